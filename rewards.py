"""Reward functions and metrics, one flat file.

A reward is called as `reward(prompts, generations, references, metas)` and returns one number per sample; a metric as
`metric(prompts, generations, references, metas, model=None, tokenizer=None)` and returns
`{name: (one number per sample or None, number for the whole set)}`. `prompts` and `generations` are lists of texts,
`references` is a list (one entry per sample) of lists of texts, `metas` a list of dicts.

To add one: write a function that takes the reward's options and returns such a callable, and give it a line in REWARDS
or METRICS at the end of this file; or leave this file alone and pass `path/to/file.py:function` where a name is
expected. What each one measures, its range and its cost: docs/rewards.md.
"""

import difflib
import importlib
import importlib.util
import inspect
import math
import multiprocessing
import os
import re
import shutil
import signal
import string
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import regex
import torch
from nltk import sent_tokenize, word_tokenize
from nltk.corpus.reader import CorpusReader, WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from nltk.stem.porter import PorterStemmer
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize as rouge_tokenize
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Tokenizer,
    RobertaTokenizer,
)

from datapools import UsageError, offline_if_unreachable

COMMONGEN_PREFIX = "generate a sentence with: "
# References come again at every visit of their sample, so what is derived from them is kept, for as many as this.
PREPARED = 4096


# ---------------------------------------------------------------------------------------------------------------------
# From the rewards of a run to the rewards of tokens
# ---------------------------------------------------------------------------------------------------------------------
def score_texts(reward_functions, reward_weights, samples, generations, response_lengths, width):
    """The weighted rewards as rewards of tokens (B, width), and {reward: its mean}.

    A number goes to the last token of the response; a list has one number for each. Raises ValueError for any other.
    """
    texts = [s.prompt for s in samples], generations, [s.references for s in samples], [s.meta for s in samples]
    token_scores, means = torch.zeros(len(samples), width), {}
    for (name, reward), weight in zip(reward_functions.items(), reward_weights, strict=True):
        values = reward(*texts)
        if not hasattr(values, "__len__"):
            raise ValueError(f"{name} returned {values!r:.60}: must be a list of {len(samples)} numbers")
        if len(values) != len(samples):
            raise ValueError(f"{name} returned {len(values)} values for {len(samples)} samples")
        for i, value in enumerate(values):
            length = int(response_lengths[i])
            try:
                array = np.asarray(value)
            except ValueError:  # a ragged list
                array = np.asarray(None)
            if array.dtype.kind not in "biuf" or array.shape not in ((), (length,)) or not np.isfinite(array).all():
                raise ValueError(
                    f"{name} returned {value!r:.60} for sample {samples[i].id}: must be a finite number, or a list "
                    f"of one for each of the response's {length} tokens"
                )
            where = slice(0, length) if array.ndim else length - 1
            token_scores[i, where] += weight * torch.as_tensor(array, dtype=torch.float32)
        means[name] = float(np.mean([np.sum(value) for value in values]))
    return token_scores, means


def measure(name, metric, samples, generations, model, tokenizer):
    """{figure: (one float per sample or None, float for the set)}; ValueError if the metric returns something else."""
    texts = [s.prompt for s in samples], generations, [s.references for s in samples], [s.meta for s in samples]
    figures = metric(*texts, model=model, tokenizer=tokenizer)
    if not isinstance(figures, dict):
        raise ValueError(f"{name} returned {figures!r:.60}: must be {{name: (values of samples or None, value)}}")
    for figure, (per_sample, value) in figures.items():
        if per_sample is not None and len(per_sample) != len(samples):
            raise ValueError(f"{name}: {figure} has {len(per_sample)} values for {len(samples)} samples")
        per_sample = per_sample if per_sample is None else [float(number) for number in per_sample]
        figures[figure] = (per_sample, float(value))
    return figures


def describe_error(error):
    """An exception as one line that ends with the place where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"


# ---------------------------------------------------------------------------------------------------------------------
# From a score of one sample to a reward, from a reward to a metric
# ---------------------------------------------------------------------------------------------------------------------
def per_sample(score: Callable) -> Callable:
    """The reward that gives each sample `score(generation, references)`."""

    def reward(prompts, generations, references, metas):
        return [float(score(*pair)) for pair in zip(generations, references, strict=True)]

    return reward


def mean_of(name: str, reward: Callable) -> Callable:
    """The metric that reports a reward's value for each sample and, for the set, their mean."""

    def metric(prompts, generations, references, metas, model=None, tokenizer=None):
        scores = reward(prompts, generations, references, metas)
        return {name: (scores, sum(scores) / len(scores))}

    if hasattr(reward, "prepare"):
        metric.prepare = reward.prepare
    return metric


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic tasks
# ---------------------------------------------------------------------------------------------------------------------
def as_number(word: str) -> float | None:
    """The finite number that Python reads in `word` ('12', '1e3', '-0.5'), None if it is none (so 'nan', 'inf')."""
    try:
        number = float(word)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def increasing_numbers(min_tokens: int = 20):
    """Length of the strictly increasing run that the text's numbers begin with, per word of the text. In [0, 1].

    min_tokens: texts of fewer than half as many words are divided by that half, so that a short text earns little.
    """

    def score(generation, references):
        words = generation.split()
        run, last = 0, float("-inf")
        for number in filter(lambda number: number is not None, map(as_number, words)):
            if number <= last:
                break
            run, last = run + 1, number
        return run / max(len(words), min_tokens / 2)

    return per_sample(score)


def dates():
    """1 if the text holds four digits-two digits-two digits, whether or not that is a date of the calendar; else 0."""
    return per_sample(lambda generation, references: bool(re.search(r"\d{4}-\d{2}-\d{2}", generation)))


# ---------------------------------------------------------------------------------------------------------------------
# ROUGE
# ---------------------------------------------------------------------------------------------------------------------
# Porter's stemmer takes half of rouge-score's time and a text's words come again and again, as do the references.
porter = SimpleNamespace(stem=lru_cache(maxsize=1 << 18)(PorterStemmer().stem))
cached_rouge_tokenizer = SimpleNamespace(tokenize=lru_cache(maxsize=1 << 16)(partial(rouge_tokenize, stemmer=porter)))


def rouge_scores(types: tuple[str, ...], first_reference: bool) -> Callable:
    """score(generation, references) -> {type: F1}, each type's best over the references or that of the first alone."""
    scorer = RougeScorer(types, tokenizer=cached_rouge_tokenizer)

    def score(generation, references):
        best = scorer.score_multi(references[:1] if first_reference else references, generation)
        return {type: float(best[type].fmeasure) for type in types}

    return score


def rouge(types: tuple[str, ...], first_reference: bool = False):
    """Mean over `types` (rouge1, rouge2, rougeL, rougeLsum) of rouge-score's F1, words stemmed. In [0, 1].

    first_reference: compare with the first reference only instead of taking each type's best over all of them.
    """
    scores = rouge_scores(types, first_reference)
    return per_sample(lambda *pair: sum(scores(*pair).values()) / len(types))


def rouge_metric(first_reference: bool = False):
    """rouge1, rouge2, rougeL and rougeLsum at once; see `rouge`."""
    types = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scores = rouge_scores(types, first_reference)

    def metric(prompts, generations, references, metas, model=None, tokenizer=None):
        rows = [scores(*pair) for pair in zip(generations, references, strict=True)]
        columns = {type: [row[type] for row in rows] for type in types}
        return {type: (column, sum(column) / len(column)) for type, column in columns.items()}

    return metric


# ---------------------------------------------------------------------------------------------------------------------
# ROUGE-L as NarrativeQA counts it
# ---------------------------------------------------------------------------------------------------------------------
ROUGE_L_WORDS = 100
original_porter = lru_cache(maxsize=1 << 18)(PorterStemmer(PorterStemmer.ORIGINAL_ALGORITHM).stem)
split_contractions = NLTKWordTokenizer().tokenize


@lru_cache(maxsize=1)
def irregular_forms() -> dict[str, str]:
    """py-rouge's list of irregular forms (went -> go, children -> child), read without importing py-rouge: its code
    needs pkg_resources, which setuptools no longer has."""
    package = importlib.util.find_spec("rouge")
    folder = Path(package.origin).parent if package else Path()
    files = [folder / "wordnet_key_value.txt", folder / "wordnet_key_value_special_cases.txt"]
    if not package or not all(file.exists() for file in files):
        raise UsageError("rouge_l_max needs the word lists of the package py-rouge: pip install py-rouge==1.1")
    return dict(line.split("|") for file in files for line in file.read_text(encoding="utf-8").splitlines())


