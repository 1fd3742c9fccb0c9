"""Writes sb3_numbers.json: what stable-baselines3 and sb3-contrib compute on a small problem.

    pip install stable-baselines3==2.9.2 sb3-contrib==2.9.2
    python tests/oracles/make_sb3_numbers.py

The problem: eight responses of one to seven tokens over a vocabulary of six. The next token depends on the last one
alone, so that to stable-baselines3 it is a tabular environment: the last token is the observation (one-hot), the next
one the action; policy and value are a linear layer each. The rollout buffer holds the responses one behind the other.
Nothing here is changed in the libraries but the start of sb3-contrib's conjugate gradients, which is small random noise
there, and zero here and in trpo.py.
"""

import json
from pathlib import Path

import gymnasium
import numpy as np
import sb3_contrib
import stable_baselines3
import torch
from sb3_contrib import TRPO
from sb3_contrib.common import utils
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import configure

VOCAB, LENGTHS = 6, [7, 3, 5, 1, 6, 4, 7, 2]
GAMMA, GAE_LAMBDA = 0.97, 0.9


class Nothing(gymnasium.Env):
    """An environment that is never stepped: it only says what observations and actions are."""

    observation_space = gymnasium.spaces.Discrete(VOCAB)
    action_space = gymnasium.spaces.Discrete(VOCAB)


def make_problem(rng):
    """Responses and what happened in them. Token 0 starts a response, token 1 ends one."""
    actions, observations, starts, rewards = [], [], [], []
    for i, length in enumerate(LENGTHS):
        tokens = rng.integers(2, VOCAB, length).tolist()
        if i % 3:  # the others are cut at their greatest length
            tokens[-1] = 1
        actions += tokens
        observations += [0, *tokens[:-1]]
        starts += [True] + [False] * (length - 1)
        rewards += [*(-0.1 * rng.random(length - 1)).tolist(), float(rng.normal())]
    return dict(
        vocab=VOCAB, lengths=LENGTHS, actions=actions, observations=observations, starts=starts, rewards=rewards
    )


def make_weights(rng, scale):
    return dict(
        policy_weight=(scale * rng.normal(size=(VOCAB, VOCAB))).astype(np.float32).tolist(),
        policy_bias=(scale * rng.normal(size=VOCAB)).astype(np.float32).tolist(),
        value_weight=rng.normal(size=(1, VOCAB)).astype(np.float32).tolist(),
    )


def make_model(algorithm, weights, learning_rate, optimizer_class, optimizer_kwargs=None, **settings):
    size = sum(LENGTHS)
    model = algorithm(
        "MlpPolicy",
        Nothing(),
        n_steps=size,
        learning_rate=learning_rate,
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        policy_kwargs=dict(net_arch=[], optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs),
        device="cpu",
        **settings,
    )
    model.set_logger(configure(None, []))
    with torch.no_grad():
        model.policy.action_net.weight.copy_(torch.tensor(weights["policy_weight"]))
        model.policy.action_net.bias.copy_(torch.tensor(weights["policy_bias"]))
        model.policy.value_net.weight.copy_(torch.tensor(weights["value_weight"]))
        model.policy.value_net.bias.zero_()
    model.policy.value_net.bias.requires_grad_(False)
    return model


def fill_buffer(model, problem, logprobs=None, values=None):
    """The rollout, with the given log-probs and values, or those of the model itself. Returns both."""
    observations, actions = torch.tensor(problem["observations"]), torch.tensor(problem["actions"])
    with torch.no_grad():
        own_values, own_logprobs, _ = model.policy.evaluate_actions(observations, actions)
    values = own_values.flatten() if values is None else torch.tensor(values)
    logprobs = own_logprobs if logprobs is None else torch.tensor(logprobs)
    buffer = model.rollout_buffer
    buffer.reset()
    for i in range(len(actions)):
        step = (observations[i : i + 1].numpy(), actions[i : i + 1].numpy(), np.array([problem["rewards"][i]]))
        buffer.add(*step, np.array([problem["starts"][i]]), values[i : i + 1], logprobs[i : i + 1])
    buffer.compute_returns_and_advantage(torch.zeros(1), np.array([True]))
    return logprobs.tolist(), values.tolist()


def weights_of(model):
    policy = model.policy
    return dict(
        policy_weight=policy.action_net.weight.tolist(),
        policy_bias=policy.action_net.bias.tolist(),
        value_weight=policy.value_net.weight.tolist(),
    )


