"""trpo.py's own parts: Fisher-vector products, conjugate gradients, the line search, micro-batches and processes.

The update is executed as it stands in the script (script_steps.run_steps), on random models of a few hundred weights.
"""

import copy
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from script_runs import TINY, flags, rows, run_ok, weights
from script_steps import run_steps
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import trpo

VOCAB, EOS, B, Q, T = 11, 1, 6, 4, 5
SETTINGS = dict(
    seed=1, batch_size=B, micro_batch_size=6, norm_adv=True, gamma=0.99, gae_lambda=0.95, delta=0.01, cg_steps=15,
    cg_damping=0.1, line_search_steps=10, line_search_factor=0.8, critic_epochs=2,
)  # fmt: skip
NO_AUTOCAST = dict(device_type="cpu", dtype=torch.bfloat16, enabled=False)


def tiny_policy(kind):
    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(
            vocab_size=VOCAB, d_model=4, d_kv=2, d_ff=6, num_layers=1, num_heads=2, relative_attention_num_buckets=4,
            pad_token_id=0, eos_token_id=EOS, decoder_start_token_id=0,
        )  # fmt: skip
        policy = T5ForConditionalGeneration(config)
    elif kind == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=Q + T, pad_token_id=0, eos_token_id=EOS, bos_token_id=0,
        )  # fmt: skip
        policy = LlamaForCausalLM(config)
    else:
        config = GPT2Config(vocab_size=VOCAB, n_positions=Q + T, n_embd=4, n_layer=1, n_head=2, eos_token_id=EOS)
        policy = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy.eval()