@lru_cache(maxsize=PREPARED)
def rouge_l_lines(text: str) -> list[list[str]]:
    """The stemmed words of each line of the text's first 100 words."""
    lines, room = [], ROUGE_L_WORDS
    for line in text.split("\n"):
        words = line.split()
        plain = re.sub("[^A-Za-z0-9]", " ", " ".join(words[:room]).lower()).replace("cannot", "_cannot_")
        tokens = [
            irregular_forms().get(token) or original_porter(token) if len(token) > 3 else token
            for token in split_contractions(plain)
        ]
        lines.append(" ".join(tokens).replace("_cannot_", "cannot").split())
        room -= len(words)
        if room <= 0:
            break
    return lines


def lcs_positions(x: list[str], y: list[str]) -> set[int]:
    """The positions in x of a longest common subsequence with y; of several, the one that py-rouge walks back to."""
    table = [[0] * (len(y) + 1)]
    for word in x:
        above, row, left = table[-1], [0], 0
        for j, other in enumerate(y):
            if word == other:
                left = above[j] + 1
            elif above[j + 1] > left:
                left = above[j + 1]
            row.append(left)
        table.append(row)
    positions, i, j = set(), len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            positions.add(i)
        elif table[i - 1][j] >= table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return positions


def rouge_l_f(generated: list[list[str]], reference: list[list[str]]) -> float:
    """py-rouge's F of two texts, as stemmed lines."""
    unused = Counter(chain.from_iterable(generated))
    generated_length, reference_length, hits = sum(unused.values()), sum(map(len, reference)), 0
    for line in reference:
        common = set().union(*(lcs_positions(line, other) for other in generated))
        for position in sorted(common):
            if unused[line[position]] > 0:
                unused[line[position]] -= 1
                hits += 1
    if not hits:
        return 0.0
    # The exponent belongs to ROUGE-W; py-rouge, given a weight factor, applies it to ROUGE-L as well.
    precision, recall = (hits / generated_length) ** (1 / 1.2), (hits / reference_length) ** (1 / 1.2)
    return precision * recall / (0.5 * precision + 0.5 * recall)


def rouge_l_max():
    """py-rouge's ROUGE-L F with NarrativeQA's arguments, best of the references. In [0, 1].

    Written out because py-rouge no longer imports, and takes ten times as long.
    """
    irregular_forms()

    def score(generation, references):
        generated = rouge_l_lines(generation)
        return max(rouge_l_f(generated, rouge_l_lines(reference)) for reference in references)

    return per_sample(score)


# ---------------------------------------------------------------------------------------------------------------------
# BLEU, sacreBLEU, chrF
# ---------------------------------------------------------------------------------------------------------------------
def ngrams(words, order: int):
    """All n-grams of the words as tuples."""
    return zip(*(words[i:] for i in range(order)), strict=False)


def ngram_counts(words, max_order: int = 4) -> list[Counter]:
    """For each order from 1 on, how often each n-gram is in the words."""
    return [Counter(ngrams(words, order)) for order in range(1, max_order + 1)]


@lru_cache(maxsize=PREPARED)
def bleu_references(references: tuple[str, ...]) -> tuple[list[Counter], int]:
    """For each order the most often that one reference has each n-gram; and the shortest reference's length."""
    words = [reference.split() for reference in references]
    most = [Counter() for _ in range(4)]
    for reference in words:
        for order, counts in enumerate(ngram_counts(reference)):
            most[order] |= counts
    return most, min(map(len, words))


def bleu_statistics(generation: str, references: list[str]) -> np.ndarray:
    """Matches and n-grams of orders 1 to 4, length, and shortest reference's length: (10,) counts."""
    words = generation.split()
    most, shortest = bleu_references(tuple(references))
    matches = [
        sum(min(count, limit[ngram]) for ngram, count in counts.items() if ngram in limit)
        for counts, limit in zip(ngram_counts(words), most, strict=True)
    ]
    totals = [max(len(words) - order, 0) for order in range(4)]
    return np.array([*matches, *totals, len(words), shortest])


def bleu_from(statistics: np.ndarray) -> float:
    """BLEU of (summed) statistics, 0 if any order has no match."""
    matches, totals, (length, shortest) = statistics[:4], statistics[4:8], statistics[8:]
    if not matches.all():
        return 0.0
    brevity = 1.0 if length > shortest else math.exp(1 - shortest / length)
    return brevity * math.exp(np.log(matches / totals).mean())


def bleu():
    """BLEU-4 of whitespace tokens without smoothing, as in TensorFlow's NMT tutorial. In [0, 1]."""
    return per_sample(lambda *pair: bleu_from(bleu_statistics(*pair)))


def bleu_metric():
    """BLEU of each sample, and of the set by summed counts; see `bleu`."""

    def metric(prompts, generations, references, metas, model=None, tokenizer=None):
        statistics = [bleu_statistics(*pair) for pair in zip(generations, references, strict=True)]
        return {"bleu": ([bleu_from(row) for row in statistics], bleu_from(np.sum(statistics, axis=0)))}

    return metric


