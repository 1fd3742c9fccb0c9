"""Architectures: cached sampling, one pass, a row alone and the model's own forward give the same log-probs.

Each is made small with random weights, saved with a tokenizer, and loaded as a user's model is. Those that are marked
slow differ little from one that is not. docs/models.md has the table.
"""

import copy
import inspect
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from script_runs import run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import datapools
import ppo_causal
import ppo_seq2seq

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 99))]
SIZES = dict(
    vocab_size=99, hidden_size=32, n_embd=32, d_model=32, word_embed_proj_dim=16, num_hidden_layers=4, n_layer=4,
    n_layers=4, num_layers=2, num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, num_key_value_heads=4,
    head_dim=8, intermediate_size=64, ffn_dim=64, d_ff=64, n_inner=64, max_position_embeddings=128, n_positions=128,
    max_seq_len=128, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, encoder_layers=2, decoder_layers=2,
    num_decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    d_kv=8, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, attention_window=8, sliding_window=6, rotary_dim=4, n_group=1, topk_group=1,
    state_size=8, conv_kernel=4, max_encoder_position_embeddings=128, max_decoder_position_embeddings=128,
)  # fmt: skip
OF_A_DECODER = dict(is_decoder=True)
T5GEMMA = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
    intermediate_size=64, max_position_embeddings=128, query_pre_attn_scalar=8, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
FAST = {
    "gpt2", "llama", "gemma2", "mamba", "mamba2", "jamba", "mixtral", "bloom", "opt", "t5", "bart", "m2m_100",
    "t5gemma", "marian",
}  # fmt: skip
CAUSAL = (
    "gpt2 llama gemma2 mamba mixtral bloom opt falcon falcon_mamba gpt_neox gptj mpt phi phi3 qwen2 qwen3 qwen3_moe "
    "qwen2_moe qwen3_next mistral gemma gemma3_text cohere cohere2 olmo olmo2 granite granitemoe deepseek_v2 "
    "deepseek_v3 starcoder2 stablelm smollm3 gpt_bigcode codegen ctrl biogpt xglm nemotron persimmon exaone4 glm glm4 "
    "jetmoe helium gpt_oss minimax bert llama4_text olmo3 olmoe seed_oss arcee apertus ernie4_5 glm4_moe "
    "phimoe hunyuan_v1_dense lfm2 gpt_neo mamba2 jamba bamba granitemoehybrid falcon_h1"
).split()
# sizes that differ from those of all others, above all where the attention is among recurrent layers
HYBRID = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_d_conv=4, mamba_chunk_size=8)
ODD_SIZES = {
    "gpt_neo": dict(num_layers=4, attention_types=[[["global", "local"], 2]], window_size=4),
    "mamba2": dict(num_heads=8, n_groups=1, chunk_size=8),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4, use_mamba_kernels=False),
    "bamba": HYBRID | dict(attn_layer_indices=[1, 3]),
    "granitemoehybrid": HYBRID | dict(layer_types=["mamba", "attention"] * 2, shared_intermediate_size=32),
    "falcon_h1": HYBRID | dict(mamba_d_ssm=64),
}
SEQ2SEQ = (
    "t5 bart m2m_100 t5gemma marian mt5 umt5 mbart pegasus pegasus_x led longt5 blenderbot blenderbot-small mvp plbart "
    "bigbird_pegasus"
).split()
# wrong in a way that a user would not see, or not at all made for this
REFUSED = (
    "openai-gpt xlnet xlm rwkv recurrent_gemma prophetnet-causal bart-causal rembert prophetnet roberta camembert "
    "xlm-roberta data2vec-text roberta-prelayernorm"
).split()


def config_of(kind, **more):
    """A small config of a model type, from whatever names its config gives to widths and lengths."""
    config_class = CONFIG_MAPPING[kind]
    names = set(inspect.signature(config_class.__init__).parameters) | set(getattr(config_class, "attribute_map", {}))
    for base in config_class.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
    names |= {"decoder_start_token_id"}
    return config_class(**{name: value for name, value in (SIZES | more).items() if name in names})


