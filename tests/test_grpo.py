"""GRPO: advantages of groups by hand and by naive loops, groups that stay whole, the losses token by token.

Steps are executed as they stand in main(), on a tabular policy whose next token depends on the last one alone.
"""

import copy
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from script_runs import SCRIPTS
from script_steps import Table, run_steps

if "grpo" not in SCRIPTS:
    pytest.skip("no grpo.py", allow_module_level=True)

import grpo
from datapools import UsageError

V, T, G, EOS = 7, 5, 4, 1
LENGTHS = [5, 2, 3, 1, 4, 5, 5, 2, 3, 3, 1, 5]  # of three groups of four
BASELINES = ["grpo", "dr_grpo", "rloo"]


# ------------------------------------------------------------------------------------------------ advantages


@pytest.mark.parametrize(
    "baseline, expected",
    [
        # 1, 2, 3, 6: mean 3, squares of the deviations 4 + 1 + 0 + 9, over three 14 / 3; 0, 0, 0, 4: mean 1, 12 / 3
        ("grpo", [-2 / (14 / 3) ** 0.5, -1 / (14 / 3) ** 0.5, 0, 3 / (14 / 3) ** 0.5, -0.5, -0.5, -0.5, 1.5]),
        ("dr_grpo", [-2, -1, 0, 3, -1, -1, -1, 3]),
        # the others of 1 are 2, 3 and 6
        ("rloo", [1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3, -4 / 3, -4 / 3, -4 / 3, 4]),
    ],
)
def test_groups_by_hand(baseline, expected):
    advantages = grpo.group_advantages(torch.tensor([1.0, 2, 3, 6, 0, 0, 0, 4]), 4, baseline)
    assert advantages.dtype == torch.float32 and advantages.shape == (8,)
    assert advantages.tolist() == pytest.approx(expected, abs=2e-4)  # the deviations have 1e-4 added


def trl_grpo(rewards, size):
    """GRPOTrainer with scale_rewards: (r - mean) / (std + 1e-4), the group's unbiased deviation."""
    advantages = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        mean = sum(group) / size
        std = (sum((r - mean) ** 2 for r in group) / (size - 1)) ** 0.5
        advantages += [(r - mean) / (std + 1e-4) for r in group]
    return advantages


