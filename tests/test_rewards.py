"""Rewards and metrics against the values of the original implementations, other oracles, and hostile texts."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from datapools import UsageError
from rewards import check_metric, check_reward, make_metric, make_reward

GOLDEN = json.loads((Path(__file__).parent / "golden_rewards.json").read_text())
SAMPLES = GOLDEN["samples"]
BATCH = tuple([sample[key] for sample in SAMPLES] for key in ("prompt", "generation", "references", "meta"))


def only(indices):
    """The golden samples at these indices, as the four lists that rewards and metrics take."""
    return tuple([column[i] for i in indices] for column in BATCH)


# name in the golden file -> our reward and its options
GOLDEN_REWARDS = {
    "increasing_numbers": ("increasing_numbers", {}),
    "dates": ("dates", {}),
    **{type: (type, {}) for type in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
    **{f"{type}_first_ref": (type, {"first_reference": True}) for type in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
    "rouge_combined": ("rouge_combined", {}),
    "rouge_l_max": ("rouge_l_max", {}),
    "bleu": ("bleu", {}),
    "sacrebleu": ("sacrebleu", {}),
    "sacrebleu_intl": ("sacrebleu", {"tokenize": "intl"}),
    "chrf": ("chrf", {}),
    "ter_reward": ("ter", {}),
    "parent_f": ("parent", {}),
    "common_gen_repeat_penalty": ("repeat_penalty", {}),
    "common_gen_repeat_penalty_batched": ("repeat_penalty", {}),
    "meteor": ("meteor", {}),
    "meteor_first_ref": ("meteor", {"first_reference": True}),
    "cider": ("cider", {}),
    "cider_13a": ("cider", {"tokenize": "13a"}),
}


@pytest.mark.parametrize("key", GOLDEN_REWARDS)
def test_golden_reward(key):
    name, kwargs = GOLDEN_REWARDS[key]
    expected = {**GOLDEN["per_sample"], **GOLDEN["nltk_3_10"]["per_sample"]}[key]
    defined = [i for i, value in enumerate(expected) if value is not None]
    got = make_reward(name, **kwargs)(*only(defined))
    assert got == pytest.approx([expected[i] for i in defined], abs=1e-6)
    assert all(type(score) is float for score in got)


@pytest.mark.parametrize("suffix, kwargs", [("", {}), ("_first_ref", {"first_reference": True})])
def test_golden_rouge_metric(suffix, kwargs):
    result = make_metric("rouge", **kwargs)(*BATCH)
    assert list(result) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    for type, (scores, mean) in result.items():
        assert scores == pytest.approx(GOLDEN["per_sample"][type + suffix], abs=1e-6)
        assert mean == pytest.approx(GOLDEN["corpus"][type + suffix], abs=1e-6)


# ---- names, options, needs ------------------------------------------------------------------------------------------
def sample(**fields):
    return SimpleNamespace(**{"id": "x1", "prompt": "p", "references": ["r"], "meta": {}, **fields})


def test_errors_name_what_is_right():
    with pytest.raises(UsageError, match="unknown reward 'roug1'.*did you mean 'rouge1'"):
        make_reward("roug1")
    with pytest.raises(UsageError, match="unknown metric 'rouge9'.*did you mean 'rouge"):
        make_metric("rouge9")
    with pytest.raises(UsageError, match="'rouge1' has no option 'first_ref'.*did you mean 'first_reference'"):
        make_reward("rouge1", first_ref=True)
    with pytest.raises(UsageError, match="no file 'nowhere.py'"):
        make_reward("nowhere.py:f")
    with pytest.raises(UsageError, match="sample 'x1' has none"):
        check_reward("rouge1", [sample(references=[])])
    with pytest.raises(UsageError, match="sample 'x1' has none"):
        check_metric("rouge", [sample(references=[])])
    check_reward("dates", [sample(references=[])])
    for message in ("roug1", "rouge9"):
        with pytest.raises(UsageError) as error:
            make_reward(message)
        assert "\n" not in str(error.value)


def test_ones_own_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def long(prompts, generations, references, metas, scale=1.0):\n"
        "    return [scale * len(text) for text in generations]\n"
        "def lengths(prompts, generations, references, metas, model=None, tokenizer=None):\n"
        "    return {'length': ([len(text) for text in generations], 1.0)}\n"
        "class Held:\n"
        "    def __init__(self, device, offset=0.0):\n"
        "        self.device, self.offset = device, offset\n"
        "    def __call__(self, prompts, generations, references, metas):\n"
        "        return [self.offset for _ in generations]\n"
    )
    batch = (["p"], ["four"], [["r"]], [{}])
    assert make_reward(f"{path}:long")(*batch) == [4]
    assert make_reward(f"{path}:long", scale=2.0)(*batch) == [8.0]
    assert make_metric(f"{path}:lengths")(*batch) == {"length": ([4], 1.0)}
    assert make_reward(f"{path}:Held", device="cpu", offset=3.0)(*batch) == [3.0]
    with pytest.raises(UsageError, match="has no function 'lon'.*did you mean 'long'"):
        make_reward(f"{path}:lon")
    with pytest.raises(UsageError, match="has no option 'scal'.*did you mean 'scale'"):
        make_reward(f"{path}:long", scal=2.0)
    check_reward(f"{path}:long", [sample(references=[])])


@pytest.mark.parametrize("name", ["increasing_numbers"])
def test_only_finite_numbers_count(name):
    reward = make_reward(name)
    runs = {"1 2 nan 3": 3, "1 inf 2": 2, "nan": 0, "-inf 1": 1, "1e999 1": 1, "٣ ٤": 2, "5 4": 1}
    for text, run in runs.items():
        assert reward([""], [text], [[]], [{}]) == [run / 10]
    assert all(math.isfinite(x) for x in reward([""], ["1_000 " * 3], [[]], [{}]))