def streams(references: list[list[str]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: a list per rank, with None where a sample has fewer."""
    return [list(stream) for stream in zip_longest(*references)]


def sacrebleu_scorer(tokenize: str) -> Callable:
    """score(generation, references) -> sacrebleu's BLEUScore of the one sample as a corpus, references kept."""
    if tokenize not in BLEU.TOKENIZERS:
        raise UsageError(
            f"sacrebleu has no tokenizer {tokenize!r}{nearest(tokenize, BLEU.TOKENIZERS)}; "
            f"it has: {', '.join(sorted(BLEU.TOKENIZERS))}"
        )
    try:
        BLEU(tokenize=tokenize)
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"sacrebleu's tokenizer {tokenize!r} is not installed: {str(error).strip().splitlines()[-1]}"
        ) from None

    @lru_cache(maxsize=PREPARED)
    def prepared(references):
        return BLEU(tokenize=tokenize, force=True, references=streams([list(references)]))

    return lambda generation, references: prepared(tuple(references)).corpus_score([generation], None)


def sacrebleu(tokenize: str = "13a"):
    """sacreBLEU/100 of each sample as a corpus of its own, so 0 below four tokens. In [0, 1]. tokenize: 13a, intl..."""
    scorer = sacrebleu_scorer(tokenize)
    return per_sample(lambda *pair: scorer(*pair).score / 100)


def sacrebleu_metric(tokenize: str = "13a"):
    """sacreBLEU/100 of each sample, and of the set by summed counts; see `sacrebleu`."""
    scorer = sacrebleu_scorer(tokenize)

    def metric(prompts, generations, references, metas, model=None, tokenizer=None):
        scores = [scorer(*pair) for pair in zip(generations, references, strict=True)]
        matches, totals = (
            np.sum([getattr(score, key) for score in scores], 0).tolist() for key in ("counts", "totals")
        )
        lengths = [sum(score.sys_len for score in scores), sum(score.ref_len for score in scores)]
        corpus = BLEU.compute_bleu(matches, totals, *lengths, smooth_method="exp")
        return {"sacrebleu": ([score.score / 100 for score in scores], corpus.score / 100)}

    return metric


@lru_cache(maxsize=PREPARED // 4)  # a reference's character n-grams take a few hundred kilobytes
def chrf_scorer(references: tuple[str, ...]) -> CHRF:
    return CHRF(references=streams([list(references)]))


def chrf():
    """chrF/100 of sacrebleu, best of the references. In [0, 1]."""
    return per_sample(lambda text, references: chrf_scorer(tuple(references)).corpus_score([text], None).score / 100)


def chrf_metric():
    """chrF/100 of each sample, and of the set by summed counts of each sample's best reference."""
    per_text = chrf()

    def metric(prompts, generations, references, metas, model=None, tokenizer=None):
        corpus = CHRF().corpus_score(generations, streams(references)).score / 100
        return {"chrf": (per_text(prompts, generations, references, metas), corpus)}

    return metric


# ---------------------------------------------------------------------------------------------------------------------
# TER and METEOR, which are slow and run in a pool of processes
# ---------------------------------------------------------------------------------------------------------------------
def follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, end when the parent is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@lru_cache(maxsize=1)
def process_pool() -> ProcessPoolExecutor:
    """This process's pool. All workers are forked now: before CUDA starts and before other threads hold locks."""
    workers = max(1, min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), initializer=follow_parent)
    pool.submit(int).result()
    return pool


def in_pool(score: Callable, generations: list[str], references: list[list[str]]) -> list:
    """score(generation, references) of each sample, computed by the pool, in small shares because texts differ."""
    share = max(1, len(generations) // 64)
    return list(process_pool().map(score, generations, references, chunksize=share))


def ter_score(generation: str, references: list[str]) -> tuple[float, float, float]:
    """sacrebleu's TER/100 of one sample, its edits and its average reference length."""
    score = TER().sentence_score(generation, references)
    return score.score / 100, score.num_edits, score.ref_length


def ter():
    """1 - TER/100 of sacrebleu: fewest edits to a reference per word of the average reference. At most 1, no least."""
    process_pool()

    def reward(prompts, generations, references, metas):
        return [1 - rate for rate, _, _ in in_pool(ter_score, generations, references)]

    return reward


def ter_metric():
    """TER/100 of each sample, and of the set: all edits over all average reference lengths. Lower is better."""
    process_pool()

    def metric(prompts, generations, references, metas, model=None, tokenizer=None):
        rates, edits, lengths = zip(*in_pool(ter_score, generations, references), strict=True)
        # Where no sample has a reference of any length, sacrebleu counts 1 for any text and 0 for none.
        corpus = sum(edits) / sum(lengths) if sum(lengths) else float(sum(edits) > 0)
        return {"ter": (list(rates), corpus)}

    return metric


def nltk_data_missing(name: str, data: str) -> UsageError:
    return UsageError(f"{name} needs NLTK's data: python -m nltk.downloader {data} (or set NLTK_DATA to its folder)")


def require_punkt(name: str) -> None:
    """UsageError if NLTK cannot split sentences."""
    try:
        word_tokenize("a")
    except LookupError:
        raise nltk_data_missing(name, "punkt_tab") from None


@lru_cache(maxsize=1)
def synonyms() -> SimpleNamespace:
    """WordNet for one worker, remembering words. nltk's global one may have open files when the workers are forked, and
    then they would all move the same file positions."""
    multilingual = LazyCorpusLoader("omw-1.4", CorpusReader, ".*")  # never looked at; without one, a warning
    reader = LazyCorpusLoader("wordnet", WordNetCorpusReader, multilingual)
    return SimpleNamespace(synsets=lru_cache(maxsize=1 << 16)(reader.synsets))


nltk_words = lru_cache(maxsize=PREPARED)(word_tokenize)


def meteor_of(generation: str, references: list[str]) -> float:
    """nltk's METEOR of one sample, best of the references."""
    words = [nltk_words(reference) for reference in references]
    return meteor_score(words, word_tokenize(generation), stemmer=porter, wordnet=synonyms())


def meteor(first_reference: bool = False):
    """METEOR by nltk (alpha 0.9, beta 3, gamma 0.5; words, stems, WordNet synonyms), best of the references. In [0, 1].

    first_reference: compare with the first reference only.
    """
    try:
        in_pool(meteor_of, ["a dog"] * 64, [["the hound"]] * 64)  # so that every worker has WordNet loaded
    except LookupError:
        raise nltk_data_missing("meteor", "wordnet punkt_tab") from None

    def reward(prompts, generations, references, metas):
        compared = [texts[:1] for texts in references] if first_reference else references
        return in_pool(meteor_of, generations, compared)

    return reward


# ---------------------------------------------------------------------------------------------------------------------
# CIDEr and SPICE
# ---------------------------------------------------------------------------------------------------------------------
def require(module: str, package: str, name: str):
    """The module, imported; UsageError that names the package to install if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"{name} needs the package {package}: pip install {package}") from None


class Cider:
    """CIDEr-D of each sample (n-grams up to 4, sigma 6, times 10), the arithmetic of pycocoevalcap. In [0, 10].

    tokenize: "spacy" (its English rules), or "13a" (sacrebleu's), for doing without spaCy.
    `prepare` takes the document frequencies from the references of a whole split. Without it they come, as in the
    original, from the references of each call: then a sample's value depends on its batch, and is 0 in a batch of one.
    """

    def __init__(self, tokenize: str = "spacy"):
        if tokenize == "spacy":
            tokenizer = require("spacy", "spacy", "cider").blank("en").tokenizer
            self.split = lambda text: " ".join(token.text for token in tokenizer(text)).split()
        elif tokenize == "13a":
            split = Tokenizer13a()
            self.split = lambda text: split(text).split()
        else:
            raise UsageError(f"cider has no tokenizer {tokenize!r}; it has: spacy, 13a")
        self.counts = lru_cache(maxsize=PREPARED)(lambda text: ngram_counts(self.split(text)))
        self.documents = None

    def document_frequencies(self, references: list[list[str]]) -> tuple[Counter, float]:
        """In how many samples' references each n-gram is, and the log of the number of samples."""
        frequencies = Counter()
        for texts in references:
            frequencies.update(set(chain.from_iterable(counts for text in texts for counts in self.counts(text))))
        return frequencies, math.log(len(references))

    def prepare(self, references: list[list[str]]) -> None:
        self.documents = self.document_frequencies(references)
        self.reference_vectors = lru_cache(maxsize=PREPARED)(
            lambda text: self.vectors(self.counts(text), self.documents)
        )

    @staticmethod
    def vectors(counts: list[Counter], documents: tuple[Counter, float]) -> tuple[list[tuple[dict, float]], int]:
        """The tf-idf vector of each order with its norm, and the length, which pycocoevalcap counts in bigrams."""
        frequencies, log_samples = documents
        result = []
        for order in counts:
            vector = {
                ngram: count * (log_samples - math.log(max(1, frequencies[ngram]))) for ngram, count in order.items()
            }
            result.append((vector, math.sqrt(sum(weight * weight for weight in vector.values()))))
        return result, sum(counts[1].values())

    def __call__(self, prompts, generations, references, metas):
        if self.documents is None:
            documents = self.document_frequencies(references)
            reference_vectors = lru_cache(maxsize=None)(lambda text: self.vectors(self.counts(text), documents))
        else:
            documents, reference_vectors = self.documents, self.reference_vectors
        scores = []
        for generation, texts in zip(generations, references, strict=True):
            vectors, length = self.vectors(ngram_counts(self.split(generation)), documents)
            total = 0.0
            for text in texts:
                others, other_length = reference_vectors(text)
                closeness = math.exp(-((length - other_length) ** 2) / (2 * 6.0**2))
                for (vector, norm), (other, other_norm) in zip(vectors, others, strict=True):
                    common = sum(
                        min(weight, other[ngram]) * other[ngram] for ngram, weight in vector.items() if ngram in other
                    )
                    if norm and other_norm:
                        total += closeness * common / (norm * other_norm)
            scores.append(10 * total / 4 / len(texts))
        return scores


def spice():
    """SPICE F1 by pycocoevalcap's Java program: overlap of the scene graphs. In [0, 1]. An empty text scores 0."""
    module = require("pycocoevalcap.spice.spice", "pycocoevalcap==1.2", "spice")
    if not shutil.which("java"):
        raise UsageError("spice needs Java (8 or later), and there is no 'java' on the PATH")
    folder = Path(module.__file__).parent / "lib"
    jars = ["stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"]
    if missing := [jar for jar in jars if not (folder / jar).exists()]:
        raise UsageError(
            f"spice needs {' and '.join(missing)} in {folder}: python -m pycocoevalcap.spice.get_stanford_models"
        )
    scorer = module.Spice()

    def reward(prompts, generations, references, metas):
        candidates, targets = {}, {}
        for i, (generation, texts) in enumerate(zip(generations, references, strict=True)):
            texts = [text for text in texts if text.strip()]
            if generation.strip() and texts:
                candidates[i], targets[i] = [generation], texts
        scores = [0.0] * len(generations)
        if candidates:
            for i, row in zip(sorted(candidates), scorer.compute_score(targets, candidates)[1], strict=True):
                # Without any relation to compare SPICE gives NaN.
                scores[i] = float(np.nan_to_num(row["All"]["f"]))
        return scores

    return reward


def spider(spice_coef: float = 0.5, cider_coef: float = 0.5, tokenize: str = "spacy"):
    """spice_coef * SPICE + cider_coef * CIDEr. See `spice`, `Cider`."""
    spice_reward, cider_reward = spice(), Cider(tokenize)

    def reward(*batch):
        pairs = zip(spice_reward(*batch), cider_reward(*batch), strict=True)
        return [spice_coef * spice_score + cider_coef * cider_score for spice_score, cider_score in pairs]

    reward.prepare = cider_reward.prepare
    return reward


# ---------------------------------------------------------------------------------------------------------------------
# ToTTo: PARENT and BLEU as in its official evaluation
# ---------------------------------------------------------------------------------------------------------------------
CJK = (
    r"\u1100-\u11ff\u2e80-\ua4cf\ua840-\ua87f\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff65-\uffdc\U00020000-\U0002ffff"
)
STARTS_CJK, ENDS_CJK = regex.compile(f"^[{CJK}]"), regex.compile(f"[{CJK}]$")
OPENING, CLOSING = regex.compile(r"^[\p{Sc}(\[{¿¡]+$"), regex.compile(r"^[,.?!:;\\%}\])]+$")
CONTRACTION, ENDS_ALNUM = regex.compile(r"^'\p{Alphabetic}"), regex.compile(r"[\p{Alphabetic}\p{Nd}]$")
QUOTES, CURLY = regex.compile("^['\"„“`]+$"), regex.compile("^[„“”]+$")
ESCAPES = {
    "&bar;": "|", "&#124;": "|", "&lt;": "<", "&gt;": ">", "&bra;": "[", "&ket;": "]",
    "&quot;": '"', "&apos;": "'", "&#91;": "[", "&#93;": "]", "&amp;": "&",
}  # fmt: skip


@lru_cache(maxsize=PREPARED)
def detokenize(line: str) -> str:
    """The line with English spacing, as the Moses script detokenizer.perl gives it."""
    if regex.match(r"^<.+>$|^\s*$", line):
        return line
    line = f" {line} ".replace(" @-@ ", "-")
    for escape, character in ESCAPES.items():
        line = line.replace(escape, character)
    # Perl's split drops the empty fields at the end, and only those.
    words = line.rstrip(" ").split(" ")
    text, space, quotes_seen = "", " ", Counter()
    for i, word in enumerate(words):
        previous = words[i - 1] if i else ""
        join, next_space = space, " "
        if STARTS_CJK.match(word):
            join = "" if ENDS_CJK.search(previous) else space
        elif OPENING.match(word):
            next_space = ""
        elif CLOSING.match(word) or (CONTRACTION.match(word) and ENDS_ALNUM.search(previous)):
            join = ""
        elif QUOTES.match(word):
            quote = '"' if CURLY.match(word) else word
            if quotes_seen[quote] % 2:
                join = ""
                quotes_seen[quote] += 1
            elif word == "'" and previous.endswith("s"):
                join = ""
            else:
                next_space = ""
                quotes_seen[quote] += 1
        text += join + word
        space = next_space
    return re.sub("^ | $", "", re.sub(" +", " ", text))


def totto_line(text: str) -> str:
    """A text as one line of the evaluation's files: stripped, '<null>' if empty, lower-case, detokenised."""
    line = re.sub(r"[\r\n]", " ", text).strip()
    return detokenize(line.lower()) if line else "<null>"


def totto_references(references: list[str]) -> list[str]:
    """References as the evaluation has them: three or more, '<null>' where there are fewer."""
    lines = [detokenize(re.sub(r"[\r\n]", " ", text).lower()) for text in references]
    return lines + ["<null>"] * (3 - len(lines))


tokenize_13a = Tokenizer13a()


@lru_cache(maxsize=PREPARED)
def parent_words(line: str) -> tuple[str, ...]:
    return tuple(tokenize_13a(line.strip().lower()).split())


@lru_cache(maxsize=PREPARED)
def table_values(line: str) -> list[tuple[str, ...]]:
    """The words of each value of a table in the evaluation's format, a line of attribute|||value joined by tabs."""
    values = [parent_words(entry.split("|||", 1)[-1]) for entry in detokenize(line).lower().split("\t")]
    return [value for value in values if value]


def table_lines(table: dict) -> tuple[str, str]:
    """The lines for precision (all cells, titles, section text) and for recall (highlighted cells, titles)."""

    def line(cells, titles):
        entries = [("header" if cell["is_header"] else "cell", cell["value"].strip()) for cell in cells]
        entries += [(title, table.get(f"table_{title}") or "") for title in titles]
        clean = [(name, re.sub(r"[\t\r\n]", " ", value).replace("|", "-")) for name, value in entries if value]
        return "\t".join(f"{name}|||{value}" for name, value in clean).lower()

    rows = table["table"]
    highlighted = [rows[row][column] for row, column in table["highlighted_cells"]]
    titles = ("page_title", "section_title")
    return line(chain.from_iterable(rows), (*titles, "section_text")), line(highlighted, titles)


def lcs_length(x, y) -> int:
    """Length of the longest common subsequence of x and y, with one bit per word of x (Hyyrö 2004)."""
    places, everywhere = {}, (1 << len(x)) - 1
    for i, word in enumerate(x):
        places[word] = places.get(word, 0) | 1 << i
    row = everywhere
    for word in y:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & everywhere
    return len(x) - row.bit_count()


def mean_mention(values: list[tuple[str, ...]], words: tuple[str, ...]) -> float:
    """The mean over the table's values of the part of each that is in the words, in order."""
    return sum(lcs_length(value, words) / len(value) for value in values) / len(values)


def entailed(counts: list[Counter], line: str) -> list[dict]:
    """For each order each n-gram's probability of being entailed: the part of its words that are in the table."""
    known = set(chain.from_iterable(table_values(line)))
    return [{ngram: sum(word in known for word in ngram) / len(ngram) for ngram in order} for order in counts]


@lru_cache(maxsize=PREPARED)
def parent_reference(reference: str, precision_line: str, recall_line: str) -> tuple[list[Counter], list[dict], float]:
    """A reference's n-grams, their weights, and the weight lambda of recall from the table."""
    words, values = parent_words(reference), table_values(recall_line)
    counts = ngram_counts(words)
    # With nothing highlighted and no titles there is no recall from the table to weigh.
    return counts, entailed(counts, precision_line), 1 - mean_mention(values, words) if values else 0.0


def parent_of(
    generation: str, references: list[str], table: dict, smoothing: float = 1e-5
) -> tuple[float, float, float]:
    """PARENT precision, recall and F of one text; of the references the one with the best F."""
    precision_line, recall_line = table_lines(table)
    words, values = parent_words(totto_line(generation)), table_values(recall_line)
    counts = ngram_counts(words)
    weights = entailed(counts, precision_line)
    mentioned = (mean_mention(values, words) if values else 0.0) or smoothing
    best = (0.0, 0.0, -1.0)
    for reference in totto_references(references):
        reference_counts, reference_weights, table_weight = parent_reference(reference, precision_line, recall_line)
        precisions, recalls = [], []
        for order in range(4):
            mine, theirs = counts[order], reference_counts[order]
            matched = sum(
                shared + (count - shared) * weights[order][ngram]
                for ngram, count in mine.items()
                for shared in [min(count, theirs.get(ngram, 0))]
            )
            total = sum(mine.values())
            precisions.append(matched / total if total else 0.0)
            weighted = sum(count * reference_weights[order][ngram] for ngram, count in theirs.items())
            found = sum(
                min(count, mine.get(ngram, 0)) * reference_weights[order][ngram] for ngram, count in theirs.items()
            )
            recalls.append(found / weighted if weighted else 1.0)
        # Only the higher orders are smoothed: without one shared or entailed word the score is 0.
        precisions, recalls = (
            [scores[0], *(score or smoothing for score in scores[1:])] for scores in (precisions, recalls)
        )
        precision = math.exp(sum(map(math.log, precisions)) / 4) if precisions[0] else 0.0
        recall = math.exp(sum(map(math.log, recalls)) / 4) if recalls[0] else smoothing
        recall = recall ** (1 - table_weight) * mentioned**table_weight
        f_score = 2 * precision * recall / (precision + recall + 1e-8)
        if f_score > best[2]:
            best = (precision, recall, f_score)
    return best


def parent():
    """PARENT F of each text against meta["raw_table"] and the references, as in ToTTo's evaluation. In [0, 1]."""

    def reward(prompts, generations, references, metas):
        samples = zip(generations, references, metas, strict=True)
        return [parent_of(generation, texts, meta["raw_table"])[2] for generation, texts, meta in samples]

    return reward


def totto_subsets(metas) -> dict[str, list[int]]:
    """The samples of each subset that ToTTo's evaluation reports. The hub has the flag as a string."""
    overlap = [str(meta["raw_table"].get("overlap_subset")) == "True" for meta in metas]
    everything = range(len(metas))
    return {
        "overall": list(everything),
        "overlap": [i for i in everything if overlap[i]],
        "non_overlap": [i for i in everything if not overlap[i]],
    }


def parent_metric():
    """PARENT precision, recall and F, for all samples and for those in and outside ToTTo's overlap subset."""

    def metric(prompts, generations, references, metas, model=None, tokenizer=None):
        samples = zip(generations, references, metas, strict=True)
        rows = [parent_of(generation, texts, meta["raw_table"]) for generation, texts, meta in samples]
        result = {}
        for subset, indices in totto_subsets(metas).items():
            for column, suffix in enumerate(("/precision", "/recall", "_f_score")):
                scores = [rows[i][column] for i in indices]
                mean = sum(scores) / len(scores) if scores else 0.0
                result[f"table_to_text/parent_{subset}{suffix}"] = (scores if subset == "overall" else None, mean)
        return result

    return metric


def bleu_totto():
    """sacreBLEU/100 of ToTTo's evaluation, for all samples and its subsets (0 for one without samples).

    The official command prints one decimal; bleu_{subset} is rounded like that, bleu_{subset}_unrounded is not.
    """

    def metric(prompts, generations, references, metas, model=None, tokenizer=None):
        lines = [totto_line(generation) for generation in generations]
        targets = [totto_references(texts) for texts in references]
        result = {}
        for subset, indices in totto_subsets(metas).items():
            score = 0.0
            if indices:
                chosen = [lines[i] for i in indices], streams([targets[i] for i in indices])
                score = BLEU(force=True).corpus_score(*chosen).score
            result[f"table_to_text/bleu_{subset}"] = (None, round(score, 1) / 100)
            result[f"table_to_text/bleu_{subset}_unrounded"] = (None, score / 100)
        return result

    return metric


# ---------------------------------------------------------------------------------------------------------------------
# CommonGen's penalty
# ---------------------------------------------------------------------------------------------------------------------
def repeat_penalty():
    """-1 if the text repeats the prompt's concepts in a row, its prefix, "generate" or "sentence"; else 0.

    Meant to be added to another reward. A prompt of one concept is thereby penalised for using it, as in the original.
    """

    def reward(prompts, generations, references, metas):
        penalties = []
        for prompt, generation in zip(prompts, generations, strict=True):
            text = generation.lower()
            _, found, concepts = prompt.partition(COMMONGEN_PREFIX)
            banned = [COMMONGEN_PREFIX, "generate", "sentence"]
            if found:
                # What follows a second prefix does not count; the last character is the full stop.
                banned.append(concepts.split(COMMONGEN_PREFIX)[0][:-1].lower())
            penalties.append(-1.0 if any(phrase in text for phrase in banned) else 0.0)
        return penalties

    return reward


def missing_concepts(generation: str, concepts: list[str]) -> int:
    """How many of the concepts are not in the text, as lower-case substrings."""
    text = generation.lower()
    return sum(concept not in text for concept in concepts)


# ---------------------------------------------------------------------------------------------------------------------
# Learned rewards
# ---------------------------------------------------------------------------------------------------------------------
def load_pretrained(auto_class, name: str, device: str, reward: str, **tokenizer_options):
    """Tokenizer and model (in eval mode, on the device) by hub name or path, and how many tokens the model can read."""
    if not Path(name).exists():
        offline_if_unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **tokenizer_options)
        model = auto_class.from_pretrained(name).to(device).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{reward}: the model {name!r} cannot be loaded (a hub name or a folder): {reason}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model, max_tokens(tokenizer, model.config)


def max_tokens(tokenizer, config) -> int:
    """The most tokens the model has positions for: tokenizers saved without a limit claim an absurd one."""
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    # RoBERTa and its kin count positions from the padding index on.
    offset = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
    return min(tokenizer.model_max_length, positions - offset, 1 << 20)


def beginnings(tokenizer, texts: list[str], tokens: int) -> list[str]:
    """The texts, cut after so many tokens."""
    encoded = tokenizer(
        texts, add_special_tokens=False, truncation=True, max_length=tokens, return_offsets_mapping=True
    )
    return [
        text[: max((end for _, end in offsets), default=0)]
        for text, offsets in zip(texts, encoded.offset_mapping, strict=True)
    ]


@torch.no_grad()
def classify(model, tokenizer, length: int, batch_size: int, texts, pairs=None) -> torch.Tensor:
    """(N, C) fp32 logits of the texts, or of the pairs (texts[i], pairs[i]), truncated to the length."""
    accepted = inspect.signature(model.forward).parameters
    if pairs is not None:
        # The tokenizers library builds all combinations of what it cuts off two texts: too many if both are long.
        texts, pairs = (beginnings(tokenizer, column, 2 * length) for column in (texts, pairs))
    rows = []
    for start in range(0, len(texts), batch_size):
        batch = slice(start, start + batch_size)
        encoded = tokenizer(
            texts[batch],
            None if pairs is None else pairs[batch],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=length,
        ).to(model.device)
        rows.append(model(**{key: ids for key, ids in encoded.items() if key in accepted}).logits.float().cpu())
    return torch.cat(rows)


def sentiment(
    device: str,
    model: str = "lvwerra/distilbert-imdb",
    label_ix: int = 1,
    include_prompt: bool = True,
    batch_size: int = 64,
):
    """Probability of one label of any sequence classifier, of prompt + text or of the text alone. In [0, 1].

    model: hub name or folder. label_ix: the label's index. Texts too long for the model lose their beginning.
    """
    tokenizer, classifier, length = load_pretrained(
        AutoModelForSequenceClassification, model, device, "sentiment", truncation_side="left"
    )
    if not 0 <= label_ix < classifier.config.num_labels:
        raise UsageError(f"sentiment: {model!r} has labels 0 to {classifier.config.num_labels - 1}, not {label_ix}")

    def reward(prompts, generations, references, metas):
        pairs = zip(prompts, generations, strict=True)
        texts = [prompt + text for prompt, text in pairs] if include_prompt else list(generations)
        logits = classify(classifier, tokenizer, length, batch_size, texts)
        return logits.softmax(dim=1)[:, label_ix].tolist()

    return reward


INTENT_CLASSIFIER = "rajkumarrrk/roberta-daily-dialog-intent-classifier"
END_OF_UTTERANCE = "<EOU>"


def intent_accuracy(device: str, model: str = INTENT_CLASSIFIER, batch_size: int = 64):
    """1 if the classifier finds the wanted intent (meta["intent"], counted from 1) in last utterance + text; else 0."""
    tokenizer, classifier, length = load_pretrained(AutoModelForSequenceClassification, model, device, "intent")

    def reward(prompts, generations, references, metas):
        texts = []
        for prompt, generation in zip(prompts, generations, strict=True):
            utterances = [utterance for utterance in prompt.split(END_OF_UTTERANCE) if utterance]
            texts.append((utterances[-1] if utterances else "") + generation)
        found = classify(classifier, tokenizer, length, batch_size, texts).argmax(dim=1).tolist()
        return [float(label == meta["intent"] - 1) for label, meta in zip(found, metas, strict=True)]

    return reward


def intent(
    device: str,
    model: str = INTENT_CLASSIFIER,
    intent_coef: float = 1.0,
    meteor_coef: float = 1.0,
    batch_size: int = 64,
):
    """intent_coef * (1 if the intent is the wanted one) + meteor_coef * METEOR. See `intent_accuracy`, `meteor`."""
    meteor_reward = meteor()  # first: its processes are to be forked before a model is on the device
    accuracy = intent_accuracy(device, model, batch_size)

    def reward(*batch):
        pairs = zip(accuracy(*batch), meteor_reward(*batch), strict=True)
        return [intent_coef * correct + meteor_coef * score for correct, score in pairs]

    return reward


def best_of_references(score_pairs: Callable, generations, references) -> list[float]:
    """score_pairs(texts, references) of all pairs in one call, then each sample's best."""
    owners = [i for i, texts in enumerate(references) for _ in texts]
    scores = score_pairs([generations[i] for i in owners], list(chain.from_iterable(references)))
    best = [-math.inf] * len(generations)
    for i, score in zip(owners, scores, strict=True):
        best[i] = max(best[i], score)
    return best


def bleurt(device: str, model: str = "Elron/bleurt-base-128", batch_size: int = 64):
    """BLEURT, best of the references: the regression head of a sequence classifier. About [-2, 1.5], unbounded."""
    tokenizer, scorer, length = load_pretrained(AutoModelForSequenceClassification, model, device, "bleurt")

    def score_pairs(texts, references):
        return classify(scorer, tokenizer, length, batch_size, references, texts)[:, 0].tolist()

    return lambda prompts, generations, references, metas: best_of_references(score_pairs, generations, references)


def bertscore(
    device: str, model_type: str | None = None, num_layers: int | None = None, lang: str = "en", batch_size: int = 64
):
    """BERTScore F1 (no idf, no rescaling), best of the references. In [-1, 1]. An empty text or reference scores 0.

    model_type: hub name or folder of an encoder, default bert-score's choice for `lang`. num_layers: the layer whose
    states are compared, default bert-score's choice for a model it knows.
    """
    library = require("bert_score", "bert-score==0.3.13", "bertscore")
    if model_type is None and lang not in library.utils.lang2model:
        raise UsageError(f"bertscore: no model for lang {lang!r}; pass model_type and num_layers")
    model_type = model_type or library.utils.lang2model[lang]
    if num_layers is None and model_type not in library.utils.model2layers:
        raise UsageError(f"bertscore: pass num_layers for {model_type!r}, a model that bert-score does not know")
    if not Path(model_type).exists():
        offline_if_unreachable()
    try:
        scorer = library.BERTScorer(model_type=model_type, num_layers=num_layers, batch_size=batch_size, device=device)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"bertscore: the model {model_type!r} cannot be loaded: {reason}") from None
    except AssertionError as error:
        raise UsageError(f"bertscore: num_layers {num_layers} for {model_type!r}: {error}") from None
    if isinstance(scorer._tokenizer, (GPT2Tokenizer, RobertaTokenizer)):
        # bert-score asks these for a space before the first word at each call, which transformers 5 ignores.
        scorer._tokenizer = AutoTokenizer.from_pretrained(model_type, add_prefix_space=True)
    scorer._tokenizer.model_max_length = max_tokens(scorer._tokenizer, scorer._model.config)

    def score_pairs(texts, references):
        scores = [0.0] * len(texts)
        whole = [i for i in range(len(texts)) if texts[i].strip() and references[i].strip()]
        if whole:
            f_scores = scorer.score([texts[i] for i in whole], [references[i] for i in whole])[2]
            for i, score in zip(whole, f_scores.tolist(), strict=True):
                scores[i] = score
        return scores

    return lambda prompts, generations, references, metas: best_of_references(score_pairs, generations, references)


def commongen_preference(
    device: str,
    model: str = "t5-11b",
    weights: str | None = None,
    concept_coef: float = 0.0,
    meteor_coef: float = 0.0,
    batch_size: int = 8,
):
    """P(good) / (1 + concept_coef * missing concepts) + meteor_coef * METEOR, for meta["concepts"].

    P(good) is the softmax over the words "good" and "bad" as the first token that a T5 trained on human preferences
    answers the text with. model: its hub name or folder. weights: a state dict to load into it, such as the published
    t5-11b~commongen_prefs.pt; None if the model has them already.
    """
    meteor_reward = meteor() if meteor_coef else None  # first: its processes are to be forked before a model is loaded
    if weights is not None and not Path(weights).is_file():
        raise UsageError(f"commongen_preference: no file {weights!r} (the published one is t5-11b~commongen_prefs.pt)")
    tokenizer, scorer, length = load_pretrained(AutoModelForSeq2SeqLM, model, device, "commongen_preference")
    if weights is not None:
        state = torch.load(weights, map_location=device, weights_only=True)
        scorer.resize_token_embeddings(len(tokenizer))  # the published one was trained with the embeddings cut to this
        scorer.load_state_dict(state.get("model_state_dict", state))
    answers = [tokenizer(word).input_ids[0] for word in ("good", "bad")]

    @torch.no_grad()
    def preference(texts):
        probabilities = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            encoded = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=length)
            starts = torch.full((len(batch), 1), scorer.config.decoder_start_token_id)
            logits = scorer(
                input_ids=encoded.input_ids.to(scorer.device),
                attention_mask=encoded.attention_mask.to(scorer.device),
                decoder_input_ids=starts.to(scorer.device),
            ).logits[:, 0, answers]
            probabilities += logits.float().softmax(dim=1)[:, 0].tolist()
        return probabilities

    def reward(prompts, generations, references, metas):
        scores = [
            good / (1 + concept_coef * missing_concepts(generation, meta["concepts"]))
            for good, generation, meta in zip(preference(generations), generations, metas, strict=True)
        ]
        if meteor_reward is None:
            return scores
        meteors = meteor_reward(prompts, generations, references, metas)
        return [score + meteor_coef * other for score, other in zip(scores, meteors, strict=True)]

    return reward


