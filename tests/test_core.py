"""The functions that the algorithms are made of, each against something that works it out in another way."""

import copy
import importlib
import inspect
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from script_runs import CASES, SCRIPTS, same, tiny_model
from torch.distributions import Categorical
from transformers.generation import TopKLogitsWarper

from datapools import Sample, UsageError, load_tokenizer, model_config, pad, prompt_order
from rewards import score_texts

RL_CASES = [case for case in CASES if case[0] != "supervised"]
WITH_VALUES = [case for case in RL_CASES if case[0] != "grpo"]
RL_SCRIPTS = [script for script in SCRIPTS if script != "supervised"]
V, EOS, PAD = 40, 1, 0
INF = math.inf


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=[script for script in RL_SCRIPTS if script != "grpo"])
def estimator(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=RL_SCRIPTS)
def rl(request):
    return importlib.import_module(request.param)


# ------------------------------------------------------------------------------------------------ small models


def t5(vocab=V, **options):
    config = transformers.T5Config(
        vocab_size=vocab, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=PAD, **options
    )
    return transformers.T5ForConditionalGeneration(config)


def bart():
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in SIZES.items()}
    config = transformers.BartConfig(
        vocab_size=V,
        d_model=16,
        max_position_embeddings=32,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=2,
        decoder_start_token_id=EOS,
        forced_eos_token_id=EOS,
        **sizes,
    )
    return transformers.BartForConditionalGeneration(config)


SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
IDS = dict(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2)
# rotary positions, and two query heads to each of two key-value heads
ROTARY = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    **IDS,
)
MODELS = {
    "t5": ("seq2seq", t5),
    "t5 v1.1": ("seq2seq", lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "bart": ("seq2seq", bart),
    "gpt2": (
        "causal",
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2, **IDS)
        ),
    ),
    "llama": ("causal", lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**ROTARY))),
    "qwen2": ("causal", lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**ROTARY))),
}


def small(name):
    """The model with random weights large enough that its distributions are far from uniform."""
    torch.manual_seed(0)
    policy = MODELS[name][1]().eval()
    with torch.no_grad():
        for key, weight in policy.named_parameters():
            if "norm" not in key and "ln_" not in key:
                weight.normal_(0, 0.3)
    return policy


def distinct(cases, functions):
    """The cases whose scripts differ in these functions from all before (test_siblings.py has the rest)."""
    seen = {}
    for name, kind in cases:
        script = importlib.import_module(name)
        sources = tuple(inspect.getsource(getattr(script, f)) for f in functions if hasattr(script, f))
        seen.setdefault((sources, kind), (name, kind))
    return list(seen.values())


def with_models(cases):
    """(script, model) for each model of the policy type."""
    return [(name, model) for name, kind in cases for model in MODELS if MODELS[model][0] == kind]


SCORING = ["response_logits", "behaviour_logits", "token_logprobs", "prompt_and_response", "response_pass"]
SAMPLING = ["sample_responses", "start_decoding", "decode_step", "behaviour_logits", "draw", "forward"]
VALUES = ["ValueModel", "value_backbone", "response_pass", "prompt_and_response"]
PLAIN_CASES = [case for case in CASES if "nlpo" not in case[0]]  # NLPO's sampler has a mask: tests/test_nlpo.py


