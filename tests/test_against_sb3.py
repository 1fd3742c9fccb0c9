"""PPO, A2C and TRPO against the numbers of stable-baselines3 and sb3-contrib (oracles/make_sb3_numbers.py).

Steps 5 and 6 of the scripts' main loops are executed as they stand in the files, on the stored rollout and with the
scripts' own classes around a tabular policy; what they leave is compared with what the libraries left.
"""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from script_runs import SCRIPTS
from script_steps import run_steps, table_problem

NUMBERS = json.loads((Path(__file__).parent / "oracles" / "sb3_numbers.json").read_text())
PPO = [("ppo_seq2seq", True), ("ppo_causal", False)]
BOTH = [True, False]
needs_a2c = pytest.mark.skipif("a2c" not in SCRIPTS, reason="no a2c.py of this shape")


def problem(script, seq2seq, **settings):
    """The stored rollout, sampled by the policy `old`, for an agent with the weights `start`."""
    settings = dict(gamma=NUMBERS["gamma"], gae_lambda=NUMBERS["gae_lambda"]) | settings
    variables = table_problem(script, seq2seq, NUMBERS["problem"], NUMBERS["start"], **settings)
    padded = variables["padded"]
    return variables | dict(logprobs=padded(NUMBERS["old_logprobs"]), values=padded(NUMBERS["old_values"]))


def assert_weights(variables, end, rtol=2e-4, atol=2e-5):
    """The agent's weights are those that the library ended with."""
    for parameter, name in (
        (variables["linear"].weight, "policy_weight"),
        (variables["linear"].bias, "policy_bias"),
        (variables["value_model"].head.weight, "value_weight"),
    ):
        torch.testing.assert_close(parameter.detach(), torch.tensor(end[name]), rtol=rtol, atol=atol)


def parameters(variables):
    return [p for name in ("policy", "value_model") for p in variables[name].parameters()]


def clip_together(module, variables):
    """The library clips one norm of policy and critic, the script (tests/test_steps.py) each its own."""
    both = torch.nn.ModuleList([variables["policy"], variables["value_model"]])

    def clip(model, max_norm):
        return module.sum_and_clip_gradients(both, max_norm) if model is variables["policy"] else torch.zeros(())

    return clip