# ---------------------------------------------------------------------------------------------------------------------
# SummaC: is the summary entailed by the document (the prompt)?
# ---------------------------------------------------------------------------------------------------------------------
def split_text(text: str, granularity: str) -> list[str]:
    """The text's pieces of more than 10 characters; as "document" the text itself."""
    if granularity == "document":
        return [text]
    if granularity == "paragraph":
        pieces = [piece.strip() for piece in text.split("\n\n" if "\n\n" in text else "\n")]
    else:
        pieces = sent_tokenize(text)
    pieces = [piece for piece in pieces if len(piece) > 10]
    return [" ".join(pieces[i : i + 2]) for i in range(len(pieces))] if granularity == "2sents" else pieces


def nli_images(device: str, model: str, granularity: str, batch_size: int, name: str) -> Callable:
    """images(documents, summaries) -> for each sample (2, pieces of document, pieces of summary) probabilities of
    entailment and of contradiction, all 0 in the shape (2, 1, 1) if either text has no piece."""
    granularities = granularity.split("-")
    known = ("sentence", "2sents", "paragraph", "document")
    if len(granularities) > 2 or not set(granularities) <= set(known):
        raise UsageError(f"{name}: granularity {granularity!r} is not one of {', '.join(known)}, or two joined by '-'")
    require_punkt(name)
    tokenizer, classifier, length = load_pretrained(AutoModelForSequenceClassification, model, device, name)
    labels = {label.lower(): index for index, label in classifier.config.id2label.items()}
    if not {"entailment", "contradiction"} <= set(labels):
        raise UsageError(
            f"{name}: {model!r} is no NLI model with labels entailment and contradiction, but {sorted(labels)}"
        )
    columns = [labels["entailment"], labels["contradiction"]]

    def images(documents, summaries):
        pieces = [
            (split_text(document, granularities[0])[:100], split_text(summary, granularities[-1]))
            for document, summary in zip(documents, summaries, strict=True)
        ]
        pairs = [(premise, claim) for premises, claims in pieces for premise in premises for claim in claims]
        if not pairs:
            return [np.zeros((2, 1, 1)) for _ in pieces]
        premises, claims = map(list, zip(*pairs, strict=True))
        logits = classify(classifier, tokenizer, min(length, 500), batch_size, premises, claims)
        table = logits.softmax(dim=1)[:, columns].T.numpy()
        result, start = [], 0
        for premises, claims in pieces:
            count = len(premises) * len(claims)
            image = table[:, start : start + count].reshape(2, len(premises), len(claims))
            result.append(image if count else np.zeros((2, 1, 1)))
            start += count
        return result

    return images


