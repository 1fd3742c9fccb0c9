"""Whole runs of a tiny model: what they leave, and that processes and micro-batches change nothing."""

import itertools
import json
import math
import os
import re

import pytest
import torch
from script_runs import (
    ALL_SCRIPTS,
    CASES,
    ROOT,
    SCRIPTS,
    TINY,
    checkpoint,
    flags,
    predictions,
    real_run,
    rows,
    run_ok,
    weights,
)
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import datapools
import rewards

# two iterations with two minibatches each; the test reads what depends on the first update as well
SETTINGS = TINY | dict(num_iterations=2, num_epochs=1, update_epochs=1, eval_every=1, save_every=1, learning_rate=1e-4)
VARIANTS = {
    "one": (1, {}),
    "micro-batches": (1, dict(micro_batch_size=3, sample_batch_size=3)),
    "two processes": (2, dict(micro_batch_size=3)),
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory, texts, digits):
    """finished(script, kind, variant): the folder of that run, run once."""
    done = {}

    def get(script, kind, variant="one", **changes):
        key = (script, kind, variant, json.dumps(changes, sort_keys=True))
        if key not in done:
            cwd = tmp_path_factory.mktemp("runs")
            processes, settings = VARIANTS[variant]
            fixed = dict(policy_type=kind, task=texts, reward=digits, run_dir="run")
            settings = SETTINGS | settings | fixed | changes
            run_ok(script, flags(script, **settings), cwd, processes=processes)
            done[key] = cwd / "run"
        return done[key]

    return get


def assert_close(one, two, tolerance):
    """Two lists of rows with the same names, and numbers that differ by at most `tolerance`, relative above 1."""
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        for name in a:
            if isinstance(a[name], float):
                # what conjugate gradients have not solved is their rounding error, which is anyone's guess
                allowed = 0.1 if name == "losses/cg_residual" else tolerance
                assert math.isclose(a[name], b[name], rel_tol=allowed, abs_tol=allowed), (name, a[name], b[name])
            else:
                assert a[name] == b[name], name


def optimizer_state(run_dir):
    """All moments in the last checkpoint, as one vector."""
    state = checkpoint(run_dir)["optimizer"]["state"]
    return torch.cat([moment.flatten() for name in sorted(state) for moment in state[name].values() if moment.ndim])


@pytest.mark.parametrize("variant", ["micro-batches", "two processes"])
@pytest.mark.parametrize("script, kind", CASES)
def test_processes_and_micro_batches_change_nothing(script, kind, variant, finished):
    """Rollouts are identical; metrics, and parameters after the updates, are equal to 1e-5."""
    one, other = finished(script, kind), finished(script, kind, variant)
    ours, theirs = rows(one / "metrics.jsonl"), rows(other / "metrics.jsonl")
    assert len(ours) >= 2
    assert_close(ours, theirs, 1e-5)
    # what was sampled is the same to the bit while the weights are
    for name, text in predictions(one).items():
        if name.endswith("_0.jsonl"):
            assert predictions(other)[name] == text
    for name in ("objective/score", "rollout/response_length", "rollout/eos_fraction"):
        if name in ours[0]:
            assert math.isclose(ours[0][name], theirs[0][name], rel_tol=1e-7)  # the order of the sum
    assert_close(rows(one / "eval.jsonl"), rows(other / "eval.jsonl"), 1e-5)
    largest = max((weight - weights(other)[name]).abs().max().item() for name, weight in weights(one).items())
    assert largest < 1e-5
    # the gradients themselves: Adam would make the same steps of their multiples
    moments, others = (optimizer_state(run) for run in (one, other))
    assert (moments - others).norm() < 1e-3 * moments.norm()


@pytest.mark.parametrize("script, kind", CASES)
def test_gradient_checkpointing_changes_nothing(script, kind, finished):
    one, other = finished(script, kind), finished(script, kind, gradient_checkpointing=True)
    assert_close(rows(one / "metrics.jsonl"), rows(other / "metrics.jsonl"), 1e-6)
    assert predictions(one) == predictions(other)


def test_gradient_checkpointing_keeps_less():
    """Of four layers their inputs, which is a small part of what their gradients need."""
    import ppo_causal

    kept = []
    for recompute in (False, True):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=32, n_layer=4, n_head=2, n_positions=64)).eval()
        ppo_causal.prepare_model(model, torch.device("cpu"), False, recompute)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            model(torch.zeros(8, 60, dtype=torch.long), use_cache=False)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_runs_differ_by_seed(finished):
    """What the tests above compare does depend on what was run."""
    one, other = finished("ppo_seq2seq", "seq2seq"), finished("ppo_seq2seq", "seq2seq", seed=2)
    assert predictions(one)["val_0.jsonl"] != predictions(other)["val_0.jsonl"]
    assert rows(one / "metrics.jsonl")[0]["objective/entropy"] != rows(other / "metrics.jsonl")[0]["objective/entropy"]


