"""supervised.py: what is learned of a reference, what is not, and runs that go on as if nothing had happened."""

import inspect
import json
import textwrap
from types import SimpleNamespace

import pytest
import script_runs
import torch
import torch.nn.functional as F
from script_runs import same, weights
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import datapools
import supervised

TINY = "--scratch-vocab-size 280 --scratch-width 16 --scratch-layers 1 --scratch-heads 2 --prompt-length 12".split()
TINY += "--response-length 8 --eval-samples 3 --batch-size 8 --metrics rouge --model scratch".split()


def run(cwd, *argv, processes=1, code=0):
    done = script_runs.run("supervised", argv, cwd, timeout=120, processes=processes)
    assert done.code == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(run_dir):
    return script_runs.rows(run_dir / "metrics.jsonl")


def tokenizer_of(samples=None, seq2seq=True):
    samples = samples or datapools.load_task("numbers", "train", n_samples=50)
    trained = supervised.train_tokenizer(samples, 300, seq2seq)
    return PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="<pad>", eos_token="</s>")


# ------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("seq2seq", [True, False])
def test_eos_is_taught_only_where_a_reference_ends(seq2seq):
    tokenizer = tokenizer_of(seq2seq=seq2seq)
    text = "1 2 3 4 5 6"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for length in range(1, len(ids) + 4):
        (row,) = supervised.encode_references(tokenizer, [text], length, seq2seq, tokenizer.eos_token_id, None)
        assert row == [*ids, tokenizer.eos_token_id][:length], length
        assert (tokenizer.eos_token_id in row) == (length > len(ids))


def test_targets_begin_with_the_language_that_is_asked_for():
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens({"additional_special_tokens": ["en_XX", "de_DE"]})
    encoded = supervised.encode_references(tokenizer, ["1 2"], 9, True, tokenizer.eos_token_id, ("en_XX", "de_DE"))
    ids = tokenizer("1 2", add_special_tokens=False).input_ids
    assert encoded == [[tokenizer.convert_tokens_to_ids("de_DE"), *ids, tokenizer.eos_token_id]]


