"""reward_model.py: its losses, what it encodes, and that model/ is what the rewards take."""

import json
import math
import shutil

import pytest
import script_runs
import torch
from tiny_models import LETTERS, SIZES, save_bert
from transformers import BertConfig, BertModel, BertTokenizer, GPT2Config, GPT2LMHeadModel

import datapools
import reward_model
import rewards
import supervised

SMALL = ["--batch-size", 8, "--learning-rate", 1e-2, "--eval-samples", 6, "--save-every", 3]


def run(cwd, *argv, code=0):
    done = script_runs.run("reward_model", argv, cwd, timeout=120)
    assert done.code == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def predicted(run_dir, iteration):
    return [json.loads(line) for line in open(run_dir / "predictions" / f"val_{iteration}.jsonl")]


def write(folder, rows):
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A decoder-only LM as supervised.py leaves it: [PAD] of its own, positions for 40 tokens."""
    folder = tmp_path_factory.mktemp("gpt2")
    samples = datapools.load_task("numbers", "train", n_samples=50)
    trained = supervised.train_tokenizer(samples, 300, False)
    tokens = dict(pad_token="<pad>", eos_token="</s>")
    supervised.PreTrainedTokenizerFast(tokenizer_object=trained, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(n_positions=40, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, **sizes)).save_pretrained(folder)
    return folder


def test_bradley_terry_against_a_naive_loop():
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 7, dtype=torch.float64)
    scores = torch.cat([chosen, rejected]).unsqueeze(1).requires_grad_()
    nll, margin = reward_model.preference(scores)
    for i in range(7):
        probability = math.exp(chosen[i]) / (math.exp(chosen[i]) + math.exp(rejected[i]))
        assert nll[i].item() == pytest.approx(-math.log(probability), rel=1e-12)
        assert margin[i].item() == pytest.approx((chosen[i] - rejected[i]).item(), rel=1e-12)
    nll.sum().backward()
    assert (scores.grad[:7] < 0).all() and (scores.grad[7:] > 0).all()


def test_label_likelihood_against_a_naive_loop():
    torch.manual_seed(0)
    scores, answers = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    nll, margin = reward_model.label_likelihood(scores, answers)
    for row, answer, loss, distance in zip(scores.tolist(), answers.tolist(), nll, margin, strict=True):
        probability = math.exp(row[answer]) / sum(map(math.exp, row))
        best_other = max(value for i, value in enumerate(row) if i != answer)
        assert loss.item() == pytest.approx(-math.log(probability), rel=1e-12)
        assert distance.item() == pytest.approx(row[answer] - best_other, rel=1e-12)


def test_the_synthetic_preference_is_that_of_increasing_numbers():
    pairs, gold = reward_model.number_pairs("val"), rewards.increasing_numbers()
    assert len(pairs) == 200
    for sample in pairs:
        chosen, rejected = gold([""] * 2, [sample.meta["chosen"], sample.meta["rejected"]], [[]] * 2, [{}] * 2)
        assert chosen > rejected
    assert [s.meta for s in pairs] == [s.meta for s in reward_model.number_pairs("val")]
    assert [s.meta for s in pairs] != [s.meta for s in reward_model.number_pairs("test")]


def test_model_gives_through_the_rewards_what_training_saw(tmp_path, gpt2):
    """Of texts that pad each other, and of one too long, which loses its beginning in both."""
    rows = [dict(prompt=f"count {i}", chosen="1 2 3 " * (i % 3 + 1), rejected="9 4 " * (i % 4)) for i in range(11)]
    rows.append(dict(prompt="long", chosen="7 8 " * 60, rejected="1"))
    data = write(tmp_path / "pairs", rows)
    words = ["--model", gpt2, *SMALL, "--eval-samples", 0, "--num-epochs", 3]
    run(tmp_path, "--task", data, *words, "--run-dir", "run")
    reward = rewards.make_reward("reward_model", "cpu", " ", model=str(tmp_path / "run" / "model"))
    seen = predicted(tmp_path / "run", 6)
    for side in ("chosen", "rejected"):
        texts = [row[side] for row in rows]
        scores = reward([row["prompt"] for row in rows], texts, [[]] * len(rows), [{}] * len(rows))
        assert scores == pytest.approx([row[f"{side}_score"] for row in seen], abs=1e-4)
    first, *_, last = [json.loads(line) for line in open(tmp_path / "run" / "eval.jsonl")]
    assert last["nll"] < first["nll"]
    config = json.loads((tmp_path / "run" / "model" / "tokenizer.json").read_text())
    assert config["truncation"] is None and config["padding"] is None


def test_classifier_of_an_encoder_through_the_rewards(tmp_path):
    folder = tmp_path / "bert"
    save_bert(folder, ["x", "y"])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **SIZES)).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    rows = [dict(prompt=text * n, label=label) for n in range(1, 6) for text, label in (("a", "no"), ("z", "yes"))]
    data = write(tmp_path / "labels", rows)
    words = ["--model", folder, *SMALL, "--eval-samples", 0, "--num-epochs", 15]
    run(tmp_path, "--task", data, *words, "--run-dir", "run")
    last = [json.loads(line) for line in open(tmp_path / "run" / "eval.jsonl")][-1]
    assert last["accuracy"] == 1.0 and last["margin"] > 0
    reward = rewards.make_reward(
        "classifier", "cpu", " ", model=str(tmp_path / "run" / "model"), label="yes", logit=True
    )
    prompts = [row["prompt"] for row in rows]
    scores = reward(prompts, [""] * len(rows), [[]] * len(rows), [{}] * len(rows))
    assert scores == pytest.approx([row["logits"][1] for row in predicted(tmp_path / "run", 30)], abs=1e-4)


def test_resumed_is_as_if_it_had_gone_on(tmp_path, gpt2):
    rows = [dict(prompt=f"count {i}", chosen="1 2 3 " * (i % 3 + 1), rejected="9 4 " * (i % 4)) for i in range(20)]
    common = ["--task", write(tmp_path / "pairs", rows), "--model", gpt2, *SMALL, "--no-anneal-lr"]
    run(tmp_path, *common, "--num-epochs", 2, "--run-dir", "whole")
    run(tmp_path, *common, "--num-epochs", 1, "--run-dir", "parts")
    shutil.rmtree(tmp_path / "parts" / "model")  # as if killed between the checkpoint and its model
    run(tmp_path, "--run-dir", "parts", "--resume")
    assert (tmp_path / "parts" / "model" / "model.safetensors").exists()
    assert "--num-epochs 1 -> 2" in run(tmp_path, "--run-dir", "parts", "--resume", "--num-epochs", 2)
    whole, parts = (script_runs.rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert whole == parts and len(whole) == 6
    one, two = (script_runs.weights(tmp_path / name) for name in ("whole", "parts"))
    assert script_runs.same(one, two)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_how_it_is_computed_changes_nothing(kind, tmp_path):
    """Micro-batches, layers computed again, two processes, shards, and bfloat16 but for rounding."""
    rows = [dict(prompt=f"count {i}", chosen="1 2 3 " * (i % 3 + 1), rejected="9 4 " * (i % 4)) for i in range(20)]
    words = ["--task", write(tmp_path / "pairs", rows), "--model", script_runs.tiny_model(kind), *SMALL]
    losses = {}
    for name, changes, processes in (
        ("plain", [], 1),
        ("again", ["--gradient-checkpointing", "--micro-batch-size", 3], 1),
        ("two", [], 2),
        ("shards", ["--gradient-checkpointing", "--fsdp"], 2),
        ("bfloat16", ["--dtype", "bfloat16"], 1),
    ):
        words_of = [*words, "--num-epochs", 1, "--max-length", 40, "--run-dir", name, *changes]
        script_runs.run_ok("reward_model", words_of, tmp_path, processes=processes)
        losses[name] = [row["losses/nll"] for row in script_runs.rows(tmp_path / name / "metrics.jsonl")]
    assert len(set(losses["plain"])) > 1
    for name, some in losses.items():
        assert some[0] == pytest.approx(losses["plain"][0], rel=5e-3), name
        assert some == pytest.approx(losses["plain"], rel=0.1 if name == "bfloat16" else 1e-4), name  # steps add up


@pytest.mark.parametrize(
    "rows, message",
    [
        ([dict(prompt="a", completion="b")] * 3, "its rows need chosen and rejected, or label"),
        ([dict(prompt="a", label="b")] * 3, "all its training texts have one label"),
        ([dict(prompt="a", label=["b", "c"])] * 3, "labels must be all texts or all whole numbers"),
        ([dict(prompt="a", chosen="b", rejected=None)] * 3, "chosen and rejected must be texts"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, gpt2, rows, message):
    data = write(tmp_path / "data", rows)
    out = run(tmp_path, "--task", data, "--model", gpt2, "--run-dir", "run", code=2)
    assert message in out and len(out.strip().splitlines()) == 1