def save(kind, seq2seq, folder, **more):
    """A model with random weights and its tokenizer, in a folder."""
    if kind == "t5gemma":
        module = transformers.T5GemmaModuleConfig(**T5GEMMA)
        config = transformers.T5GemmaConfig(encoder=module, decoder=copy.deepcopy(module), vocab_size=99)
    else:
        more |= OF_A_DECODER if not seq2seq else dict(decoder_start_token_id=2 if kind == "m2m_100" else 0)
        config = config_of(kind, **ODD_SIZES.get(kind, {}), **more)
    torch.manual_seed(0)
    auto_class = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) < 3e6
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def load(kind, seq2seq, folder):
    """The script, the policy as it loads it, its value model, and four prompts of different lengths."""
    script = ppo_seq2seq if seq2seq else ppo_causal
    args = SimpleNamespace(
        model=str(folder), prompt_length=16, response_length=8, min_response_length=2, languages=None
    )
    datapools.language_model_config(args, "seq2seq" if seq2seq else "causal")
    policy = script.load_policy(args, datapools.load_tokenizer(str(folder)), {"num_beams": 2})
    torch.manual_seed(1)
    value_model = script.ValueModel(policy, None)
    torch.nn.init.normal_(value_model.head.weight)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(4, 99, (n,), generator=generator).tolist() for n in (3, 7, 5, 12)]
    queries, query_mask = datapools.pad(rows, 0, "cpu", left=not seq2seq)
    return script, args, policy, value_model, queries, query_mask


def own_logprobs(policy, seq2seq, query, response):
    """log-probs of a response by the model's plain forward on one row without padding."""
    if seq2seq:
        start = torch.tensor([[policy.config.decoder_start_token_id]])
        decoder_input_ids = torch.cat([start, response[None, :-1]], 1)
        logits = policy(input_ids=query[None], decoder_input_ids=decoder_input_ids).logits[0]
    else:
        logits = policy(input_ids=torch.cat([query, response[:-1]])[None]).logits[0, len(query) - 1 :]
    return logits.log_softmax(-1)


ALL = [
    *(pytest.param(False, kind, marks=() if kind in FAST else pytest.mark.slow) for kind in CAUSAL),
    *(pytest.param(True, kind, marks=() if kind in FAST else pytest.mark.slow) for kind in SEQ2SEQ),
]


@pytest.mark.parametrize("seq2seq, kind", ALL)
def test_sampled_scored_alone_and_own_forward_agree(seq2seq, kind, tmp_path):
    script, args, policy, value_model, queries, query_mask = load(kind, seq2seq, save(kind, seq2seq, tmp_path))
    eos = torch.tensor(policy.generation_config.eos_token_id)
    behaviour = dict(temperature=1.0, min_response_length=2, eos=eos)
    script.prepare_model(policy, torch.device("cpu"), fsdp=False, recompute=False)
    script.check_fit(policy, value_model, queries, query_mask, behaviour, 0, args)
    uniform = torch.rand(4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    responses, mask, sampled, *_ = script.sample_responses(policy, queries, query_mask, uniform, behaviour, 0)
    for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
        response = response[mask[i]]
        with torch.no_grad():
            own = own_logprobs(policy, seq2seq, query[query_mask[i]], response)
        own[:2, eos] = -torch.inf
        own = own.log_softmax(-1).gather(1, response[:, None]).squeeze(1)
        assert (own - sampled[i][mask[i]]).abs().max() < 1e-4
    assert value_model(batch_of(queries, query_mask, responses, mask)).abs().max() > 1e-3


@pytest.mark.parametrize("seq2seq, kind", ALL)
def test_bfloat16(seq2seq, kind, tmp_path):
    """Under autocast a model samples with its cache what it scores in one pass, learns, and searches."""
    script, _, policy, value_model, queries, query_mask = load(kind, seq2seq, save(kind, seq2seq, tmp_path))
    behaviour = dict(temperature=1.0, min_response_length=2, eos=torch.tensor(policy.generation_config.eos_token_id))
    script.prepare_model(policy, torch.device("cpu"), fsdp=False, recompute=False)
    uniform = torch.rand(4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        responses, mask, sampled, *_ = script.sample_responses(policy, queries, query_mask, uniform, behaviour, 0)
        mb = batch_of(queries, query_mask, responses, mask)
        logits, values = script.response_logits(policy, mb), value_model(mb)
        with torch.no_grad():
            script.beam_search(policy, queries, query_mask)
    scored = script.token_logprobs(script.behaviour_logits(logits, 0, **behaviour), responses)
    assert (scored - sampled)[mask].abs().mean() < 0.02
    (scored + values)[mask].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart", "t5gemma"])
def test_a_sampled_token_that_is_the_padding_id_counts(kind, tmp_path):
    seq2seq = kind not in ("gpt2", "llama")
    script, args, policy, value_model, queries, query_mask = load(kind, seq2seq, save(kind, seq2seq, tmp_path))
    behaviour = dict(temperature=1.0, min_response_length=0, eos=torch.tensor([2]))
    uniform = torch.zeros(4, 8, dtype=torch.float64)  # the first token of the vocabulary: <pad>
    responses, mask, sampled, *_ = script.sample_responses(policy, queries, query_mask, uniform, behaviour, 0)
    assert (responses == 0).all() and mask.all()
    with torch.no_grad():
        logits = script.response_logits(policy, batch_of(queries, query_mask, responses, mask))
    assert (script.token_logprobs(logits, responses) - sampled).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "bloom"])
