"""The functions that the algorithms are made of, each against something that works it out in another way."""

import hashlib
import importlib
import inspect
import json
import math
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from script_runs import CASES, SCRIPTS, same
from torch.distributions import Categorical
from transformers.activations import ACT2FN

from datapools import Sample, UsageError, encode_prompts, pad, prompt_order
from rewards import score_texts

RL_CASES = [case for case in CASES if case[0] != "supervised"]
RL_SCRIPTS = [script for script in SCRIPTS if script != "supervised"]
V, EOS, PAD = 40, 1, 0
INF = math.inf


@pytest.fixture(params=SCRIPTS)
def script(request):
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


SCORING = ["response_logits", "behaviour_logits", "token_logprobs", "prompt_and_response", "decoder_inputs"]
SAMPLING = ["sample_responses", "start_decoding", "decode_step", "behaviour_logits", "draw", "keep_top_k"]
VALUES = ["ValueModel", "value_backbone", "response_hidden", "prompt_and_response", "decoder_inputs"]
PLAIN_CASES = [case for case in CASES if "nlpo" not in case[0]]  # NLPO's sampler has a mask: tests/test_nlpo.py


def rollout(kind, seed=0, lengths=(3, 7, 1, 5), T=6):
    """Prompts of different lengths, their padded tensors, and random responses."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, V, size=length).tolist() for length in lengths]
    queries, query_mask = pad(prompts, PAD, "cpu", left=kind == "causal")
    responses = torch.from_numpy(rng.integers(1, V, size=(len(prompts), T)))
    return prompts, queries, query_mask, responses


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
    behaviour = behaviour | dict(eos_id=EOS)
    with torch.no_grad():
        logits = script.behaviour_logits(script.response_logits(policy, queries, query_mask, responses), 0, **behaviour)
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


@pytest.mark.parametrize("name, model", with_models(distinct(RL_CASES, VALUES)))
def test_values_equal_those_of_every_prefix_alone(name, model):
    """V(s_t) of the one pass is the head on the last hidden state of prompt and prefix, run alone."""
    script, policy = importlib.import_module(name), small(model)
    torch.manual_seed(1)
    value_model = script.ValueModel(script.value_backbone(policy))
    prompts, queries, query_mask, responses = rollout(MODELS[model][0])
    with torch.no_grad():
        values = value_model(queries, query_mask, responses)
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


@pytest.mark.parametrize("name, kind", CASES)
def test_likelihood_is_the_library_loss(name, kind):
    """token_logprobs of response_logits, averaged, is the cross-entropy that transformers computes from labels."""
    script, policy = importlib.import_module(name), small("t5" if kind == "seq2seq" else "gpt2")
    prompts, queries, query_mask, responses = rollout(kind)
    with torch.no_grad():
        logits = script.response_logits(policy, queries, query_mask, responses)
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
    """Token by token without cache, by the inverse CDF in numpy. Returns the tokens and the mass that top-k leaves."""
    tokens, masses = [], []
    for t, u in enumerate(uniform):
        p = probabilities(next_logits(policy, prompt, tokens), t, temperature, min_response_length)
        kept = np.zeros_like(p)
        best = np.argsort(-p)[: top_k or V]
        kept[best] = p[best]
        cdf = kept.cumsum()
        tokens.append(int(np.searchsorted(cdf, u * cdf[-1], side="right")))
        masses.append(cdf[-1])
        if tokens[-1] == EOS:
            break
    return tokens, masses


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("name, model", with_models(distinct(PLAIN_CASES, SAMPLING)))
def test_cached_sampling_equals_uncached(name, model, behaviour, top_k):
    """With the cache, padded and together, the tokens are those of each row alone without; so is top-k's mass."""
    script, policy = importlib.import_module(name), small(model)
    prompts, queries, query_mask, _ = rollout(MODELS[model][0], lengths=(3, 7, 1, 5, 2, 6, 4, 7))
    uniform = script.uniforms(7, 1, range(len(prompts)), 10)
    responses, kept_mass = script.sample_responses(
        policy, queries, query_mask, uniform, behaviour | dict(eos_id=EOS), top_k, PAD
    )
    assert responses.shape[1] <= 10
    lengths = set()
    for row, prompt in enumerate(prompts):
        tokens, masses = naive_sample(policy, prompt, uniform[row].numpy(), top_k=top_k, **behaviour)
        lengths.add(len(tokens))
        assert responses[row].tolist() == tokens + [PAD] * (responses.shape[1] - len(tokens))
        np.testing.assert_allclose(kept_mass[row, : len(tokens)], masses, atol=1e-5)
        assert EOS not in tokens[: behaviour["min_response_length"]]
    assert responses.shape[1] == max(lengths), "sampling goes on after every row has ended"


