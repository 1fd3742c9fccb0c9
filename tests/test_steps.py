"""Steps 1 to 6 of every RL script, executed as they stand in main(), against a rollout that is worked out by hand.

By hand: one sequence and one token at a time, with the models' plain forward without cache, padding or position ids,
in numpy's floats, from the counter-based uniform numbers. The policy is another than its reference, the value head is
not zero, temperature and minimum length are set, and there are several EOS tokens.
"""

import concurrent.futures
import copy
import importlib
import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from script_runs import CASES, tiny_model
from script_steps import run_steps

import datapools

RL_CASES = [case for case in CASES if case[0] != "supervised"]
WITH_VALUES = [case for case in RL_CASES if case[0] != "grpo"]
CLIPPED = [case for case in RL_CASES if case[0].startswith(("ppo", "nlpo"))]
B, T, SEED, TEMPERATURE, LEAST, KL_COEF, GAMMA, LAMBDA = 8, 10, 3, 0.7, 2, 0.3, 0.9, 0.8
TOP_P = 0.6  # of NLPO


def length_of(prompts, generations, references, metas):
    """A reward that differs from text to text."""
    return [0.1 * len(g) + 0.01 * len(p) for p, g in zip(prompts, generations, strict=True)]


class Setting:
    """The variables that main() has before step 1."""

    def __init__(self, script, kind, texts, **settings):
        self.name, self.kind, self.module = script, kind, importlib.import_module(script)
        fixed = dict(model=tiny_model(kind), task=str(texts), reward=("own",), reward_weights=(1.0,), policy_type=kind)
        fixed |= dict(batch_size=B, response_length=T, prompt_length=9, min_response_length=LEAST, seed=SEED)
        fixed |= dict(temperature=TEMPERATURE, gamma=GAMMA, gae_lambda=LAMBDA, micro_batch_size=3, sample_batch_size=3)
        fixed |= dict(num_minibatches=2, update_epochs=2, group_size=2, max_grad_norm=1e9, learning_rate=1e-2)
        fixed |= dict(cg_steps=3, critic_epochs=1, top_mask=TOP_P, min_tokens_to_keep=1, kl_coef=KL_COEF)
        names = self.module.Args.__dataclass_fields__
        args = self.module.Args(**{k: v for k, v in (fixed | settings).items() if k in names})
        tokenizer = datapools.load_tokenizer(args.model)
        torch.manual_seed(0)
        transformers.utils.logging.disable_progress_bar()
        options = dict(args=args, tokenizer=tokenizer, decoding={}, config=datapools.model_config(args.model))
        wanted = inspect.signature(self.module.load_policy).parameters
        reference = self.module.load_policy(**{name: options[name] for name in wanted})
        self.spread(reference, 0.3)
        policy = copy.deepcopy(reference)
        self.spread(policy, 0.05)
        mask_model = copy.deepcopy(reference)
        self.spread(mask_model, 0.1)
        eos = torch.tensor([1])
        behaviour = dict(temperature=args.temperature, min_response_length=args.min_response_length, eos=eos)
        if kind == "seq2seq":
            behaviour |= dict(forced_bos=None)
        train = datapools.load_splits(args.task, None, {}, False)[0]
        self.args, self.train, self.tokenizer, self.eos = args, train, tokenizer, eos
        self.policy, self.reference, self.mask_model = policy, reference.requires_grad_(False), mask_model
        self.variables = dict(
            args=args, rank=0, world_size=1, device=torch.device("cpu"), B=B, T=T, V=policy.config.vocab_size,
            pad_id=0, eos=eos, behaviour=behaviour, train=train, tokenizer=tokenizer, seq2seq=kind == "seq2seq",
            autocast=dict(device_type="cpu", dtype=torch.bfloat16, enabled=False), kl_coef=args.kl_coef,
            reward_functions={"own": length_of}, policy=policy, reference=reference, mask_model=mask_model,
            thread=concurrent.futures.ThreadPoolExecutor(1), signals=[],
        )  # fmt: skip
        masking = dict(mask_type="learned_top_p", top_mask=TOP_P, min_tokens_to_keep=1, special_ids=[0, 1])
        self.variables |= dict(masking=masking | dict(mask_model=mask_model))
        if hasattr(self.module, "ValueModel"):
            value_model = self.module.ValueModel(policy, None)
            self.spread(value_model.backbone, 0.05)
            torch.nn.init.normal_(value_model.head.weight, 0, 0.3)
            self.variables |= dict(value_model=value_model)
        if hasattr(self.module, "BehaviourPolicy"):
            actor = self.module.BehaviourPolicy(policy, behaviour, self.variables["autocast"])
            parameters = {name: p for name, p in actor.named_parameters() if p.requires_grad}
            self.variables |= dict(actor=actor, parameters=parameters)

        # tokens that are drawn in several rows are EOS too, so that responses end early and late
        drawn = self.run(1, 1, iteration=2).responses[:, LEAST + 1 :]
        rows_with = {t: {i for i in range(B) if t in drawn[i]} for t in drawn.unique().tolist() if t > 1}
        often = sorted(rows_with, key=lambda token: -len(rows_with[token]))[:4]
        for some in range(len(often), 0, -1):
            self.eos = behaviour["eos"] = self.variables["eos"] = torch.tensor([1, *often[:some]])
            if 1 < self.run(1, 1, iteration=2).finished.sum() < B:
                break

    @staticmethod
    def spread(model, scale):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" not in name and "ln_" not in name:
                    weight += scale * torch.randn_like(weight)

    def run(self, first, last, iteration=1, **changes):
        return SimpleNamespace(
            **run_steps(self.name, first, last, **self.variables | dict(iteration=iteration) | changes)
        )

    @property
    def parts(self):
        return [self.policy, *([self.variables["value_model"]] if "value_model" in self.variables else [])]

    weight_decay = 0.0

    def sgd(self, lr=1e-2):
        parameters = [p for model in self.parts for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=lr, weight_decay=self.weight_decay)