def test_keys_and_values_are_written_in_place(kind, tmp_path):
    script, _, policy, _, queries, query_mask = load(kind, False, save(kind, False, tmp_path))
    state, inputs = script.start_decoding(policy, queries, query_mask, 8)
    places = set()
    with torch.no_grad():
        for t in range(8):
            inputs = script.decode_step(policy, state, inputs if t == 0 else inputs[:, -1:]).argmax(-1)
            places |= {(layer.keys.data_ptr(), layer.keys.shape) for layer in state["cache"]["past_key_values"].layers}
    assert len(places) == len(state["cache"]["past_key_values"].layers)


def batch_of(queries, query_mask, responses, mask):
    return SimpleNamespace(queries=queries, query_mask=query_mask, responses=responses, mask=mask)


@pytest.mark.parametrize("kind", [kind for kind in REFUSED])
def test_what_does_not_fit_is_refused_in_one_line(kind, tmp_path):
    seq2seq = kind == "prophetnet"
    folder = save(kind.removesuffix("-causal"), seq2seq, tmp_path)
    with pytest.raises(datapools.UsageError, match="does not fit|is no"):
        script, args, policy, value_model, queries, query_mask = load(kind, seq2seq, folder)
        behaviour = dict(temperature=1.0, min_response_length=2, eos=torch.tensor([2]))
        script.check_fit(policy, value_model, queries, query_mask, behaviour, 0, args)


def test_a_bert_that_sees_what_comes_is_refused(tmp_path):
    folder = save("bert", False, tmp_path, is_decoder=True)
    config = json.loads((folder / "config.json").read_text()) | {"is_decoder": False}
    (folder / "config.json").write_text(json.dumps(config))
    script, args, policy, value_model, queries, query_mask = load("bert", False, folder)
    behaviour = dict(temperature=1.0, min_response_length=2, eos=torch.tensor([2]))
    with pytest.raises(datapools.UsageError, match="bert does not fit this script"):
        script.check_fit(policy, value_model, queries, query_mask, behaviour, 0, args)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Own data in the words of the models here."""
    file = tmp_path_factory.mktemp("words") / "words.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "references": [f"w{i + 3} w{i + 4}"]} for i in range(4, 64)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("seq2seq, kind", [
    *(pytest.param(False, kind, marks=() if kind in ("gpt2", "mamba") else pytest.mark.slow) for kind in CAUSAL),
    *(pytest.param(True, kind, marks=() if kind in ("t5gemma", "bart") else pytest.mark.slow) for kind in SEQ2SEQ),
])  # fmt: skip
def test_an_iteration_from_the_command_line(seq2seq, kind, words, tmp_path):
    save(kind, seq2seq, tmp_path / "model")
    flags = (
        f"--task {words} --model {tmp_path / 'model'} --reward rouge1 --prompt-length 8 --response-length 6 "
        "--batch-size 4 --num-minibatches 2 --update-epochs 1 --num-iterations 1 --eval-samples 2 --run-dir run"
    )
    result = run("ppo_seq2seq" if seq2seq else "ppo_causal", flags.split(), tmp_path, timeout=120)
    assert result.code == 0, result.stderr
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["rollout/sampler_error"] < 1e-4


@pytest.mark.parametrize("kind", ["mamba", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_sharded(kind, words, tmp_path):
    """Also a model that names blocks, and parts of them, as what is not to be split."""
    save(kind, False, tmp_path / "model")
    flags = (
        f"--task {words} --model {tmp_path / 'model'} --reward rouge1 --prompt-length 8 --response-length 6 --fsdp "
        "--batch-size 4 --num-minibatches 2 --update-epochs 1 --num-iterations 1 --eval-samples 2 --run-dir run "
        "--gradient-checkpointing"
    )
    result = run("ppo_causal", flags.split(), tmp_path, timeout=120, processes=2)
    assert result.code == 0, result.stderr
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["rollout/sampler_error"] < 1e-4


@pytest.mark.parametrize("kind", ["bloom", "mixtral", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_trpo_refuses_kernels_without_forward_derivatives_in_one_line(kind, words, tmp_path):
    save(kind, False, tmp_path / "model")
    flags = f"--task {words} --model {tmp_path / 'model'} --reward rouge1 --prompt-length 8 --response-length 6"
    result = run("trpo", f"{flags} --policy-type causal --batch-size 4 --run-dir run".split(), tmp_path, timeout=120)
    assert result.code == 2 and len(result.stderr.splitlines()) == 1
    assert f"{kind} does not fit this script: TRPO needs forward derivatives" in result.stderr