def close(value):
    return pytest.approx(value, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("script, seq2seq", [*PPO, *[(s, s == "a2c") for s in ("a2c", "trpo") if s in SCRIPTS]])
def test_gae(script, seq2seq):
    after = run_steps(script, 5, 5, **problem(script, seq2seq))
    mask = after["mask"]
    for name in ("advantages", "returns"):
        torch.testing.assert_close(after[name][mask], torch.tensor(NUMBERS[name]), rtol=1e-5, atol=1e-5)
    assert not after["advantages"][~mask].any()


def ppo_settings(case):
    """The library's settings under the script's names."""
    names = dict(
        n_epochs="update_epochs", clip_range="clip_coef", clip_range_vf="clip_vf_coef", target_kl="early_stop_kl",
        normalize_advantage="norm_adv",
    )  # fmt: skip
    defaults = dict(clip_coef=0.2, clip_vf_coef=None, early_stop_kl=None, norm_adv=True, ent_coef=0.0, vf_coef=0.5)
    return defaults | dict(max_grad_norm=0.5) | {names.get(name, name): v for name, v in case["settings"].items()}


@pytest.mark.parametrize("script, seq2seq", PPO)
@pytest.mark.parametrize("case", NUMBERS["ppo"], ids=lambda case: " ".join(case["settings"]))
def test_ppo(script, seq2seq, case):
    """Losses and figures at ratios away from 1, and the weights after the steps: losses' signs, weights, clipping."""
    settings = ppo_settings(case)
    variables = problem(script, seq2seq, **settings)
    optimizer = torch.optim.SGD(parameters(variables), lr=settings["learning_rate"])
    variables["sum_and_clip_gradients"] = clip_together(importlib.import_module(script), variables)
    after = run_steps(script, 5, 6, **variables, optimizer=optimizer)
    assert_weights(variables, case["end"])
    names = ("policy", "value", "approx_kl", "clipfrac", "ratio", "updated")
    sums = dict(zip(names, after["update_sums"].tolist(), strict=True))
    figures, logged = {name: total / sums["updated"] for name, total in sums.items()}, case["logged"]
    assert figures["policy"] == close(logged["policy_gradient_loss"])
    assert figures["value"] == close(logged["value_loss"])
    assert figures["clipfrac"] == close(logged["clip_fraction"])
    if settings["update_epochs"] == 1:  # of several epochs, the library logs the last one's KL
        assert figures["approx_kl"] == close(logged["approx_kl"])


def test_ppo_cases_reach_every_branch():
    """The stored cases clip ratios and values, stop early, and clip the gradient."""
    assert all(case["logged"]["clip_fraction"] > 0.1 for case in NUMBERS["ppo"])
    stopped = [case for case in NUMBERS["ppo"] if case["logged"]["n_updates"] < case["settings"]["n_epochs"]]
    assert stopped and all("target_kl" in case["settings"] for case in stopped)
    assert len({case["logged"]["value_loss"] for case in NUMBERS["ppo"]}) == len(NUMBERS["ppo"])


@needs_a2c
@pytest.mark.parametrize("seq2seq", BOTH)
@pytest.mark.parametrize("case", NUMBERS["a2c"], ids=lambda case: f"{case['optimizer']} {' '.join(case['settings'])}")
def test_a2c(seq2seq, case):
    import a2c

    settings = dict(norm_adv=False, ent_coef=0.0, vf_coef=0.5, max_grad_norm=0.5) | case["settings"]
    settings["norm_adv"] = settings.pop("normalize_advantage", False)
    variables = problem("a2c", seq2seq, **settings)
    optimizer = torch.optim.SGD(parameters(variables), lr=settings["learning_rate"])
    if case["optimizer"] == "rmsprop":
        line = re.search(r"torch\.optim\.RMSprop\(.+\)", inspect.getsource(a2c.main))[0]  # the script's, not a copy
        optimizer = eval(line, vars(a2c) | variables | dict(trained=parameters(variables)))
    variables["sum_and_clip_gradients"] = clip_together(a2c, variables)
    after = run_steps("a2c", 5, 6, **variables, optimizer=optimizer)
    assert_weights(variables, case["end"])
    policy, value = (after["update_sums"] / after["mask"].sum()).tolist()[:2]
    assert policy == close(case["logged"]["policy_loss"])
    assert value == close(case["logged"]["value_loss"])


@pytest.mark.parametrize("script, seq2seq", PPO)
def test_entropy(script, seq2seq):
    """The entropy that the bonus is of, at the start weights."""
    variables, module = problem(script, seq2seq), importlib.import_module(script)
    (mb,) = (mb for _, mb in module.micro_batches(variables["batch"], variables["B"]))
    entropy = module.token_entropy(module.response_logits(variables["policy"], mb))
    assert entropy[mb.mask].mean().item() == close(-NUMBERS["a2c"][0]["logged"]["entropy_loss"])


@pytest.mark.parametrize("seq2seq", BOTH)
@pytest.mark.parametrize("case", NUMBERS["trpo"], ids=lambda case: " ".join(case["settings"]))
def test_trpo(seq2seq, case):
    """Three iterations on the same responses: natural gradient, line search and critic.

    One case takes full steps, one has to shorten its first, and one, allowed a single try, takes none.
    """
    names = dict(
        target_kl="delta", cg_max_steps="cg_steps", line_search_max_iter="line_search_steps",
        line_search_shrinking_factor="line_search_factor", n_critic_updates="critic_epochs",
    )  # fmt: skip
    settings = dict(delta=0.01, cg_steps=15, cg_damping=0.1, line_search_steps=10, line_search_factor=0.8)
    settings |= {names.get(name, name): value for name, value in case["settings"].items()} | dict(norm_adv=True)
    variables = problem("trpo", seq2seq, **settings)
    optimizer = torch.optim.Adam(variables["value_model"].parameters(), lr=settings["learning_rate"])
    import trpo

    actor = trpo.BehaviourPolicy(*(variables[name] for name in ("policy", "behaviour", "autocast")))
    variables |= dict(actor=actor, parameters={n: p for n, p in actor.named_parameters() if p.requires_grad})
    tries = []
    for step in case["steps"]:
        passes = (variables["policy"], variables["policy"], variables["value_model"], variables["batch"])
        logprobs, _, _, values = trpo.rollout_passes(
            *passes, variables["behaviour"], variables["autocast"], variables["args"]
        )
        variables |= dict(logprobs=logprobs, values=values)
        after = run_steps("trpo", 5, 6, **variables, optimizer=optimizer)
        logged = step["logged"]
        assert after["accepted"] == bool(logged["is_line_search_success"])
        tries.append(after["line_search_steps"])
        assert_weights(variables, step["end"], rtol=1e-3, atol=5e-4)  # conjugate gradients in float32 amplify rounding
        # advantages have mean 0, so that the surrogate is what it has improved by
        assert after["improvement"] == pytest.approx(logged["policy_objective"], rel=2e-3, abs=1e-5)
        assert after["kl_after"] == pytest.approx(step["kl_old_new"], rel=2e-3, abs=1e-6)
        value_loss = after["value_sum"].item() / (after["num_tokens"].item() * settings["critic_epochs"])
        assert value_loss == close(logged["value_loss"])
    assert (max(tries) > 1) == ("line_search_shrinking_factor" in case["settings"])


def test_trpo_cases_reach_every_branch():
    accepted = [[step["logged"]["is_line_search_success"] for step in case["steps"]] for case in NUMBERS["trpo"]]
    assert accepted == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