@torch.no_grad()
def distributions(model, problem):
    return model.policy.get_distribution(torch.tensor(problem["observations"])).distribution


def logged(model):
    values = model.logger.name_to_value.items()
    return {name.removeprefix("train/"): float(value) for name, value in values if name.startswith("train/")}


def main():
    rng = np.random.default_rng(0)
    problem, old, start = make_problem(rng), make_weights(rng, 0.7), make_weights(rng, 0.7)
    # the policy to train is some way from the one that sampled, so that ratios are clipped
    start |= {name: (np.array(old[name]) + 0.25 * np.array(start[name])).tolist() for name in old}
    size, sgd, problem_old = sum(LENGTHS), torch.optim.SGD, None
    numbers = dict(
        versions={m.__name__: m.__version__ for m in (stable_baselines3, sb3_contrib)},
        problem=problem, old=old, start=start, gamma=GAMMA, gae_lambda=GAE_LAMBDA, ppo=[], a2c=[], trpo=[],
    )  # fmt: skip

    for settings in (
        dict(n_epochs=1),
        dict(n_epochs=1, clip_range_vf=0.3, ent_coef=0.05),
        dict(n_epochs=3, normalize_advantage=False, vf_coef=0.7, clip_range=0.1),
        dict(n_epochs=3, clip_range_vf=0.2, ent_coef=0.01, max_grad_norm=10.0),
        dict(n_epochs=8, target_kl=0.03, learning_rate=2.0, normalize_advantage=False),
    ):
        options = dict(learning_rate=0.5) | settings
        model = make_model(PPO, old, optimizer_class=sgd, batch_size=size, **options)
        problem_old = fill_buffer(model, problem)
        model = make_model(PPO, start, optimizer_class=sgd, batch_size=size, **options)
        fill_buffer(model, problem, *problem_old)
        buffer = model.rollout_buffer
        numbers |= dict(old_logprobs=problem_old[0], old_values=problem_old[1])
        numbers |= dict(advantages=buffer.advantages.flatten().tolist(), returns=buffer.returns.flatten().tolist())
        model.train()
        numbers["ppo"].append(dict(settings=options, logged=logged(model), end=weights_of(model)))

    for name, settings in (
        ("sgd", dict()),
        ("sgd", dict(normalize_advantage=True, ent_coef=0.05, max_grad_norm=10.0, vf_coef=0.3)),
        ("rmsprop", dict(learning_rate=0.01)),
    ):
        options = dict(learning_rate=0.5) | settings
        kind = dict(use_rms_prop=name == "rmsprop", optimizer_class=sgd if name == "sgd" else torch.optim.RMSprop)
        if name == "rmsprop":
            kind["optimizer_kwargs"] = dict(alpha=0.99, eps=1e-5, weight_decay=0)
        model = make_model(A2C, start, **options, **kind)
        fill_buffer(model, problem, *problem_old)
        model.train()
        numbers["a2c"].append(dict(optimizer=name, settings=options, logged=logged(model), end=weights_of(model)))

    utils.th.randn_like = torch.zeros_like
    for settings in (
        dict(),
        dict(target_kl=0.4, cg_damping=0.01, cg_max_steps=8, line_search_shrinking_factor=0.5),
        dict(target_kl=0.4, cg_damping=0.01, cg_max_steps=8, line_search_max_iter=1),
    ):
        options = dict(learning_rate=0.05, n_critic_updates=10) | settings
        adam = dict(optimizer_class=torch.optim.Adam, optimizer_kwargs=dict(eps=1e-8))
        model, steps = make_model(TRPO, start, batch_size=size, **adam, **options), []
        for _ in range(3):
            fill_buffer(model, problem)
            before = distributions(model, problem)
            model.train()
            # the constraint is KL(new || old) in sb3-contrib, KL(old || new) in the paper and in trpo.py
            kl = torch.distributions.kl_divergence(before, distributions(model, problem)).mean().item()
            steps.append(dict(logged=logged(model), kl_old_new=kl, end=weights_of(model)))
        numbers["trpo"].append(dict(settings=options, steps=steps))

    path = Path(__file__).with_name("sb3_numbers.json")
    path.write_text(json.dumps(numbers, indent=None, separators=(",", ":")) + "\n")
    for algorithm in ("ppo", "a2c"):
        for case in numbers[algorithm]:
            print(algorithm, case["settings"], case["logged"])
    for case in numbers["trpo"]:
        for step in case["steps"]:
            print("trpo", case["settings"], step["logged"], step["kl_old_new"])


if __name__ == "__main__":
    main()
