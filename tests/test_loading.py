"""Model folders that are not what they should be: one line before the first evaluation, and never random weights."""

import json
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from test_models import load, save
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import datapools
import ppo_seq2seq


@pytest.fixture
def gpt2(tmp_path):
    return save("gpt2", False, tmp_path / "model")


def refused(folder, match, seq2seq=False):
    with pytest.raises(datapools.UsageError, match=match) as error:
        load("gpt2", seq2seq, folder)
    assert len(str(error.value)) < 500


def rewrite(folder, change):
    """The weights with their names or values changed."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_a_whole_folder_loads_with_its_own_weights(gpt2):
    policy = load("gpt2", False, gpt2)[2]
    saved = load_file(gpt2 / "model.safetensors")
    assert torch.equal(policy.state_dict()["transformer.h.0.mlp.c_fc.weight"], saved["transformer.h.0.mlp.c_fc.weight"])


def test_gelu_as_one_kernel_is_the_same_function(gpt2):
    policy = load("gpt2", False, gpt2)[2]
    plain = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    assert isinstance(policy.transformer.h[0].mlp.act, torch.nn.GELU)
    assert not isinstance(plain.transformer.h[0].mlp.act, torch.nn.GELU)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert (policy(ids).logits - plain(ids).logits).abs().max() < 1e-5


def test_weights_under_other_names(gpt2):
    rewrite(gpt2, lambda weights: {f"module.policy.{name}": weight for name, weight in weights.items()})
    refused(gpt2, "lack weights.*transformer")


def test_a_layer_is_missing(gpt2):
    rewrite(gpt2, lambda weights: {name: weight for name, weight in weights.items() if ".h.1." not in name})
    refused(gpt2, r"lack weights.*h\.1\.")


def test_weights_of_another_size(gpt2):
    config = json.loads((gpt2 / "config.json").read_text()) | {"n_embd": 64}
    (gpt2 / "config.json").write_text(json.dumps(config))
    refused(gpt2, r"other shapes.*wte.*|other shapes.*c_attn.bias.*\[96\].*\[192\]")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"])
def test_a_pointer_instead_of_a_file(name, gpt2):
    (gpt2 / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(gpt2, f"{name} is a pointer of Git LFS")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"<html>no such file</html>", "half", "objects"])
def test_weights_that_cannot_be_read(name, content, gpt2):
    file = gpt2 / "model.safetensors"
    weights = file.read_bytes()
    if name == "pytorch_model.bin":
        torch.save({"a": SimpleNamespace()} if content == "objects" else load_file(file), gpt2 / name)
        file.unlink()
        weights = (gpt2 / name).read_bytes()
    if content == "objects" and name == "model.safetensors":
        content = b'\x08\0\0\0\0\0\0\0{"a": 1}'
    if content != "objects":
        (gpt2 / name).write_bytes(weights[: len(weights) // 2] if content == "half" else content)
    refused(gpt2, r"cannot be loaded: \w*Error\(")


@pytest.mark.parametrize(
    "change", [{"n_embd": "32"}, {"dtype": "float17"}, {"n_head": 5}, {"activation_function": "x"}]
)
def test_a_config_that_makes_no_model(change, gpt2):
    (gpt2 / "config.json").write_text(json.dumps(json.loads((gpt2 / "config.json").read_text()) | change))
    refused(gpt2, "cannot be loaded|no model folder")


@pytest.mark.parametrize("eos", ["</s>", 99_999, [2, "</s>"]])
def test_an_eos_that_is_no_token(eos, gpt2):
    (gpt2 / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    refused(gpt2, "no ids below 99")


def test_a_quantised_model_without_its_library(gpt2):
    config = json.loads((gpt2 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (gpt2 / "config.json").write_text(json.dumps(config))
    refused(gpt2, "cannot be loaded")


def test_an_adapter(gpt2):
    (gpt2 / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(gpt2, "adapter; merge")


def test_no_tokenizer(gpt2):
    for file in gpt2.glob("tokenizer*"):
        file.unlink()
    refused(gpt2, "tokenizer")


def test_an_unknown_tokenizer_class(gpt2):
    config = json.loads((gpt2 / "tokenizer_config.json").read_text()) | {"tokenizer_class": "NoSuchTokenizer"}
    (gpt2 / "tokenizer_config.json").write_text(json.dumps(config))
    (gpt2 / "tokenizer.json").unlink()
    refused(gpt2, "tokenizer")


def test_no_eos_at_all(gpt2):
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(gpt2)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((gpt2 / name).read_text())
        config.pop("eos_token_id", None)
        (gpt2 / name).write_text(json.dumps(config))
    refused(gpt2, "(?i)eos")


def test_a_padding_token_beyond_the_vocabulary(gpt2):
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 99  # the model has 99 embeddings
    tokenizer.save_pretrained(gpt2)
    script, args, policy, value_model, queries, query_mask = load("gpt2", False, gpt2)
    pad_id, eos = policy.generation_config.pad_token_id, policy.generation_config.eos_token_id
    assert pad_id == eos[0] == 2
    queries = queries.masked_fill(~query_mask, pad_id)
    behaviour = dict(temperature=1.0, min_response_length=0, eos=torch.tensor(eos))
    script.check_fit(policy, value_model, queries, query_mask, behaviour, pad_id, args)


def test_of_the_folders_generation_config_only_its_eos_stays(gpt2):
    GenerationConfig(
        eos_token_id=[2, 7], repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=[5], forced_bos_token_id=9,
        return_dict_in_generate=True, do_sample=True, temperature=0.1, max_length=3,
    ).save_pretrained(gpt2)  # fmt: skip
    script, args, policy, _, queries, query_mask = load("gpt2", False, gpt2)
    config = policy.generation_config
    assert config.eos_token_id == [2, 7]
    plain = GenerationConfig()
    for name in ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "forced_bos_token_id", "max_length"):
        assert getattr(config, name) == getattr(plain, name), name
    assert config.max_new_tokens == 8 and config.min_new_tokens == 2 and config.num_beams == 2
    found = script.beam_search(policy, queries, query_mask)
    assert isinstance(found, torch.Tensor) and found.shape[1] <= 8


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_any_eos_ends_a_response_and_none_comes_too_early(kind, tmp_path):
    seq2seq = kind == "bart"
    folder = save(kind, seq2seq, tmp_path)
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(folder)
    script, args, policy, _, queries, query_mask = load(kind, seq2seq, folder)
    eos = torch.tensor(policy.generation_config.eos_token_id)
    with torch.no_grad():  # 7 is by far the likeliest
        policy.get_output_embeddings().weight[7] = 0
    hook = policy.get_output_embeddings()
    plain = hook.forward
    hook.forward = lambda hidden: plain(hidden).index_fill(-1, torch.tensor([7]), 50.0)
    behaviour = dict(temperature=1.0, min_response_length=3, eos=eos)
    responses, mask, *_ = script.sample_responses(
        policy, queries, query_mask, torch.full((4, 8), 0.5, dtype=torch.float64), behaviour, 0
    )
    assert (mask.sum(1) == 4).all() and (responses[:, 3] == 7).all()
    assert not torch.isin(responses[:, :3], eos).any()
    assert datapools.until_eos(responses, eos) == [row[:4] for row in responses.tolist()]


def test_a_target_language_is_the_first_token_in_sampling_scoring_and_search(tmp_path, monkeypatch):
    folder = save("mbart", True, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["w10", "w11"]})
    tokenizer.save_pretrained(folder)
    args = SimpleNamespace(
        model=str(folder), prompt_length=16, response_length=6, min_response_length=0, languages=("w10", "w11")
    )
    tokenizer = datapools.load_tokenizer(str(folder), args.languages)
    policy = ppo_seq2seq.load_policy(args, tokenizer, {"num_beams": 2})
    forced = policy.generation_config.forced_bos_token_id
    assert forced == tokenizer.convert_tokens_to_ids("w11")
    queries, query_mask = datapools.pad([[5, 6, 7], [8, 9]], 0, "cpu")
    behaviour = dict(temperature=1.0, min_response_length=0, eos=torch.tensor([2]), forced_bos=forced)
    uniform = torch.full((2, 6), 0.3, dtype=torch.float64)
    responses, mask, sampled = ppo_seq2seq.sample_responses(policy, queries, query_mask, uniform, behaviour, 0)
    assert (responses[:, 0] == forced).all() and sampled[:, 0].abs().max() == 0
    mb = SimpleNamespace(queries=queries, query_mask=query_mask, responses=responses)
    with torch.no_grad():
        logits = ppo_seq2seq.behaviour_logits(ppo_seq2seq.response_logits(policy, mb), 0, **behaviour)
    scored = ppo_seq2seq.token_logprobs(logits, responses)
    assert ((scored - sampled) * mask).abs().max() < 1e-5
    assert (ppo_seq2seq.beam_search(policy, queries, query_mask)[:, 0] == forced).all()
    drawn, sample = [], ppo_seq2seq.sample_responses
    monkeypatch.setattr(ppo_seq2seq, "sample_responses", lambda *given: drawn.append(sample(*given)) or drawn[-1])
    args = SimpleNamespace(**vars(args), truncation_side="left", sample_batch_size=4, dtype="float32", seed=1)
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "w5 w6", "references": ["w7"]}\n' * 20)
    split = datapools.load_task(str(own), "train")
    texts = ppo_seq2seq.decode_split(
        policy, tokenizer, split, {"do_sample": True}, behaviour, args, torch.device("cpu")
    )
    assert len(texts) == len(split) and (drawn[0][0][:, 0] == forced).all()
    with pytest.raises(datapools.UsageError, match="--languages xx"):
        datapools.load_tokenizer(str(folder), ("xx", "w11"))


def test_prompts_longer_than_the_positions(gpt2):
    args = SimpleNamespace(model=str(gpt2), prompt_length=100, response_length=29)
    with pytest.raises(datapools.UsageError, match="129: .* 128 positions"):
        datapools.language_model_config(args, "causal")
    args.response_length = 28
    for policy_type in ("causal", None):
        assert datapools.language_model_config(args, policy_type).model_type == "gpt2"
    with pytest.raises(datapools.UsageError, match="gpt2 is decoder-only; see the causal script"):
        datapools.language_model_config(args, "seq2seq")


def test_prompts_and_responses_of_an_encoder_decoder_have_positions_of_their_own(tmp_path):
    args = SimpleNamespace(model=str(save("bart", True, tmp_path)), prompt_length=128, response_length=128)
    for policy_type in ("seq2seq", None):
        assert datapools.language_model_config(args, policy_type).model_type == "bart"
    with pytest.raises(datapools.UsageError, match="bart is encoder-decoder; see the seq2seq script"):
        datapools.language_model_config(args, "causal")
    for name in ("prompt_length", "response_length"):
        with pytest.raises(datapools.UsageError, match="129: .* 128 positions"):
            datapools.language_model_config(SimpleNamespace(**vars(args) | {name: 129}), "seq2seq")


def test_one_of_the_trial_prompts_is_shorter(gpt2):
    """Also where all prompts of a task are the same: else no row of check_fit would be padded."""
    tokenizer, args = datapools.load_tokenizer(str(gpt2)), SimpleNamespace(prompt_length=16, truncation_side="left")
    split = [datapools.Sample(str(i), "w5 w6 w7 w8", [], {}) for i in range(9)]
    for seq2seq in (True, False):
        ids, mask = datapools.trial_prompts(tokenizer, split, args, 0, "cpu", seq2seq)
        assert len(ids) == 4 and mask.sum(1)[0] < mask.sum(1)[1] and mask[1:].all()
        assert mask[0, 0 if seq2seq else -1]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_lengths_at_which_one_row_changes_the_others(kind, gpt2):
    """Beyond the original length such rotary embeddings take other angles for the whole batch."""
    factors = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4) if kind == "longrope" else {}
    rope = dict(rope_type=kind, rope_theta=1e4, factor=4.0, original_max_position_embeddings=20, **factors)
    folder = save("llama", False, gpt2.parent / kind, rope_parameters=rope)
    with pytest.raises(datapools.UsageError, match=r"--prompt-length \+ --response-length 24.* 20 positions"):
        load("llama", False, folder)


@pytest.mark.parametrize("kind, file", [
    ("t5", "spiece.model"), ("llama", "tokenizer.model"), ("gemma", "tokenizer.model"),
    ("mbart", "sentencepiece.bpe.model"),
])  # fmt: skip
def test_a_folder_with_nothing_but_a_sentencepiece_model(kind, file, tmp_path):
    texts, ids = ["the house of the cat is green", "say: catdog 1 2 3"] * 40, dict(pad_id=0, eos_id=1, unk_id=2)
    with open(tmp_path / file, "wb") as model:
        options = dict(model_writer=model, vocab_size=40, hard_vocab_limit=False, bos_id=-1, minloglevel=2, **ids)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), **options)
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    tokenizer = datapools.load_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer("the green house").input_ids, skip_special_tokens=True) == "the green house"