def rollout(kind, seed=0, lengths=(3, 7, 1, 5), T=6):
    """Prompts of different lengths, their padded tensors, and random responses."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, V, size=length).tolist() for length in lengths]
    queries, query_mask = pad(prompts, PAD, "cpu", left=kind == "causal")
    responses = torch.from_numpy(rng.integers(1, V, size=(len(prompts), T)))
    return prompts, queries, query_mask, responses


def mb_of(queries, query_mask, responses):
    """What a micro-batch is to the models."""
    return SimpleNamespace(queries=queries, query_mask=query_mask, responses=responses)


@torch.no_grad()
def next_logits(policy, prompt, prefix):
    """Logits (V,) of the token after `prefix`, of one row without padding, cache or position ids."""
    if policy.config.is_encoder_decoder:
        start = [policy.config.decoder_start_token_id]
        output = policy(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start + prefix]), use_cache=False
        )
    else:
        output = policy(input_ids=torch.tensor([prompt + prefix]), use_cache=False)
    return output.logits[0, -1].double().numpy()


def probabilities(logits, t, temperature=1.0, min_response_length=0):
    """softmax in numpy; before min_response_length over all tokens but EOS."""
    weights = np.exp((logits - logits.max()) / temperature)
    if t < min_response_length:
        weights[EOS] = 0.0
    return weights / weights.sum()


BEHAVIOURS = [dict(temperature=1.0, min_response_length=0), dict(temperature=0.6, min_response_length=3)]


# ------------------------------------------------------------------------------------------------ log-probs


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("name, model", with_models(distinct(CASES, SCORING)))
def test_one_pass_equals_steps_without_cache(name, model, behaviour):
    """The one-pass log-probs of padded rows are those of each row alone, token by token, without padding and cache."""
    script, policy = importlib.import_module(name), small(model)
    prompts, queries, query_mask, responses = rollout(MODELS[model][0])
    responses[responses == EOS] = 2
    responses[:, 4] = EOS
    behaviour = behaviour | dict(eos=torch.tensor([EOS]))
    with torch.no_grad():
        logits = script.behaviour_logits(
            script.response_logits(policy, mb_of(queries, query_mask, responses)), 0, **behaviour
        )
        logprobs = script.token_logprobs(logits, responses)
    assert logits.shape == (*responses.shape, V) and logits.dtype == logprobs.dtype == torch.float32
    for row, prompt in enumerate(prompts):
        for t in range(responses.shape[1]):
            expected = probabilities(
                next_logits(policy, prompt, responses[row, :t].tolist()),
                t,
                behaviour["temperature"],
                behaviour["min_response_length"],
            )
            assert math.isclose(logprobs[row, t], math.log(expected[responses[row, t]]), abs_tol=1e-5)
            whole = logits[row, t].softmax(-1).double().numpy()
            np.testing.assert_allclose(whole, expected, atol=1e-5)
            assert math.isclose(whole.sum(), 1.0, abs_tol=1e-6)
            assert (whole[EOS] == 0) == (t < behaviour["min_response_length"])


@pytest.mark.parametrize("name, model", with_models(distinct(WITH_VALUES, VALUES)))
def test_values_equal_those_of_every_prefix_alone(name, model):
    """V(s_t) of the one pass is the head on the last hidden state of prompt and prefix, run alone."""
    script, policy = importlib.import_module(name), small(model)
    torch.manual_seed(1)
    value_model = script.ValueModel(policy, None)
    assert not value_model.head.weight.any(), "the head does not start at zero"
    torch.nn.init.normal_(value_model.head.weight)
    prompts, queries, query_mask, responses = rollout(MODELS[model][0])
    with torch.no_grad():
        values = value_model(mb_of(queries, query_mask, responses))
        for row, prompt in enumerate(prompts):
            for t in range(responses.shape[1]):
                prefix = responses[row, :t].tolist()
                if policy.config.is_encoder_decoder:
                    decoder = torch.tensor([[policy.config.decoder_start_token_id, *prefix]])
                    inputs = dict(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder)
                    hidden = policy(**inputs, output_hidden_states=True).decoder_hidden_states[-1]
                else:
                    hidden = policy(input_ids=torch.tensor([prompt + prefix]), output_hidden_states=True).hidden_states[
                        -1
                    ]
                expected = hidden[0, -1] @ value_model.head.weight[0]
                assert math.isclose(values[row, t], expected, abs_tol=1e-5)
    own, shared = {p.data_ptr() for p in value_model.parameters()}, {p.data_ptr() for p in policy.parameters()}
    assert not own & shared, "the value model trains the policy's own weights"


@pytest.mark.parametrize("name, kind", distinct(WITH_VALUES, VALUES))
def test_critic_may_be_of_another_width(name, kind, tmp_path):
    """A reward model is often larger than the policy."""
    script, policy = importlib.import_module(name), small("t5" if kind == "seq2seq" else "gpt2")
    config = copy.deepcopy(policy.config)
    config.hidden_size *= 2
    type(policy)(config).save_pretrained(tmp_path)
    value_model = script.ValueModel(policy, str(tmp_path))
    torch.nn.init.normal_(value_model.head.weight)
    _, queries, query_mask, responses = rollout(kind)
    values = value_model(mb_of(queries, query_mask, responses))
    assert values.shape == responses.shape and values.all()


@pytest.mark.parametrize("name, kind", CASES)
def test_likelihood_is_the_library_loss(name, kind):
    """token_logprobs of response_logits, averaged, is the cross-entropy that transformers computes from labels."""
    script, policy = importlib.import_module(name), small("t5" if kind == "seq2seq" else "gpt2")
    prompts, queries, query_mask, responses = rollout(kind)
    with torch.no_grad():
        logits = script.response_logits(policy, mb_of(queries, query_mask, responses))
        ours = -script.token_logprobs(logits.float(), responses).mean()
        if kind == "seq2seq":
            theirs = policy(input_ids=queries, attention_mask=query_mask, labels=responses).loss
        else:
            losses = []
            for prompt, response in zip(prompts, responses.tolist(), strict=True):
                labels = torch.tensor([[-100] * len(prompt) + response])
                losses.append(policy(input_ids=torch.tensor([prompt + response]), labels=labels).loss)
            theirs = torch.stack(losses).mean()
    assert math.isclose(ours, theirs, abs_tol=1e-5)


# ------------------------------------------------------------------------------------------------ sampling


def naive_sample(policy, prompt, uniform, temperature, min_response_length, top_k):
    """Token by token without cache, by the inverse CDF in numpy. Returns the tokens and their log-probs."""
    tokens, logprobs = [], []
    for t, u in enumerate(uniform):
        p = probabilities(next_logits(policy, prompt, tokens), t, temperature, min_response_length)
        kept = np.zeros_like(p)
        best = np.argsort(-p)[: top_k or V]
        kept[best] = p[best]
        cdf = kept.cumsum()
        tokens.append(int(np.searchsorted(cdf, u * cdf[-1], side="right")))
        logprobs.append(np.log(kept[tokens[-1]] / cdf[-1]))
        if tokens[-1] == EOS:
            break
    return tokens, logprobs


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("name, model", with_models(distinct(PLAIN_CASES, SAMPLING)))
def test_cached_sampling_equals_uncached(name, model, behaviour, top_k):
    """With the cache, padded and together, the tokens are those of each row alone without; log-probs too."""
    script, policy = importlib.import_module(name), small(model)
    prompts, queries, query_mask, _ = rollout(MODELS[model][0], lengths=(3, 7, 1, 5, 2, 6, 4, 7))
    uniform = script.uniforms(7, 1, range(len(prompts)), 10)
    behaviour_now, warpers = behaviour | dict(eos=torch.tensor([EOS])), [TopKLogitsWarper(top_k)] if top_k else []
    steps = []

    def counted(*arguments):
        steps.append(1)
        return decode_step(*arguments)

    decode_step = script.decode_step
    script.decode_step = counted
    try:
        responses, mask, sampled = script.sample_responses(
            policy, queries, query_mask, uniform, behaviour_now, PAD, warpers
        )
    finally:
        script.decode_step = decode_step
    assert responses.shape == mask.shape == sampled.shape == uniform.shape
    lengths = set()
    for row, prompt in enumerate(prompts):
        tokens, logprobs = naive_sample(policy, prompt, uniform[row].numpy(), top_k=top_k, **behaviour)
        lengths.add(len(tokens))
        assert responses[row].tolist() == tokens + [PAD] * (responses.shape[1] - len(tokens))
        assert mask[row].tolist() == [t < len(tokens) for t in range(10)]
        np.testing.assert_allclose(sampled[row, : len(tokens)], logprobs, atol=1e-4)
        assert not sampled[row, len(tokens) :].any()
        assert EOS not in tokens[: behaviour["min_response_length"]]
    assert len(steps) == max(lengths), "sampling goes on after every row has ended"


@pytest.mark.parametrize("name, model", with_models(distinct(PLAIN_CASES, SAMPLING)))
def test_sampling_ends_with_the_longest_row(name, model):
    """EOS that is certain ends every row at once, however long a response may be."""
    script, policy = importlib.import_module(name), small(model)
    _, queries, query_mask, _ = rollout(MODELS[model][0])
    uniform = torch.zeros(len(queries), 8, dtype=torch.float64)  # the first token of positive probability, in order
    behaviour = dict(temperature=1.0, min_response_length=3, eos=torch.tensor([0]))
    responses, mask, *_ = script.sample_responses(policy, queries, query_mask, uniform, behaviour, 5)
    assert mask.sum(1).tolist() == [4] * len(queries)
    assert responses.tolist() == [[1, 1, 1, 0, 5, 5, 5, 5]] * len(queries)  # 0 is EOS, banned for three


@pytest.mark.parametrize("name, kind", distinct(PLAIN_CASES, SAMPLING))
def test_first_tokens_follow_the_policy(name, kind):
    """Chi-square of 3,000 first tokens against the policy's probabilities on a vocabulary of 8."""
    script = importlib.import_module(name)
    torch.manual_seed(0)
    if kind == "seq2seq":
        policy = t5(vocab=8).eval()
    else:
        config = transformers.GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=1, n_head=2, **IDS)
        policy = transformers.GPT2LMHeadModel(config).eval()
    n, prompt = 3000, [3, 4, 5]
    queries, query_mask = torch.tensor([prompt] * n), torch.ones(n, 3, dtype=torch.bool)
    uniform = script.uniforms(3, 1, range(n), 1)
    behaviour = dict(temperature=1.0, min_response_length=1, eos=torch.tensor([EOS]))
    tokens, *_ = script.sample_responses(policy, queries, query_mask, uniform, behaviour, PAD)
    expected = n * probabilities(next_logits(policy, prompt, []), 0, 1.0, 1)
    counts = np.bincount(tokens[:, 0], minlength=8)
    assert counts[EOS] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 27.86, f"{counts} against {expected}"  # 6 degrees of freedom: exceeded once in 10,000


