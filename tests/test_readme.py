"""The README's commands and examples, run as they stand there, in a copy of the scripts; the long ones cut short."""

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from packaging.specifiers import SpecifierSet
from script_runs import ROOT, run_ok

TEXT = (ROOT / "README.md").read_text()
SHORT = "--num-iterations 1 --batch-size 8 --num-minibatches 2 --update-epochs 1 --eval-samples 4".split()
EPOCH = "--num-epochs 1 --eval-samples 4".split()


def block(language, with_words):
    """The block of code that has these words."""
    blocks = [code for name, code in re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL) if name == language]
    return next(code for code in blocks if with_words in code)


def run(command, cwd, *more):
    """A command of the README, its script taken from cwd, with further flags."""
    script, *words = shlex.split(command.strip().removeprefix("python "))
    return run_ok(script.removesuffix(".py"), [*words, *more], cwd, timeout=300, root=cwd, draw=True).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The scripts, and runs/sft of the first command."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    run("python supervised.py --task numbers --run-dir runs/sft", folder, *EPOCH)
    return folder


def test_first_command(checkout):
    *_, sft, ppo = block("bash", "--run-dir runs/ppo").split("&&")
    assert sft.split() == "python supervised.py --task numbers --run-dir runs/sft".split()
    really = [sys.executable, *shlex.split(ppo)[1:], *SHORT]
    subprocess.run(really, cwd=checkout, check=True, timeout=300)
    left = {path.name for path in (checkout / "runs" / "ppo").iterdir()} - {".lock"}
    assert left == {"config.json", "metrics.jsonl", "eval.jsonl", "predictions", "checkpoint", "model", "curves.png"}
    table = TEXT.split("## What a run leaves")[1].split("\n## ")[0]
    for name in left:
        assert f"`{name}" in table, name


def test_own_reward(checkout):
    (checkout / "own_rewards.py").write_text(block("python", "def even("))
    output = run(block("bash", "--reward own_rewards.py:even"), checkout, *SHORT)
    assert "even" in output and "increasing_numbers" in output


def test_own_data(checkout):
    (checkout / "own.jsonl").write_text(block("json", "references") * 10)
    command = block("bash", "--task own.jsonl").replace("--model t5-small", "--model runs/sft/model")
    run(command, checkout, *SHORT)


def test_reward_model(checkout):
    sft, reward_model, ppo = block("bash", "reward_model.py").strip().splitlines()
    run(sft, checkout, *EPOCH)
    run(reward_model, checkout, *EPOCH)
    assert "increasing_numbers" in run(ppo.replace("--num-iterations 20", ""), checkout, *SHORT)


def test_tests_command():
    """That of the README is the one of CI."""
    *_, tests = block("bash", "pytest").strip().split("&&")
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == tests.strip()


@pytest.mark.slow
def test_own_task_learns(checkout):
    with open(checkout / "datapools.py", "a") as file:
        file.write("\n\n" + block("python", "def load_next"))
    for command in block("bash", "--task next").split("&&"):
        run(command, checkout)
    rows = [json.loads(line) for line in (checkout / "runs" / "next_ppo" / "eval.jsonl").read_text().splitlines()]
    before, *_, after = [row["chrf"] for row in rows if row["split"] == "val"]
    assert after > before + 0.05


def test_python_versions():
    """README's least Python is one that every pinned package takes, as their metadata say, and that ruff checks."""
    least = re.search(r"^Python (3\.\d+) or later", TEXT, re.M)[1]
    assert f'target-version = "py{least.replace(".", "")}"' in (ROOT / "ruff.toml").read_text()
    pins = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    assert len(pins) > 20
    for name in pins:
        needed = importlib.metadata.metadata(name)["Requires-Python"]
        assert needed is None or f"{least}.0" in SpecifierSet(needed), f"{name} needs Python {needed}"
