"""benchmarks/grue.py: the scripts take its commands, and its table is of what runs have left."""

import importlib
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import script_runs
from script_runs import ROOT, fields, tiny_model

sys.path.append(str(ROOT / "benchmarks"))  # behind the root: both have a rewards.py
import grue

ALL = [(task, method) for task in grue.TASKS for method in grue.METHODS]


def flags_of(words):
    """{flag: its values} of a command."""
    values = {}
    for word in words:
        if word.startswith("--"):
            values[word.removeprefix("--")] = []
        elif values:
            values[list(values)[-1]].append(word)
    return values


@pytest.mark.parametrize("supervised", ["published", "own"])
def test_the_scripts_have_all_flags(supervised):
    args = grue.Args(supervised=supervised)
    for task, method in ALL:
        words = grue.command(args, task, method, 1)
        known = fields(Path(words[1]).stem)
        assert {flag.replace("-", "_") for flag in flags_of(words)} <= known.keys(), (task, method)


def test_runs_from_a_supervised_model_have_the_settings_of_rl4lms():
    # task: tokens per iteration, iterations, divisor of the learning rate, KL weight and target
    wanted = {
        "imdb": (1280, 50, 1, 0.1, 0.1),
        "commongen": (1280, 100, 1, 0.01, 1),
        "cnn_dm": (5120, 50, 1, 0.01, 0.2),
        "totto": (2560, 100, 4, 0.01, 0.2),
        "narrative_qa": (2560, 100, 4, 0.001, 0.2),
        "iwslt2017": (5120, 50, 2, 0.001, 0.2),
        "daily_dialog": (1280, 50, 1, 0.2, 0.05),
    }
    lengths = {"imdb": 48, "commongen": 20, "cnn_dm": 100, "totto": 50, "narrative_qa": 50, "iwslt2017": 128}
    for (task, (tokens, iterations, divisor, kl, target)), method in itertools.product(wanted.items(), ("PPO", "NLPO")):
        words = grue.command(grue.Args(), task, f"supervised+{method}", 1)
        script = importlib.import_module(Path(words[1]).stem)
        table = next(row for names, row in script.TASK_DEFAULTS.items() if task in names.split())
        default = dict(zip(script.TASK_COLUMNS, table, strict=False))
        typed = {name.replace("-", "_"): float(value[0]) for name, value in flags_of(words).items() if name in SETTINGS}
        row = default | typed
        assert (row["num_iterations"], row["kl_coef"], row["target_kl"]) == (iterations, kl, target), (task, method)
        assert row["learning_rate"] == pytest.approx(default["learning_rate"] / divisor), (task, method)
        assert row["batch_size"] * lengths.get(task, 20) == pytest.approx(tokens, rel=0.25), (task, method)


SETTINGS = ("num-iterations", "kl-coef", "target-kl", "learning-rate", "batch-size")


def test_runs_are_made_once_and_gathered(tmp_path, monkeypatch, capsys):
    started, tiny = [], tiny_model("seq2seq")

    def run(line):
        started.append(Path(line[1]).stem)
        return SimpleNamespace(returncode=script_runs.run(started[-1], line[2:], tmp_path).code)

    monkeypatch.setattr(grue.subprocess, "run", run)
    monkeypatch.setitem(grue.TASKS, "narrative_qa", replace(grue.TASKS["narrative_qa"], supervised=tiny))
    small = dict(prompt_length=24, response_length=8, batch_size=8, num_minibatches=2, update_epochs=1, eval_samples=4)
    small |= dict(model=tiny, num_iterations=1, metrics="rouge_l_max")
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in small.items())
    call = ["grue.py", "--tasks", "narrative_qa", "--methods", "zero-shot", "supervised+NLPO", "--seeds", "1", "2"]
    call += ["--out", str(tmp_path), "--data", str(ROOT / "tests" / "data"), f"--flags={flags}"]
    for extra in ["--run"], ["--run"], ["--table"]:
        monkeypatch.setattr(sys, "argv", call + extra)
        grue.main()
        assert started == ["ppo_seq2seq", "nlpo_seq2seq", "nlpo_seq2seq"]
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines if line.startswith("| ")}
    assert cells["method"][0] == "rouge_l_max"
    assert cells["zero-shot"][0].endswith("(1)")
    assert "±" in cells["supervised+NLPO"][0] and cells["supervised+NLPO"][0].endswith("(2)")


def test_the_table_is_of_the_last_evaluation_of_finished_runs_beside_what_was_published(tmp_path):
    args = grue.Args(tasks=("imdb",), methods=("zero-shot", "PPO", "NLPO"), seeds=(1, 2), out=tmp_path)
    for name, rows in {
        "zero-shot_1": [(0, "val", 0.1), (0, "test", 0.4)],
        "PPO_1": [(0, "test", 0.4), (50, "val", 0.2), (50, "test", 0.5)],
        "PPO_2": [(0, "test", 0.4), (50, "val", 0.2), (50, "test", 0.7)],
        "NLPO_1": [(0, "test", 0.4), (40, "val", 0.9)],
    }.items():
        (tmp_path / "imdb" / name).mkdir(parents=True)
        lines = [f'{{"iteration": {i}, "split": "{split}", "sentiment": {value}}}\n' for i, split, value in rows]
        (tmp_path / "imdb" / name / "eval.jsonl").write_text("".join(lines))
    table = grue.table(args)
    assert "| zero-shot | 0.400 (1) | 0.489 [1] |" in table
    assert "| PPO | 0.600 ± 0.141 (2) | 0.602 [1] |" in table
    assert "| NLPO |  | 0.611 [1] |" in table
    assert f"[1] {grue.PAPER}" in table
