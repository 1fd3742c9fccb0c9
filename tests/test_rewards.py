"""Rewards and metrics against the values of the original implementations, other oracles, and hostile texts."""

import inspect
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import nltk
import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider as PycocoCider
from rouge_score.rouge_scorer import RougeScorer

import rewards
from datapools import Sample, UsageError
from rewards import make_metric, make_metrics, make_reward, make_rewards, measure, score_texts

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
    expected = golden("per_sample", key)
    defined = [i for i, value in enumerate(expected) if value is not None]
    got = make_reward(name, **kwargs)(*only(defined))
    assert got == pytest.approx([expected[i] for i in defined], abs=1e-6)
    assert all(type(score) is float for score in got)


# name in the golden file -> our metric, its options, its key there; the corpus values that are means are checked too
GOLDEN_METRICS = {
    **{key: (name, kwargs, name) for key, (name, kwargs) in GOLDEN_REWARDS.items() if key in GOLDEN["corpus"]},
    "ter": ("ter", {}, "ter"),
}
del GOLDEN_METRICS["ter_reward"]  # the metric is the rate itself
DOCUMENTED_DIFFERENCES = {
    # the mean itself instead of the median over resamples of it, which depends on the seed
    **{f"{type}_first_ref_bootstrap_mid": f"{type}_first_ref" for type in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
}


def golden(kind, key):
    return {**GOLDEN[kind], **GOLDEN["nltk_3_10"][kind]}[key]


@pytest.mark.parametrize("key", GOLDEN_METRICS)
def test_golden_metric(key):
    name, kwargs, ours = GOLDEN_METRICS[key]
    scores, value = make_metric(name, **kwargs)(*BATCH)[ours]
    expected = [0.0 if score is None else score for score in golden("per_sample", key)]  # BLEU of no words: ours is 0
    assert scores == pytest.approx(expected, abs=1e-6)
    assert value == pytest.approx(golden("corpus", key), abs=1e-6)
    assert type(value) is float


@pytest.mark.parametrize("suffix, kwargs", [("", {}), ("_first_ref", {"first_reference": True})])
def test_golden_rouge_metric(suffix, kwargs):
    result = make_metric("rouge", **kwargs)(*BATCH)
    assert list(result) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    for type, (scores, mean) in result.items():
        assert scores == pytest.approx(GOLDEN["per_sample"][type + suffix], abs=1e-6)
        assert mean == pytest.approx(GOLDEN["corpus"][type + suffix], abs=1e-6)


def test_our_mean_is_within_the_bootstrap_of_the_original():
    for key, ours in DOCUMENTED_DIFFERENCES.items():
        assert GOLDEN["corpus"][ours] == pytest.approx(GOLDEN["corpus"][key], abs=GOLDEN["tolerance"][key])


TOTTO = only([i for i, row in enumerate(SAMPLES) if "raw_table" in row["meta"]])


def test_golden_parent_metric():
    result = make_metric("parent")(*TOTTO)
    for key in (key for key in GOLDEN["corpus"] if "/parent_" in key):
        assert result[key][1] == pytest.approx(GOLDEN["corpus"][key], abs=1e-6)
    assert len(result) == 9
    for key, ours in [("precision", "/precision"), ("recall", "/recall"), ("f", "_f_score")]:
        expected = [score for score in GOLDEN["per_sample"][f"parent_{key}"] if score is not None]
        assert result[f"table_to_text/parent_overall{ours}"][0] == pytest.approx(expected, abs=1e-6)


def test_golden_bleu_totto():
    result = make_metric("bleu_totto")(*TOTTO)
    expected = {key: value for key, value in GOLDEN["corpus"].items() if "/bleu_" in key}
    assert {key: value for key, (_, value) in result.items()} == pytest.approx(expected, abs=1e-9)
    overlap = only([i for i, row in enumerate(SAMPLES) if row["meta"].get("raw_table", {}).get("overlap_subset")])
    assert make_metric("bleu_totto")(*overlap)["table_to_text/bleu_non_overlap"] == (None, 0.0)


def test_golden_totto_lines():
    """The exact lines that the Perl detokenizer made of generations, references and tables."""
    for row in SAMPLES:
        if lines := row.get("totto_detok"):
            assert rewards.totto_line(row["generation"]) == lines["predictions"]
            assert rewards.totto_references(row["references"]) == [lines[f"references-multi{i}"] for i in range(3)]
            made = map(rewards.detokenize, rewards.table_lines(row["meta"]["raw_table"]))
            assert list(made) == [lines[f"tables_parent_{kind}_format"] for kind in ("precision", "recall")]


def test_detokenize_is_moses():
    """Lines with what Moses' detokenizer.perl makes of them; equal on 60,000 random lines when this was written."""
    for line, expected in json.loads((Path(__file__).parent / "detokenized.json").read_text()).items():
        assert rewards.detokenize(line) == expected


def test_golden_diversity(monkeypatch):
    metric = make_metric("diversity")
    for corpus in ("nltk_3_10", None):
        values = GOLDEN[corpus]["corpus"] if corpus else GOLDEN["corpus"]
        expected = {key: value for key, value in values.items() if key.startswith("diversity_metrics/")}
        if not corpus:  # the words that nltk 3.7 made of the texts
            words = {row["generation"]: row["nltk_3_7_tokens"] for row in SAMPLES}
            monkeypatch.setattr(rewards, "word_tokenize", words.__getitem__)
        result = metric(*BATCH)
        assert {key: value for key, (_, value) in result.items()} == pytest.approx(expected, abs=1e-6)


def test_msttr_averages_whole_windows():
    metric = make_metric("diversity")
    texts = ["a " * 100, "a b " * 100, "what is left"]  # windows with 1, 2 and 2 of 100 words, and a part of one
    values = metric([""] * 3, texts, [[]] * 3, [{}] * 3)
    assert values["diversity_metrics/msttr-100"] == (None, 0.01667)
    assert metric([""], ["a b a"], [[]], [{}])["diversity_metrics/msttr-100"] == (None, 0.66667)


def test_golden_missing_concepts():
    for row, expected in zip(SAMPLES, GOLDEN["per_sample"]["missing_concepts"], strict=True):
        if expected is not None:
            assert rewards.missing_concepts(row["generation"], row["meta"]["concepts"]) == expected


def test_every_golden_value_has_its_test():
    tested = {*GOLDEN_REWARDS, *GOLDEN_METRICS, *DOCUMENTED_DIFFERENCES, "missing_concepts"}
    tested |= {"parent_precision", "parent_recall"}
    for key in {*GOLDEN["per_sample"], *GOLDEN["corpus"]}:
        elsewhere = key.startswith(("diversity_metrics/", "table_to_text/", "perplexity_toy", "quirk/", "ter"))
        assert key in tested or elsewhere, key


def test_one_sample_alone_gives_its_value_in_the_batch():
    """A reward must not depend on its batch. CIDEr does so where no split was given."""
    for name in ("rouge1", "rougeLsum", "rouge_l_max", "bleu", "sacrebleu", "chrf", "meteor", "cider", "dates"):
        reward = make_reward(name)
        if name == "cider":
            reward.prepare(BATCH[2])
        together = reward(*BATCH)
        assert [reward(*only([i]))[0] for i in range(len(SAMPLES))] == together


# ---- other implementations, on random pairs -------------------------------------------------------------------------
WORDS = (
    "the a of to children went cannot can't gonna wanna gimme better running runs ran Mr. U.S. 3.5 1,000 it's - -- "
    'don\'t well-known end. yes, (no) "x" 12 2021-07-14 happily flies flying fly dying tying ? ! 日本 über & &amp; cat'
).split()


def random_text(rng, most=30, lines=True):
    words = rng.choices(WORDS, k=rng.randint(0, most))
    return "".join(word + ("\n" if lines and rng.random() < 0.06 else " ") for word in words)


def random_pairs(count, most=30, references=3, **kwargs):
    rng = random.Random(0)
    for _ in range(count):
        pool = [random_text(rng, most, **kwargs) for _ in range(rng.randint(1, references))]
        generation = random_text(rng, most, **kwargs)
        if rng.random() < 0.5 and pool[0]:  # half of them near the reference
            kept = [word for word in pool[0].split(" ") if rng.random() < 0.7]
            generation = " ".join(kept + generation.split(" ")[:3])
        yield generation, pool


PAIRS = 10_000 if os.environ.get("ALL_PAIRS") else 300  # the whole 10,000 take four minutes


def test_rouge_is_rouge_score():
    types = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    library, ours = RougeScorer(types, use_stemmer=True), make_metric("rouge")
    for generation, references in random_pairs(PAIRS):
        expected = {type: score.fmeasure for type, score in library.score_multi(references, generation).items()}
        result = ours([""], [generation], [references], [{}])
        assert {type: value for type, (_, value) in result.items()} == expected


def test_sacrebleu_and_chrf_are_sacrebleu():
    pairs = list(random_pairs(PAIRS))
    generations, references = map(list, zip(*pairs, strict=True))
    batch = ([""] * PAIRS, generations, references, [{}] * PAIRS)
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    for tokenize in ("13a", "intl", "char", "none"):
        scores, corpus = make_metric("sacrebleu", tokenize=tokenize)(*batch)["sacrebleu"]
        expected = sacrebleu.corpus_bleu(generations, streams, tokenize=tokenize, force=True).score / 100
        assert corpus == pytest.approx(expected, abs=1e-12)
        for score, (generation, texts) in zip(scores, pairs, strict=True):
            assert score == sacrebleu.corpus_bleu([generation], [[t] for t in texts], tokenize=tokenize).score / 100
    scores, corpus = make_metric("chrf")(*batch)["chrf"]
    assert corpus == sacrebleu.corpus_chrf(generations, streams).score / 100
    for score, (generation, texts) in zip(scores, pairs, strict=True):
        assert score == sacrebleu.sentence_chrf(generation, texts).score / 100
    few = tuple(column[:40] for column in batch)
    _, corpus = make_metric("ter")(*few)["ter"]
    expected = sacrebleu.corpus_ter(few[1], [list(stream) for stream in itertools.zip_longest(*few[2])]).score / 100
    assert corpus == pytest.approx(expected, abs=1e-12)
    with pytest.raises(UsageError, match="tokenizer 'intel'.*did you mean 'intl'"):
        make_reward("sacrebleu", tokenize="intel")


def nmt_bleu(pairs):
    """BLEU as TensorFlow's NMT tutorial computes it, written down plainly."""
    matches, possible, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for generation, references in pairs:
        words, others = generation.split(), [reference.split() for reference in references]
        length, reference_length = length + len(words), reference_length + min(map(len, others))
        for n in range(1, 5):
            counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            best = Counter()
            for other in others:
                best |= Counter(tuple(other[i : i + n]) for i in range(len(other) - n + 1))
            matches[n - 1] += sum((counts & best).values())
            possible[n - 1] += max(len(words) - n + 1, 0)
    if not all(matches):
        return 0.0
    mean = math.exp(sum(math.log(m / p) / 4 for m, p in zip(matches, possible, strict=True)))
    return mean * (1.0 if length > reference_length else math.exp(1 - reference_length / length))


def test_bleu_is_nmt_bleu():
    pairs = list(random_pairs(PAIRS))
    scores, corpus = make_metric("bleu")([""] * PAIRS, *map(list, zip(*pairs, strict=True)), [{}] * PAIRS)["bleu"]
    assert scores == pytest.approx([nmt_bleu([pair]) for pair in pairs], abs=1e-12)
    assert corpus == pytest.approx(nmt_bleu(pairs), abs=1e-12)
    assert sum(score > 0 for score in scores) > PAIRS / 10


def test_meteor_is_nltk():
    pairs = list(random_pairs(PAIRS))
    got = make_reward("meteor")([""] * PAIRS, *map(list, zip(*pairs, strict=True)), [{}] * PAIRS)
    for score, (generation, references) in zip(got, pairs, strict=True):
        words = [nltk.word_tokenize(reference) for reference in references]
        assert score == nltk.translate.meteor_score.meteor_score(words, nltk.word_tokenize(generation))


@pytest.mark.parametrize("tokenize", ["spacy", "13a"])
def test_cider_is_pycocoevalcap(tokenize):
    pairs = list(random_pairs(PAIRS))
    generations, references = map(list, zip(*pairs, strict=True))
    reward = make_reward("cider", tokenize=tokenize)
    reward.prepare(references)
    got = reward([""] * PAIRS, generations, references, [{}] * PAIRS)
    truth = {i: [reward.line(reference) for reference in texts] for i, texts in enumerate(references)}
    _, expected = PycocoCider().compute_score(truth, {i: [reward.line(text)] for i, text in enumerate(generations)})
    assert got == pytest.approx(list(expected), abs=1e-9)
    # a part of the split scores the same, which is why the split is prepared
    assert reward([""] * 5, generations[:5], references[:5], [{}] * 5) == got[:5]
    assert make_reward("cider")([""], generations[:1], references[:1], [{}]) == [0]
    # and a batch with more texts than the split has samples does too
    reward.prepare(references[:3])
    few = reward([""] * 3, generations[:3], references[:3], [{}] * 3)
    assert reward([""] * 9, generations[:3] * 3, references[:3] * 3, [{}] * 9) == few * 3


def naive_lcs(x, y):
    if not x or not y:
        return 0
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, j in itertools.product(range(len(x)), range(len(y))):
        table[i + 1][j + 1] = table[i][j] + 1 if x[i] == y[j] else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def naive_parent(words, references, table, recall):
    """PARENT (Dhingra et al. 2019) as in ToTTo's evaluation, of words and values, written down plainly."""

    def entailed(ngram):
        return sum(word in set(itertools.chain(*table)) for word in ngram) / len(ngram)

    def mention(text):
        return sum(naive_lcs(value, text) / len(value) for value in recall) / len(recall)

    best = None
    for reference in references:
        p, r = [], []
        for n in range(1, 5):
            mine, theirs = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (words, reference))
            gained = {g: min(1.0, theirs[g] / c) for g, c in mine.items()}
            p.append(sum(c * (gained[g] + (1 - gained[g]) * entailed(g)) for g, c in mine.items()))
            p[-1] = p[-1] / sum(mine.values()) if mine else 0.0
            weight = sum(c * entailed(g) for g, c in theirs.items())
            found = sum(c * entailed(g) * min(1.0, mine[g] / c) for g, c in theirs.items())
            r.append(found / weight if weight else 1.0)
        p, r = ([x[0]] + [v or 1e-5 for v in x[1:]] for x in (p, r))
        precision = math.prod(p) ** 0.25
        of_reference, of_table, lam = (math.prod(r) ** 0.25 or 1e-5), (mention(words) or 1e-5), 1 - mention(reference)
        total = of_reference ** (1 - lam) * of_table**lam
        f = 2 * precision * total / (precision + total + 1e-8)
        best = max(best or (f, precision, total), (f, precision, total), key=lambda row: row[0])
    return best[1], best[2], best[0]