# ------------------------------------------------------------------------------------------------ by hand


def inputs(model, prompt, prefix):
    """What the model reads before the token behind `prefix`: one row, nothing padded, nothing cached."""
    if model.config.is_encoder_decoder:
        decoder = [model.config.decoder_start_token_id, *prefix]
        return dict(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([decoder]), use_cache=False)
    return dict(input_ids=torch.tensor([[*prompt, *prefix]]), use_cache=False)


@torch.no_grad()
def distribution(model, prompt, prefix, eos):
    """Probabilities (V,) of the next token: tempered, and without EOS before the minimum length."""
    logits = model(**inputs(model, prompt, prefix)).logits[0, -1].double().numpy() / TEMPERATURE
    if len(prefix) < LEAST:
        logits[eos] = -np.inf
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@torch.no_grad()
def value(model, prompt, prefix):
    output = model.backbone(**inputs(model.backbone, prompt, prefix), output_hidden_states=True)
    hidden = output.decoder_hidden_states if model.backbone.config.is_encoder_decoder else output.hidden_states
    return float(hidden[-1][0, -1].double() @ model.head.weight[0].double())


def top_p(probs):
    """The smallest set of likeliest tokens that has TOP_P, and the special tokens 0 and 1."""
    kept, mass = {0, 1}, 0.0
    for token in np.argsort(-probs):
        if mass >= TOP_P:
            break
        kept.add(int(token))
        mass += probs[token]
    return np.array([i in kept for i in range(len(probs))])


def by_hand(setting, iteration, indices, prompt_ids, top_k=0):
    """A rollout as lists, one entry a sequence: tokens and their log-probs, entropies and values."""
    rows, eos = [], setting.eos.tolist()
    for index, prompt in zip(indices, prompt_ids, strict=True):
        philox = np.random.Philox(key=[SEED, iteration], counter=[0, 0, index, 0])
        row = dict(tokens=[], sampled=[], logprobs=[], unmasked=[], ref=[], entropy=[], values=[])
        for u in np.random.Generator(philox).random(T):
            before = list(row["tokens"])
            probs = whole = distribution(setting.policy, prompt, before, eos)
            if setting.name.startswith("nlpo"):
                probs = probs * top_p(distribution(setting.mask_model, prompt, before, eos))
                probs = probs / probs.sum()
            drawn_from = probs
            if top_k:
                drawn_from = np.where(probs >= np.sort(probs)[-top_k], probs, 0.0)
                drawn_from = drawn_from / drawn_from.sum()
            cdf = drawn_from.cumsum()
            token = int(np.searchsorted(cdf, u * cdf[-1], side="right"))
            row["tokens"].append(token)
            row["sampled"].append(math.log(drawn_from[token]))
            row["logprobs"].append(math.log(probs[token]))
            row["unmasked"].append(math.log(whole[token]))
            row["ref"].append(math.log(distribution(setting.reference, prompt, before, eos)[token]))
            row["entropy"].append(-sum(p * math.log(p) for p in probs if p > 0))
            if "value_model" in setting.variables:
                row["values"].append(value(setting.variables["value_model"], prompt, before))
            if token in eos:
                break
        rows.append(row)
    return rows


