"""benchmarks/evidence.py: the scripts take its commands, and it measures and counts right."""

import sys

import numpy as np
import pytest
import torch
from script_runs import ROOT, fields, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

sys.path.append(str(ROOT / "benchmarks"))  # behind the root: both have a rewards.py
import evidence
import evidence_rewards
import evidence_tables


def test_the_scripts_have_all_flags(tmp_path):
    for task in evidence.tasks_of(tmp_path).values():
        assert (task.shared | task.start).keys() <= fields("supervised").keys()
        for name in evidence.ALGORITHMS:
            for setting in evidence.settings_of(name):
                script = evidence.script_of(name, task, ROOT)
                assert evidence.flags_of(task, name, setting, 1, tmp_path).keys() <= fields(script.stem).keys()


def test_what_an_ablation_changes_is_in_the_script():
    for label, (name, changed, replaced) in evidence.ABLATIONS.items():
        script = "ppo_causal" if name == "PPO" else "nlpo_causal"
        assert changed.keys() <= fields(script).keys()
        assert all((ROOT / f"{script}.py").read_text().count(old) == 1 for old in replaced), label


def test_statistics():
    assert evidence_tables.better([1, 2, 3], [0, 0.5]).startswith("1.00 [1.00, 1.00]")
    assert evidence_tables.better([1, 2], [1, 2]).startswith("0.50")
    assert evidence_tables.mean_and_interval([2.0, 2.0, None]) == "2.000 [2.000, 2.000]"
    low, high = evidence_tables.interval(np.arange(5.0), lambda rng, x: rng.choice(x, len(x)).mean())
    assert 0.5 < low < 1.2 and 2.8 < high < 3.5


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_kl_to_the_start_model(kind):
    folder = tiny_model(kind)
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSeq2SeqLM
    model, tokenizer = auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    metric = evidence_rewards.start_kl("cpu", folder, 12, "left")
    prompts, texts, references = ["ab", "abcdef"], [" xy", " z"], [["q r"], ["s"]]
    same = metric(prompts, texts, references, [{}, {}], model, tokenizer)
    assert same["kl"][1] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    together = metric(prompts, texts, references, [{}, {}], model, tokenizer)["kl"][0]
    alone = [
        metric([p], [t], [r], [{}], model, tokenizer)["kl"][1]
        for p, t, r in zip(prompts, texts, references, strict=True)
    ]
    assert min(alone) > 0 and together == pytest.approx(alone, rel=1e-3)


def test_the_judge(tmp_path):
    (tmp_path / "judge.json").write_text('{"good": [0, 9], "bad": [9, 0], "not good": [9, 0], "film": [5, 5]}')
    judge = evidence_rewards.judge(str(tmp_path / "judge.json"))
    good, bad, neither, negated = judge([""] * 4, ["a Good film", "bad film", "film", "not good"], None, None)
    assert good > 0.8 and bad < 0.2 and neither == pytest.approx(0.5, abs=0.2) and negated < good