# ------------------------------------------------------------------------------------------------ what is logged

DOCUMENT = next(
    f for f in (ROOT / "docs" / "metrics.md", ROOT / "README.md") if f.exists() and "`losses/" in f.read_text()
)
MASK = {f"rollout/{name}" for name in ("mask_mass", "mask_kept_fraction", "mask_bite_fraction")}
# figures that every RL script has, whatever the document says
ALWAYS = {f"objective/{name}" for name in ("score", "kl", "kl_coef", "entropy", "rlhf_reward")}
ALWAYS |= {"rollout/response_length", "rollout/eos_fraction", "rollout/sampler_error", "losses/learning_rate"}
ALWAYS |= {f"time/{name}" for name in ("iteration_seconds", "update_seconds", "tokens_per_second")}


@pytest.mark.parametrize("script, kind", CASES)
def test_emitted_names_are_documented(script, kind, finished):
    documented = set(re.findall(r"`((?:objective|losses|rollout|time|reward|eval)/[^`]+)`", DOCUMENT.read_text()))
    for row in rows(finished(script, kind) / "metrics.jsonl", times=True):
        names = {name for name in row if name != "iteration" and not name.startswith("reward/")}
        assert not names - documented, f"{DOCUMENT.name} does not have {names - documented}"
        assert script == "supervised" or names >= ALWAYS
        assert (names >= MASK) == script.startswith("nlpo")
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values())


def test_documented_names_are_emitted(finished):
    """By some script: no figure is documented that none has."""
    documented = set(re.findall(r"`((?:objective|losses|rollout|time)/\w+)`", DOCUMENT.read_text()))
    emitted = {name for case in CASES for name in rows(finished(*case) / "metrics.jsonl", times=True)[0]}
    missing = documented - emitted
    assert not missing or len(SCRIPTS) < len(ALL_SCRIPTS), missing


RL_CASES = [case for case in CASES if case[0] != "supervised"]


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_figures_agree_with_each_other(script, kind, finished):
    """The policy starts as its reference; the penalty, its controller and the figures of the rollout follow."""
    metrics = rows(finished(script, kind) / "metrics.jsonl")
    assert [row["iteration"] for row in metrics] == [1, 2]
    assert abs(metrics[0]["objective/kl"]) < 1e-6 and metrics[0]["objective/kl_coef"] == SETTINGS["kl_coef"]
    assert abs(metrics[1]["objective/kl"]) > 1e-9, "the second rollout is of the first policy"
    for row in metrics:
        penalty = row["objective/kl_coef"] * row["objective/kl"] * row["rollout/response_length"]
        assert math.isclose(row["objective/rlhf_reward"], row["objective/score"] - penalty, abs_tol=1e-9)
        assert 1 <= row["rollout/response_length"] <= SETTINGS["response_length"]
        assert 0 < row["objective/score"] < 1


@pytest.mark.parametrize("script, kind", RL_CASES)
def test_kl_coef_follows_the_kl_from_iteration_to_iteration(script, kind, finished):
    metrics = rows(finished(script, kind, num_iterations=4) / "metrics.jsonl")
    assert len(metrics) == 4
    for row, following in itertools.pairwise(metrics):
        error = (row["objective/kl"] - SETTINGS["target_kl"]) / SETTINGS["target_kl"]
        expected = row["objective/kl_coef"] * (1 + 0.1 * min(max(error, -0.2), 0.2))
        assert math.isclose(following["objective/kl_coef"], expected, rel_tol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("script, kind", RL_CASES)
def test_what_is_sampled_is_what_is_scored(script, kind, variant, finished):
    """To rounding, also with a temperature and a minimum length."""
    for row in rows(finished(script, kind, variant) / "metrics.jsonl"):
        assert row["rollout/sampler_error"] <= 1e-5
    changed = finished(script, kind, variant, temperature=0.7, min_response_length=3, ent_coef=0.01)
    for row in rows(changed / "metrics.jsonl"):
        assert row["rollout/sampler_error"] <= 1e-5 and row["rollout/response_length"] >= 4


@pytest.mark.parametrize("script, kind", [case for case in CASES if case[0].startswith(("ppo", "nlpo"))])
def test_before_the_first_step_the_ratio_is_one(script, kind, finished):
    run = finished(script, kind, num_minibatches=1, temperature=0.7, min_response_length=3)
    for row in rows(run / "metrics.jsonl"):
        assert abs(row["losses/ratio"] - 1) <= 1e-6 and row["losses/approx_kl"] <= 1e-6
        assert row["losses/clipfrac"] == 0


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith(("ppo", "nlpo"))])
def test_early_stop_ends_the_epochs(script, finished):
    kind = script.rpartition("_")[2]
    every = rows(finished(script, kind, update_epochs=3, learning_rate=1e-2) / "metrics.jsonl")
    some = rows(finished(script, kind, update_epochs=3, learning_rate=1e-2, early_stop_kl=1e-3) / "metrics.jsonl")
    assert every[0]["losses/optimizer_steps"] == 6 and 1 <= some[0]["losses/optimizer_steps"] < 6