def summac_zs(
    device: str,
    model: str = "roberta-large-mnli",
    granularity: str = "sentence",
    use_entailment: bool = True,
    use_contradiction: bool = True,
    batch_size: int = 32,
):
    """SummaC-ZS: each sentence's best entailment minus its worst contradiction, mean over the summary. In [-1, 1].

    Without contradiction: the entailment, in [0, 1]; without entailment: 1 - contradiction, in [0, 1]. A summary or a
    document without a sentence of more than 10 characters scores as if both were 0.
    """
    if not use_entailment and not use_contradiction:
        raise UsageError("summac_zs: one of use_entailment and use_contradiction must be on")
    images = nli_images(device, model, granularity, batch_size, "summac_zs")

    def reward(prompts, generations, references, metas):
        scores = []
        for image in images(prompts, generations):
            entailment, contradiction = image.max(axis=1)
            if use_entailment:
                scores.append(float((entailment - use_contradiction * contradiction).mean()))
            else:
                scores.append(float((1 - contradiction).mean()))
        return scores

    return reward


# Edges of the bins of the published SummaC-Conv model, narrow where NLI probabilities crowd.
PERCENTILE_BINS = [
    0, 0.01, 0.02, 0.03, 0.04, 0.07, 0.13, 0.37, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975,
    0.98, 0.985, 0.99, 0.995, 1,
]  # fmt: skip