def test_parent_is_its_definition():
    rng = random.Random(0)
    for generation, references in random_pairs(PAIRS, most=15):
        cells = [{"is_header": rng.random() < 0.3, "value": rng.choice(["", *WORDS])} for _ in range(12)]
        table = {"table": [cells[:6], cells[6:]], "highlighted_cells": [[rng.randint(0, 1), 2], [1, 3]]}
        table |= {"table_page_title": "The cat went", "table_section_title": "", "table_section_text": "well | done"}
        lines = [rewards.totto_line(generation), *rewards.totto_references(references)]
        words = [sacrebleu.tokenizers.tokenizer_13a.Tokenizer13a()(line).split() for line in lines]
        values = [rewards.table_values(line) for line in rewards.table_lines(table)]
        expected = naive_parent(words[0], words[1:], *values)
        assert rewards.parent_of(generation, references, table) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.sampled_from("abc"), max_size=80), st.lists(st.sampled_from("abcd"), max_size=80))
def test_lcs(x, y):
    assert rewards.lcs_length(x, y) == naive_lcs(x, y)


# ---- names, options, needs ------------------------------------------------------------------------------------------
def sample(**fields):
    return SimpleNamespace(**{"id": "x1", "prompt": "p", "references": ["r"], "meta": {}, **fields})


