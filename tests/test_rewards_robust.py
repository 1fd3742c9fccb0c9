"""No text may crash a reward or metric, or make it other than a finite number in its range."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time

import nltk
import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rewards
from datapools import UsageError
from rewards import METRICS, REWARDS, make_metric, make_reward

TABLE = {
    "table": [
        [{"is_header": True, "value": "Name"}, {"is_header": False, "value": "a|b &bar;&#124; \t x\ny"}],
        [{"is_header": False, "value": " "}, {"is_header": False, "value": "ünï ( $ 5 )"}],
    ],
    "highlighted_cells": [[0, 1], [1, 0], [1, 1]],
    "table_page_title": "Page",
    "table_section_title": " ",
    "table_section_text": "",
    "overlap_subset": "True",
}
BARE = {**TABLE, "highlighted_cells": [], "table_page_title": "", "table_section_title": "", "overlap_subset": False}
METAS = [{"raw_table": table, "concepts": ["Dog", "", "cat"], "intent": 2} for table in (TABLE, BARE)]
UNBOUNDED = math.inf
RANGES = {"ter": (-UNBOUNDED, 1), "bleurt": (-UNBOUNDED, UNBOUNDED), "cider": (0, 10), "bertscore": (-1, 1)}
RANGES |= {"spider": (0, 5.5), "intent": (0, 2), "repeat_penalty": (-1, 0), "summac_zs": (-1, 1)}
RANGES |= {"reward_model": (-UNBOUNDED, UNBOUNDED)}
METRIC_RANGES = {**RANGES, "ter": (0, UNBOUNDED), "perplexity": (0, UNBOUNDED), "intent": (0, 1)}
WITHOUT_JAVA = {"spice", "spider"}  # their program is not there in most places: see test_rewards_learned.py


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """For each name that needs a model, options that name a small one."""
    root = tmp_path_factory.mktemp("models")
    four = tiny_models.save_bert(root / "four", ["a", "b", "c", "d"])
    nli = tiny_models.save_bert(root / "nli", ["contradiction", "neutral", "entailment"])
    import torch

    conv = {"mlp.weight": torch.ones(1, 23), "mlp.bias": torch.zeros(1)}
    torch.save({**conv, "layer_final.weight": torch.ones(2, 3), "layer_final.bias": torch.zeros(2)}, root / "conv.bin")
    return {
        "sentiment": {"model": tiny_models.save_roberta(root / "roberta")},
        "classifier": {"model": four, "label": "c"},
        "intent": {"model": four},
        "bleurt": {"model": tiny_models.save_bert(root / "one", ["score"])},
        "reward_model": {"model": str(root / "one")},
        "bertscore": {"model_type": four, "num_layers": 1},
        "commongen_preference": {"model": tiny_models.save_t5(root / "t5"), "concept_coef": 0.5, "meteor_coef": 0.0},
        "summac_zs": {"model": nli},
        "summac_conv": {"model": nli, "weights": str(root / "conv.bin")},
    }


@pytest.fixture(scope="module")
def scorers(options):
    """All rewards and metrics, made once: (kind, name) -> callable."""
    made = {("reward", name): make_reward(name, **options.get(name, {})) for name in set(REWARDS) - WITHOUT_JAVA}
    made |= {("metric", name): make_metric(name, **options.get(name, {})) for name in METRICS}
    return made


MODEL, TOKENIZER = tiny_models.formula_gpt2()


def check(scorers, kind, name, prompts, generations, references):
    scorer = scorers[kind, name]
    metas = [METAS[i % 2] for i in range(len(prompts))]
    if kind == "reward":
        scores = scorer(prompts, generations, references, metas)
        assert len(scores) == len(generations) and all(type(score) is float for score in scores)
        low, high = RANGES.get(name, (0, 1))
        assert all(math.isfinite(score) and low - 1e-6 <= score <= high + 1e-6 for score in scores), scores
        return
    policy = {"model": MODEL, "tokenizer": TOKENIZER} if name == "perplexity" else {}
    result = scorer(prompts, generations, references, metas, **policy)
    low, high = METRIC_RANGES.get(name, (-1e-6, UNBOUNDED) if name == "diversity" else (0, 1))
    for key, (scores, value) in result.items():
        least = -UNBOUNDED if "cond_entropy" in key else low
        for score in [value, *(scores or [])]:
            assert type(score) is float and math.isfinite(score), key
            assert least - 1e-6 <= score <= high + 1e-6, (key, score)
        assert scores is None or len(scores) == len(generations)


HOSTILE = [
    "",
    " ",
    "\n\n\t \r\n",
    "?! ... -- ;",
    "'",
    '"',
    "''' \" \" „ “ `",
    "🍞🔥😀 👩‍👩‍👧",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "日本語の文。ひらがな",
    "a",
    "<null>",
    "<cell> 1 </cell>",
    "NaN inf -inf 1e999 1_000 ٣",
    "\x00\x01\x7f\ufeff\u200b",
    "generate a sentence with: dog cat.",
    "a\u2028b\u2029c\x85d\x0be\x0cf",
    "e\u0301 ﬁ ß İ ı ǅ",
    "cannot _cannot_ can not gonna 'tis d'ye",
    "https://a.b/c?d=e&amp;f=g",
    "&lt;&bar;&#124;&amp;amp; @-@ $ 5 ( x ) % }",
    "line one.\nline two.\n\nline three.",
]
NAMES = [("reward", name) for name in sorted(set(REWARDS) - WITHOUT_JAVA)]
NAMES += [("metric", name) for name in sorted(METRICS)]


@pytest.mark.parametrize("kind, name", NAMES)
def test_hostile_texts(scorers, kind, name):
    count = len(HOSTILE)
    usual = ["The dog went home.", "A cat sat."]
    for references in (
        [usual] * count,  # hostile generations
        [[text] for text in HOSTILE],  # identical
        [[text] for text in reversed(HOSTILE)],
        [[""]] * count,
        [["", text] for text in HOSTILE],
        [(HOSTILE[i:] + HOSTILE)[:10] for i in range(count)],  # ten references
    ):
        check(scorers, kind, name, HOSTILE, HOSTILE, references)
    check(scorers, kind, name, [""] * count, ["The dog went home."] * count, [[text] for text in HOSTILE])
    check(scorers, kind, name, [""], [""], [[""]])  # a batch of one, of nothing


@pytest.mark.parametrize("kind, name", NAMES)
def test_five_thousand_words(scorers, kind, name):
    words = " ".join(["the", "dog", "went", f"home{i}."][i % 4] for i in range(5000))
    unbroken = "x" * 20_000
    check(scorers, kind, name, ["p", words], [words, unbroken], [["the dog went home."], ["x", "y"]])
    if name not in ("ter", "rougeL", "rougeLsum", "rouge_combined", "rouge"):  # quadratic in the two lengths
        check(scorers, kind, name, ["p"], [words], [[words + " now", "a dog"]])


pieces = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["the", "dog", "went", "'", '"', "$", "(", ")", ".", "%", "\n", "2021-07-14", "12", "don't", "<", ">"]
    ),
)
texts = st.lists(pieces, max_size=10).map(" ".join)
samples = st.lists(st.tuples(texts, texts, st.lists(texts, min_size=1, max_size=4)), min_size=1, max_size=4)


@pytest.mark.parametrize("kind, name", NAMES)
@settings(
    max_examples=int(os.environ.get("EXAMPLES", 25)),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=samples)
def test_any_text(scorers, kind, name, rows):
    check(scorers, kind, name, *map(list, zip(*rows, strict=True)))


# ---- the pool, and data that is missing -----------------------------------------------------------------------------
def run(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


POOL = """
import rewards, time, sys
reward = rewards.make_reward("ter")
print(*rewards.process_pool()._processes, flush=True)
print(reward([""], ["a b"], [["a b"]], [{}]), flush=True)
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at processes the Linux way")
@pytest.mark.parametrize("end", ["exit", "error", "killed"])
def test_the_pool_is_made_at_once_and_ends_with_its_process(end):
    code = POOL + {"exit": "", "error": "raise SystemExit(3)", "killed": "time.sleep(60)"}[end]
    process = run(code, LOCAL_WORLD_SIZE="1")
    workers = process.stdout.readline().split()
    assert 1 <= len(workers) <= 8
    assert process.stdout.readline() == "[1.0]\n"
    if end == "killed":
        process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == {"exit": 0, "error": 3, "killed": -signal.SIGKILL}[end]
    for _ in range(100):
        if not any(map(alive, workers)):
            return
        time.sleep(0.05)
    raise AssertionError(f"workers left behind: {workers}")