def summac_conv(
    device: str,
    weights: str | None = None,
    model: str = "tals/albert-xlarge-vitaminc-mnli",
    granularity: str = "sentence",
    bins: str = "percentile",
    batch_size: int = 32,
):
    """SummaC-Conv: a learned layer over the histogram of each sentence's entailments, then a softmax. In [0, 1].

    weights: the trained layers (a state dict with mlp.* and layer_final.*), such as SummaC's published
    summac_conv_vitc_sent_perc_e.bin, which goes with the default model, granularity and bins. bins: "percentile", or
    "evenN" for N equal ones. The first 10 sentences of the summary count.
    """
    if weights is None or not Path(weights).is_file():
        raise UsageError(
            f"summac_conv: weights must be the file of the trained layers, not {weights!r}: "
            "summac_conv_vitc_sent_perc_e.bin of the repository tingofurro/summac"
        )
    if bins != "percentile" and not re.fullmatch(r"even[1-9]\d*", bins):
        raise UsageError(f"summac_conv: bins must be 'percentile' or 'evenN' with a number N, not {bins!r}")
    edges = np.array(PERCENTILE_BINS) if bins == "percentile" else np.linspace(0, 1, int(bins.removeprefix("even")) + 1)
    layers = {key: value.float() for key, value in torch.load(weights, weights_only=True, map_location="cpu").items()}
    if layers["mlp.weight"].shape[1] != len(edges) - 1:
        raise UsageError(
            f"summac_conv: {weights!r} is for {layers['mlp.weight'].shape[1]} bins, {bins!r} has {len(edges) - 1}"
        )
    images = nli_images(device, model, granularity, batch_size, "summac_conv")

    def reward(prompts, generations, references, metas):
        scores = []
        for image in images(prompts, generations):
            columns = image[0].T[:10]
            histograms = torch.tensor(np.array([np.histogram(column, bins=edges)[0] for column in columns])).float()
            feature = (histograms @ layers["mlp.weight"].T + layers["mlp.bias"]).mean()
            # The three features are the least, mean and greatest in SummaC's other variants, three means in this one.
            logits = layers["layer_final.weight"] @ feature.repeat(3) + layers["layer_final.bias"]
            scores.append(logits.softmax(dim=0)[1].item())
        return scores

    return reward


