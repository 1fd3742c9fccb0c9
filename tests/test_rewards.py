"""Rewards and metrics against the values of the original implementations, other oracles, and hostile texts."""

import itertools
import json
import math
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nltk
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider as PycocoCider
from rouge_score.rouge_scorer import RougeScorer

import rewards
from datapools import UsageError
from rewards import make_metric, make_metrics, make_reward, make_rewards

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
    for message in ("roug1", "rouge9"):
        with pytest.raises(UsageError) as error:
            make_reward(message)
        assert "\n" not in str(error.value)


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
    with pytest.raises(UsageError, match="has no function 'lon'.*did you mean 'long'"):
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