def trl_dr_grpo(rewards, size):
    """GRPOTrainer without scale_rewards."""
    return [r - sum(rewards[i // size * size : i // size * size + size]) / size for i, r in enumerate(rewards)]


def trl_rloo(rewards, size):
    """RLOOTrainer: (the group's sum - r) / (k - 1) is what r is compared with."""
    advantages = []
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j // size == i // size and j != i]
        advantages.append(reward - sum(others) / len(others))
    return advantages


NAIVE = dict(grpo=trl_grpo, dr_grpo=trl_dr_grpo, rloo=trl_rloo)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_groups_as_published(baseline, size):
    torch.manual_seed(size)
    rewards = torch.randn(5 * size) * 3 + 10
    ours = grpo.group_advantages(rewards, size, baseline)
    assert ours.tolist() == pytest.approx(NAIVE[baseline](rewards.double().tolist(), size), rel=1e-5, abs=1e-5)
    assert ours.view(-1, size).sum(1).abs().max() < 1e-4 and ours.abs().min(0).values.max() < ours.abs().max()


@pytest.mark.parametrize("baseline", BASELINES)
def test_equal_rewards_teach_nothing(baseline):
    """Not even by rounding, which a deviation of 0 would blow up; the group beside them is not touched by it."""
    rewards = torch.tensor([1000.1] * 7 + [0.0, 1.0] + [0.3] * 5)
    advantages = grpo.group_advantages(rewards, 7, baseline)
    assert advantages[:7].tolist() == [0.0] * 7 and advantages[7:].abs().min() > 0


# ------------------------------------------------------------------------------------------------ step 1


class Stop(Exception):
    """Ends a step in its middle."""


@pytest.mark.parametrize("world_size", [1, 3])
def test_prompts_and_numbers_of_a_group(world_size):
    """Group g of iteration 3 has the prompt at position 2 * groups + g; no two responses have the same numbers."""
    positions, numbers = {}, {}
    for rank in range(world_size):
        asked = []

        def uniforms(seed, stream, indices, length, asked=asked):
            drawn = grpo.uniforms(seed, stream, indices, length).tolist()
            positions.update(zip(indices, asked, strict=True))
            numbers.update(zip(indices, map(tuple, drawn), strict=True))
            raise Stop

        fake = SimpleNamespace(
            prompt_order=lambda places, size, seed, asked=asked: asked.extend(places),
            encode_batch=lambda *_: (None, None, None),
        )
        train = MagicMock()
        train.__len__.return_value = 9
        args = grpo.Args(batch_size=24, group_size=4, seed=5)
        variables = dict(args=args, rank=rank, world_size=world_size, iteration=3, T=T, train=train, tokenizer=None)
        variables |= dict(seq2seq=True, pad_id=0, device=torch.device("cpu"), datapools=fake, uniforms=uniforms)
        with pytest.raises(Stop):
            run_steps("grpo", 1, 1, **variables)
    assert positions == {i: 2 * 6 + i // 4 for i in range(24)}
    assert len(set(numbers.values())) == 24


# ------------------------------------------------------------------------------------------------ steps 4 to 8


def problem(seq2seq=False, **settings):
    """The variables that step 4 finds: twelve stored responses, with a policy that is neither its reference nor quite
    the one that sampled them."""
    torch.manual_seed(3)
    B = len(LENGTHS)
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(T) < lengths.unsqueeze(1)
    query_mask = torch.ones(B, 2, dtype=torch.bool)
    batch = dict(queries=torch.zeros(B, 2, dtype=torch.long), query_mask=query_mask, mask=mask)
    batch |= dict(responses=torch.randint(2, V, (B, T)) * mask, index=torch.arange(B).unsqueeze(1))
    policy, sampler, reference = (Table(V, seq2seq, torch.nn.Linear(V, V)) for _ in range(3))
    behaviour = dict(temperature=0.7, min_response_length=0, eos=torch.tensor([EOS]))
    mb = SimpleNamespace(**batch)
    with torch.no_grad():
        sampler.linear.weight.copy_(policy.linear.weight + 0.3 * torch.randn(V, V))
        logprobs, ref_logprobs = (
            grpo.token_logprobs(grpo.behaviour_logits(grpo.response_logits(model, mb), 0, **behaviour), mb.responses)
            * mask
            for model in (sampler, reference)
        )
    scores = torch.zeros(B, T)
    scores[torch.arange(B), lengths - 1] = torch.randn(B)
    fixed = dict(batch_size=B, group_size=G, num_minibatches=1, update_epochs=1, micro_batch_size=5, max_grad_norm=1e9)
    return dict(
        args=grpo.Args(**fixed | settings), iteration=1, rank=0, world_size=1, device=torch.device("cpu"), B=B, T=T,
        autocast=dict(device_type="cpu", dtype=torch.bfloat16, enabled=False), batch=batch, mask=mask, policy=policy,
        behaviour=behaviour, logprobs=logprobs, ref_logprobs=ref_logprobs, scores=scores, kl_coef=0.3,
        optimizer=torch.optim.SGD(policy.parameters(), lr=1.0),
    )  # fmt: skip


def rewards_of(before):
    """Score minus penalty of each response, with numbers alone."""
    args, rewards = before["args"], []
    for i, length in enumerate(LENGTHS):
        reward = float(before["scores"][i].sum())
        for t in range(length):
            if not args.kl_in_loss:
                reward -= 0.3 * float(before["logprobs"][i, t] - before["ref_logprobs"][i, t])
        rewards.append(reward)
    return rewards


def naive_loss(before):
    """The loss of the batch as a sum over its tokens, one at a time."""
    args, loss = before["args"], 0.0
    advantages = NAIVE[args.baseline](rewards_of(before), args.group_size)
    for i, length in enumerate(LENGTHS):
        last = 0  # what the decoder, or the prompt, ends with
        for t in range(length):
            token = int(before["batch"]["responses"][i, t])
            logprobs = (before["policy"].linear.weight[:, last] + before["policy"].linear.bias).div(0.7).log_softmax(0)
            ratio = (logprobs[token] - before["logprobs"][i, t]).exp()
            high = 1 + (args.clip_coef_high or args.clip_coef)
            limited = ratio.clamp(1 - args.clip_coef, high)
            loss = loss - torch.minimum(ratio * advantages[i], limited * advantages[i])
            if args.kl_in_loss:
                difference = before["ref_logprobs"][i, t] - logprobs[token]
                loss = loss + 0.3 * (difference.exp() - difference - 1)
            loss = loss + args.ent_coef * (logprobs.exp() * logprobs).sum()
            last = token
    return loss / sum(LENGTHS)


def step_of(variables):
    """What a step of SGD with a learning rate of 1 has taken from the weights."""
    policy = variables["policy"]
    old = [p.detach().clone() for p in policy.parameters()]
    after = run_steps("grpo", 4, 6, **variables)
    return [a - b.detach() for a, b in zip(old, policy.parameters(), strict=True)], after


def assert_step_is_gradient_of(loss, variables):
    expected = torch.autograd.grad(loss, list(variables["policy"].parameters()))
    step, after = step_of(variables)
    assert max(g.abs().max() for g in expected) > 0.01
    for one, two in zip(step, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    return after


@pytest.mark.parametrize("seq2seq", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        *(dict(baseline=name) for name in BASELINES),
        dict(kl_in_loss=True),
        dict(clip_coef=0.05, clip_coef_high=0.4),
        dict(ent_coef=0.2, baseline="rloo"),
    ],
    ids=str,
)
def test_step_is_the_gradient_of_the_naive_sum(settings, seq2seq):
    variables = problem(seq2seq, **settings)
    after = assert_step_is_gradient_of(naive_loss(variables), variables)
    policy, approx_kl, clipfrac, ratio, tokens = after["update_sums"].tolist()
    assert not after["advantages"][~variables["mask"]].any()
    assert tokens == sum(LENGTHS) and 0.1 < clipfrac / tokens < 0.9 and approx_kl > 0 and ratio > 0


def test_rloo_is_reinforce_with_the_mean_of_the_others():
    """At the policy that has sampled: the gradient of log pi, weighted by the reward less the others' mean reward."""
    variables = problem(baseline="rloo")
    policy, mb = variables["policy"], SimpleNamespace(**variables["batch"])
    logits = grpo.response_logits(policy, mb) / 0.7
    logprobs = logits.log_softmax(-1).gather(2, mb.responses.unsqueeze(2)).squeeze(2) * variables["mask"]  # (B, T)
    variables["logprobs"] = logprobs.detach()
    rewards = rewards_of(variables)
    loss = 0.0
    for i, reward in enumerate(rewards):
        others = [rewards[j] for j in range(i // G * G, i // G * G + G) if j != i]
        loss = loss - (reward - sum(others) / (G - 1)) * logprobs[i].sum()
    assert_step_is_gradient_of(loss / sum(LENGTHS), variables)


def test_kl_in_the_loss_alone():
    """With equal scores the rewards teach nothing, and the step is towards the reference."""
    variables = problem(kl_in_loss=True)
    variables["scores"] = torch.zeros(len(LENGTHS), T)
    _, after = step_of(variables)
    assert torch.equal(after["token_rewards"], variables["scores"]) and not after["advantages"].any()
    moved = problem(kl_in_loss=True)["policy"], variables["policy"]
    mb = SimpleNamespace(**variables["batch"])
    ref = variables["ref_logprobs"]
    distances = []
    for policy in moved:
        logits = grpo.behaviour_logits(grpo.response_logits(policy, mb), 0, **variables["behaviour"])
        difference = ref - grpo.token_logprobs(logits, mb.responses)
        distances.append((((difference.exp() - 1 - difference) * variables["mask"]).sum()).item())
    assert 0 < distances[1] < distances[0]


def seen_groups(world_size, **settings):
    """Of each minibatch, in order, the responses of all processes."""
    minibatches = []
    for rank in range(world_size):
        variables = problem(**settings)
        own = [i for i in range(len(LENGTHS)) if i // variables["args"].group_size % world_size == rank]
        for name in ("mask", "logprobs", "ref_logprobs", "scores"):
            variables[name] = variables[name][own]
        variables["batch"] = {name: tensor[own] for name, tensor in variables["batch"].items()}
        seen = []

        def looking(minibatch, size, seen=seen):
            seen.append(minibatch["index"].flatten().tolist())
            yield from grpo.micro_batches(minibatch, size)

        run_steps("grpo", 4, 6, **variables | dict(rank=rank, world_size=world_size, micro_batches=looking))
        minibatches.append(seen)
    return [sorted(sum(parts, [])) for parts in zip(*minibatches, strict=True)]


def test_groups_are_never_split():
    """A minibatch has whole groups, each epoch every group once and in another order, for any number of processes."""
    settings = dict(group_size=2, num_minibatches=3, update_epochs=4)
    alone, together = seen_groups(1, **settings), seen_groups(2, **settings)
    assert alone == together and len(alone) == 12
    for epoch in range(4):
        minibatches = alone[3 * epoch : 3 * epoch + 3]
        assert sorted(sum(minibatches, [])) == list(range(12))
        for rows in minibatches:
            assert len(rows) == 4 and all(rows.count(i // 2 * 2) == rows.count(i // 2 * 2 + 1) == 1 for i in rows)
    assert len({tuple(map(tuple, alone[3 * epoch : 3 * epoch + 3])) for epoch in range(4)}) > 1


def test_epochs_end_early():
    variables = problem(early_stop_kl=1e-6, update_epochs=3)
    old = copy.deepcopy(variables["policy"].state_dict())
    after = run_steps("grpo", 4, 6, **variables)
    assert len(after["grad_norms"]) < 3 and all(p.grad is None for p in variables["policy"].parameters())
    assert all(torch.equal(old[name], weight) for name, weight in variables["policy"].state_dict().items())


def test_equal_groups_are_counted():
    """By their scores: the KL penalty makes no two rewards equal."""
    variables, rows = problem(), []
    variables["scores"] = torch.zeros(len(LENGTHS), T)
    for i, length in enumerate(LENGTHS):  # a group of equal scores at different places, and two that differ
        variables["scores"][i, length - 1] = [0.7, 0.7 + 0.1 * (i == 6), float(i)][i // G]
    after = run_steps("grpo", 4, 7, **variables)
    after |= dict(log_row=lambda row, *_: rows.append(row), progress=None, run_dir=None, means={"own": 0.5})
    after |= dict(entropy=after["mask"] * 2.0, finished=after["mask"].any(1))
    after |= dict.fromkeys(("started", "sample_ended", "score_ended", "forward_ended", "sampler_error"), 0.0)
    run_steps("grpo", 8, 8, **after)
    (row,) = rows
    assert row["rollout/equal_groups"] == pytest.approx(1 / 3)
    assert row["objective/score"] == pytest.approx(variables["scores"].sum().item() / 12)
    assert row["objective/entropy"] == 2 and row["losses/optimizer_steps"] == 1


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    "settings, processes",
    [(dict(batch_size=12, group_size=5, num_minibatches=1), 1), (dict(batch_size=16, group_size=4), 2)],
)
def test_batches_hold_whole_groups(settings, processes, monkeypatch):
    """Also in each minibatch of each process."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    args = grpo.Args(**dict(num_minibatches=4) | settings)
    args.reward_weights = (1.0,)
    with pytest.raises(UsageError, match=f"--batch-size {args.batch_size}: .*--group-size {args.group_size}"):
        grpo.check_args(args)
    args.batch_size = args.group_size * args.num_minibatches * processes
    grpo.check_args(args)


def test_there_is_no_critic(tmp_path):
    """Of the siblings' names none is left, and a group of one is refused."""
    assert not {"ValueModel", "value_backbone", "gae"} & vars(grpo).keys()
    assert not {"value_model", "vf_coef", "gamma", "gae_lambda"} & grpo.Args.__dataclass_fields__.keys()
    with pytest.raises(UsageError, match="--group-size 1"):
        grpo.parse_args(["--task", "numbers", "--group-size", "1"], "seq2seq")