# ---------------------------------------------------------------------------------------------------------------------
# Metrics that are no rewards
# ---------------------------------------------------------------------------------------------------------------------
def segmental_ttr(words: list[str], window: int) -> float:
    """Mean type-token ratio of the whole windows of the text; of all its words if they fill none."""
    whole = [words[i : i + window] for i in range(0, len(words) - window + 1, window)] or [words]
    return round(sum(len(set(part)) / max(len(part), 1) for part in whole) / len(whole), 5)


def entropy(counts: Counter) -> float:
    """Shannon entropy in bits of how often things occur."""
    frequencies = np.array(list(counts.values())) / max(sum(counts.values()), 1)
    return float(-(frequencies * np.log2(frequencies)).sum())


def conditional_entropy(counts: Counter, contexts: Counter) -> float:
    """Entropy in bits of an n-gram's last word given the words before it, as GEM estimates it: contexts are counted
    over whole texts, so it may come out a little below 0."""
    if not counts:
        return 0.0
    joint = np.array(list(counts.values())) / sum(counts.values())
    context = np.array([contexts[ngram[:-1]] for ngram in counts]) / sum(contexts.values())
    return float(-(joint * np.log2(joint / context)).sum())


def diversity(window_size: int = 100):
    """GEM's statistics of the generations' words, lower-cased, with and without punctuation: lengths, MSTTR, and for
    1-, 2- and 3-grams the distinct share, the number of types and of those seen once, and entropies in bits."""
    require_punkt("diversity")

    def metric(prompts, generations, references, metas, model=None, tokenizer=None):
        words = [[word.lower() for word in word_tokenize(generation)] for generation in generations]
        no_punctuation = [[word for word in text if word not in set(string.punctuation)] for text in words]
        values = {}
        for texts, suffix, msttr_suffix in ((words, "", ""), (no_punctuation, "-nopunct", "_nopunct")):
            values[f"msttr-{window_size}{msttr_suffix}"] = segmental_ttr(list(chain.from_iterable(texts)), window_size)
            lengths = [len(text) for text in texts]
            values[f"total_length{suffix}"] = sum(lengths)
            for name in ("mean", "std", "median", "min", "max"):
                values[f"{name}_pred_length{suffix}"] = getattr(np, name)(lengths)
            contexts = None
            for order in (1, 2, 3):
                counts = Counter(chain.from_iterable(ngrams(text, order) for text in texts))
                values[f"distinct-{order}{suffix}"] = len(counts) / max(sum(counts.values()), 1)
                values[f"vocab_size-{order}{suffix}"] = len(counts)
                values[f"unique-{order}{suffix}"] = sum(count == 1 for count in counts.values())
                values[f"entropy-{order}{suffix}"] = entropy(counts)
                if contexts is not None:
                    values[f"cond_entropy-{order}{suffix}"] = conditional_entropy(counts, contexts)
                contexts = counts
        return {f"diversity_metrics/{name}": (None, float(value)) for name, value in values.items()}

    return metric


def perplexity(stride: int = 512, reference_key: str | None = None):
    """Perplexity of a causal policy (the `model` passed in) on the references, in one text joined by blank lines.

    stride: tokens scored per window, each seeing as much before it as the model's positions allow; at most those.
    reference_key: take each sample's text from this key of its meta instead of its references.
    """

    @torch.no_grad()
    def metric(prompts, generations, references, metas, model=None, tokenizer=None):
        if model is None or model.config.is_encoder_decoder:
            raise UsageError("perplexity is defined for a causal policy only, not for an encoder-decoder")
        texts = [meta[reference_key] for meta in metas] if reference_key else list(chain.from_iterable(references))
        ids = torch.tensor([tokenizer("\n\n".join(texts)).input_ids], dtype=torch.long, device=model.device)
        window, total = getattr(model.config, "max_position_embeddings", stride), ids.shape[1]
        step = min(stride, window)
        nll = 0.0
        for start in range(0, total, step):
            begin, end = max(start + step - window, 0), min(start + step, total)
            logits = model(input_ids=ids[:, begin:end]).logits[0].float()
            # Of the scored tokens the first of the text has nothing before it. As in the original it is left out of
            # the mean, which then counts for all of them.
            targets = ids[0, max(start, begin + 1) : end]
            if len(targets):
                losses = torch.nn.functional.cross_entropy(logits[-1 - len(targets) : -1], targets)
                nll += losses.item() * (end - start)
        return {"perplexity": (None, math.exp(nll / max(total, 1)))}

    return metric


def evaluate_metric(name: str, kwargs: dict) -> Callable:
    """Any metric of the `evaluate` library, by name or by the path of its script.

    The option config_name chooses among a metric's configurations; all others go to its compute(). Lists with a number
    per sample become per-sample values. A metric that takes one reference per sample gets the first.
    """
    library = require("evaluate", "evaluate", f"evaluate:{name}")
    options = dict(kwargs)
    try:
        module = library.load(name, options.pop("config_name", None))
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"evaluate has no metric {name!r} that can be loaded here: {reason}") from None
    schemas = module.features if isinstance(module.features, list) else [module.features]
    many = any(not hasattr(schema["references"], "dtype") for schema in schemas if "references" in schema)
    takes_references = any("references" in schema for schema in schemas)
    prefix = Path(name).stem

    def metric(prompts, generations, references, metas, model=None, tokenizer=None):
        given = {"references": references if many else [texts[0] for texts in references]} if takes_references else {}
        values = module.compute(predictions=generations, **given, **options)
        result = {}
        for key, value in values.items():
            label = prefix if key == prefix else f"{prefix}/{key}"
            if isinstance(value, (list, np.ndarray)) and len(value) == len(generations):
                result[label] = ([float(score) for score in value], float(np.mean(value)))
            elif isinstance(value, (int, float, np.number)):
                result[label] = (None, float(value))
        return result

    return metric