@pytest.mark.parametrize("script", SCRIPTS)
def test_learning_rate_falls_when_asked(script, finished):
    kind = "causal" if script.endswith("causal") else "seq2seq"
    metrics = rows(finished(script, kind, anneal_lr=True) / "metrics.jsonl")
    falling = [SETTINGS["learning_rate"] * (1 - i / len(metrics)) for i in range(len(metrics))]
    for row, expected in zip(metrics, falling, strict=True):
        assert math.isclose(row["losses/learning_rate"], expected, rel_tol=1e-9)


@pytest.mark.parametrize("script, kind", CASES)
def test_no_iterations_evaluate(script, kind, texts, digits, tmp_path):
    """--num-iterations 0, or --num-epochs 0, evaluates val and test, and ends."""
    settings = SETTINGS | dict(
        policy_type=kind, task=texts, reward=digits, run_dir="run", num_iterations=0, num_epochs=0
    )
    run_ok(script, flags(script, **settings), tmp_path)
    assert [(row["split"], row["iteration"]) for row in rows(tmp_path / "run" / "eval.jsonl")] == [
        ("val", 0),
        ("test", 0),
    ]
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "model").exists()


def test_several_rewards_are_weighted(finished, digits):
    """The score is the weighted sum of what is logged of each."""
    run = finished("ppo_seq2seq", "seq2seq", reward=[digits, "rouge1"], reward_weights=[0.5, -2.0], num_iterations=1)
    (row,) = rows(run / "metrics.jsonl")
    parts = {name: value for name, value in row.items() if name.startswith("reward/")}
    assert len(parts) == 2
    (own,) = (value for name, value in parts.items() if "digits" in name)
    (rouge,) = (value for name, value in parts.items() if "rouge1" in name)
    assert own > 0 and math.isclose(row["objective/score"], 0.5 * own - 2.0 * rouge, abs_tol=1e-6)


# ------------------------------------------------------------------------------------------------ what is left


@pytest.mark.parametrize("script, kind", CASES)
def test_evaluations_are_complete(script, kind, finished, texts):
    """val and test before and after, val in between; each prediction beside its sample; metrics as rewards.py's."""
    run = finished(script, kind)
    last = len(rows(run / "metrics.jsonl"))
    evals = rows(run / "eval.jsonl")
    done = [(row["split"], row["iteration"]) for row in evals]
    assert done == [("val", 0), ("test", 0), *(("val", i + 1) for i in range(last)), ("test", last)]
    assert set(predictions(run)) == {f"{split}_{iteration}.jsonl" for split, iteration in done}
    metric = rewards.make_metric("rouge")
    for row in evals:
        samples = datapools.load_task(str(texts), row["split"])
        told = rows(run / "predictions" / f"{row['split']}_{row['iteration']}.jsonl")
        columns = ("id", "prompt", "references")
        assert [[p[c] for c in columns] for p in told] == [[s.id, s.prompt, s.references] for s in samples]
        arguments = [[p[c] for p in told] for c in ("prompt", "generation", "references")]
        for name, (per_sample, value) in metric(*arguments, [{}] * len(told)).items():
            assert math.isclose(row[name], value, abs_tol=1e-12)
            assert per_sample is None or [p[name] for p in told] == per_sample