def test_workers_share_the_cores_with_the_other_processes():
    process = run(POOL, LOCAL_WORLD_SIZE="1000")
    assert len(process.communicate()[0].splitlines()[0].split()) == 1


@pytest.mark.parametrize(
    "kind, name, data", [("reward", "meteor", "wordnet punkt_tab"), ("metric", "diversity", "punkt_tab")]
)
def test_missing_nltk_data(tmp_path, kind, name, data):
    code = (
        "import nltk, rewards\n"
        f"nltk.data.path[:] = [{str(tmp_path)!r}]\n"
        f"try:\n    rewards.make_{kind}({name!r})\n"
        "except rewards.UsageError as error:\n    print(error)\n"
    )
    output = run(code).communicate()[0]
    assert output == f"{name} needs NLTK's data: python -m nltk.downloader {data} (or set NLTK_DATA to its folder)\n"


@pytest.mark.parametrize("online", [True, False])
def test_nltk_data_are_fetched_where_there_is_a_network(tmp_path, monkeypatch, online):
    folder, at_hand, fetched = tmp_path / "data", nltk.data.find("tokenizers/punkt_tab"), []

    def download(self, package, quiet):
        fetched.append(package)
        shutil.copytree(str(at_hand), folder / "tokenizers" / package)

    folder.mkdir()
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    monkeypatch.setattr(nltk.downloader.Downloader, "download", download)
    monkeypatch.setattr(rewards.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(rewards, "answers", lambda url: online and "nltk_data" in url)
    if not online:
        with pytest.raises(UsageError, match="python -m nltk.downloader punkt_tab"):
            make_metric("diversity")
    for _ in range(2 * online):
        make_metric("diversity")
    assert fetched == ["punkt_tab"] * online
    monkeypatch.setattr(rewards.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="python -m nltk.downloader punkt_tab"):
        make_metric("diversity")
    assert fetched == ["punkt_tab"] * online


@pytest.mark.parametrize(
    "name, module, words",
    [("cider", "spacy", "pip install spacy"), ("bertscore", "bert_score", "pip install bert-score")],
)
def test_missing_package(monkeypatch, name, module, words):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=words):
        make_reward(name)


def test_missing_py_rouge(monkeypatch):
    rewards.py_rouge.cache_clear()
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install py-rouge"):
        make_reward("rouge_l_max")