def tokenizer(text, add_special_tokens=True):
    """Two tokens a word and one of the end, so that nobody can tell their number from a text."""
    return SimpleNamespace(input_ids=[7] * 2 * len(text.split()) + [1] * add_special_tokens)


def rewards_of(*names, samples, separator="", defaults=None, **typed):
    return make_rewards(names, typed, defaults or {}, samples, tokenizer, "cpu", separator)


def metrics_of(*names, samples, separator="", defaults=None, **typed):
    return make_metrics(names, typed, defaults or {}, samples, tokenizer, "cpu", separator)


def test_errors_name_what_is_right():
    with pytest.raises(UsageError, match="unknown reward 'roug1'.*did you mean 'rouge1'"):
        make_reward("roug1")
    with pytest.raises(UsageError, match="unknown metric 'rouge9'.*did you mean 'rouge"):
        make_metric("rouge9")
    with pytest.raises(UsageError, match="'rouge1' has no option 'first_ref'.*did you mean 'first_reference'"):
        make_reward("rouge1", first_ref=True)
    with pytest.raises(UsageError, match="no file '.*nowhere.py'"):
        make_reward("nowhere.py:f")
    for make in (rewards_of, metrics_of):
        with pytest.raises(UsageError, match="sample 'x1' has none"):
            make("rouge1", samples=[sample(references=[])])
    with pytest.raises(UsageError, match="sample 'x1' has none"):
        metrics_of("rouge", samples=[sample(references=[])])
    rewards_of("dates", samples=[sample(references=[])])
    for name, option in (("increasing_numbers", "min_tokens"), ("diversity", "window_size"), ("perplexity", "stride")):
        with pytest.raises(UsageError, match=f"{option} must be at least 1, not 0"):
            make_metric(name, **{option: 0})
    for make in (rewards_of, metrics_of):
        with pytest.raises(UsageError, match="'dates' is named twice"):
            make("dates", "chrf", "dates", samples=[sample()])
    for message in ("roug1", "rouge9"):
        with pytest.raises(UsageError) as error:
            make_reward(message)
        assert "\n" not in str(error.value)


def test_types_of_options(tmp_path, modules):
    for name, options, words in (
        (
            "increasing_numbers",
            {"min_tokens": "many"},
            "'min_tokens' of 'increasing_numbers' must be of type int, not 'many'",
        ),
        ("increasing_numbers", {"min_tokens": True}, "must be of type int, not True"),
        ("rouge1", {"first_reference": 1}, "must be of type bool, not 1"),
        ("spider", {"cider_coef": "0,5"}, "must be of type float, not '0,5'"),
        ("reward_model", {"model": "x", "clip": "5%"}, "must be of type float, not '5%'"),
        ("reward_model", {"model": "x", "max_length": 0.5}, "must be of type int, not 0.5"),
        ("classifier", {"model": "x", "label": 1.5}, "must be of type int or str, not 1.5"),
    ):
        with pytest.raises(UsageError, match=words):
            make_reward(name, **options)
    (tmp_path / "typed_of_mine.py").write_text(
        "def r(prompts, generations, references, metas, scale: float = 1.0, most: float | None = None):\n"
        "    return [scale * (most or 1)] * len(metas)\n"
    )
    batch = (["p"], ["g"], [["r"]], [{}])
    assert make_reward(f"{tmp_path}/typed_of_mine.py:r", scale=2, most=None)(*batch) == [2]
    assert make_reward(f"{tmp_path}/typed_of_mine.py:r", scale=2.0, most=3)(*batch) == [6]
    with pytest.raises(UsageError, match="must be of type float, not 'big'"):
        make_reward(f"{tmp_path}/typed_of_mine.py:r", scale="big")