def padded(rows):
    """Lists of different lengths as a tensor (B, T), 0 on padding."""
    return torch.tensor([list(row) + [0.0] * (T - len(row)) for row in rows], dtype=torch.float32)


def near(tensor, rows, tolerance=2e-4):
    torch.testing.assert_close(tensor.detach().float(), padded(rows), rtol=tolerance, atol=tolerance)


def gae_of(rewards, values):
    """(16) of Schulman et al. 2016 as a sum of sums."""
    n = len(rewards)
    deltas = [rewards[t] + (GAMMA * values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((GAMMA * LAMBDA) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.fixture(scope="module")
def made(texts):
    """made(script, kind): the setting, what steps 1 to 5 have left, and the same by hand; made once."""
    done = {}

    def get(script, kind):
        if (script, kind) not in done:
            setting = Setting(script, kind, texts)
            after = setting.run(1, 5, iteration=2)
            done[script, kind] = setting, after, by_hand(setting, 2, range(B), encoded(setting, after.samples))
        return done[script, kind]

    return get


def encoded(setting, samples):
    """The prompts' ids, each alone."""
    rows = []
    for sample in samples:
        ids = list(sample.prompt.encode())  # the tokenizer has one token a byte
        bytes_ids = setting.tokenizer(sample.prompt, add_special_tokens=False).input_ids
        assert len(bytes_ids) == len(ids)
        room = setting.args.prompt_length - (setting.kind == "seq2seq")
        rows.append(bytes_ids[-room:] + ([1] if setting.kind == "seq2seq" else []))
    return rows


# ------------------------------------------------------------------------------------------------ steps 1 to 5


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_rollout(script, kind, made):
    """Tokens, mask and the sampler's log-probs are those of every row alone; any EOS token ends a row."""
    setting, after, rows = made(script, kind)
    near(after.responses, [row["tokens"] for row in rows], 0)
    near(after.mask, [[1.0] * len(row["tokens"]) for row in rows], 0)
    near(after.sampler_logprobs, [row["sampled"] for row in rows])
    eos = set(setting.eos.tolist())
    lengths = [len(row["tokens"]) for row in rows]
    ended = [row["tokens"][-1] in eos for row in rows]
    assert any(ended) and len(set(lengths)) > 2 and min(lengths) > LEAST, "the problem is too easy"
    assert after.finished.tolist() == ended and after.mask.sum(1).tolist() == lengths
    assert after.token_ids == [row["tokens"] for row in rows]
    assert after.query_mask.sum(1).tolist() == [len(ids) for ids in encoded(setting, after.samples)]


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_scores(script, kind, made):
    """The reward sees prompt and text without EOS, and is paid at the last token."""
    setting, after, rows = made(script, kind)
    texts = [setting.tokenizer.decode([t for t in row["tokens"] if t not in (0, 1)]) for row in rows]
    prompts = [sample.prompt for sample in after.samples]
    if kind == "seq2seq":
        assert after.generations == texts
    expected = length_of(prompts, after.generations, None, None)
    near(after.scores, [[0.0] * (len(row["tokens"]) - 1) + [s] for row, s in zip(rows, expected, strict=True)], 1e-6)


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_one_pass_figures(script, kind, made):
    """Log-probs of policy and reference are those of the tempered distributions without early EOS; so is entropy."""
    setting, after, rows = made(script, kind)
    near(after.logprobs, [row["logprobs"] for row in rows])
    near(after.ref_logprobs, [row["ref"] for row in rows])
    near(after.entropy, [row["entropy"] for row in rows], 1e-3)
    assert after.sampler_error < 1e-4
    if script.startswith("nlpo"):
        near(after.unmasked_logprobs, [row["unmasked"] for row in rows])
    if "value_model" in setting.variables:
        near(after.values, [row["values"] for row in rows])
        assert max(abs(v) for row in rows for v in row["values"]) > 0.1


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_kl_penalty(script, kind, made):
    """What the policy likes more than its reference costs: the penalty is taken from the score, at every token."""
    _, after, rows = made(script, kind)
    kl = [[a - b for a, b in zip(row["unmasked"], row["ref"], strict=True)] for row in rows]
    near(after.kl, kl, 1e-3)
    assert max(abs(x) for row in kl for x in row) > 0.1
    if hasattr(after, "token_rewards"):
        scores = [after.scores[i, len(row) - 1].item() for i, row in enumerate(kl)]
        expected = [[-KL_COEF * x for x in row] for row in kl]
        for row, score in zip(expected, scores, strict=True):
            row[-1] += score
        near(after.token_rewards, expected, 1e-3)


@pytest.mark.parametrize("script, kind", WITH_VALUES)
def test_advantages(script, kind, made):
    _, after, rows = made(script, kind)
    scores = [after.scores[i, len(row["tokens"]) - 1].item() for i, row in enumerate(rows)]
    expected = []
    for row, score in zip(rows, scores, strict=True):
        rewards = [-KL_COEF * (a - b) for a, b in zip(row["unmasked"], row["ref"], strict=True)]
        rewards[-1] += score
        expected.append(gae_of(rewards, row["values"]))
    near(after.advantages, expected, 2e-3)
    returns = [
        [a + v for a, v in zip(a_row, row["values"], strict=True)] for a_row, row in zip(expected, rows, strict=True)
    ]
    near(after.returns, returns, 2e-3)


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_every_iteration_has_prompts_and_numbers_of_its_own(script, kind, texts):
    """An epoch of prompts, each once; then the next, in another order. The same prompt is answered differently."""
    setting = Setting(script, kind, texts)
    groups = getattr(setting.args, "group_size", 1)
    each, n = B // groups, len(setting.train)
    assert n == 20
    after = [setting.run(1, 1, iteration=i) for i in range(1, 2 * n // math.gcd(each, n) + 1)]
    seen = [sample.id for a in after for sample in a.samples][::groups]
    assert len(seen) >= 2 * n
    for epoch in range(2):
        assert len(set(seen[epoch * n : (epoch + 1) * n])) == n
    assert seen[:n] != seen[n : 2 * n]
    numbers = torch.cat([a.uniform.flatten() for a in after])
    assert len(numbers.unique()) == len(numbers), "a uniform number comes twice"
    again = setting.run(1, 1, iteration=3)
    assert torch.equal(again.responses, after[2].responses), "an iteration's rollout does not depend on those before"


@pytest.mark.parametrize("script, kind", [case for case in RL_CASES if not case[0].startswith("nlpo")])
def test_top_k_is_seen_by_the_sampler_alone(script, kind, texts):
    setting = Setting(script, kind, texts, top_k=4)
    if not hasattr(setting.args, "top_k"):
        pytest.skip("no --top-k")
    after = setting.run(1, 4)
    rows = by_hand(setting, 1, range(B), encoded(setting, after.samples), top_k=4)
    near(after.responses, [row["tokens"] for row in rows], 0)
    near(after.sampler_logprobs, [row["sampled"] for row in rows])
    near(after.logprobs, [row["logprobs"] for row in rows])
    off = [s - p for row in rows for p, s in zip(row["logprobs"], row["sampled"], strict=True)]
    assert after.sampler_error == pytest.approx(np.mean(off), rel=1e-3) and after.sampler_error > 0.01


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_a_sampler_that_is_not_scored_stops_the_run(script, kind, texts, capsys):
    """In the first iteration, when log-probs of sampling and of one pass differ: here by a cache that forgets."""
    setting = Setting(script, kind, texts)
    module, real = setting.module, setting.module.decode_step

    def forgets(policy, state, inputs):
        return real(policy, state, inputs) * 0.9

    setting.variables |= dict(sample_responses=with_global(module.sample_responses, decode_step=forgets))
    with pytest.raises(SystemExit) as stop:
        setting.run(1, 3, iteration=1)
    assert stop.value.code == 1 and "sampled and scored differently" in capsys.readouterr().err
    setting.run(1, 3, iteration=2)


def with_global(function, **changes):
    """The function with other globals."""
    inner = getattr(function, "__wrapped__", function)
    made = type(inner)(
        inner.__code__, vars(importlib.import_module(inner.__module__)) | changes, inner.__name__, inner.__defaults__
    )
    return torch.no_grad()(made)


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_response_without_eos_has_its_score(script, kind, texts, made):
    """--eos-penalty stands in place of the text's score, at the last token, and only where no EOS came."""
    setting, before, _ = made(script, kind)
    setting.args.eos_penalty = -7.0
    try:
        after = setting.run(1, 4, iteration=2)
    finally:
        setting.args.eos_penalty = None
    assert 0 < after.finished.sum() < B
    assert torch.equal(after.scores[after.finished], before.scores[after.finished])
    for row in after.scores[~after.finished]:
        assert row.tolist() == [0.0] * (T - 1) + [-7.0]


@pytest.mark.parametrize("script, kind", WITH_VALUES)
def test_rewards_are_divided_by_their_deviation(script, kind, made):
    setting, before, _ = made(script, kind)
    setting.args.whiten_rewards = True
    try:
        after = setting.run(1, 4, iteration=2)
    finally:
        setting.args.whiten_rewards = False
    real = before.token_rewards[before.mask]
    torch.testing.assert_close(
        after.token_rewards[after.mask], real / real.double().std().float(), rtol=1e-4, atol=1e-6
    )
    assert not after.token_rewards[~after.mask].any()


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_scores_of_responses_that_all_end_early(script, kind):
    """At their own last tokens, however far before the longest that a response may be."""
    lengths, values, T = [2, 4, 1], [1.0, -2.0, 3.0], 7
    mask = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    samples = [datapools.Sample(str(i), "p", ["r"], {}) for i in range(3)]
    variables = dict.fromkeys(("policy", "reference", "value_model", "batch", "behaviour", "autocast"))
    variables |= dict(
        args=SimpleNamespace(reward_weights=[2.0], eos_penalty=None), iteration=1, mask=mask, T=T, samples=samples
    )
    variables |= dict(reward_functions={"own": lambda prompts, generations, references, metas: values})
    variables |= dict(generations=["a", "b", "c"], token_ids=[[5] * length for length in lengths])
    variables |= dict(thread=SimpleNamespace(submit=lambda *passes: None), device=torch.device("cpu"))
    after = run_steps(script, 2, 2, **variables)
    expected = torch.zeros(3, T)
    expected[range(3), [length - 1 for length in lengths]] = 2 * torch.tensor(values)
    assert torch.equal(after["scores"], expected) and after["means"] == {"own": pytest.approx(2 / 3)}


# ------------------------------------------------------------------------------------------------ step 6


def seen_minibatches(setting, iteration):
    """The minibatches of step 6, in order, each as {name: tensor}."""
    module, seen = setting.module, []

    def looking(minibatch, size):
        seen.append(dict(minibatch))
        yield from module.micro_batches(minibatch, size)

    before = setting.run(1, 5, iteration=iteration)
    variables = vars(before) | dict(optimizer=setting.sgd(1e-4), micro_batches=looking)
    run_steps(setting.name, 6, 6, **variables)
    return before, seen


@pytest.mark.parametrize("script, kind", CLIPPED)
def test_minibatches(script, kind, texts):
    """Each epoch has every sequence once, no two epochs or iterations the same minibatches; advantages are whitened
    over the tokens of each."""
    setting = Setting(script, kind, texts, update_epochs=3, num_minibatches=4)
    orders = set()
    for iteration in (1, 2):
        before, seen = seen_minibatches(setting, iteration)
        assert len(seen) == 12
        places = {tuple(row.tolist()): i for i, row in enumerate(before.returns)}
        assert len(places) == B
        epochs = []
        for minibatch in seen:
            rows = [places[tuple(row.tolist())] for row in minibatch["returns"]]
            epochs.append(frozenset(rows))
            for name in ("logprobs", "values", "responses", "queries", "mask"):
                assert torch.equal(minibatch[name], vars(before)[name][rows]), name
            real = minibatch["advantages"][minibatch["mask"]].double()
            assert abs(real.mean()) < 1e-5 and abs(real.std() - 1) < 1e-4
            ours = before.advantages[rows][before.mask[rows]].double()
            torch.testing.assert_close(real, (ours - ours.mean()) / ours.std(), rtol=1e-4, atol=1e-5)
        for epoch in range(3):
            minibatches = epochs[4 * epoch : 4 * epoch + 4]
            assert sorted(row for rows in minibatches for row in rows) == list(range(B))
            assert {len(rows) for rows in minibatches} == {2}
            orders.add(tuple(minibatches))
    assert len(orders) == 6


def changes_of(setting, iteration=1, lr=1e-3, before=None):
    """The norm of what one step of SGD has done to the policy and to the value model."""
    before = before or setting.run(1, 5, iteration=iteration)
    old = [[p.detach().clone() for p in model.parameters()] for model in setting.parts]
    variables = vars(before) | dict(optimizer=setting.sgd(lr))
    run_steps(setting.name, 6, 6, **variables)
    norms = []
    for model, weights in zip(setting.parts, old, strict=True):
        squares = [((p.detach() - w).double() ** 2).sum() for p, w in zip(model.parameters(), weights, strict=True)]
        norms.append(float(sum(squares).sqrt()) / lr)
    return norms


@pytest.mark.parametrize("script, kind", CLIPPED)
def test_before_the_first_step_the_ratio_is_one(script, kind, texts):
    """The update's distribution is the one that was sampled: temperature, minimum length, NLPO's mask."""
    setting = Setting(script, kind, texts, num_minibatches=1, update_epochs=1, norm_adv=False)
    after = setting.run(1, 5, iteration=2)
    later = run_steps(script, 6, 6, **vars(after) | dict(optimizer=setting.sgd(1e-4)))
    names = ("policy", "value", "approx_kl", "clipfrac", "ratio", "tokens")
    sums = dict(zip(names, later["update_sums"].tolist(), strict=True))
    assert sums["tokens"] == after.mask.sum() and sums["clipfrac"] == 0
    assert sums["ratio"] == pytest.approx(sums["tokens"], rel=1e-6) and abs(sums["approx_kl"]) < 1e-6
    assert sums["policy"] == pytest.approx(-after.advantages.sum().item(), rel=1e-4, abs=1e-4)
    assert sums["value"] == pytest.approx(((after.values - after.returns) ** 2).sum().item(), rel=1e-4)


@pytest.mark.parametrize("script, kind", [case for case in RL_CASES if case[0] != "trpo"])
def test_an_update_leaves_no_gradient_to_the_next(script, kind, texts):
    """Of two updates on one rollout the second moves the weights as far as the first, not twice as far."""
    setting = Setting(script, kind, texts)
    before = setting.run(1, 5)
    first, second = (changes_of(setting, lr=1e-5, before=before) for _ in range(2))
    assert second == pytest.approx(first, rel=0.2)


@pytest.mark.parametrize("script, kind", CLIPPED)
def test_an_early_stop_throws_its_gradients_away(script, kind, texts):
    """The first step is taken; the second minibatch is too far off, and leaves neither a step nor a gradient."""
    setting = Setting(script, kind, texts, num_minibatches=1, update_epochs=3, early_stop_kl=1e-5)
    later = run_steps(script, 6, 6, **vars(setting.run(1, 5)) | dict(optimizer=setting.sgd(0.1)))
    assert len(later["grad_norms"]) == 1
    assert all(p.grad is None for model in setting.parts for p in model.parameters())


@pytest.mark.parametrize("script, kind", CLIPPED)
def test_policy_and_critic_are_clipped_apart(script, kind, texts):
    """A critic with a huge gradient takes nothing of the policy's norm, and the other way round."""
    one_step = dict(num_minibatches=1, update_epochs=1)
    free = changes_of(Setting(script, kind, texts, **one_step))
    assert max(free) > 1.2 * min(free) > 0, "too alike to be told apart"
    limit = min(free) / 2
    clipped = changes_of(Setting(script, kind, texts, max_grad_norm=limit, **one_step))
    assert clipped == pytest.approx([limit, limit], rel=1e-2)
    between = (free[0] + free[1]) / 2
    clipped = changes_of(Setting(script, kind, texts, max_grad_norm=between, **one_step))
    assert clipped == pytest.approx([min(between, norm) for norm in free], rel=1e-2)


@pytest.mark.parametrize("script, kind", WITH_VALUES)
def test_value_warmup_leaves_the_policy_alone(script, kind, texts):
    setting = Setting(script, kind, texts, value_warmup_iterations=1, ent_coef=0.1)
    setting.weight_decay = 0.1  # moves whatever has a gradient, be it 0
    before = setting.run(1, 5, iteration=1)
    policy, critic = changes_of(setting, before=before)
    assert policy == 0 and critic > 0
    policy, critic = changes_of(setting, iteration=2)
    assert policy > 0 and critic > 0


def objective(setting, after):
    """The clipped loss with its parts, at the weights of now, as one naive sum over the tokens; and its gradient."""
    args, module = setting.args, setting.module
    batch = {name: after.batch[name] for name in after.batch}
    _, mb = next(module.micro_batches(batch, B))
    order = batch["mask"].sum(1).argsort()
    logits = module.response_logits(setting.policy, mb).double() / TEMPERATURE
    for t in range(min(LEAST, logits.shape[1])):
        logits[:, t, setting.eos] = -math.inf
    logprobs_all = logits.log_softmax(-1)
    values = setting.variables["value_model"](mb).double()
    advantages, total = after.advantages[after.mask].double(), 0.0
    mean, std = advantages.mean(), advantages.std()
    for i, row in enumerate(order.tolist()):
        for t in range(int(after.mask[row].sum())):
            logprob = logprobs_all[i, t, after.responses[row, t]]
            ratio = (logprob - after.logprobs[row, t].double()).exp()
            advantage = (after.advantages[row, t].double() - mean) / std
            limited = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            policy_loss = -torch.minimum(ratio * advantage, limited * advantage)
            value_loss = (values[i, t] - after.returns[row, t].double()) ** 2
            p = logprobs_all[i, t][logprobs_all[i, t] > -math.inf]
            entropy = -(p.exp() * p).sum()
            total = total + policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return total / len(advantages)


@pytest.mark.parametrize("script, kind", [case for case in CLIPPED if case[0].startswith("ppo")])
def test_gradient_is_that_of_the_naive_sum(script, kind, texts):
    """One step of SGD, taken away from the rollout's policy so that ratios are clipped, is minus the gradient of the
    losses written out token by token."""
    settings = dict(num_minibatches=1, update_epochs=1, ent_coef=0.02, vf_coef=0.3)
    setting = Setting(script, kind, texts, **settings)
    after = setting.run(1, 5)
    after.batch = after.batch | dict(logprobs=after.logprobs, values=after.values)
    Setting.spread(setting.policy, 0.02)  # on: the ratios are no longer 1
    objective(setting, after).backward()
    named = {(i, n): p for i, model in enumerate(setting.parts) for n, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    old = {name: p.detach().clone() for name, p in named.items()}
    for model in setting.parts:
        model.zero_grad()
    run_steps(script, 6, 6, **vars(after) | dict(optimizer=setting.sgd(1.0)))
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        step = old[name] - named[name].detach()
        assert (gradient - step).norm() <= 2e-3 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_kl_controller(script, kind, made):
    """The mean is over tokens; the penalty rises when the KL is above its target, and waits for the critic."""
    setting, after, rows = made(script, kind)
    kl = [a - b for row in rows for a, b in zip(row["unmasked"], row["ref"], strict=True)]
    for target in (abs(np.mean(kl)) * 0.95, abs(np.mean(kl)) * 3):
        setting.args.target_kl = target
        of_step_6 = dict(tokens=int(after.mask.sum()), warming_up=False)
        later = run_steps(script, 7, 7, **of_step_6 | vars(after))
        error = (np.mean(kl) - target) / target
        assert later["kl_coef"] == pytest.approx(KL_COEF * (1 + 0.1 * np.clip(error, -0.2, 0.2)), rel=1e-3)
        assert later["mean_kl"] == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-4)
        if script != "grpo":
            assert run_steps(script, 7, 7, **of_step_6 | vars(after) | dict(warming_up=True))["kl_coef"] == KL_COEF


# ------------------------------------------------------------------------------------------------ step 8


class NoStep:
    """An optimizer that moves nothing, and remembers the norm of each model's gradient."""

    def __init__(self, models, lr):
        self.models, self.param_groups, self.norms = models, [dict(lr=lr)], []

    def step(self):
        gradients = [[p.grad.flatten() for p in model.parameters() if p.grad is not None] for model in self.models]
        self.norms.append([torch.cat(parts).norm().item() if parts else 0.0 for parts in gradients])

    def zero_grad(self):
        for model in self.models:
            model.zero_grad()


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_log(script, kind, texts):
    """What metrics.jsonl says of a rollout by hand, and of an update that moves nothing."""
    setting = Setting(script, kind, texts, norm_adv=False, critic_epochs=2)
    after, logged, clock = setting.run(1, 5, iteration=2), [], iter([15.0, 21.0])
    rows = by_hand(setting, 2, range(B), encoded(setting, after.samples))
    variables = vars(after) | dict(started=1.0, sample_ended=3.0, score_ended=6.0, forward_ended=10.0)
    variables |= dict(seconds=lambda device: next(clock), progress=None, run_dir=None, sampler_error=0.25)
    variables |= dict(optimizer=NoStep(setting.parts, 1e-9), log_row=lambda row, *_: logged.append(row))
    later = run_steps(script, 6, 8, **variables)
    lengths = [len(row["tokens"]) for row in rows]
    kls = [[a - b for a, b in zip(row["unmasked"], row["ref"], strict=True)] for row in rows]
    scores = length_of([sample.prompt for sample in after.samples], after.generations, None, None)
    mean_kl = sum(map(sum, kls)) / sum(lengths)
    expected = {
        "objective/score": np.mean(scores),
        "objective/kl": mean_kl,
        "objective/kl_coef": KL_COEF,
        "objective/entropy": sum(sum(row["entropy"]) for row in rows) / sum(lengths),
        "objective/rlhf_reward": np.mean([score - KL_COEF * sum(kl) for score, kl in zip(scores, kls, strict=True)]),
        "reward/own": np.mean(scores),
        "losses/learning_rate": 1e-9,
        "rollout/response_length": np.mean(lengths),
        "rollout/eos_fraction": np.mean([row["tokens"][-1] in setting.eos.tolist() for row in rows]),
        "rollout/sampler_error": 0.25,
        "time/sample_seconds": 2.0,
        "time/score_seconds": 3.0,
        "time/forward_seconds": 4.0,
        "time/update_seconds": 5.0,
        "time/iteration_seconds": 20.0,
        "time/tokens_per_second": sum(lengths) / 20,
    }
    norms = np.array(later["optimizer"].norms)  # (steps, models)
    if script != "trpo":
        expected["losses/grad_norm"] = norms[:, 0].mean()
    if (script, kind) in WITH_VALUES:
        expected["losses/value_grad_norm"] = norms[-1, 1] if script == "trpo" else norms[:, 1].mean()
        rewards = [[-KL_COEF * x for x in kl] for kl in kls]
        for row, score in zip(rewards, scores, strict=True):
            row[-1] += score
        advantages = [gae_of(r, row["values"]) for r, row in zip(rewards, rows, strict=True)]
        errors = np.concatenate(advantages)
        returns = errors + np.concatenate([row["values"] for row in rows])
        expected["losses/explained_variance"] = 1 - np.var(errors, ddof=1) / np.var(returns, ddof=1)
        expected["losses/value"] = np.mean(errors**2)
        factors = np.concatenate([row["logprobs"] for row in rows]) if script == "a2c" else 1.0
        expected["losses/policy"] = -np.mean(errors * factors)
    if script == "trpo":
        residual = (later["gradient"] - later["product"]).norm() / later["gradient"].norm()
        expected |= {
            "losses/policy": -later["improvement"],
            "losses/surrogate_improvement": later["improvement"],
            "losses/kl_after": later["kl_after"],
            "losses/step_size": later["step_size"],
            "losses/line_search_steps": later["line_search_steps"],
            "losses/accepted": float(later["accepted"]),
            "losses/grad_norm": later["gradient"].norm().item(),
        }
        assert 0 < logged[0]["losses/cg_residual"] == pytest.approx(residual.item())
        assert later["accepted"] and later["improvement"] > 0
    if (script, kind) in CLIPPED:
        expected |= {"losses/optimizer_steps": 4, "losses/ratio": 1, "losses/clipfrac": 0}
    if script.startswith("nlpo"):
        masses = [np.exp(np.subtract(row["unmasked"], row["logprobs"])) for row in rows]
        expected["rollout/mask_mass"] = np.mean(np.concatenate(masses))
    for name, value in expected.items():
        assert logged[0][name] == pytest.approx(value, rel=2e-3, abs=1e-4), name