@pytest.mark.parametrize("name, model", with_models(distinct(PLAIN_CASES, SAMPLING)))
def test_sampling_ends_with_the_longest_row(name, model):
    """EOS that is certain ends every row at once, however long a response may be."""
    script, policy = importlib.import_module(name), small(model)
    _, queries, query_mask, _ = rollout(MODELS[model][0])
    uniform = torch.zeros(len(queries), 8, dtype=torch.float64)  # the first token of positive probability, in order
    behaviour = dict(temperature=1.0, min_response_length=3, eos_id=0)
    responses, _ = script.sample_responses(policy, queries, query_mask, uniform, behaviour, 0, 0)
    assert responses.tolist() == [[1, 1, 1, 0]] * len(queries)  # token 0 is EOS here, banned for three tokens


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
    behaviour = dict(temperature=1.0, min_response_length=1, eos_id=EOS)
    tokens, _ = script.sample_responses(policy, queries, query_mask, uniform, behaviour, 0, PAD)
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
    others = [script.uniforms(*counter, range(8), 20) for counter in ((6, 9), (5, 10), (5, script.EVALUATION_STREAM))]
    everything = torch.cat([whole, *others]).flatten()
    assert len(everything.unique()) == everything.numel(), "numbers come twice"


def test_keep_top_k_keeps_the_greatest(script):
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    for k in (1, 4, 11, 50):
        kept = script.keep_top_k(logits, k)
        for row, before in zip(kept, logits, strict=True):
            best = set(before.argsort(descending=True)[:k].tolist())
            assert {i for i in range(11) if row[i] > -INF} == best
            assert torch.equal(row[list(best)], before[list(best)])


# ------------------------------------------------------------------------------------------------ arithmetic


def naive_gae(rewards, values, gamma, lam):
    """The sum of (16) in Schulman et al. 2016 as it stands: quadratic, of one sequence, in Python's floats."""
    T = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < T else 0.0) - values[t] for t in range(T)]
    return [sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, T)) for t in range(T)]


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_gae_equals_the_sum(rl, gamma, lam):
    rng = np.random.default_rng(0)
    lengths, T = [7, 1, 4, 6], 7
    mask = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    rewards, values = (torch.from_numpy(rng.normal(size=(4, T))) for _ in range(2))
    values.masked_fill_(~mask, 0.0)  # as the scripts do; a reward on padding is never looked at
    advantages = rl.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = naive_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        np.testing.assert_allclose(advantages[row, :length], expected, atol=1e-12)
        assert (advantages[row, length:] == 0).all(), "padding has an advantage"