def test_ones_own_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def long(prompts, generations, references, metas, scale=1.0):\n"
        "    return [scale * len(text) for text in generations]\n"
        "def lengths(prompts, generations, references, metas):\n"
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
    with pytest.raises(UsageError, match="has no function 'lon'.*did you mean 'long'.*; it has: long, lengths, Held$"):
        make_reward(f"{path}:lon")
    with pytest.raises(UsageError, match="has no option 'scal'.*did you mean 'scale'"):
        make_reward(f"{path}:long", scal=2.0)
    assert list(rewards_of(f"{path}:long", samples=[sample(references=[])])) == [f"{path}:long"]


@pytest.mark.parametrize("name", ["increasing_numbers"])
def test_only_finite_numbers_count(name):
    reward = make_reward(name)
    runs = {"1 2 nan 3": 3, "1 inf 2": 2, "nan": 0, "-inf 1": 1, "1e999 1": 1, "٣ ٤": 2, "5 4": 1}
    for text, run in runs.items():
        assert reward([""], [text], [[]], [{}]) == [run / 10]
    assert all(math.isfinite(x) for x in reward([""], ["1_000 " * 3], [[]], [{}]))


def test_dates_are_found_by_their_digits_alone():
    found = {
        "2021-07-14": 1,
        "x12021-07-140": 1,
        "٢٠٢٤-٠٥-٠٦": 1,
        "9999-99-99": 1,
        "21-07-14": 0,
        "2021-7-14": 0,
        "": 0,
    }
    for text, expected in found.items():
        assert make_reward("dates")([""], [text], [[]], [{}]) == [expected]


def test_a_set_of_one_sample_has_its_value():
    for name, kwargs in (
        ("bleu", {}),
        ("sacrebleu", {}),
        ("sacrebleu", {"tokenize": "intl"}),
        ("chrf", {}),
        ("ter", {}),
    ):
        metric = make_metric(name, **kwargs)
        for i in (0, 3, 5, 6, 8, 12, 13, 19):  # without a match of four words, empty, one word, ...
            ((score,), value) = metric(*only([i]))[name]
            assert value == pytest.approx(score, abs=1e-12)


# ---- from rewards to tokens, from metrics to figures ----------------------------------------------------------------
ROWS = [Sample(f"s{i}", f"prompt {i}", [f"the dog {i} went home to its old house"], {"gold": i}) for i in range(7)]
IDS = [[5, 1], [5, 6, 7, 1], [1], [5, 1], [5, 1], [5, 6, 1], [5, 1]]
GENERATIONS = [f"a dog {i} went to its house" + " again" * i for i in range(7)]


def constant(value):
    return lambda prompts, generations, references, metas: value


@pytest.mark.parametrize(
    "make", [list, np.array, torch.tensor, lambda x: torch.tensor(x, requires_grad=True).bfloat16()]
)
def test_a_number_goes_to_the_last_token(make):
    scores, means = score_texts({"a": constant(make([1.0, 2, 3, 4, 5, 6, 7]))}, [0.5], ROWS, GENERATIONS, IDS, 3)
    assert scores.dtype == torch.float32 and scores.shape == (7, 4) and not scores.requires_grad
    expected = torch.zeros(7, 4)
    for i, ids in enumerate(IDS):
        expected[i, len(ids) - 1] = 0.5 * (i + 1)
    assert torch.equal(scores, expected)
    assert means == {"a": 4.0}


def numbered(prompts, generations, references, metas, token_ids, scale=1):
    """A reward of tokens, which cannot know the tokens from the texts."""
    return [[scale * (place + 1) for place in range(len(ids))] for ids in token_ids]


def test_a_list_goes_to_the_tokens():
    as_tensor = lambda *texts, token_ids: [torch.tensor(row, requires_grad=True) + 0.0 for row in rows(token_ids)]  # noqa
    as_tensor.__signature__ = inspect.signature(numbered)
    rows = lambda token_ids: [[float(place + 1) for place in range(len(ids))] for ids in token_ids]  # noqa: E731
    for reward in (numbered, as_tensor):
        scores, means = score_texts({"t": reward, "n": constant([1.0] * 7)}, [2.0, 1.0], ROWS, GENERATIONS, IDS, 3)
        assert scores[1].tolist() == [2, 4, 6, 9] and scores[2].tolist() == [3, 0, 0, 0]
        assert means["t"] == pytest.approx((3 + 10 + 1 + 3 + 3 + 6 + 3) / 7) and means["n"] == 1.0


@pytest.mark.parametrize(
    "value, words",
    [
        (None, "returned None: must be a list of 7 numbers"),
        ({"a": 1}, "must be a list of 7 numbers"),
        ("abcdefg", "must be a list of 7 numbers"),
        (torch.tensor(1.0), "must be a list of 7 numbers"),
        ([1.0] * 6, "returned 6 values for 7 samples"),
        ([1.0] * 3 + [math.nan] + [1.0] * 3, "returned nan for sample s3: must be finite"),
        ([1.0] * 3 + [1e39] + [1.0] * 3, "returned 1e.39 for sample s3: must be finite"),  # inf as a float32
        ([[1.0, math.inf]] + [1.0] * 6, "for sample s0: must be finite"),
        ([1.0, "good"] + [1.0] * 5, "returned 'good' for sample s1: must be a number, or .* response's 4 tokens"),
        ([1.0, None] + [1.0] * 5, "returned None for sample s1"),
        ([1.0, [1.0, 2.0]] + [1.0] * 5, r"returned \[1.0, 2.0\] for sample s1: .* one for each of .* 4 tokens"),
        ([1.0, [1.0, [2.0], 1, 1]] + [1.0] * 5, "for sample s1"),
        (np.ones((7, 4)), "for sample s0"),
    ],
)
def test_what_a_reward_must_not_return(value, words):
    with pytest.raises(ValueError, match=f"(?s)^own .*{words}.*\nin iteration 3"):
        score_texts({"own": constant(value)}, [1.0], ROWS, GENERATIONS, IDS, 3)


def test_a_reward_that_fails_names_the_sample():
    def fails(prompts, generations, references, metas, token_ids):
        assert len(token_ids) == len(metas) and all(type(ids) is list for ids in token_ids)
        return [1 / (meta["gold"] - 4) for meta in metas]

    with pytest.raises(ZeroDivisionError) as error:
        score_texts({"own": fails}, [1.0], ROWS, GENERATIONS, IDS, 3)
    said = f"raised by own of the sample s4, whose generation is {GENERATIONS[4]!r}"
    assert error.value.__notes__ == [said, "in iteration 3"]
    assert error.traceback[-1].name == "<listcomp>" or error.traceback[-1].name == "fails"

    def fails_together(prompts, generations, references, metas):
        return [1 / (len(metas) - 7)]

    with pytest.raises(ZeroDivisionError) as error:
        score_texts({"own": fails_together}, [1.0], ROWS, GENERATIONS, IDS, 3)
    assert error.value.__notes__ == ["raised by own of the samples s0, s1, s2, s3, s4, ...", "in iteration 3"]