def test_every_reference_is_a_pair_and_what_repeats_the_prompt_is_left_off(tmp_path):
    rows = [{"prompt": f"p{i}", "references": [f"p{i} r{i}{j}" for j in range(i % 3)]} for i in range(20)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, _, _ = datapools.load_splits(str(tmp_path), None, {})
    pairs = supervised.Pairs(train)
    expected = [(f"p{i}", f" r{i}{j}") for i in range(20) for j in range(i % 3)]
    assert len(pairs) == len(expected)
    order = [5, 0, *range(len(expected))]
    samples, references = pairs.take(order)
    prompts = [sample.prompt for sample in samples]
    assert list(zip(prompts, references, strict=True)) == [expected[i] for i in order]


# ------------------------------------------------------------------------------------------------ the loss


def batch_of(prompts, targets, pad_id, left):
    queries, query_mask = datapools.pad(prompts, pad_id, "cpu", left=left)
    responses, mask = datapools.pad(targets, pad_id, "cpu")
    return dict(queries=queries, query_mask=query_mask, responses=responses, mask=mask)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_is_of_the_response_tokens_alone(size):
    """Against the plain forward of each row alone, whatever stands on the padding and however the batch is cut."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    prompts, targets = [[3, 4], [5], [6, 7, 8], [2, 3]], [[9, 1], [4, 5, 6, 7, 1], [1], [8, 8, 8]]
    alone = 0.0
    for prompt, target in zip(prompts, targets, strict=True):
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        alone += F.cross_entropy(logits, torch.tensor(target), reduction="sum")
    for pad_id in (0, 11):
        batch = batch_of(prompts, targets, pad_id, left=True)
        main = inspect.getsource(supervised.main)
        step = textwrap.dedent(main[main.index("        # 2. ") : main.index("        # 3. ")])  # the script's lines
        names = vars(supervised) | dict(batch=batch, mask=batch["mask"], policy=model, device=torch.device("cpu"))
        names |= dict(args=SimpleNamespace(micro_batch_size=size, max_grad_norm=1.0))
        names |= dict(autocast=dict(device_type="cpu", enabled=False))
        names |= dict(optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
        exec(step, names)
        assert names["nll"].item() * names["num_tokens"] == pytest.approx(alone.item(), rel=1e-5)


def test_the_logged_loss_is_the_mean_over_response_tokens(tmp_path):
    """The first row of a run against a naive loop over its pairs: nothing of the padding, each token once."""
    rows = [{"prompt": f"say {i}", "references": ["1 " * (i + 1)]} for i in range(8)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--task", tmp_path, *TINY, "--policy-type", "causal", "--response-length", 32]
    run(tmp_path, *common, "--num-epochs", 1, "--learning-rate", 1e-30, "--run-dir", "run")  # as good as not moving
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = datapools.load_tokenizer(str(tmp_path / "run" / "model"))
    nll, tokens = 0.0, 0
    for row in rows:
        (prompt,) = datapools.encode_prompts(tokenizer, [row["prompt"]], 12, "left", seq2seq=False)
        target = [*tokenizer(row["references"][0], add_special_tokens=False).input_ids, tokenizer.eos_token_id][:32]
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        nll, tokens = nll + F.cross_entropy(logits, torch.tensor(target), reduction="sum").item(), tokens + len(target)
    assert losses(tmp_path / "run")[0]["losses/nll"] == pytest.approx(nll / tokens, rel=1e-5)


def test_a_model_whose_loss_sees_the_answer_is_refused(tmp_path, texts):
    tokenizer = tokenizer_of(seq2seq=False)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    for is_decoder, code in ((False, 2), (True, 0)):
        folder = tmp_path / f"bert_{is_decoder}"
        torch.manual_seed(0)
        model = BertLMHeadModel(
            BertConfig(vocab_size=len(tokenizer), is_decoder=is_decoder, initializer_range=0.5, **sizes)
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        words = ["--task", texts, *TINY, "--model", folder, "--num-epochs", 0]
        out = run(tmp_path, *words, "--run-dir", f"run_{is_decoder}", code=code)
        if not is_decoder:
            assert "bert does not fit this script" in out and "Traceback" not in out


# ------------------------------------------------------------------------------------------------ scratch models


def test_the_tokenizer_reads_a_bounded_sample():
    """Of many texts some 20,000, from the first to the last; of few, all."""
    asked = []

    class Many:
        def __len__(self):
            return 1_000_000

        def take(self, indices):
            asked.extend(indices)
            return [SimpleNamespace(prompt=f"{i % 7}", references=[]) for i in indices]

    supervised.train_tokenizer(Many(), 300, True)
    assert len(asked) == 20_000 and asked[0] == 0 and asked[-1] == 999_999
    assert max(b - a for a, b in zip(asked, asked[1:], strict=False)) <= 51


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("policy_type", ["seq2seq", "causal"])
def test_resumed_is_as_if_it_had_gone_on(tmp_path, texts, policy_type):
    common = ["--task", texts, *TINY, "--policy-type", policy_type, "--save-every", 2]
    run(tmp_path, *common, "--num-epochs", 2, "--run-dir", "whole")
    run(tmp_path, *common, "--num-epochs", 1, "--run-dir", "parts")
    out = run(tmp_path, "--run-dir", "parts", "--resume", "--num-epochs", 2)
    assert "--num-epochs 1 -> 2" in out
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(losses(tmp_path / "whole")) == 6
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_two_processes_learn_the_same(tmp_path, texts):
    """One tokenizer, the same gradients: equal but for the order of float32 sums."""
    common = ["--task", texts, *TINY, "--policy-type", "causal", "--num-epochs", 1]
    run(tmp_path, *common, "--run-dir", "one")
    run(tmp_path, *common, "--run-dir", "two", "--micro-batch-size", 3, processes=2)
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    evals = [(tmp_path / name / "eval.jsonl").read_text().splitlines()[:2] for name in ("one", "two")]
    assert evals[0] == evals[1]


def test_what_is_wrong_is_one_line(tmp_path, texts):
    for words, message in [
        (["--scratch-heads", 3], "--scratch-heads 3: must divide --scratch-width 16"),
        (["--num-epochs", -1], "--num-epochs"),
        (["--min-response-length", 9], "at most --response-length 8"),
    ]:
        out = run(tmp_path, "--task", texts, *TINY, *words, "--run-dir", "none", code=2)
        assert message in out and len(out.strip().splitlines()) == 1
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps({"prompt": "a b"}) + "\n" for _ in range(20)))
    bare = ["--task", "bare.jsonl", *TINY, "--metrics", "diversity", "--run-dir", "none"]
    assert "no references to learn from" in run(tmp_path, *bare, code=2)