def test_gae_closed_forms(rl):
    """lambda 1: rewards to go minus the value; lambda 0: the one-step error; an episode's end is worth 0."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert torch.allclose(rl.gae(rewards, values, mask, 0.5, 1.0), torch.tensor([[0.25 - 0.5, 0.5 - 0.25, 1.0 - 2.0]]))
    assert torch.allclose(rl.gae(rewards, values, mask, 0.5, 0.0), torch.tensor([[0.125 - 0.5, 1.0 - 0.25, 1.0 - 2.0]]))


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
    options = dict(temperature=0.5, min_response_length=3, eos_id=EOS)
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
    for iteration in (1, 2):
        for epoch in range(3):
            sets = {}
            for world_size in (1, 2, 4):
                parts = [
                    script.minibatch_rows(1, iteration, epoch, minibatches, size, rank, world_size)
                    for rank in range(world_size)
                ]
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


@pytest.mark.parametrize("name, kind", RL_CASES)
def test_micro_batch_cuts_only_padding(name, kind):
    script = importlib.import_module(name)
    prompts, queries, query_mask, responses = rollout(kind)
    lengths, response_lengths = torch.tensor([len(p) for p in prompts]), torch.tensor([2, 6, 3, 4])
    left = () if script.__name__.startswith(("ppo", "nlpo")) else (kind == "causal",)
    rows = torch.tensor([2, 0, 3])
    cut = script.micro_batch(rows, queries, query_mask, lengths, responses, response_lengths, *left)
    assert [part.shape for part in cut] == [(3, 5), (3, 5), (3, 4)]
    for i, row in enumerate(rows):
        assert cut[0][i][cut[1][i]].tolist() == prompts[row]
        assert cut[2][i].tolist() == responses[row, :4].tolist()


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

    generations, lengths = ["a", "b", "c"], torch.tensor([1, 4, 2])
    scores, means = score_texts({"n": number, "t": tokens}, (2.0, 10.0), samples_of(3), generations, lengths, 5)
    expected = [[2 + 5.0, 0, 0, 0, 0], [10, 20, 30, 40 + 4.0, 0], [0, 10 + 6.0, 0, 0, 0]]
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
        score_texts({"own": lambda *texts: values}, (1.0,), samples_of(2), ["a", "b"], torch.tensor([3, 3]), 4)
    assert told in str(caught.value) and "own" in str(caught.value)


# ------------------------------------------------------------------------------------------------ scratch models


def scratch_args(kind, seed=1):
    sizes = dict(scratch_vocab_size=300, scratch_width=16, scratch_layers=1, scratch_heads=2)
    return SimpleNamespace(model="scratch", policy_type=kind, seed=seed, prompt_length=8, response_length=8, **sizes)


@pytest.mark.parametrize("name, kind", CASES)
def test_scratch_model_is_the_same_for_a_seed(name, kind):
    script, texts = importlib.import_module(name), ["one two three", "two three four", "three four five"] * 5
    torch.manual_seed(1234)
    (one, one_tokens), (two, two_tokens), (other, _) = (
        script.load_model(scratch_args(kind, seed), texts) for seed in (1, 1, 2)
    )
    assert one_tokens.get_vocab() == two_tokens.get_vocab() and len(one_tokens) == one.config.vocab_size <= 300
    assert one.config.is_encoder_decoder == (kind == "seq2seq") and not one.training
    for (key, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    for text in ("one two five", "  Ünïcödé ⛄ 12"):  # bytes that no training text has, too
        assert one_tokens.decode(one_tokens(text).input_ids, skip_special_tokens=True).strip() == text.strip()
    ids = one_tokens("one two").input_ids
    assert (ids[-1] == one_tokens.eos_token_id) == (kind == "seq2seq")


def test_every_process_has_a_gpu_of_its_own(script, monkeypatch):
    """Rewards and metrics go there as well: they are made before the process group is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert script.local_device(True) == torch.device("cuda:3") and script.local_device(False) == torch.device("cpu")
    main = inspect.getsource(script).split('if __name__ == "__main__":')[1]
    assert main.count("device=str(device)") == main.count("make_reward(") + main.count("make_metric(") > 0
    monkeypatch.delenv("LOCAL_RANK")
    assert script.local_device(True) == torch.device("cuda:0")


def test_gpt2s_gelu_is_one_kernel_and_the_same_function():
    importlib.import_module(SCRIPTS[0])
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    written_out = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    with torch.autograd.profiler.profile() as profile:
        activation = ACT2FN["gelu_new"](x)
    torch.testing.assert_close(activation, written_out, rtol=1e-12, atol=1e-12)
    assert {event.name for event in profile.function_events} == {"aten::gelu"}


def test_prompts_are_cut_on_the_task_side():
    script = importlib.import_module(SCRIPTS[0])
    tokenizer = script.train_tokenizer(["one two three four"] * 9, 300, ends_with_eos=False)
    (whole,) = encode_prompts(tokenizer, ["one two three four"], 99, "left")
    assert len(whole) >= 4
    assert encode_prompts(tokenizer, ["one two three four"], 2, "left") == [whole[-2:]]
    assert encode_prompts(tokenizer, ["one two three four", ""], 2, "right") == [whole[:2], [tokenizer.eos_token_id]]


def test_fingerprint_tells_models_apart_but_not_threads(script):
    """A run goes on with another number of threads: the sum's order must not look like another model."""
    torch.manual_seed(0)
    model, threads = torch.nn.Linear(700, 900), torch.get_num_threads()
    try:
        prints = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            prints.append(script.fingerprint(model))
    finally:
        torch.set_num_threads(threads)
    assert prints[0] == prints[1] == prints[2]
    with torch.no_grad():
        model.bias[3] += 1e-3
    assert script.fingerprint(model) != prints[0]


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def run_dir(tmp_path):
    """A run folder with the logs that every checkpoint knows the length of."""
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
    assert script.load_checkpoint(run_dir) is None
    (run_dir / "metrics.jsonl").write_text("12345\n")
    for iteration in (1, 2, 3):
        state = state_of(iteration)
        script.save_checkpoint(run_dir, dict(state))
        loaded = script.load_checkpoint(run_dir)
        assert same({key: loaded[key] for key in state}, state)
        assert loaded["metrics.jsonl"] == 6 and loaded["eval.jsonl"] == 0
    # the one before is kept as well, older ones are not
    kept = {path.name for path in (run_dir / "checkpoint").iterdir()}
    assert kept == {"iteration_2.pt", "iteration_3.pt", "latest.json"}