def rollout(kind, min_response_length=0, temperature=1.0, **settings):
    """The variables that step 6 finds, with random responses of different lengths and random advantages."""
    policy = tiny_policy(kind)
    value_model = trpo.ValueModel(policy, None)
    torch.nn.init.normal_(value_model.head.weight)
    behaviour = dict(temperature=temperature, min_response_length=min_response_length, eos=torch.tensor([EOS]))
    actor, generator = trpo.BehaviourPolicy(policy, behaviour, NO_AUTOCAST), torch.Generator().manual_seed(1)
    lengths, query_lengths = torch.tensor([5, 2, 4, 5, 3, 5]), torch.tensor([4, 1, 3, 2, 4, 2])
    mask = torch.arange(T) < lengths.unsqueeze(1)
    query_mask = torch.arange(Q) < query_lengths.unsqueeze(1)
    query_mask = query_mask if policy.config.is_encoder_decoder else query_mask.flip(1)
    queries = torch.randint(2, VOCAB, (B, Q), generator=generator).masked_fill(~query_mask, 0)
    responses = torch.randint(2, VOCAB, (B, T), generator=generator).masked_fill(~mask, 0)
    batch = dict(queries=queries, query_mask=query_mask, responses=responses, mask=mask)
    with torch.no_grad():
        logprobs = trpo.token_logprobs(actor(SimpleNamespace(**batch)), responses).masked_fill(~mask, 0.0)
        values = value_model(SimpleNamespace(**batch)).masked_fill(~mask, 0.0)
    advantages = torch.randn(B, T, generator=generator).masked_fill(~mask, 0.0)
    return dict(
        args=trpo.Args(**(SETTINGS | settings)), iteration=7, rank=0, world_size=1, device=torch.device("cpu"), B=B,
        autocast=NO_AUTOCAST, batch=batch, mask=mask, responses=responses, logprobs=logprobs, policy=policy,
        value_model=value_model, actor=actor, parameters=dict(actor.named_parameters()), advantages=advantages,
        returns=advantages + values, optimizer=torch.optim.Adam(value_model.parameters(), lr=0.01),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_the_actor_computes_under_autocast_with_a_head_in_float32(kind):
    variables = rollout(kind)
    policy, mb = variables["policy"], SimpleNamespace(**variables["batch"])
    trpo.prepare_model(policy, torch.device("cpu"), fsdp=False, recompute=False)
    autocast = NO_AUTOCAST | dict(enabled=True)
    with torch.no_grad():
        exact, rounded = (
            variables["actor"](mb),
            trpo.BehaviourPolicy(policy, variables["actor"].behaviour, autocast)(mb),
        )
        with torch.autocast(**autocast):
            expected = trpo.response_logits(policy, mb)
    assert torch.equal(rounded, expected) and rounded.dtype == torch.float32 and not torch.equal(rounded, exact)


def all_logits(variables, policy=None):
    """Logits (tokens, V) of all response tokens, tempered and without EOS where it is too early."""
    behaviour = variables["actor"].behaviour
    logits = trpo.response_logits(policy or variables["policy"], SimpleNamespace(**variables["batch"]))
    early = torch.zeros_like(logits, dtype=torch.bool)
    early[:, : behaviour["min_response_length"], EOS] = True
    return (logits / behaviour["temperature"]).masked_fill(early, -math.inf)[variables["mask"]]


def dense_fisher(variables):
    """E[sum_a p(a) grad log p(a) grad log p(a)'], its definition, from one backward pass for each token and action."""
    parameters = list(variables["policy"].parameters())
    logprobs = all_logits(variables).log_softmax(-1)
    size = sum(p.numel() for p in parameters)
    fisher = torch.zeros(size, size, dtype=torch.float64)
    for token in range(len(logprobs)):
        for action in range(VOCAB):
            if logprobs[token, action] > -math.inf:
                gradients = torch.autograd.grad(logprobs[token, action], parameters, retain_graph=True)
                score = trpo.flatten(gradients).double()
                fisher += logprobs[token, action].exp().item() * torch.outer(score, score)
    return fisher / len(logprobs)


def fisher_batches(variables, size):
    return [mb for _, mb in trpo.micro_batches(variables["batch"], size)]


@pytest.mark.parametrize("kind", ["gpt2", "t5", "llama"])
def test_fisher_vector_product(kind):
    """Against the dense matrix, with a temperature and with EOS banned from the first two positions."""
    variables = rollout(kind, min_response_length=2, temperature=0.8)
    fisher, num_tokens = dense_fisher(variables), variables["mask"].sum()
    assert len(fisher) < 900
    for seed, damping, size in ((0, 0.0, 6), (1, 0.1, 4), (2, 0.0, 1)):
        vector = torch.randn(len(fisher), generator=torch.Generator().manual_seed(seed))
        given = variables["actor"], variables["parameters"], fisher_batches(variables, size), num_tokens, damping
        got = trpo.fisher_vector_product(*given, vector)
        wanted = fisher @ vector.double() + damping * vector
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert all(p.grad is None for p in variables["policy"].parameters())


def test_fisher_vector_product_in_bfloat16():
    """Under autocast the product is near the exact one, and float32."""
    variables = rollout("gpt2")
    fisher, vector = dense_fisher(variables), torch.randn(sum(p.numel() for p in variables["policy"].parameters()))
    batches, num_tokens = fisher_batches(variables, 6), variables["mask"].sum()
    variables["actor"].autocast = NO_AUTOCAST | dict(enabled=True)
    got = trpo.fisher_vector_product(variables["actor"], variables["parameters"], batches, num_tokens, 0.0, vector)
    wanted = fisher @ vector.double()
    assert got.dtype == torch.float32
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_conjugate_gradient():
    """Against numpy.linalg.solve; n steps solve n equations, fewer stop short, and 0 = 0 needs none."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(12, 12))
    matrix, b = root @ root.T / 12 + 0.5 * np.eye(12), rng.normal(size=12)
    A, b32 = torch.tensor(matrix, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    x = trpo.conjugate_gradient(lambda v: A @ v, b32, 15)
    np.testing.assert_allclose(x.numpy(), np.linalg.solve(matrix, b), rtol=1e-3, atol=1e-4)
    few = trpo.conjugate_gradient(lambda v: A @ v, b32, 3)
    assert 1e-3 < (A @ few - b32).norm() < b32.norm()
    calls = []
    zero = trpo.conjugate_gradient(lambda v: calls.append(v), torch.zeros(12), 15)
    assert not zero.any() and not calls
    assert trpo.dot(torch.tensor([1e8, 1.0, -1e8]), torch.ones(3)) == 1  # float32 would lose the 1


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(delta=0.5, cg_damping=1e-3), dict(norm_adv=False)],
    ids=["defaults", "long steps", "plain advantages"],
)
def test_an_accepted_step(kind, settings):
    """KL(old || new) < delta and a surrogate that has risen, recomputed from the weights before and after."""
    variables = rollout(kind, min_response_length=2, temperature=0.8, **settings)
    old = copy.deepcopy(variables["policy"])
    after = run_steps("trpo", 6, 6, **variables)
    torch.testing.assert_close(  # the policy has taken just this step
        trpo.flatten(variables["policy"].parameters()),
        trpo.flatten(old.parameters()) + after["step_size"] * after["direction"],
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    mask, args = variables["mask"], variables["args"]
    with torch.no_grad():
        old_logits, new_logits = all_logits(variables, old).double(), all_logits(variables).double()
    p, q = F.softmax(old_logits, -1), F.softmax(new_logits, -1)
    kl = torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1).mean().item()
    actions, advantages = variables["responses"][mask].unsqueeze(1), variables["advantages"][mask].double()
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std()
    ratio = (q.gather(1, actions) / p.gather(1, actions)).squeeze(1)
    assert after["accepted"] and 0 < kl < args.delta
    assert (advantages * ratio).mean() > advantages.mean() + 1e-3
    assert after["kl_after"] == pytest.approx(kl, rel=1e-3)
    assert after["improvement"] == pytest.approx((advantages * (ratio - 1)).mean().item(), rel=1e-3)
    wanted = math.sqrt(2 * args.delta / after["curvature"]) * 0.8 ** (after["line_search_steps"] - 1)
    assert after["step_size"] == pytest.approx(wanted)
    if args.delta == 0.5:
        assert after["line_search_steps"] > 1  # the first lengths went too far
    else:  # the length was chosen by the second-order estimate of the KL, which holds for short steps
        undamped = after["fisher"](after["direction"]) - args.cg_damping * after["direction"]
        estimate = after["step_size"] ** 2 / 2 * trpo.dot(after["direction"], undamped)
        assert kl == pytest.approx(estimate, rel=0.5)


@pytest.mark.parametrize("case", ["too far", "no gradient"])
def test_a_rejected_step(case, capsys):
    """The policy keeps every bit, the log says so, and the critic still learns."""
    variables = rollout("gpt2", **(dict(delta=0.5, cg_damping=1e-3, line_search_steps=1) if case == "too far" else {}))
    if case == "no gradient":
        variables["advantages"] = torch.zeros(B, T)
    before, critic = (copy.deepcopy(variables[name].state_dict()) for name in ("policy", "value_model"))
    after = run_steps("trpo", 6, 6, **variables)
    assert not after["accepted"] and after["line_search_steps"] == variables["args"].line_search_steps
    assert all(torch.equal(before[name], tensor) for name, tensor in variables["policy"].state_dict().items())
    assert after["improvement"] == after["kl_after"] == after["step_size"] == 0.0
    assert "iteration 7: no step" in capsys.readouterr().out
    assert any(not torch.equal(critic[name], tensor) for name, tensor in variables["value_model"].state_dict().items())


@pytest.mark.parametrize(
    "improvement, kl, accepted",
    [(1e-6, 0.99, True), (1e-6, 1.01, False), (0.0, 0.5, False), (-1e-6, 0.5, False)],
)
def test_limits_of_the_line_search(improvement, kl, accepted):
    """A step is taken if it improves the surrogate, however little, and stays below delta, however near."""
    variables = rollout("gpt2")
    variables["surrogate_and_kl"] = lambda *_: (improvement, kl * variables["args"].delta)
    after = run_steps("trpo", 6, 6, **variables)
    assert after["accepted"] == accepted
    assert after["line_search_steps"] == (1 if accepted else variables["args"].line_search_steps)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_micro_batches_change_nothing(kind):
    """Sums are weighted by tokens, also where micro-batches have different numbers of them.

    With plain gradient descent for the critic, since Adam makes whole steps of rounding errors where the gradient is 0,
    and few, well damped steps of conjugate gradients, since these amplify rounding errors too.
    """
    results = []
    for size in (6, 4, 1):
        variables = rollout(kind, micro_batch_size=size, cg_steps=4, cg_damping=1.0)
        variables["optimizer"] = torch.optim.SGD(variables["value_model"].parameters(), lr=0.01)
        after = run_steps("trpo", 6, 6, **variables)
        policy, value_model = (trpo.flatten(variables[name].parameters()) for name in ("policy", "value_model"))
        figures = torch.tensor([after["improvement"], after["kl_after"], after["step_size"]])
        results.append((policy.detach(), value_model.detach(), figures))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


def test_graphs_do_not_outlive_their_micro_batch():
    """Of a rollout of many micro-batches, at most one's logits are there at a time."""
    variables = rollout("gpt2", micro_batch_size=1)
    alive, most, forward = [], 0, trpo.BehaviourPolicy.forward

    def counted(*args):
        nonlocal most
        logits = forward(*args)
        alive[:] = [reference for reference in alive if reference() is not None]
        alive.append(torch.utils.weak.TensorWeakRef(logits))
        most = max(most, len(alive))
        return logits

    variables["actor"].forward = functools.partial(counted, variables["actor"])
    run_steps("trpo", 6, 6, **variables)
    assert most <= 4  # of the micro-batch before, not yet let go: old and new


def test_warming_up():
    """At first the critic alone learns."""
    variables = rollout("gpt2", value_warmup_iterations=7)
    before, critic = (copy.deepcopy(variables[name].state_dict()) for name in ("policy", "value_model"))
    run_steps("trpo", 6, 6, **variables)
    assert all(torch.equal(before[name], tensor) for name, tensor in variables["policy"].state_dict().items())
    assert any(not torch.equal(critic[name], tensor) for name, tensor in variables["value_model"].state_dict().items())


def test_no_forward_derivatives():
    """A model with an operation that knows no dual numbers is refused in one line, another is not."""
    variables = rollout("gpt2")
    given = variables["actor"], variables["parameters"], variables["batch"]["queries"], variables["batch"]["query_mask"]
    args = SimpleNamespace(model="some/model")
    trpo.check_derivatives(*given, args)

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    variables["policy"].transformer.ln_f.register_forward_hook(lambda module, inputs, output: Plain.apply(output))
    with pytest.raises(trpo.UsageError, match="some/model: gpt2 does not fit this script: TRPO needs forward"):
        trpo.check_derivatives(*given, args)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_two_processes(kind, tmp_path, texts, digits):
    """Two processes and other micro-batches give what one gives; the critic's optimizer goes on from a checkpoint."""
    settings = dict(task=texts, policy_type=kind, reward=digits, num_iterations=3, delta=0.05, cg_steps=6)
    words = flags("trpo", **TINY | settings | dict(learning_rate=3e-3, critic_epochs=3))
    run_ok("trpo", [*words, "--run-dir", "one"], tmp_path)
    run_ok("trpo", [*words, "--run-dir", "two", "--micro-batch-size", "3"], tmp_path, processes=2)
    one, two = rows(tmp_path / "one" / "metrics.jsonl"), rows(tmp_path / "two" / "metrics.jsonl")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
        assert a["losses/accepted"] == 1 and 0 < a["losses/kl_after"] < 0.05 and a["losses/surrogate_improvement"] > 0
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-4, atol=1e-4)


def test_a_rejected_step_in_a_run(tmp_path, texts, digits):
    """metrics.jsonl says losses/accepted 0, and the model that is saved is the one before."""
    settings = dict(task=texts, policy_type="causal", reward=digits, num_iterations=2, eval_every=9)
    words = flags("trpo", **TINY | settings | dict(delta=1.0, cg_damping=1e-4, cg_steps=15, line_search_steps=1))
    result = run_ok("trpo", [*words, "--run-dir", "run"], tmp_path)
    figures = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["losses/accepted"] for row in figures] == [0.0, 0.0]
    assert [row["objective/kl"] for row in figures] == [0.0, 0.0]
    assert [row["losses/kl_after"] for row in figures] == [0.0, 0.0]
    assert "iteration 2: no step of 1 accepted, the policy stays as it is" in result.stdout + result.stderr
