"""NLPO's mask: which tokens it keeps, that sampling keeps to it, that it is renewed; without it NLPO is PPO."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from script_runs import TINY, flags, rows, run_ok, weights

SETTINGS = TINY | dict(num_iterations=3, eval_every=3, save_every=1, min_tokens_to_keep=2)
KINDS = ("seq2seq", "causal")


def tiny_model(kind, seed):
    torch.manual_seed(seed)
    if kind == "seq2seq":
        config = transformers.T5Config(
            vocab_size=43, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).eval()
    config = transformers.GPT2Config(
        vocab_size=43, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():  # GPT-2 starts nearly uniform: sharpen it
        parameter.data *= 4
    return model


def naive_mask(logits, mask_type, top_mask, least, special_ids):
    """One row at a time, token by token."""
    masks = []
    for probs in logits.double().softmax(-1):
        order = sorted(range(len(probs)), key=lambda i: -probs[i].item())
        kept, mass = [], 0.0
        for token in order:
            enough = mass >= top_mask if mask_type == "learned_top_p" else len(kept) >= top_mask
            if enough and (mask_type != "learned_top_p" or len(kept) >= least):
                break
            kept.append(token)
            mass += probs[token].item()
        masks.append([i in kept or i in special_ids for i in range(len(probs))])
    return torch.tensor(masks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mask_type, top_mask, least",
    [("learned_top_p", 0.9, 1), ("learned_top_p", 0.3, 5), ("learned_top_k", 7, 1), ("top_k", 3, 4)],
)
def test_mask_is_the_smallest_set(kind, mask_type, top_mask, least):
    script = importlib.import_module(f"nlpo_{kind}")
    logits = 3 * torch.randn(20, 43, generator=torch.Generator().manual_seed(0))
    mask = script.make_action_mask(logits, mask_type, top_mask, least, [0, 1])
    assert torch.equal(mask, naive_mask(logits, mask_type, top_mask, least, [0, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_of_equal_tokens_all_are_kept(kind):
    """Which of them are in the mask is not chance's, nor their ids'; what is less likely than they are is out."""
    script = importlib.import_module(f"nlpo_{kind}")
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0] * 5, [9.0, 0.0, 0.0, 0.0, -1.0]])
    for least, thirds in ((1, [True] + [False] * 4), (2, [True] * 4 + [False])):
        mask = script.make_action_mask(logits, "learned_top_p", 0.5, least, [])
        assert mask.tolist() == [[False, True, True, True, False], [True] * 5, thirds]


@pytest.mark.parametrize("kind", KINDS)
def test_all_probability_keeps_all(kind):
    script = importlib.import_module(f"nlpo_{kind}")
    logits = torch.tensor([[50.0, -50.0, 0.0, -1000.0]])
    assert script.make_action_mask(logits, "learned_top_p", 1.0, 1, []).all()


def unpack(packed, size):
    """Bit by bit."""
    bits = [[[(byte >> i) & 1 for byte in row for i in range(8)][:size] for row in rows] for rows in packed.tolist()]
    return torch.tensor(bits, dtype=torch.bool)


@pytest.mark.parametrize("size", [1, 7, 8, 43, 64])
def test_packed_masks_come_back(size):
    script = importlib.import_module("nlpo_causal")
    mask = torch.rand(3, 5, size, generator=torch.Generator().manual_seed(size)) < 0.4
    packed = script.pack(mask)
    assert packed.shape == (3, 5, -(-size // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, size), mask)
    logits = torch.randn(3, 5, size)
    within = script.within_mask(logits, SimpleNamespace(action_masks=packed))
    assert torch.equal(within > -torch.inf, mask) and torch.equal(within[mask], logits[mask])
    assert script.within_mask(logits, SimpleNamespace()) is logits


@pytest.mark.parametrize("mask_type", ["learned_top_p", "learned_top_k", "top_k"])
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_keeps_to_the_mask_and_renormalises(kind, mask_type):
    """Tokens are inside; masks are those of the masking policy in one pass; restricted probabilities sum to 1."""
    script = importlib.import_module(f"nlpo_{kind}")
    policy, mask_model = tiny_model(kind, 0), tiny_model(kind, 1)
    mask_model = policy if mask_type == "top_k" else mask_model
    masking = dict(
        mask_type=mask_type,
        top_mask=0.5 if mask_type == "learned_top_p" else 6,
        min_tokens_to_keep=1,
        special_ids=[0, 1],
    )
    behaviour = dict(temperature=1.3, min_response_length=2, eos=torch.tensor([1]))
    queries = torch.randint(2, 43, (40, 5), generator=torch.Generator().manual_seed(0))
    query_mask = torch.ones_like(queries, dtype=torch.bool)
    uniform = script.uniforms(0, 1, range(40), 6)
    responses, alive, sampled_logprobs, mass, kept, packed = script.sample_responses(
        policy, queries, query_mask, uniform, behaviour, 0, mask_model=mask_model, **masking
    )
    masks = unpack(packed, 43)
    assert torch.equal(alive, torch.cat([torch.zeros(40, 1), (responses == 1).cumsum(1)[:, :-1]], 1) == 0)
    assert masks.gather(-1, responses.unsqueeze(-1)).squeeze(-1)[alive].all() and masks[..., :2].all()
    assert torch.equal(masks.sum(-1)[alive], kept.long()[alive]) and masks[~alive].all()

    mb = SimpleNamespace(queries=queries, query_mask=query_mask, responses=responses, mask=alive)
    with torch.no_grad():
        whole = script.behaviour_logits(script.response_logits(mask_model, mb), 0, **behaviour)
        for b in range(40):
            expected = naive_mask(whole[b], mask_type, masking["top_mask"], 1, [0, 1])
            assert torch.equal(masks[b][alive[b]], expected[alive[b]])
        probs = script.behaviour_logits(script.response_logits(policy, mb), 0, **behaviour).softmax(-1)
        restricted = probs * masks
        total = restricted.sum(-1)
    assert torch.allclose(mass[alive], total[alive], atol=1e-5)
    batch = vars(mb)
    arguments = (behaviour, dict(device_type="cpu", enabled=False), SimpleNamespace(micro_batch_size=7))
    models = (policy, policy, script.ValueModel(policy, None))
    passes = [script.rollout_passes(*models, b, *arguments) for b in (batch | dict(action_masks=packed), batch)]
    (logprobs, unmasked, ref, entropy, _), (free, free_too, *_) = passes
    sampled = restricted.gather(-1, responses.unsqueeze(-1)).squeeze(-1) / total
    assert torch.allclose(logprobs.exp()[alive], sampled[alive], atol=1e-5)
    assert torch.allclose(sampled_logprobs[alive], logprobs[alive], atol=1e-4)
    normalised = restricted / total.unsqueeze(-1)
    assert torch.allclose(entropy[alive], torch.special.entr(normalised).sum(-1)[alive], atol=1e-4)
    # the released behaviour's ratio is the unrestricted one, and the reference knows no mask
    assert torch.equal(free, unmasked) and torch.equal(free, free_too) and torch.equal(ref, unmasked)
    assert (logprobs[alive] > unmasked[alive] - 1e-6).all() and not logprobs[~alive].any()


@pytest.mark.parametrize("kind", KINDS)
def test_another_masking_policy_masks_otherwise(kind):
    """The sampler looks at the mask model that it is given, not at a copy from before."""
    script = importlib.import_module(f"nlpo_{kind}")
    policy, mask_model = tiny_model(kind, 0), tiny_model(kind, 0)
    masking = dict(mask_type="learned_top_p", top_mask=0.5, min_tokens_to_keep=1, special_ids=[0, 1])
    behaviour = dict(temperature=1.0, min_response_length=6, eos=torch.tensor([1]))
    queries = torch.randint(2, 43, (8, 5), generator=torch.Generator().manual_seed(0))
    arguments = (
        queries,
        torch.ones_like(queries, dtype=torch.bool),
        script.uniforms(0, 1, range(8), 6),
        behaviour,
        0,
    )
    options = dict(mask_model=mask_model, **masking)
    before = script.sample_responses(policy, *arguments, **options)
    again = script.sample_responses(policy, *arguments, **options)
    mask_model.load_state_dict(tiny_model(kind, 3).state_dict())
    after = script.sample_responses(policy, *arguments, **options)
    assert torch.equal(before[-1], again[-1]) and not torch.equal(before[-1], after[-1])


def checkpoint(run_dir, name="latest"):
    return torch.load(run_dir / "checkpoint" / f"{name}.pt", weights_only=True)


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_mask_is_renewed_when_it_should_be_and_only_then(kind, tmp_path, texts, digits):
    def go(name, **changes):
        run_dir = tmp_path / name
        settings = SETTINGS | dict(task=texts, reward=digits, run_dir=run_dir) | changes
        run_ok(f"nlpo_{kind}", flags(f"nlpo_{kind}", **settings), tmp_path)
        return run_dir

    every_second, never = go("every_second", target_update_iterations=2), go("never", target_update_iterations=0)
    second, third = (checkpoint(every_second, name) for name in ("previous", "latest"))
    start = checkpoint(never, "previous")["mask_model"]
    assert equal(start, checkpoint(never)["mask_model"])
    assert not equal(start, second["mask_model"])
    assert equal(second["mask_model"], second["policy"]) and equal(third["mask_model"], second["policy"])
    assert not equal(third["mask_model"], third["policy"])
    ages = [
        [row["rollout/iterations_since_refresh"] for row in rows(run / "metrics.jsonl")]
        for run in (every_second, never)
    ]
    assert ages == [[1, 2, 1], [1, 2, 3]]
    one, other = (rows(run / "metrics.jsonl") for run in (every_second, never))
    assert one[:2] == [row | {"rollout/iterations_since_refresh": i + 1} for i, row in enumerate(other[:2])]
    assert one[2]["rollout/mask_mass"] != other[2]["rollout/mask_mass"]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_goes_on_with_its_masking_policy(kind, tmp_path, texts, digits):
    """Stopped between two renewals: the masking policy is neither the start model nor the policy of that moment."""

    def go(name, **changes):
        settings = SETTINGS | dict(task=texts, reward=digits, run_dir=tmp_path / name, target_update_iterations=2)
        run_ok(f"nlpo_{kind}", flags(f"nlpo_{kind}", **settings | changes), tmp_path)
        return tmp_path / name

    whole = go("whole", num_iterations=5)
    go("parts", num_iterations=3)
    parts = go("parts", num_iterations=5, resume=True)
    assert rows(whole / "metrics.jsonl") == rows(parts / "metrics.jsonl")
    assert equal(weights(whole), weights(parts))
    assert equal(checkpoint(whole)["mask_model"], checkpoint(parts)["mask_model"])


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mask_it_is_ppo(kind, tmp_path, texts, digits):
    runs = []
    for script in (f"ppo_{kind}", f"nlpo_{kind}"):
        settings = SETTINGS | dict(task=texts, reward=digits, run_dir=tmp_path / script, top_mask=1.0)
        run_ok(script, flags(script, **settings), tmp_path)
        runs.append(tmp_path / script)
    ppo, nlpo = map(weights, runs)
    assert all((ppo[name] - nlpo[name]).abs().max() <= 1e-6 for name in ppo)
    last = rows(runs[1] / "metrics.jsonl")[-1]
    assert last["rollout/mask_bite_fraction"] == 0 and last["rollout/mask_kept_fraction"] == 1
    for one, two in zip(*(rows(run / "metrics.jsonl") for run in runs), strict=True):
        assert {name for name in one if name.startswith(("objective/", "losses/"))} <= two.keys()
        assert all(abs(one[name] - two[name]) <= 1e-6 for name in one if name.startswith(("objective/", "losses/")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_bites_reaches_the_loss(kind, tmp_path, texts, digits):
    """In the original the mask drops out of the policy loss: gradients with real masks and with none are equal."""
    runs = []
    for ratio in ("masked", "unmasked"):
        settings = SETTINGS | dict(task=texts, reward=digits, run_dir=tmp_path / ratio, top_mask=0.3, ratio=ratio)
        settings |= dict(vf_coef=0)  # the gradient of the policy alone
        run_ok(f"nlpo_{kind}", flags(f"nlpo_{kind}", **settings), tmp_path)
        runs.append(rows(tmp_path / ratio / "metrics.jsonl"))
    masked, unmasked = runs
    assert masked[0]["rollout/mask_bite_fraction"] > 0.9
    assert masked[0]["objective/score"] == unmasked[0]["objective/score"]  # the same first rollout
    assert masked[0]["losses/grad_norm"] != pytest.approx(unmasked[0]["losses/grad_norm"], rel=1e-3)
    assert masked[0]["objective/kl"] == unmasked[0]["objective/kl"]  # the penalty is of the unrestricted policy
