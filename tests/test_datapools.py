"""Every task's prompts, references and meta, pinned on hand-written rows in the hub's columns, and the errors."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets
import pytest

import datapools
from datapools import UsageError, load_task

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """datasets copies what it reads: not into the cache of whoever runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def rising_prefix(text):
    numbers = [int(word) for word in text.split()]
    rise = 1
    while rise < len(numbers) and numbers[rise] > numbers[rise - 1]:
        rise += 1
    return rise / max(len(numbers), 10)


def test_numbers():
    samples = load_task("numbers", "train")
    assert len(samples) == 2000 and len(load_task("numbers", "val")) == len(load_task("numbers", "test")) == 50
    assert load_task("numbers", "train") == samples != load_task("numbers", "train", seed=1)
    assert load_task("numbers", "val", n_samples=7) == load_task("numbers", "val")[:7]
    assert {sample.prompt for sample in samples} == {"Count upwards:"}
    texts = [sample.references[0] for sample in samples]
    assert 0.3 < sum(map(rising_prefix, texts)) / len(texts) < 0.4
    assert all(12 <= len(text.split()) <= 18 for text in texts)
    assert all(0 <= int(word) <= 300 for text in texts for word in text.split())