def test_draws_follow_the_probabilities(script):
    """Over (index) and over (position), chi-square on six tokens of very different probability."""
    logits = torch.tensor([2.0, -INF, 0.0, 1.0, -INF, -2.0, 0.5, -3.0])
    p = logits.softmax(-1).double().numpy()
    for uniform in (script.uniforms(1, 1, range(20000), 1)[:, 0], script.uniforms(1, 1, range(20), 1000).flatten()):
        counts = np.bincount(script.draw(logits.expand(len(uniform), -1), uniform), minlength=8)
        assert counts[1] == counts[4] == 0
        expected = len(uniform) * p
        chi_square = ((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum()
        assert chi_square < 25.74, f"{counts} against {expected}"  # 5 degrees of freedom: once in 10,000


def test_impossible_tokens_are_never_drawn(script):
    """At the ends of [0, 1) and at the steps of the CDF, whatever rows of zeros are in between or at the ends."""
    rng = np.random.default_rng(0)
    rows, drawn = [], []
    for _ in range(300):
        logits = rng.normal(0, 3, size=12)
        logits[rng.permutation(12)[: rng.integers(0, 11)]] = -INF
        rows += [logits] * 4
        drawn += [0.0, 1 - 2.0**-53, rng.random(), 2.0**-53]
    logits = torch.tensor(np.array(rows), dtype=torch.float32)
    tokens = script.draw(logits, torch.tensor(drawn, dtype=torch.float64))
    assert logits.gather(1, tokens.unsqueeze(1)).isfinite().all()
    cdf = logits.double().softmax(-1).cumsum(-1)
    steps = cdf[:, 5] / cdf[:, -1]  # exactly at the end of token 5: the next possible one, if there is one
    tokens = script.draw(logits, steps.clamp(max=1 - 2.0**-53))
    assert logits.gather(1, tokens.unsqueeze(1)).isfinite().all()


def test_underflown_tail_is_never_drawn(script):
    """Tokens so improbable that they vanish in the sum come out neither."""
    logits = torch.tensor([[0.0, -800.0, 0.0, -INF, -2000.0]])
    tokens = {int(script.draw(logits, torch.tensor([u], dtype=torch.float64))) for u in (0.0, 0.5, 0.999, 1 - 2.0**-53)}
    assert tokens == {0, 2}


def test_uniforms_do_not_depend_on_who_asks(script):
    whole = script.uniforms(5, 9, range(8), 20)
    assert whole.dtype == torch.float64 and (whole >= 0).all() and (whole < 1).all()
    for world_size in (2, 4):
        for rank in range(world_size):
            assert torch.equal(script.uniforms(5, 9, range(rank, 8, world_size), 20), whole[rank::world_size])
    assert torch.equal(script.uniforms(5, 9, [6], 7), whole[6:7, :7])
    assert torch.equal(script.uniforms(5, 9, [3, 1], 20), whole[[3, 1]])
    counters = ((6, 9), (5, 10), (5, script.EVALUATION_STREAM), (2**53, 9), (2**53 + 1, 9))  # no seed is cut to a float
    others = [script.uniforms(*counter, range(8), 20) for counter in counters]
    everything = torch.cat([whole, *others]).flatten()
    assert len(everything.unique()) == everything.numel(), "numbers come twice"


# ------------------------------------------------------------------------------------------------ arithmetic


def naive_gae(rewards, values, gamma, lam):
    """The sum of (16) in Schulman et al. 2016 as it stands: quadratic, of one sequence, in Python's floats."""
    T = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < T else 0.0) - values[t] for t in range(T)]
    return [sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, T)) for t in range(T)]


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_gae_equals_the_sum(estimator, gamma, lam):
    rng = np.random.default_rng(0)
    lengths, T = [7, 1, 4, 6], 7
    mask = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    rewards, values = (torch.from_numpy(rng.normal(size=(4, T))) for _ in range(2))
    values.masked_fill_(~mask, 0.0)  # as the scripts do; a reward on padding is never looked at
    advantages = estimator.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = naive_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        np.testing.assert_allclose(advantages[row, :length], expected, atol=1e-12)
        assert (advantages[row, length:] == 0).all(), "padding has an advantage"


