"""What all tests share: no network, one thread, slow tests only when asked for, and folders of data to run on."""

import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])

import json

import pytest

REWARDS = '''
def digits(prompts, generations, references, metas):
    """A reward that a random model earns some of: the share of digits and of letters up to m."""
    good = set("0123456789abcdefghijklm")
    return [sum(c in good for c in g.lower()) / max(len(g), 1) for g in generations]
'''


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: minutes long; run with -m slow, or with all others by -m 'slow or not slow'"
    )
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of train.jsonl, validation.jsonl and test.jsonl: prompts and references of different lengths."""
    folder, rng = tmp_path_factory.mktemp("texts") / "texts", random.Random(0)
    folder.mkdir()
    words = "the a cat dog tree house runs sleeps green under over seven 12 345 quickly".split()
    for split, size in (("train", 20), ("validation", 5), ("test", 3)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for i in range(size):
                prompt, reference = (" ".join(rng.choices(words, k=rng.randint(1, most))) for most in (8, 5))
                row = {"id": f"{split}-{i}", "prompt": prompt, "references": [reference]}
                file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """path/to/file.py:function of a reward that differs from response to response."""
    file = tmp_path_factory.mktemp("reward") / "own_rewards.py"
    file.write_text(REWARDS)
    return f"{file}:digits"