@pytest.mark.parametrize("script, kind", CASES)
@pytest.mark.parametrize("decoding", ["greedy", "sampled"])
def test_saved_model_is_the_policy(script, kind, decoding, finished, texts):
    """It loads with its tokenizer, decodes the final predictions again, and does so token by token without cache."""
    words = ["do_sample", "false"] if decoding == "greedy" else ["do_sample", "true", "temperature", "0.7"]
    run = finished(script, kind, decoding=words)
    auto_model = AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM
    model, tokenizer = auto_model.from_pretrained(run / "model").eval(), AutoTokenizer.from_pretrained(run / "model")
    saved, loaded = checkpoint(run)["policy"], model.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    eos, module = tokenizer.eos_token_id, __import__(script)
    told = rows(run / "predictions" / f"test_{len(rows(run / 'metrics.jsonl'))}.jsonl")
    assert told
    for i, prediction in enumerate(told):
        side = json.loads((run / "config.json").read_text())["truncation_side"]
        length, seq2seq = SETTINGS["prompt_length"], kind == "seq2seq"
        (ids,) = datapools.encode_prompts(tokenizer, [prediction["prompt"]], length, side, seq2seq)
        inputs, prefix = {}, ids
        if kind == "seq2seq":
            inputs, prefix = dict(input_ids=torch.tensor([ids])), [model.config.decoder_start_token_id]
        if decoding == "greedy":
            output = model.generate(torch.tensor([ids]))  # as the generation config of the folder says
            tokens = output[0, 1 if kind == "seq2seq" else len(ids) :].tolist()
            assert tokens == by_steps(model, inputs, prefix, eos, None)
        else:
            tokens = by_steps(model, inputs, prefix, eos, module.uniforms(1, module.EVALUATION_STREAM, [i], 8)[0])
        (text,) = datapools.decode_responses(tokenizer, [ids], [tokens], kind == "seq2seq")
        assert text == prediction["generation"]


@torch.no_grad()
def by_steps(model, inputs, prefix, eos, uniform):
    """Response tokens without cache: the likeliest, or with uniform numbers those of the inverse CDF."""
    tokens = []
    while len(tokens) < SETTINGS["response_length"] and (not tokens or tokens[-1] != eos):
        ids = torch.tensor([prefix + tokens])
        logits = model(**inputs, **{"decoder_input_ids" if inputs else "input_ids": ids}).logits[0, -1]
        logits = logits if uniform is None else logits / 0.7
        cdf = logits.double().softmax(-1).cumsum(-1)
        draw = torch.searchsorted(cdf, uniform[len(tokens)] * cdf[-1], right=True) if uniform is not None else None
        tokens.append(int(logits.argmax() if uniform is None else draw))
    return tokens


def test_run_folder_is_named_and_agreed_on(texts, digits, tmp_path):
    """runs/{task}__{script}__{seed}__{time}, one for both processes; config.json holds the settings."""
    settings = TINY | dict(num_iterations=1, seed=5, task=texts, reward=digits)
    run_ok("ppo_causal", flags("ppo_causal", **settings), tmp_path, processes=2)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"texts__ppo_causal__5__\d{8}_\d{6}_\d{6}", folder.name)
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 5 and config["task"] == str(texts) and config["response_length"] == TINY["response_length"]
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} | {"curves.png"}
    assert names == {
        *("config.json", "metrics.jsonl", "eval.jsonl", "predictions", "checkpoint", "model", "curves.png")
    }


# ------------------------------------------------------------------------------------------------ real command lines


def test_real_run_with_wandb_offline(texts, digits, finished, tmp_path):
    """`python ppo_seq2seq.py --track`: the figures of the forked run to the bit, a real picture, wandb's files."""
    settings = SETTINGS | dict(task=texts, reward=digits, run_dir="run", track=True)
    env = dict(WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    result = real_run("ppo_seq2seq", flags("ppo_seq2seq", **settings), tmp_path, env=env)
    assert result.code == 0, result.stderr
    assert result.stderr == ""
    run, forked = tmp_path / "run", finished("ppo_seq2seq", "seq2seq")
    assert rows(run / "metrics.jsonl") == rows(forked / "metrics.jsonl")
    assert predictions(run) == predictions(forked)
    picture = (run / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82") and len(picture) > 10000
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    content = file.read_bytes()
    for name in (b"objective/score", b"losses/value", b"eval/val/rouge1", b"eval/test/rouge1"):
        assert name in content


def test_real_torchrun(texts, digits, finished, tmp_path):
    """`torchrun --nproc_per_node 2 ppo_causal.py`: as two forked processes, and as one."""
    settings = SETTINGS | dict(task=texts, reward=digits, run_dir="run", micro_batch_size=3)
    result = real_run("ppo_causal", flags("ppo_causal", **settings), tmp_path, torchrun=2)
    assert result.code == 0, result.stderr
    two = finished("ppo_causal", "causal", "two processes")
    assert rows(tmp_path / "run" / "metrics.jsonl") == rows(two / "metrics.jsonl")
    assert_close(
        rows(tmp_path / "run" / "metrics.jsonl"), rows(finished("ppo_causal", "causal") / "metrics.jsonl"), 1e-5
    )
    assert os.path.getsize(tmp_path / "run" / "curves.png") > 10000