def test_metrics_of_one_name_are_all_reported(tmp_path):
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        text = f"def rouge1(prompts, generations, references, metas):\n    return [{value} for _ in prompts]\n"
        (tmp_path / folder / "same.py").write_text(text)
    names = [f"{tmp_path / folder}/same.py:rouge1" for folder in ("one", "two")]
    samples = [sample(references=["a b"])]
    row, values = measure(metrics_of("rouge", *names, samples=samples), samples, ["a c"], None, tokenizer)
    assert row["rouge1"] == 0.5 and [row[name] for name in names] == [1, 2]
    assert values[0]["rouge1"] == 0.5 and [values[0][name] for name in names] == [1, 2]


def test_metrics_become_figures(tmp_path):
    (tmp_path / "figures.py").write_text(
        "import numpy as np\n"
        "def odd(prompts, generations, references, metas):\n"
        "    values = np.array([np.nan] + [1.5] * (len(metas) - 1))\n"
        "    return {'odd': (values, np.float32('inf')), 'n': (None, len(metas))}\n"
        "def short(prompts, generations, references, metas):\n"
        "    return {'short': ([1.0], 1.0)}\n"
        "def tokens(prompts, generations, references, metas, tokenizer):\n"
        "    return [len(tokenizer(text).input_ids) for text in generations]\n"
        "def knows(prompts, generations, references, metas, model, tokenizer):\n"
        "    return {'model': (None, model + len(tokenizer('a b').input_ids))}\n"
        "def nan(prompts, generations, references, metas):\n"
        "    return [float('nan')] + [1.0] * (len(metas) - 1)\n"
        "def share(prompts, generations, references, metas, token_ids):\n"
        "    return [[0.5] * len(ids) for ids in token_ids]\n"
    )
    names = [f"{tmp_path / 'figures.py'}:{name}" for name in ("odd", "knows", "nan", "share", "tokens")]
    metrics = metrics_of(*names, "bleu", "rouge_combined", "diversity", samples=ROWS)
    assert list(metrics) == [*names, "bleu", "rouge_combined", "diversity"]
    row, predictions = measure(metrics, ROWS, GENERATIONS, 40, tokenizer)
    json.dumps([row, predictions], allow_nan=False)
    kept = [[prediction[name] for prediction in predictions] for name in ("id", "prompt", "references", "generation")]
    assert kept == [*([getattr(s, name) for s in ROWS] for name in ("id", "prompt", "references")), GENERATIONS]
    per_sample = {name: [prediction[name] for prediction in predictions] for name in predictions[0]}
    assert row["odd"] is None and row["n"] == 7.0 and row["nan"] is None and row["model"] == 45.0
    assert per_sample["odd"] == [None] + [1.5] * 6 and per_sample["nan"] == [None] + [1.0] * 6
    assert per_sample["tokens"] == [2 * len(text.split()) + 1 for text in GENERATIONS]  # a reward with the tokenizer
    assert per_sample["share"] == [len(text.split()) for text in GENERATIONS]  # half a point for each of two tokens
    assert row["bleu"] == make_metric("bleu")(*columns_of(ROWS, GENERATIONS))["bleu"][1]
    assert per_sample["rouge_combined"] == make_reward("rouge_combined")(*columns_of(ROWS, GENERATIONS))
    assert row["rouge_combined"] == pytest.approx(np.mean(per_sample["rouge_combined"]))
    assert "diversity_metrics/msttr-100" in row and "n" not in per_sample
    with pytest.raises(UsageError, match=r"figures.py:short: short has 1 values for 4 samples"):
        metrics_of(f"{tmp_path / 'figures.py'}:short", samples=ROWS)


def columns_of(samples, generations):
    return ([s.prompt for s in samples], generations, [s.references for s in samples], [s.meta for s in samples])


DISTRIBUTED = """
import datetime, json, os, sys
import torch
sys.path[:0] = [{root!r}, {tests!r}]
from test_rewards import GENERATIONS, ROWS, metrics_of, tokenizer
from rewards import measure

names = sys.argv[2:]
metrics = metrics_of(*names, samples=ROWS)
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank = os.environ.get("RANK", "alone")
seen = open(f"{{sys.argv[1]}}/seen{{rank}}", "w").close()
result = measure(metrics, ROWS, GENERATIONS, None, tokenizer)
open(f"{{sys.argv[1]}}/result{{rank}}", "w").write(json.dumps(result))
"""