# ---------------------------------------------------------------------------------------------------------------------
# The tables, and what the scripts call
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """How to make a reward or metric, and what it needs of a sample: "references", "meta.KEY", "commongen prompt"."""

    make: Callable
    needs: tuple[str, ...] = ()


def as_metric(name: str, reward: Entry) -> Entry:
    """A reward's entry as that of the metric that reports it per sample and its mean, with the same options."""

    def make(*args, **kwargs):
        return mean_of(name, reward.make(*args, **kwargs))

    make.__signature__ = inspect.signature(reward.make)
    return Entry(make, reward.needs)


REFERENCES = ("references",)

REWARDS = {
    "increasing_numbers": Entry(increasing_numbers),
    "dates": Entry(dates),
    "rouge1": Entry(partial(rouge, ("rouge1",)), REFERENCES),
    "rouge2": Entry(partial(rouge, ("rouge2",)), REFERENCES),
    "rougeL": Entry(partial(rouge, ("rougeL",)), REFERENCES),
    "rougeLsum": Entry(partial(rouge, ("rougeLsum",)), REFERENCES),
    # The original's combination looks at the first reference only.
    "rouge_combined": Entry(partial(rouge, ("rouge1", "rouge2", "rougeL"), first_reference=True), REFERENCES),
    "rouge_l_max": Entry(rouge_l_max, REFERENCES),
    "bleu": Entry(bleu, REFERENCES),
    "sacrebleu": Entry(sacrebleu, REFERENCES),
    "chrf": Entry(chrf, REFERENCES),
    "ter": Entry(ter, REFERENCES),
    "meteor": Entry(meteor, REFERENCES),
    "cider": Entry(Cider, REFERENCES),
    "spice": Entry(spice, REFERENCES),
    "spider": Entry(spider, REFERENCES),
    "parent": Entry(parent, (*REFERENCES, "meta.raw_table")),
    "bertscore": Entry(bertscore, REFERENCES),
    "bleurt": Entry(bleurt, REFERENCES),
    "sentiment": Entry(sentiment),
    "intent": Entry(intent, (*REFERENCES, "meta.intent")),
    "commongen_preference": Entry(commongen_preference, (*REFERENCES, "meta.concepts")),
    "repeat_penalty": Entry(repeat_penalty, ("commongen prompt",)),
}

AVERAGED = (
    "increasing_numbers dates rouge1 rouge2 rougeL rougeLsum rouge_combined rouge_l_max meteor cider spice bertscore "
    "bleurt sentiment"
).split()

METRICS = {
    **{name: as_metric(name, REWARDS[name]) for name in AVERAGED},
    "rouge": Entry(rouge_metric, REFERENCES),
    "bleu": Entry(bleu_metric, REFERENCES),
    "sacrebleu": Entry(sacrebleu_metric, REFERENCES),
    "chrf": Entry(chrf_metric, REFERENCES),
    "ter": Entry(ter_metric, REFERENCES),
    "parent": Entry(parent_metric, (*REFERENCES, "meta.raw_table")),
    "bleu_totto": Entry(bleu_totto, (*REFERENCES, "meta.raw_table")),
    "intent": as_metric("intent", Entry(intent_accuracy, ("meta.intent",))),
    "diversity": Entry(diversity),
    "perplexity": Entry(perplexity, REFERENCES),
    "summac_zs": as_metric("summac_zs", Entry(summac_zs)),
    "summac_conv": as_metric("summac_conv", Entry(summac_conv)),
}


def nearest(name: str, known) -> str:
    """' (did you mean X?)' for the known name most like `name`, '' if none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def load_function(spec: str) -> Callable:
    """The object called `function` of a Python file, from 'path/to/file.py:function'. UsageError if it is not there."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"no file {path!r} for the reward or metric {spec!r}")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError, OSError) as error:
        raise UsageError(f"{path}: cannot be imported: {describe_error(error)}") from None
    if not callable(getattr(module, name, None)):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"{path!r} has no function {name!r}{nearest(name, functions)}")
    return getattr(module, name)


def check_options(name: str, make: Callable, given: dict, hidden: tuple[str, ...] = ()) -> None:
    """UsageError if `make` takes no option of one of the given names, or misses one that it must have."""
    options = {key: option for key, option in inspect.signature(make).parameters.items() if key not in hidden}
    if any(option.kind is option.VAR_KEYWORD for option in options.values()):
        return
    for key in given:
        if key not in options:
            known = ", ".join(options) if options else "none"
            raise UsageError(f"{name!r} has no option {key!r}{nearest(key, options)}; its options are: {known}")
        kind = options[key].annotation
        accepted = (int, float) if kind is float else kind
        if kind in (int, float, bool, str) and given[key] is not None and not isinstance(given[key], accepted):
            raise UsageError(f"option {key!r} of {name!r} must be of type {kind.__name__}, not {given[key]!r}")
    missing = [key for key, option in options.items() if option.default is option.empty and key not in given]
    if missing:
        raise UsageError(f"{name!r} needs a value for its option {missing[0]!r}")


def make_entry(kind: str, table: dict[str, Entry], call_arguments: tuple[str, ...], name: str, device, kwargs: dict):
    """What make_reward and make_metric share."""
    if ".py:" in name:
        function = load_function(name)
        if inspect.isclass(function):
            check_options(name, function, kwargs, hidden=("device",))
            takes_device = "device" in inspect.signature(function).parameters
            return function(**kwargs, **({"device": device} if takes_device else {}))
        check_options(name, function, dict.fromkeys(call_arguments) | kwargs)
        return partial(function, **kwargs) if kwargs else function
    if name not in table:
        raise UsageError(f"unknown {kind} {name!r}{nearest(name, table)}; known are: {', '.join(sorted(table))}")
    make = table[name].make
    check_options(name, make, kwargs, hidden=("device",))
    if "device" in inspect.signature(make).parameters:
        kwargs = {**kwargs, "device": device}
    return make(**kwargs)


def make_reward(name: str, device: str = "cpu", **kwargs) -> Callable:
    """The reward called `name` (of REWARDS, or 'path/to/file.py:function'), with its options.

    Returns reward(prompts, generations, references, metas) -> one float per sample. A function of one's own may return
    for each sample a list with one value per response token instead; a class of one's own is instantiated with the
    options (and `device`, if it takes that). UsageError if the name or an option is unknown, or if a package, a model,
    data or a jar that it needs is missing. `reward.prepare(references)`, where there is one, is to be called once with
    the references of all samples of the split before the first use.
    """
    return make_entry("reward", REWARDS, ("prompts", "generations", "references", "metas"), name, device, kwargs)


def make_metric(name: str, device: str = "cpu", **kwargs) -> Callable:
    """The metric called `name` (of METRICS, 'evaluate:NAME' or 'path/to/file.py:function'), with its options.

    Returns metric(prompts, generations, references, metas, model=None, tokenizer=None) ->
    {name: (one float per sample or None, float for the set)}. Errors and `prepare` as in make_reward.
    """
    if name.startswith("evaluate:"):
        return evaluate_metric(name.removeprefix("evaluate:"), kwargs)
    arguments = ("prompts", "generations", "references", "metas", "model", "tokenizer")
    return make_entry("metric", METRICS, arguments, name, device, kwargs)


def check_needs(kind: str, table: dict[str, Entry], name: str, samples) -> None:
    """What check_reward and check_metric share."""
    for need in table[name].needs if name in table else ():
        key = need.removeprefix("meta.")
        for sample in samples:
            if need == "references" and not sample.references:
                raise UsageError(f"{kind} {name!r} compares with references, and sample {sample.id!r} has none")
            if need == "commongen prompt" and COMMONGEN_PREFIX not in sample.prompt:
                raise UsageError(f"{kind} {name!r} needs prompts with {COMMONGEN_PREFIX!r}: not so in {sample.id!r}")
            if key != need and key not in sample.meta:
                there = ", ".join(sample.meta) or "none"
                raise UsageError(f"{kind} {name!r} needs meta[{key!r}]: {sample.id!r} has only {there}")


def check_reward(name: str, samples) -> None:
    """UsageError if one of the samples lacks what the reward `name` works on. Loads no model."""
    check_needs("reward", REWARDS, name, samples)


def check_metric(name: str, samples) -> None:
    """UsageError if one of the samples lacks what the metric `name` works on. Loads no model."""
    check_needs("metric", METRICS, name, samples)