def test_gae_closed_forms(estimator):
    """lambda 1: rewards to go minus the value; lambda 0: the one-step error; an episode's end is worth 0."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert torch.allclose(
        estimator.gae(rewards, values, mask, 0.5, 1.0), torch.tensor([[0.25 - 0.5, 0.5 - 0.25, 1.0 - 2.0]])
    )
    assert torch.allclose(
        estimator.gae(rewards, values, mask, 0.5, 0.0), torch.tensor([[0.125 - 0.5, 1.0 - 0.25, 1.0 - 2.0]])
    )


def test_kl_controller_equals_its_formula(rl):
    """RL4LMs': kl_coef *= 1 + 0.1 * clip((kl - target) / target, -0.2, 0.2)."""
    cases = {0.2: 1.0, 0.21: 1.005, 0.19: 0.995, 5.0: 1.02, -3.0: 0.98, 0.24: 1.02, 0.16: 0.98, 0.0: 0.98}
    for kl, factor in cases.items():
        assert math.isclose(rl.next_kl_coef(0.03, kl, 0.2), 0.03 * factor, rel_tol=1e-9)


def test_entropy_and_its_gradient(rl):
    """Against torch.distributions; with banned tokens, against the same without their columns, gradient included."""
    logits = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(rl.token_entropy(logits), Categorical(logits=logits).entropy())
    banned = [2, 7]
    masked = logits.clone()
    masked[..., banned] = -INF
    masked.requires_grad_()
    kept = logits[..., [i for i in range(9) if i not in banned]].clone().requires_grad_()
    entropy, expected = rl.token_entropy(masked), Categorical(logits=kept).entropy()
    assert torch.allclose(entropy, expected)
    (entropy.sum() + masked[..., 0].sum()).backward()
    (expected.sum() + kept[..., 0].sum()).backward()
    assert masked.grad.isfinite().all()
    assert torch.allclose(masked.grad[..., [i for i in range(9) if i not in banned]], kept.grad)
    assert (masked.grad[..., banned] == 0).all()