def test_figures_are_the_same_for_any_number_of_processes(tmp_path):
    """Seven samples on three processes; no process scores more than its share with a reward."""
    own = tmp_path / "own.py"
    own.write_text(
        "import os, sys\n"
        "def counted(prompts, generations, references, metas):\n"
        "    with open(f\"{sys.argv[1]}/seen{os.environ.get('RANK', 'alone')}\", 'a') as file:\n"
        "        file.write(' '.join(str(meta['gold']) for meta in metas) + '\\n')\n"
        "    return [len(text) / 100 for text in generations]\n"
    )
    script = tmp_path / "script.py"
    tests = Path(__file__).parent
    script.write_text(DISTRIBUTED.format(root=str(tests.parent), tests=str(tests)))
    names = [f"{own}:counted", "rouge", "bleu", "sacrebleu", "chrf", "ter", "meteor", "cider", "diversity"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    for prefix in ([], launch):
        done = subprocess.run(
            [sys.executable, *prefix, str(script), str(tmp_path), *names], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    row, predictions = json.loads((tmp_path / "resultalone").read_text())
    for rank in range(3):
        other, other_predictions = json.loads((tmp_path / f"result{rank}").read_text())
        assert other == pytest.approx(row, abs=1e-12)
        assert other_predictions == predictions
        share = " ".join(map(str, range(rank, 7, 3)))
        assert (tmp_path / f"seen{rank}").read_text().split("\n")[-2] == share
    assert (
        len(predictions) == 7 and all("counted" in prediction for prediction in predictions) and 0 < row["cider"] < 10
    )


class Endless(Sequence):
    """A split too long to be looked at as a whole."""

    def __init__(self, length):
        self.length, self.looked_at = length, set()

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if i >= self.length:
            raise IndexError(i)
        self.looked_at.add(i)
        return Sample(f"s{i}", "p", [f"the dog {i % 50} went home"], {})


def test_a_long_split_is_looked_at_in_part():
    samples = Endless(4_500_000)
    rewards_of("rouge1", "increasing_numbers", samples=samples)
    assert 4 <= len(samples.looked_at) <= 2000 < samples.length
    missing = Endless(999)
    missing.__class__ = type("", (Endless,), {"__getitem__": lambda self, i: Sample(f"s{i}", "", ["r"][: i < 900], {})})
    missing.length = 999
    with pytest.raises(UsageError, match="sample 's900' has none"):
        rewards_of("rouge1", samples=missing)


def test_cider_is_prepared_with_the_whole_split():
    samples = Endless(300)
    cider = rewards_of("cider", samples=samples)["cider"]
    assert len(samples.looked_at) == 300
    expected = make_reward("cider")
    expected.prepare([sample.references for sample in samples])
    batch = (["p"] * 2, ["the dog 1 went", "home"], [["the dog 1 went home"], ["the cat"]], [{}] * 2)
    assert cider(*batch) == expected(*batch) != make_reward("cider")(*batch)


# ---- one's own file -------------------------------------------------------------------------------------------------
OWN = """
from __future__ import annotations

import dataclasses
import os
import pickle
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from neighbour_of_mine import WEIGHT

with open(Path(__file__).with_name("executed"), "a") as file:
    file.write(f"{os.getpid()} ")


@dataclasses.dataclass
class Part:
    value: float


def part_of(text: str) -> Part:
    return Part(WEIGHT * len(text))


def in_processes(prompts, generations, references, metas):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return [part.value for part in pool.map(part_of, generations)]


def in_time(prompts, generations, references, metas):
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(5)
    parts = [pickle.loads(pickle.dumps(part_of(text))) for text in generations]
    signal.alarm(0)
    return [part.value for part in parts]
"""


@pytest.fixture
def modules():
    """What a test imports is forgotten after it."""
    names, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - names:
        if not name.startswith(("torch", "transformers")):
            del sys.modules[name]
    sys.path[:] = path


def test_ones_own_file_is_imported_as_python_would(tmp_path, modules):
    (tmp_path / "neighbour_of_mine.py").write_text("WEIGHT = 2.0\n")
    (tmp_path / "own_of_mine.py").write_text(OWN)
    names = [f"{tmp_path}/own_of_mine.py:{name}" for name in ("in_processes", "in_time")]
    rewards = rewards_of(*names, samples=ROWS)
    metrics = metrics_of(*names, samples=ROWS)
    assert sys.modules["own_of_mine"].in_time is rewards[names[1]]
    _, means = score_texts(rewards, [1.0, 1.0], ROWS, GENERATIONS, IDS, 3)
    expected = 2 * np.mean([len(text) for text in GENERATIONS])
    assert means == {name: pytest.approx(expected) for name in names}
    assert measure(metrics, ROWS, GENERATIONS, None, tokenizer)[0]["in_time"] == pytest.approx(expected)
    processes = (tmp_path / "executed").read_text().split()
    assert processes.count(str(os.getpid())) == 1 < len(processes)  # once in each, reward or metric


def test_files_of_packages_and_modules(tmp_path, modules, monkeypatch):
    package = tmp_path / "package_of_mine" / "inner"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").write_text("NUMBER = 3.0\n")
    (package / "own.py").write_text(
        "from .. import NUMBER\nfrom .other import more\n"
        "def reward(prompts, generations, references, metas):\n    return [NUMBER + more] * len(metas)\n"
    )
    (package / "other.py").write_text("more = 1.0\n")
    by_file = make_reward(f"{package}/own.py:reward")
    assert by_file(*columns_of(ROWS, GENERATIONS)) == [4.0] * 7
    monkeypatch.chdir(tmp_path)
    assert make_reward("package_of_mine.inner.own:reward") is by_file
    with pytest.raises(UsageError, match="package_of_mine.nothing: cannot be imported: ModuleNotFoundError"):
        make_reward("package_of_mine.nothing:reward")
    with pytest.raises(UsageError, match="'package_of_mine.inner.own' has no function 'rewar'.*'reward'"):
        make_reward("package_of_mine.inner.own:rewar")


def test_files_of_the_same_name(tmp_path, modules):
    """Of each other, and of a module of ours: all are there, each is executed once."""
    made = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        for name in ("same", "rewards"):
            (tmp_path / str(number) / f"{name}.py").write_text(
                "import pickle\ndef f(prompts, generations, references, metas):\n"
                f"    return [{number} + {len(name)}] * len(pickle.loads(pickle.dumps(f)) and metas)\n"
            )
            made.append(make_reward(f"{tmp_path}/{number}/{name}.py:f"))
            assert make_reward(f"{tmp_path}/{number}/{name}.py:f") is made[-1]
    package = tmp_path / "rewards"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "own.py").write_text("def f(prompts, generations, references, metas):\n    return [9]\n")
    made.append(make_reward(f"{package}/own.py:f"))
    assert [f(*columns_of(ROWS[:1], GENERATIONS[:1])) for f in made] == [[4], [7], [5], [8], [9]]
    assert sys.modules["rewards"] is rewards


@pytest.mark.parametrize(
    "text, words",
    [
        ("def f(:\n", "SyntaxError.*broken_of_mine.py"),
        ("import nothing_at_all\n", "ModuleNotFoundError.*nothing_at_all.*broken_of_mine.py:1"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines .*broken_of_mine.py:1"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path, text, words):
    (tmp_path / "broken_of_mine.py").write_text(text)
    for _ in range(2):  # nothing half imported is left
        with pytest.raises(UsageError, match=f"cannot be imported: {words}") as error:
            make_reward(f"{tmp_path}/broken_of_mine.py:f")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "signature",
    [
        "completions, **kwargs",
        "prompts, completions, **kwargs",
        "generations, references",
        "completions, prompts, references, metas",
        "prompts, references, generations, metas",
        "*, prompts, generations, references, metas",
        "",
    ],
)
@pytest.mark.parametrize("make, kind", [(rewards_of, "reward"), (metrics_of, "metric")])
def test_a_wrong_signature_is_refused(tmp_path, modules, signature, make, kind):
    (tmp_path / "signature_of_mine.py").write_text(f"def r({signature}):\n    return [0.0] * 4\n")
    with pytest.raises(UsageError) as error:
        make(f"{tmp_path}/signature_of_mine.py:r", samples=ROWS)
    assert f"r({signature})" in str(error.value) and "\n" not in str(error.value)
    assert f"must be: def {kind}(prompts, generations, references, metas)" in str(error.value)


@pytest.mark.parametrize(
    "signature", ["a, b, c, d", "*texts", "prompts, generations, references, metas, **rest", "p, g, r, metas, x=1"]
)
def test_signatures_that_fit(tmp_path, modules, signature):
    (tmp_path / "signature_of_mine.py").write_text(f"def r({signature}):\n    return [0.0] * 4\n")
    rewards_of(f"{tmp_path}/signature_of_mine.py:r", samples=ROWS)


def test_every_reward_is_tried_before_the_run(tmp_path, modules):
    (tmp_path / "tried_of_mine.py").write_text(
        "def fails(prompts, generations, references, metas):\n    return [meta['nothing'] for meta in metas]\n"
        "def many(prompts, generations, references, metas):\n    return [1.0, 2.0]\n"
        "def nan(prompts, generations, references, metas):\n    return [float('nan')] * len(metas)\n"
        "def tokens(prompts, generations, references, metas, token_ids):\n"
        "    assert generations == [r[0] for r in references]\n"
        "    return [[1.0] * len(text.split()) * 2 for text in generations]\n"
        "def needs(prompts, generations, references, metas, scale):\n    return [scale] * len(metas)\n"
        "class Held:\n"
        "    def __init__(self, separator, scale: float = 1.0):\n        self.value = (separator, scale)\n"
        "    def __call__(self, prompts, generations, references, metas):\n"
        "        return [self.value[1]] * len(metas)\n"
    )
    own = f"{tmp_path}/tried_of_mine.py:"
    for make in (rewards_of, metrics_of):
        with pytest.raises(KeyError) as error:
            make(own + "fails", samples=ROWS)
        assert "raised by" in error.value.__notes__[0] and "of the sample s0" in error.value.__notes__[0]
        with pytest.raises(UsageError, match="many returned 2 values for 4 samples"):
            make(own + "many", samples=ROWS)
        with pytest.raises(UsageError, match="needs a value for its option 'scale'"):
            make(own + "needs", samples=ROWS)
        make(own + "tokens", samples=ROWS)
    with pytest.raises(UsageError, match="nan returned nan for sample s0: must be finite"):
        rewards_of(own + "nan", samples=ROWS)
    held = rewards_of(
        own + "Held", own + "needs", samples=ROWS, separator=" ", **{own + "Held.scale": "2.5", "scale": "4"}
    )
    assert held[own + "Held"].value == (" ", 4) and held[own + "needs"](*columns_of(ROWS, GENERATIONS)) == [4] * 7
    held = rewards_of(own + "Held", samples=ROWS, defaults={own + "Held": {"scale": 7.0}})
    assert held[own + "Held"].value == ("", 7.0)


# ---- what samples must have -----------------------------------------------------------------------------------------
TEXTS = {
    "Chinese": ("我爱北京天安门。", "我爱上海。"),
    "Japanese": ("私は東京が好きです。", "私は大阪が好きだ。"),
    "Thai": ("ฉันรักประเทศไทย", "ฉันรักกรุงเทพ"),
    "Arabic": ("أنا أحب القاهرة كثيرا", "أنا أحب بيروت"),
    "Russian": ("я очень люблю Москву", "я люблю Москву и Омск"),
    "German": ("für die größere Straße", "fór die größere Straße"),
    "Hindi": ("मैं कल दिल्ली जा रहा हूँ", "मैं दिल्ली जा रहा"),
    "Tibetan": ("ང་ལྷ་ས་ལ་འགྲོ་གི་ཡོད།", "ང་ལྷ་ས་ལ་དགའ།"),
}


@pytest.mark.parametrize("language", TEXTS)
def test_languages(language):
    reference, text = TEXTS[language]
    samples = [Sample("x1", "p", [reference], {})] * 3
    batch = (["p"] * 2, [text, reference], [[reference]] * 2, [{}] * 2)
    refused = set()
    for name in ("rouge1", "rougeL", "rouge_l_max", "bleu", "meteor", "cider", "sacrebleu", "ter", "chrf"):
        try:
            score, whole = rewards_of(name, samples=samples)[name](*batch)
            assert whole > 0.9 or name in ("cider", "bleu", "sacrebleu")
        except UsageError as error:
            refused.add(name)
            assert re.search("'x1'.*chrf, sacrebleu with tokenize zh.*rouge1.* with tokenize unicode", str(error))
            with pytest.raises(UsageError, match="^metric"):
                metrics_of(name, samples=samples)
    latin, spaced = {"rouge1", "rougeL", "rouge_l_max"}, {"bleu", "meteor", "cider", "sacrebleu", "ter"}
    expected = {"German": set(), "Arabic": latin, "Russian": latin, "Hindi": latin}.get(language, latin | spaced)
    assert refused == expected
    for name in ("rouge1", "rouge_combined"):
        score, whole = rewards_of(name, samples=samples, tokenize="unicode")[name](*batch)
        assert whole == pytest.approx(1.0) and 0.2 < score < 0.95
    rouge = metrics_of("rouge", samples=samples, tokenize="unicode")
    assert 0.2 < measure(rouge, samples, [text] * 3, None, tokenizer)[0]["rougeL"] < 0.95
    assert 0 < rewards_of("rouge1", samples=samples, tokenize="char")["rouge1"](*batch)[0] < 1
    tokenize = "zh" if language == "Chinese" else "char"
    assert rewards_of("sacrebleu", samples=samples, tokenize=tokenize)["sacrebleu"](*batch)[1] == pytest.approx(1)
    assert rewards_of("cider", samples=samples, tokenize="unicode")["cider"]


def test_what_ter_costs_is_said_where_it_is_chosen(capsys, monkeypatch):
    for words, rank, line in (
        (250, "0", "metric 'ter': references of 250 words take about 1.0 s"),
        (250, "1", ""),
        (60, "0", ""),
    ):
        monkeypatch.setenv("RANK", rank)
        rewards.checked_options("metric", ["ter"], {}, {}, [sample(references=["word " * words])])
        said = capsys.readouterr().err
        assert said.startswith(line) and bool(said) is bool(line)


def test_words_of_all_languages():
    assert rewards.unicode_words("Für fór, GRÖSSE ﬁ") == ["für", "fór", "grösse", "fi"]
    assert rewards.unicode_words("我爱2024年。Привет, мир! أنا") == ["我", "爱", "2024", "年", "привет", "мир", "أنا"]
    assert rewards.unicode_words("e\u0301t\u00e9") == ["été"]
    with pytest.raises(UsageError, match="rouge has no tokenizer 'unicod'.*did you mean 'unicode'.*13a"):
        make_reward("rouge1", tokenize="unicod")
    with pytest.raises(UsageError, match="tokenizer 'unicode'.*intl"):
        make_reward("sacrebleu", tokenize="unicode")


def test_a_split_without_references_to_speak_of_is_not_refused():
    metrics_of("rouge", "bleu", samples=[sample(references=[""])])  # ToTTo's test split


@pytest.mark.parametrize("text", ["\U0001f600 \U0001f389", "...", "\u2211 \u222b"])
def test_references_without_a_letter(text):
    for name, options in (("rouge1", {}), ("rouge1", {"tokenize": "unicode"}), ("cider", {"tokenize": "unicode"})):
        with pytest.raises(UsageError, match="sees .*letters .*digits only.*chrf"):
            rewards_of(name, samples=[sample(references=[text])], **options)
    assert rewards_of("chrf", samples=[sample(references=[text])])


@pytest.mark.parametrize(
    "name, meta, words",
    [
        ("intent", {"intent": None}, r"meta\['intent'\] of 'x1' is None; must be a whole number from 1 on"),
        ("intent", {"intent": "2"}, "is '2'; must be a whole number"),
        ("intent", {"intent": 0}, "is 0; must be a whole number from 1"),
        ("intent", {"intent": True}, "is True; must be a whole number"),
        ("intent", {"topic": 1}, r"needs meta\['intent'\]: 'x1' has only topic"),
        ("commongen_preference", {"concepts": "dog run"}, r"is 'dog run'; must be a list of texts"),
        ("commongen_preference", {"concepts": [1, 2]}, r"is \[1, 2\]; must be a list of texts"),
        ("parent", {"raw_table": None}, "is None; must be a table with ToTTo's keys"),
        ("parent", {"raw_table": {"table": [], "highlighted_cells": [[0, 0]]}}, "must be a table with ToTTo's keys"),
        ("parent", {"raw_table": "a table"}, "must be a table with ToTTo's keys"),
    ],
)
def test_metas_of_the_wrong_type(name, meta, words):
    for make in (rewards_of, metrics_of):
        with pytest.raises(UsageError, match=words):
            if (make, name) != (metrics_of, "commongen_preference"):
                make(name, samples=[sample(meta=meta)])
            else:
                make(name, samples=[sample(meta=meta)])


def test_perplexity_of_a_meta():
    metrics_of("perplexity", samples=[sample(references=[], meta={"whole": "text"})], reference_key="whole")
    with pytest.raises(UsageError, match="decoder-only policy, not for an encoder-decoder"):
        metrics_of("perplexity", samples=[sample()], separator=" ")
    with pytest.raises(UsageError, match=r"meta\['whole'\] of 'x1' is 3; must be a text"):
        metrics_of("perplexity", samples=[sample(meta={"whole": 3})], reference_key="whole")
    with pytest.raises(UsageError, match="sample 'x1' has none"):
        metrics_of("perplexity", samples=[sample(references=[])])


def test_half_a_character_is_replaced(tmp_path, modules):
    half = "a \ud83d dog \ude00"
    samples = [Sample("s", f"p {half}", [half, "a cat"], {})]
    (tmp_path / "half_of_mine.py").write_text(
        "def clean(prompts, generations, references, metas):\n"
        "    ' '.join([*prompts, *generations, *references[0]]).encode()\n"
        "    return [float('\\ufffd' in prompts[0] + generations[0] + references[0][0])]\n"
    )
    names = ["rouge", "rouge_l_max", "bleu", "sacrebleu", "chrf", "ter", "meteor", "cider", "diversity"]
    names.append(f"{tmp_path}/half_of_mine.py:clean")
    row, _ = measure(metrics_of(*names, samples=samples), samples, [half], None, tokenizer)
    assert row["clean"] == 1 and row["rouge_l_max"] == pytest.approx(1)
    rewards_of(*names[1:-2], names[-1], samples=samples)
    for text in ("🍞 日本 a\ufeff", "\ufeffa é", "plain"):
        assert rewards.clean(text) == text


CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]


def test_a_chat_is_a_text_to_those_that_do_not_read_messages(tmp_path, modules):
    (tmp_path / "chat_of_mine.py").write_text(
        "def texts(prompts, generations, references, metas):\n    return [float(prompts == ['be kind\\nhello'])]\n"
        "def messages(prompts, generations, references, metas, scale=1.0):\n"
        "    return [scale * (prompts[0][1]['role'] == 'user')]\n"
        "messages.reads_messages = True\n"
    )
    samples = [Sample("s", CHAT, ["hello"], {})]
    names = [f"{tmp_path}/chat_of_mine.py:{name}" for name in ("texts", "messages")]
    rewards = rewards_of(*names, "rouge1", samples=samples, **{f"{names[1]}.scale": "3"})
    assert score_texts(rewards, [1] * 3, samples, ["hello"], [[1]], 3)[1] == {
        names[0]: 1.0,
        names[1]: 3.0,
        "rouge1": 1.0,
    }


@pytest.mark.parametrize(
    "prompt, text, separator, expected",
    [
        ("say:", "cat", " ", "say: cat"),
        ("say: ", "cat", " ", "say: cat"),
        ("say:\n", "cat", " ", "say:\ncat"),
        ("say:", " cat", " ", "say: cat"),
        ("say:", " cat", "", "say: cat"),
        ("sa", "y", "", "say"),
        ("", "cat", " ", "cat"),
        ("say:", "", " ", "say:"),
    ],
)
def test_prompt_and_response_are_joined(prompt, text, separator, expected):
    assert rewards.join(prompt, text, separator) == expected


# ---- the documentation ----------------------------------------------------------------------------------------------
DOCS = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()


def test_the_documentation_has_every_option_and_its_default():
    options = DOCS[DOCS.index("\n## Options") : DOCS.index("\n## Reward models")]
    rows = dict.fromkeys({*rewards.REWARDS, *rewards.METRICS}, "")
    for line in filter(lambda line: line.startswith("| `"), options.splitlines()):
        names, text = line.strip("| ").split(" | ", 1)
        for name in re.findall("`([^`]*)`", names):
            if name in rows:
                rows[name] += text
    for name, text in rows.items():
        assert text, name
        for table in (rewards.REWARDS, rewards.METRICS):
            for option in inspect.signature(table[name].make).parameters.values() if name in table else ():
                default = f" {option.default:g}" if type(option.default) is float else f" {option.default}"
                default = {" None": "", " True": " true", " False": " false"}.get(default, default)
                default = "" if option.default is option.empty else default
                if option.name not in ("device", "separator"):
                    assert re.search(f"`{option.name}`{re.escape(default)}($|[^.0-9])", text), (name, option)
    table = DOCS[: DOCS.index("\n## Options")]
    assert all(re.search(rf"^\|.*`{name}`", table, re.MULTILINE) for name in rows)


def test_the_examples_of_the_documentation(tmp_path, modules):
    (tmp_path / "documented.py").write_text("".join(re.findall("```python\n(.*?)```", DOCS, re.DOTALL)))
    names = [f"{tmp_path}/documented.py:{name}" for name in ("brevity", "no_repetition")]
    made = rewards_of(*names, samples=ROWS, **{f"{names[0]}.words": "6"})
    scores, means = score_texts(made, [1.0, 1.0], ROWS[:2], ["one two", "one " * 12], [[4, 4, 4, 1], [3, 1]], 3)
    assert scores.tolist() == [[0, -1, -1, 1], [0, 0.5, 0, 0]]
    assert means == {names[0]: 0.75, names[1]: -1.0}
