"""The README's examples, run as they stand there."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text() if README.exists() else ""
SHORT = "--num-iterations 1 --batch-size 8 --num-minibatches 2 --update-epochs 1 --eval-samples 4".split()
SMALL = "--model scratch --scratch-vocab-size 300 --scratch-width 32 --scratch-layers 1 --scratch-heads 2".split()


def block(language, with_words):
    """The block of code that has these words."""
    blocks = [code for name, code in re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL) if name == language]
    return next(code for code in blocks if with_words in code)


def run(command, cwd, *more):
    """A command of the README, its script taken from cwd, cut short by further flags."""
    script, *words = shlex.split(command.strip().removeprefix("python "))
    done = subprocess.run([sys.executable, script, *words, *more], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_own_reward(checkout):
    (checkout / "own_rewards.py").write_text(block("python", "def even("))
    output = run(block("bash", "own_rewards.py:even_metric"), checkout, *SHORT, *SMALL)
    assert "even  " in output


def test_own_data(checkout):
    (checkout / "own.jsonl").write_text(block("json", "references").strip().join(["", "\n"]) * 20)
    run(block("bash", "--task own.jsonl"), checkout, *SHORT, *SMALL)


def test_own_task(checkout):
    with open(checkout / "datapools.py", "a") as file:
        file.write("\n\n" + block("python", "def load_reverse"))
    first, second = block("bash", "--task reverse").split("&&")
    run(first, checkout, "--num-epochs", "1", "--eval-samples", "4")
    assert "chrf" in run(second, checkout, *SHORT)