def test_early_eos_is_banned_by_position(script):
    """first_position counts: what one pass bans at 0.. is what the sampling loop bans at each t."""
    logits = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(0))
    options = dict(temperature=0.5, min_response_length=3, eos=torch.tensor([EOS]))
    whole = script.behaviour_logits(logits, 0, **options)
    steps = [script.behaviour_logits(logits[:, t : t + 1], t, **options) for t in range(5)]
    assert torch.equal(whole, torch.cat(steps, 1))
    assert (whole[:, :3, EOS] == -INF).all() and whole[:, 3:, EOS].isfinite().all()
    others = [i for i in range(V) if i != EOS]
    assert torch.equal(whole[..., others], logits[..., others] * 2)
    assert script.behaviour_logits(logits.bfloat16(), 0, **options).dtype == torch.float32


# ------------------------------------------------------------------------------------------------ who gets what


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.startswith(("ppo", "nlpo"))])
def test_minibatches_are_a_partition_for_any_world_size(name):
    """Every epoch sees each sequence once; the minibatches are the same sets of samples for 1, 2 and 4 processes."""
    script, (batch, minibatches) = importlib.import_module(name), (24, 3)
    size, seen = batch // minibatches, []
    args = script.Args(seed=1, batch_size=batch, num_minibatches=minibatches, update_epochs=3)
    for iteration in (1, 2):
        rows = {(rank, n): [*script.minibatch_rows(args, iteration, rank, n)] for n in (1, 2, 4) for rank in range(n)}
        assert all(len(parts) == 3 * minibatches for parts in rows.values())
        for epoch in range(3):
            sets = {}
            for world_size in (1, 2, 4):
                of_epoch = slice(epoch * minibatches, (epoch + 1) * minibatches)
                parts = [torch.stack(rows[rank, world_size][of_epoch]) for rank in range(world_size)]
                assert all(part.shape == (minibatches, size // world_size) for part in parts)
                # row r of process k holds sample r * world_size + k of the batch
                samples = [part * world_size + rank for rank, part in enumerate(parts)]
                sets[world_size] = [frozenset(torch.cat([s[i] for s in samples]).tolist()) for i in range(minibatches)]
                assert sorted(i for minibatch in sets[world_size] for i in minibatch) == list(range(batch))
            assert sets[1] == sets[2] == sets[4]
            seen.append(tuple(sets[1]))
    assert len(set(seen)) == len(seen), "two epochs have the same minibatches"


def test_prompt_order_visits_every_sample_once_per_epoch():
    n, stream = 13, prompt_order(range(4 * 13), 13, seed=3)
    epochs = [stream[i : i + n] for i in range(0, len(stream), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and epochs[0] != prompt_order(range(n), n, seed=4)
    for world_size in (2, 3):
        for rank in range(world_size):
            assert prompt_order(range(rank, 52, world_size), n, seed=3) == stream[rank::world_size]


@pytest.mark.parametrize("name, kind", CASES)
def test_micro_batches_cut_only_padding(name, kind):
    """Every row once, like lengths together, each part as long as its longest prompt and response."""
    script = importlib.import_module(name)
    prompts, queries, query_mask, responses = rollout(kind)
    lengths = torch.tensor([2, 6, 3, 4])
    mask = torch.arange(responses.shape[1]) < lengths.unsqueeze(1)
    batch = dict(queries=queries, query_mask=query_mask, responses=responses, mask=mask)
    seen = []
    for rows, mb in script.micro_batches(batch, 3):
        seen += rows.tolist()
        longest = max(len(prompts[row]) for row in rows)
        assert mb.queries.shape == mb.query_mask.shape == (len(rows), longest)
        assert mb.responses.shape == (len(rows), lengths[rows].max())
        for i, row in enumerate(rows.tolist()):
            assert mb.queries[i][mb.query_mask[i]].tolist() == prompts[row]
            assert mb.responses[i, : lengths[row]].tolist() == responses[row, : lengths[row]].tolist()
    assert seen == [0, 2, 3, 1]


# ------------------------------------------------------------------------------------------------ rewards of tokens


def samples_of(n):
    return [Sample(f"s{i}", f"prompt {i}", [f"reference {i}"], {"k": i}) for i in range(n)]


def test_scores_go_to_the_last_token_and_lists_to_each():
    seen = []

    def number(prompts, generations, references, metas):
        seen.append((prompts, generations, references, metas))
        return [1.0, 2, np.float32(3.0)]

    def tokens(prompts, generations, references, metas):
        return [[0.5], [1.0, 2.0, 3.0, 4.0], [0.0, 1.0]]

    generations, token_ids = ["a", "b", "c"], [[5], [5] * 4, [5] * 2]
    scores, means = score_texts({"n": number, "t": tokens}, (2.0, 10.0), samples_of(3), generations, token_ids, 3)
    expected = [[2 + 5.0, 0, 0, 0], [10, 20, 30, 40 + 4.0], [0, 10 + 6.0, 0, 0]]
    assert torch.allclose(scores, torch.tensor(expected)) and scores.dtype == torch.float32
    assert means["n"] == 2.0 and math.isclose(means["t"], (0.5 + 10 + 1) / 3)
    columns = ["prompt 0", "prompt 1", "prompt 2"], generations, [[f"reference {i}"] for i in range(3)]
    assert seen == [(*columns, [{"k": 0}, {"k": 1}, {"k": 2}])]


BAD_VALUES = [
    ([1.0, math.nan], "sample s1"),
    ([math.inf, 1.0], "sample s0"),
    ([1.0, None], "sample s1"),
    (["1", 1.0], "sample s0"),
    ([1.0, [1.0, 2.0]], "sample s1"),  # of three tokens
    ([1.0, [1.0, math.nan, 1.0]], "sample s1"),
    ([1.0, [[1.0]]], "sample s1"),
    ([1.0], "1 values for 2 samples"),
    ([1.0] * 3, "3 values for 2 samples"),
    ([1.0, [1.0, [2.0], 3.0]], "sample s1"),
]


@pytest.mark.parametrize("values, told", BAD_VALUES, ids=[str(case[0]) for case in BAD_VALUES])
def test_what_is_no_score_is_told_by_sample(values, told):
    with pytest.raises(ValueError) as caught:
        score_texts({"own": lambda *texts: values}, (1.0,), samples_of(2), ["a", "b"], [[1] * 3] * 2, 3)
    assert told in str(caught.value) and "own" in str(caught.value)


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("name, kind", CASES)
def test_loaded_model_is_that_of_the_folder(name, kind):
    """Without dropout, in float32, with a generation config that has nothing of the folder's but EOS."""
    script, folder = importlib.import_module(name), tiny_model(kind)
    args = script.Args(model=folder, response_length=8, min_response_length=3)
    tokenizer = load_tokenizer(folder)
    options = dict(args=args, config=model_config(folder), tokenizer=tokenizer, decoding=dict(num_beams=3))
    policy = script.load_policy(**{n: options[n] for n in inspect.signature(script.load_policy).parameters})
    assert not policy.training
    auto = transformers.AutoModelForSeq2SeqLM if kind == "seq2seq" else transformers.AutoModelForCausalLM
    for (key, a), b in zip(
        policy.state_dict().items(), auto.from_pretrained(folder).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b) and a.dtype == torch.float32, key
    decoding = policy.generation_config
    assert (decoding.min_new_tokens, decoding.max_new_tokens, decoding.num_beams) == (3, 8, 3)
    assert decoding.eos_token_id == [tokenizer.eos_token_id] and decoding.pad_token_id == tokenizer.pad_token_id


def test_every_process_has_a_gpu_of_its_own(script, monkeypatch):
    """Rewards and metrics go there as well: they are made before the process group is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert script.local_device() == torch.device("cuda:3")
    assert "device=str(device)" in inspect.getsource(script.main)
    monkeypatch.delenv("LOCAL_RANK")
    assert script.local_device() == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.local_device() == torch.device("cpu")


@pytest.mark.parametrize(
    "name, kind",
    distinct(
        [c for c in CASES if hasattr(importlib.import_module(c[0]), "gae")],
        ["prepare_model", "ValueModel", "response_pass"],
    ),
)
def test_heads_compute_in_float32_under_bfloat16(name, kind):
    """Logits near -100 lose half a nat to bfloat16's steps: a shift of all logits by -100 must not be seen."""
    script = importlib.import_module(name)
    policy = small("t5" if kind == "seq2seq" else "gpt2")
    V_ = policy.get_output_embeddings().weight.shape[0]
    torch.manual_seed(1)
    value_model = script.ValueModel(policy, None)
    torch.nn.init.normal_(value_model.head.weight)
    _, queries, query_mask, responses = rollout(kind)
    mb = SimpleNamespace(queries=queries, query_mask=query_mask, responses=responses)
    figures, final = {}, {}
    for shift in (0.0, -100.0):
        model = copy.deepcopy(policy)
        head = model.get_output_embeddings()
        # the shift is in the head's own weights: a unit whose input is always 1
        wide = torch.nn.Linear(head.weight.shape[1] + 1, V_, bias=False)
        with torch.no_grad():
            wide.weight.copy_(torch.cat([head.weight, torch.full((V_, 1), shift)], 1))
        model.set_output_embeddings(Widened(wide))
        script.prepare_model(model, torch.device("cpu"), fsdp=False, recompute=False)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = script.response_logits(model, mb)
                figures[shift, dtype] = script.token_logprobs(logits, responses)
                final[dtype] = value_model(mb)
        assert logits.dtype == torch.float32 and final[torch.bfloat16].dtype == torch.float32
    errors = [(figures[shift, torch.bfloat16] - figures[shift, torch.float32]).abs().mean() for shift in (0.0, -100.0)]
    assert figures[-100.0, torch.float32].sub(figures[0.0, torch.float32]).abs().max() < 1e-3
    assert errors[0] > 0 and errors[1] < errors[0] + 1e-3
    # the value head: what differs comes from the backbone alone
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = script.response_pass(value_model.backbone, mb).last_hidden_state[:, -responses.shape[1] :]
    torch.testing.assert_close(final[torch.bfloat16], (hidden.float() @ value_model.head.weight[0]))


class Widened(torch.nn.Module):
    """A head that sees one more input, always 1."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight = linear, linear.weight

    def forward(self, hidden):
        return self.linear(torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1))


def test_checksum_tells_models_apart_but_not_threads(script):
    """A run goes on with another number of threads: the sum's order must not look like another model."""
    torch.manual_seed(0)
    model, threads = torch.nn.Linear(700, 900), torch.get_num_threads()
    try:
        sums = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            sums.append(script.checksum(model))
    finally:
        torch.set_num_threads(threads)
    assert sums[0] == sums[1] == sums[2]
    with torch.no_grad():
        model.bias[3] += 1e-3
    assert script.checksum(model) != sums[0]


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def run_dir(tmp_path):
    """A run folder with logs."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        (tmp_path / name).touch()
    return tmp_path


def state_of(iteration):
    torch.manual_seed(iteration)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return dict(iteration=iteration, kl_coef=0.1, policy=model.state_dict(), optimizer=optimizer.state_dict())


def test_checkpoint_comes_back_to_the_bit(script, run_dir):
    """With the logs as they were then; another process than the first touches no file."""
    (run_dir / "metrics.jsonl").write_text("12345\n")
    assert script.load_checkpoint(run_dir, 1) == {} and (run_dir / "metrics.jsonl").read_text() == "12345\n"
    for iteration in (1, 2, 3):
        state = state_of(iteration)
        script.save_checkpoint(run_dir, dict(state), 1)
        assert iteration > 1 or not (run_dir / "checkpoint").exists()
        script.save_checkpoint(run_dir, dict(state), 0)
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write("will come again\n")
        script.load_checkpoint(run_dir, 1)
        assert "again" in (run_dir / "metrics.jsonl").read_text()
        loaded = script.load_checkpoint(run_dir, 0)
        assert same({key: loaded[key] for key in state}, state)
        assert (run_dir / "metrics.jsonl").read_text() == "12345\n" and (run_dir / "eval.jsonl").read_text() == ""
    # the one before is kept as well, older ones are not
    kept = {path.name for path in (run_dir / "checkpoint").iterdir()}
    assert kept == {"latest.pt", "previous.pt"}
    assert torch.load(run_dir / "checkpoint" / "previous.pt", weights_only=True)["iteration"] == 2


def test_run_without_a_checkpoint_begins_with_empty_logs(script, run_dir):
    (run_dir / "metrics.jsonl").write_text("of a run that was killed before its first checkpoint\n")
    assert script.load_checkpoint(run_dir, 0) == {}
    assert (run_dir / "metrics.jsonl").read_text() == ""


def test_leftovers_of_a_crash_are_ignored(script, run_dir):
    script.save_checkpoint(run_dir, state_of(1), 0)
    (run_dir / "checkpoint" / "aside.tmp").write_bytes(b"half a checkpoint")
    assert script.load_checkpoint(run_dir, 0)["iteration"] == 1
    script.save_checkpoint(run_dir, state_of(2), 0)
    assert script.load_checkpoint(run_dir, 0)["iteration"] == 2


def test_crash_at_any_call_of_save_checkpoint_leaves_a_whole_one(script, run_dir, monkeypatch):
    """Every step of it fails once; what load_checkpoint then finds is whole, the state before or the new one."""

    class Crash(BaseException):
        pass

    for module, name, times in (("os", "fsync", 1), ("os", "replace", 2), ("torch", "save", 1)):
        for n in range(1, times + 1):
            folder = run_dir / f"{name}_{n}"
            shutil.copytree(run_dir, folder, ignore=lambda path, names: [x for x in names if not x.endswith("jsonl")])
            script.save_checkpoint(folder, state_of(1), 0)
            script.save_checkpoint(folder, state_of(2), 0)
            original, calls = getattr(getattr(script, module), name), []

            def crashing(*args, original=original, calls=calls, n=n, **kwargs):
                calls.append(1)
                if len(calls) == n:
                    raise Crash
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(getattr(script, module), name, crashing)
                with pytest.raises(Crash):
                    script.save_checkpoint(folder, state_of(3), 0)
            assert script.load_checkpoint(folder, 0)["iteration"] in (2, 3)


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: b"garbage" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_by_name(script, run_dir, damage):
    """The message names the file, no log is touched, and the way out that it describes works."""
    script.save_checkpoint(run_dir, state_of(4), 0)
    script.save_checkpoint(run_dir, state_of(8), 0)
    (run_dir / "metrics.jsonl").write_text("mine\n")
    file = run_dir / "checkpoint" / "latest.pt"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(UsageError) as caught:
        script.load_checkpoint(run_dir, 0)
    assert str(file) in str(caught.value) and "remove" in str(caught.value)
    assert (run_dir / "metrics.jsonl").read_text() == "mine\n"
    file.unlink()
    assert script.load_checkpoint(run_dir, 0)["iteration"] == 4


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.write_text, (Path(self.file), "executed")


def test_nothing_pickled_is_executed(script, run_dir):
    """A checkpoint made by someone else cannot run code."""
    script.save_checkpoint(run_dir, state_of(8), 0)
    file, target = run_dir / "checkpoint" / "latest.pt", run_dir / "executed"
    torch.save(dict(iteration=8, policy=Malicious(str(target))), file)
    with pytest.raises(UsageError):
        script.load_checkpoint(run_dir, 0)
    assert not target.exists()


def test_what_an_update_holds_of_the_logits(rl):
    """Two copies, with an entropy bonus three, and what one sequence takes: counted by the profiler, byte by byte."""
    batch, T, V = 16, 8, 5000
    logits = torch.randn(batch, T, V, requires_grad=True)
    responses = torch.randint(V, (batch, T))

    def copies(ent_coef):
        with torch.profiler.profile(profile_memory=True) as profile:
            rows = (logits * 1).unbind()  # as a language-model head makes them: what is before keeps no copy
            loss = rl.token_logprobs(rows, responses).sum()
            if ent_coef:
                loss = loss - ent_coef * rl.token_entropy(rows).sum()
            del rows
            torch.autograd.grad(loss, logits)
        events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        return np.cumsum(events).max() / (4 * batch * T * V)

    assert copies(0) < 2 + 4 / batch and copies(0.1) < 3 + 8 / batch