def test_leftovers_of_a_crash_are_ignored(script, run_dir):
    script.save_checkpoint(run_dir, state_of(1))
    folder = run_dir / "checkpoint"
    (folder / "iteration_2.tmp").write_bytes(b"half a checkpoint")
    (folder / "iteration_2.pt").write_bytes(b"whole but not yet named in latest.json")
    (folder / "latest.tmp").write_text("[{")
    assert script.load_checkpoint(run_dir)["iteration"] == 1
    script.save_checkpoint(run_dir, state_of(2))
    assert script.load_checkpoint(run_dir)["iteration"] == 2


def test_crash_at_any_call_of_save_checkpoint_leaves_a_whole_one(script, run_dir, monkeypatch):
    """Every step of it fails once; what load_checkpoint then finds is whole, the state before or the new one."""

    class Crash(BaseException):
        pass

    steps = [("os", "fsync"), ("os", "replace"), ("torch", "save"), ("hashlib", "file_digest"), ("json", "dumps")]
    for module, name in steps:
        for n in (1, 2):
            folder = run_dir / f"{name}_{n}"
            shutil.copytree(run_dir, folder, ignore=lambda path, names: [x for x in names if not x.endswith("jsonl")])
            script.save_checkpoint(folder, state_of(1))
            script.save_checkpoint(folder, state_of(2))
            original, calls = getattr(getattr(script, module), name), []

            def crashing(*args, original=original, calls=calls, n=n, **kwargs):
                calls.append(1)
                if len(calls) == n:
                    raise Crash
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(getattr(script, module), name, crashing)
                try:
                    script.save_checkpoint(folder, state_of(3))
                except Crash:
                    pass
            assert script.load_checkpoint(folder)["iteration"] in (2, 3)


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one bit": lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
    "garbage": lambda content: b"garbage" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_by_name(script, run_dir, damage):
    """The message names the file and the one before, and the way out that it describes works."""
    script.save_checkpoint(run_dir, state_of(4))
    script.save_checkpoint(run_dir, state_of(8))
    file, latest = run_dir / "checkpoint" / "iteration_8.pt", run_dir / "checkpoint" / "latest.json"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(UsageError) as caught:
        script.load_checkpoint(run_dir)
    message = str(caught.value)
    assert str(file) in message and "iteration_4.pt" in message and str(latest) in message and "\n" not in message
    latest.write_text(json.dumps(json.loads(latest.read_text())[1:]))
    assert script.load_checkpoint(run_dir)["iteration"] == 4


LISTS = {"empty": "", "cut": "[{", "no entry": "[]", "no list": "{}", "zeros": "\0" * 100}


@pytest.mark.parametrize("content", LISTS.values(), ids=LISTS)
def test_damaged_list_of_checkpoints_is_refused_by_name(script, run_dir, content):
    script.save_checkpoint(run_dir, state_of(8))
    latest = run_dir / "checkpoint" / "latest.json"
    latest.write_text(content)
    with pytest.raises(UsageError) as caught:
        script.load_checkpoint(run_dir)
    assert str(latest) in str(caught.value) and "\n" not in str(caught.value)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.write_text, (Path(self.file), "executed")


def test_nothing_pickled_is_executed(script, run_dir):
    """A checkpoint made by someone else, right in its checksum, cannot run code."""
    script.save_checkpoint(run_dir, state_of(8))
    file, latest = run_dir / "checkpoint" / "iteration_8.pt", run_dir / "checkpoint" / "latest.json"
    target = run_dir / "executed"
    torch.save(dict(iteration=8, policy=Malicious(str(target))), file)
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    latest.write_text(json.dumps([{"file": file.name, "sha256": checksum}]))
    with pytest.raises((UsageError, pickle.UnpicklingError)):
        script.load_checkpoint(run_dir)
    assert not target.exists()


# ------------------------------------------------------------------------------------------------ supervised.py


@pytest.mark.skipif("supervised" not in SCRIPTS, reason="no supervised.py")
def test_responses_end_with_eos_and_keep_their_length():
    script = importlib.import_module("supervised")
    tokenizer = script.train_tokenizer(["one two three four"] * 9, 300, ends_with_eos=True)
    eos = tokenizer.eos_token_id
    plain = tokenizer("one two three four", add_special_tokens=False).input_ids
    for seq2seq in (True, False):
        rows = script.encode_responses(tokenizer, ["one two three four", ""], 99, seq2seq)
        assert rows == [[*plain, eos], [eos]]
        assert script.encode_responses(tokenizer, ["one two three four"], 3, seq2seq) == [[*plain[:2], eos]]


@pytest.mark.skipif("supervised" not in SCRIPTS, reason="no supervised.py")
def test_every_reference_is_an_example():
    script = importlib.import_module("supervised")
    samples = [Sample("a", "once upon", ["once upon a time", "a day"], {}), Sample("b", "x", [], {})]
    assert script.training_pairs(samples) == [("once upon", " a time"), ("once upon", "a day")]
