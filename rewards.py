"""Reward functions and metrics, one flat file.

A reward is called as `reward(prompts, generations, references, metas)` and returns one number per sample; with a
parameter `token_ids`, the list of each response's ids, it may return a list of one number per token. A metric is called
as `metric(prompts, generations, references, metas)`, with the policy as `model` and its `tokenizer` where it has these
parameters, and returns `{name: (one number per sample or None, number for the whole set)}`. `prompts` and `generations`
are lists of texts, `references` is a list (one entry per sample) of lists of texts, `metas` a list of dicts.

To add one: write a function that takes the reward's options and returns such a callable, and give it a line in REWARDS
or METRICS at the end of this file; or leave this file alone and pass `path/to/file.py:function` where a name is
expected. What each one measures, its options, range and cost: docs/rewards.md.
"""

import contextlib
import importlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import string
import sys
import threading
import time
import traceback
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial, reduce, update_wrapper
from itertools import chain, islice, product, starmap, zip_longest
from operator import or_
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import huggingface_hub
import nltk
import numpy as np
import regex
import torch
from filelock import FileLock
from nltk import sent_tokenize, word_tokenize
from nltk.corpus.reader import CorpusReader, WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize as rouge_tokenize
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from datapools import (
    LOADING_ERRORS,
    UsageError,
    answers,
    chat_text,
    check_positive,
    nearest,
    offline_if_unreachable,
    parse_kwargs,
    position_limit,
)

COMMONGEN_PREFIX = "generate a sentence with: "
# References come again at every visit of their sample, so what is derived from them is kept, for as many as this.
PREPARED = 4096
LESS = ("perplexity", "ter", "nll")  # metrics of which less is better


# ---- From the rewards of a run to the rewards of tokens, from its metrics to the numbers of an evaluation ------------
class BadReturn(ValueError):
    """A reward or metric returned something else than it must."""


def score_texts(reward_functions, weights, samples, generations, token_ids, iteration):
    """The weighted rewards as rewards of tokens, (B, longest response) float32, and {reward: mean over the samples}.

    token_ids: the ids of each response, EOS included. A sample's number goes to its last token; a list has a number for
    each of its tokens, and counts in the mean with its sum. BadReturn for anything else that a reward returns; what is
    raised gets a note of the iteration, which is 0 before the run.
    """
    lengths = [len(ids) for ids in token_ids]
    token_scores, means = torch.zeros(len(samples), max(lengths)), {}
    with noted(lambda: f"in iteration {iteration}" if iteration else "before the run, with references as generations"):
        for (name, reward), weight in zip(reward_functions.items(), weights, strict=True):
            values = as_tensors(name, call(name, reward, samples, generations, token_ids), samples, lengths)
            for i, value in enumerate(values):
                if not value.float().isfinite().all():
                    got = f"{value.tolist()!r:.60} for sample {samples[i].id}"
                    raise BadReturn(f"{name} returned {got}: must be finite")
                where = slice(0, lengths[i]) if value.ndim else lengths[i] - 1
                token_scores[i, where] += (weight * value).float()
            means[name] = sum(value.sum().item() for value in values) / len(values)
    return token_scores, means


class noted(contextlib.AbstractContextManager):
    """What is raised within goes on its way with a note, which is made only then."""

    def __init__(self, describe: Callable[[], str]):
        self.describe = describe

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception):
            error.add_note(self.describe())


def measure(metrics, samples, generations, model, tokenizer):
    """{figure: its value}, and for each sample a row of what it is, its generation and its own figures; None for what
    is not finite, which JSON cannot hold.

    To be called by all processes of torch.distributed with the same arguments; all get the result, whatever their
    number: each scores its share of the samples for the metrics made of samples, rank 0 computes the others.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)
    samples, row = list(samples), {}
    predictions = [
        {"id": sample.id, "prompt": sample.prompt, "generation": generation, "references": sample.references}
        for sample, generation in zip(samples, generations, strict=True)
    ]
    for name, metric in metrics.items():
        shared = hasattr(metric, "rows")
        rows = metric.rows if shared else metric
        if hasattr(rows, "prepare"):
            rows.prepare(clean_references(samples))
        share = range(rank, len(samples), processes) if shared else range(len(samples) if rank == 0 else 0)
        own, texts, found = [samples[i] for i in share], [generations[i] for i in share], None
        if own:
            token_ids = response_ids(texts, tokenizer) if "token_ids" in inspect.signature(rows).parameters else None
            found = call(name, rows, own, texts, token_ids, model=model, tokenizer=tokenizer)
            if getattr(metric, "of_reward", False):
                found = as_tensors(name, found, own, token_ids and map(len, token_ids))
                found = [value.sum().item() for value in found]
        parts = [found] * processes
        if together:
            torch.distributed.all_gather_object(parts, found)
        figures = parts[0]
        if shared:
            figures = metric.combine([parts[i % processes][i // processes] for i in range(len(samples))])
        check_figures(name, figures, samples)
        for figure, (values, value) in figures.items():
            if figure in row:  # own functions of one name
                figure = name if len(figures) == 1 else f"{name}.{figure}"
            row[figure] = finite_or_none(value)
            for prediction, x in zip(predictions, values, strict=True) if values is not None else ():
                prediction[figure] = finite_or_none(x)
    return row, predictions


def is_best(run_dir, metric, iteration) -> bool:
    """Whether val is at its best after this iteration, by a metric of eval.jsonl; least is best of those in LESS."""
    if metric is None:
        return False
    rows = map(json.loads, (run_dir / "eval.jsonl").read_text().splitlines())
    rows = (row for row in rows if row["split"] == "val" and row.get(metric) is not None)  # --metrics may have changed
    values = {row["iteration"]: row[metric] for row in rows}
    return (min if metric in LESS else max)(values, key=values.get, default=None) == iteration


def check_figures(name, figures, samples) -> None:
    """BadReturn if that is not what a metric must return."""
    if not isinstance(figures, dict) or not all(isinstance(p, tuple) and len(p) == 2 for p in figures.values()):
        raise BadReturn(f"{name} returned {figures!r:.60}: must be {{name: (values of samples or None, value)}}")
    for figure, (values, _) in figures.items():
        if values is not None and len(values) != len(samples):
            raise BadReturn(f"{name}: {figure} has {len(values)} values for {len(samples)} samples")


def finite_or_none(number) -> float | None:
    return float(number) if number is not None and math.isfinite(number) else None


def call(name, scorer, samples, generations, token_ids=None, **others):
    """scorer(prompts, generations, references, metas), with token_ids and the others where it has such a parameter.

    What it raises gets a note with its name and the sample; to find that, samples are tried alone for five seconds.
    """
    parameters = inspect.signature(scorer).parameters

    def ask(indices):
        chosen = [samples[i] for i in indices]
        prompts = [s.prompt if getattr(scorer, "reads_messages", False) else as_text(s.prompt) for s in chosen]
        given = {key: value for key, value in others.items() if key in parameters}
        if "token_ids" in parameters:
            given["token_ids"] = [list(token_ids[i]) for i in indices]
        texts = [clean(generations[i]) for i in indices]
        return scorer(prompts, texts, list(clean_references(chosen)), [s.meta for s in chosen], **given)

    def who() -> str:
        deadline = time.monotonic() + 5
        for i in range(len(samples)):
            if time.monotonic() > deadline:
                break
            with contextlib.suppress(Exception):  # it is being raised already: this only tells which sample it is
                ask([i])
                continue
            return f"raised by {name} of the sample {samples[i].id}, whose generation is {generations[i]!r:.200}"
        return f"raised by {name} of the samples {', '.join(s.id for s in samples[:5])}{', ...' * (len(samples) > 5)}"

    with noted(who):
        return ask(range(len(samples)))


def as_tensors(name, values, samples, lengths=None) -> list[torch.Tensor]:
    """A reward's values of samples, float64 of shape () or (its response's tokens,); BadReturn for anything else.

    values: list, array or tensor, on any device. lengths: tokens of the responses; without, there are no tokens.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    if isinstance(values, str | dict) or not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0:
        raise BadReturn(f"{name} returned {values!r:.60}: must be a list of {len(samples)} numbers")
    if len(values) != len(samples):
        raise BadReturn(f"{name} returned {len(values)} values for {len(samples)} samples")
    lengths, tensors = [None] * len(samples) if lengths is None else list(lengths), []
    for value, sample, length in zip(values, samples, lengths, strict=True):
        try:
            tensors.append(torch.as_tensor(value, dtype=torch.float64, device="cpu").detach())
        except (TypeError, ValueError, RuntimeError, OverflowError):  # a text, None, a ragged list
            tensors.append(torch.empty(0, 0))
        if tensors[-1].shape not in ((), (length,)):
            tokens = "" if length is None else f", or a list of one for each of the response's {length} tokens"
            raise BadReturn(f"{name} returned {value!r:.60} for sample {sample.id}: must be a number{tokens}")
    return tensors


def response_ids(texts, tokenizer) -> list[list[int]]:
    """The texts' token ids, where no sampled response is at hand."""
    return [list(tokenizer(clean(text), add_special_tokens=False).input_ids) or [0] for text in texts]


def as_text(prompt) -> str:
    """A prompt as a text: of a chat the messages' contents, a line each."""
    return clean(prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt))


def clean(text: str) -> str:
    """The text with U+FFFD for each lone surrogate: JSON can hold one, and no tokenizer can encode it."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def clean_references(samples):
    """Each sample's references, one sample after the other."""
    return ([clean(text) for text in sample.references] for sample in samples)


def join(prompt: str, generation: str, separator: str) -> str:
    """Prompt and response as one text, with the separator between them unless there is a space already."""
    space = not prompt or not generation or prompt[-1].isspace() or generation[0].isspace()
    return prompt + ("" if space else separator) + generation


# ---- From a score of one sample to a reward, from values of samples to a metric --------------------------------------
def per_sample(score: Callable) -> Callable:
    """The reward that gives each sample `score(generation, references)`."""
    return lambda prompts, texts, references, metas: list(map(score, texts, references))


def weighted_sum(*terms: tuple[float, Callable]) -> Callable:
    """The reward that adds up other rewards, given as (coefficient, reward)."""

    def reward(*batch):
        columns = [[coefficient * score for score in term(*batch)] for coefficient, term in terms]
        return list(map(sum, zip(*columns, strict=True)))

    return reward


def by_sample(rows: Callable, combine: Callable, of_reward: bool = False) -> Callable:
    """The metric combine(rows(prompts, generations, references, metas)), whose rows, one a sample and independent of
    each other, can be computed by several processes. of_reward: rows is a reward, and combine takes its floats."""

    def metric(*texts):
        return combine(rows(*texts))

    metric.rows, metric.combine, metric.of_reward = rows, combine, of_reward
    return metric


def mean_of(name: str, reward: Callable) -> Callable:
    """The metric that reports a reward's value for each sample and, for the set, their mean."""
    return by_sample(reward, lambda scores: {name: (scores, sum(scores) / len(scores))}, of_reward=True)


# ---- Synthetic tasks -------------------------------------------------------------------------------------------------
def increasing_numbers(min_tokens: int = 20):
    """Length of the strictly increasing run that the text's numbers begin with, per word of the text. In [0, 1].

    Numbers are the finite ones that Python reads ('12', '1e3', '-0.5', not 'nan', 'inf'); other words are passed over.
    min_tokens: texts of fewer than half as many words are divided by that half, so that a short text earns little.
    """

    def score(generation, references):
        words = generation.split()
        run, last = 0, -math.inf
        for word in words:
            try:
                number = float(word)
            except ValueError:
                continue
            if math.isfinite(number):
                if number <= last:
                    break
                run, last = run + 1, number
        return run / max(len(words), min_tokens / 2)

    return per_sample(score)


def dates():
    """1 if the text holds four digits-two digits-two digits, whether or not that is a date of the calendar; else 0."""
    return per_sample(lambda generation, references: float(bool(re.search(r"\d{4}-\d{2}-\d{2}", generation))))


# ---- ROUGE -----------------------------------------------------------------------------------------------------------
# Porter's stemmer takes half of rouge-score's time and a text's words come again and again, as do the references.
porter = SimpleNamespace(stem=lru_cache(maxsize=1 << 18)(PorterStemmer().stem))
WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Javanese}"
UNICODE_WORD = regex.compile(rf"[{WITHOUT_SPACES}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{WITHOUT_SPACES}]]+", regex.V1)


def unicode_words(text: str) -> list[str]:
    """Words of any language, lower-case; where it writes no spaces (Chinese, Japanese, Thai ...), each character."""
    return UNICODE_WORD.findall(unicodedata.normalize("NFKC", text).lower())


def word_splitter(name: str, tokenize: str, others: dict[str, Callable]) -> Callable[[str], list[str]]:
    """text -> words, by one of `others` (name -> function) or by a tokenizer of sacrebleu."""
    known = others | dict.fromkeys(BLEU.TOKENIZERS)
    if tokenize not in known:
        raise UsageError(f"{name} has no tokenizer {tokenize!r}{nearest(tokenize, known)}; it has: {', '.join(known)}")
    if known[tokenize]:
        return known[tokenize]
    try:
        split = BLEU(tokenize=tokenize).tokenizer
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(f"{name}: sacrebleu's tokenizer {tokenize!r} is not installed: {reason}") from None
    return lambda text: split(text).split()


ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scores(types: tuple[str, ...], first_reference: bool, tokenize: str) -> Callable:
    """score(generation, references) -> {type: F1}, each type's best over the references or that of the first alone."""
    own = {"rouge": partial(rouge_tokenize, stemmer=porter), "unicode": unicode_words}
    split = word_splitter("rouge", tokenize, own)
    words = SimpleNamespace(tokenize=lru_cache(maxsize=1 << 16)(split))
    scorer = RougeScorer(types, tokenizer=words)

    def score(generation, references):
        best = scorer.score_multi(references[:1] if first_reference else references, generation)
        return {type: float(best[type].fmeasure) for type in types}

    return score


def rouge(types: tuple[str, ...], first_reference: bool = False, tokenize: str = "rouge"):
    """Mean over `types` (rouge1, rouge2, rougeL, rougeLsum) of rouge-score's F1. In [0, 1].

    first_reference: compare with the first reference only instead of taking each type's best over all of them.
    tokenize: "rouge", rouge-score's own: a to z and digits, lower-case, stemmed; "unicode" for other languages than
    English; or a tokenizer of sacrebleu (zh, ja-mecab, char, intl ...), which keeps the case.
    """
    scores = rouge_scores(types, first_reference, tokenize)
    return per_sample(lambda *pair: sum(scores(*pair).values()) / len(types))


def rouge_metric(first_reference: bool = False, tokenize: str = "rouge"):
    """rouge1, rouge2, rougeL and rougeLsum at once; see `rouge`."""
    scores = rouge_scores(ROUGE, first_reference, tokenize)

    def combine(rows):
        columns = {type: [row[type] for row in rows] for type in ROUGE}
        return {type: (column, sum(column) / len(column)) for type, column in columns.items()}

    return by_sample(per_sample(scores), combine)


@lru_cache(maxsize=1)
def py_rouge():
    """py-rouge's scorer with NarrativeQA's arguments."""
    package = importlib.util.find_spec("rouge")  # the name of another package too
    if package is None or not Path(package.origin).with_name("wordnet_key_value.txt").exists():
        raise UsageError("rouge_l_max needs the package py-rouge: pip install py-rouge==1.1")
    # Of pkg_resources, which setuptools has no longer, it uses one function, to find its word lists.
    beside = SimpleNamespace(resource_filename=lambda name, file: str(Path(package.origin).with_name(file)))
    missing = "pkg_resources" not in sys.modules
    sys.modules.setdefault("pkg_resources", beside)
    try:
        library = importlib.import_module("rouge.rouge")
    finally:
        if missing:
            del sys.modules["pkg_resources"]
    scorer = library.Rouge(metrics=["rouge-l"], length_limit=100, length_limit_type="words", weight_factor=1.2)
    scorer.STEMMER.stem = lru_cache(maxsize=1 << 18)(scorer.STEMMER.stem)
    return scorer


def rouge_l_max():
    """py-rouge's ROUGE-L F of the first 100 words with NarrativeQA's arguments, best of the references. In [0, 1].

    Its weight factor belongs to ROUGE-W; py-rouge raises the P and R of ROUGE-L to 1/1.2 as well.
    """
    scorer = py_rouge()
    return per_sample(
        lambda text, references: max(scorer.get_scores(text, reference)["rouge-l"]["f"] for reference in references)
    )


# ---- BLEU, sacreBLEU, chrF -------------------------------------------------------------------------------------------
def ngrams(words, order: int):
    """All n-grams of the words as tuples."""
    return zip(*(words[i:] for i in range(order)), strict=False)


def ngram_counts(words) -> list[Counter]:
    """For each order from 1 to 4, how often each n-gram is in the words."""
    return [Counter(ngrams(words, order)) for order in (1, 2, 3, 4)]


def bleu_statistics(generation: str, references: list[str]) -> np.ndarray:
    """Matches and n-grams of orders 1 to 4, length, and shortest reference's length: (10,) counts."""
    words, others = generation.split(), [reference.split() for reference in references]
    most = (reduce(or_, counts) for counts in zip(*map(ngram_counts, others), strict=True))  # in any reference
    matches = [(counts & best).total() for counts, best in zip(ngram_counts(words), most, strict=True)]
    totals = [max(len(words) - order, 0) for order in range(4)]
    return np.array([*matches, *totals, len(words), min(map(len, others))])


def bleu_from(statistics: np.ndarray) -> float:
    """BLEU of (summed) statistics, 0 if any order has no match."""
    *counts, length, shortest = statistics.tolist()
    return BLEU.compute_bleu(counts[:4], counts[4:], length, shortest, smooth_method="none").score / 100


def bleu():
    """BLEU-4 of whitespace tokens without smoothing, as in TensorFlow's NMT tutorial. In [0, 1]."""
    return per_sample(lambda *pair: bleu_from(bleu_statistics(*pair)))


def bleu_metric():
    """BLEU of each sample, and of the set by summed counts; see `bleu`."""

    def combine(rows):
        return {"bleu": (list(map(bleu_from, rows)), bleu_from(np.sum(rows, axis=0)))}

    return by_sample(per_sample(bleu_statistics), combine)


def streams(references: list[list[str]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: a list per rank, with None where a sample has fewer."""
    return [list(stream) for stream in zip_longest(*references)]


def sacrebleu_scorer(tokenize: str) -> Callable:
    """score(generation, references) -> sacrebleu's BLEUScore of the one sample as a corpus."""
    word_splitter("sacrebleu", tokenize, {})
    scorer = BLEU(tokenize=tokenize, force=True)
    return lambda generation, references: scorer.corpus_score([generation], streams([references]))


def sacrebleu(tokenize: str = "13a"):
    """sacreBLEU/100 of each sample as a corpus of its own, so 0 below four tokens. In [0, 1].

    tokenize: a tokenizer of sacrebleu's: 13a, intl, char, zh, ja-mecab, ko-mecab, ...
    """
    scorer = sacrebleu_scorer(tokenize)
    return per_sample(lambda *pair: scorer(*pair).score / 100)


def sacrebleu_metric(tokenize: str = "13a"):
    """sacreBLEU/100 of each sample, and of the set by summed counts; see `sacrebleu`."""

    def combine(scores):
        keys = ("counts", "totals", "sys_len", "ref_len")
        sums = (np.sum([getattr(score, key) for score in scores], axis=0).tolist() for key in keys)
        corpus = BLEU.compute_bleu(*sums, smooth_method="exp")
        return {"sacrebleu": ([score.score / 100 for score in scores], corpus.score / 100)}

    return by_sample(per_sample(sacrebleu_scorer(tokenize)), combine)


def chrf():
    """chrF/100 of sacrebleu, best of the references. In [0, 1]."""
    scorer = CHRF()
    return per_sample(lambda text, references: scorer.sentence_score(text, references).score / 100)


def chrf_metric():
    """chrF/100 of each sample, and of the set by summed counts of each sample's best reference."""
    per_text = chrf()

    def metric(prompts, generations, references, metas):
        corpus = CHRF().corpus_score(generations, streams(references)).score / 100
        return {"chrf": (per_text(prompts, generations, references, metas), corpus)}

    return metric


# ---- TER and METEOR, which are slow and run in a pool of processes ---------------------------------------------------
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
    """1 - TER/100 of sacrebleu: fewest edits to a reference per word of the average reference. At most 1, no least.

    Slow by nature: its search for words to shift takes some 25 ms for a text of 60 words, and seconds for one of 500.
    """
    process_pool()
    return lambda prompts, texts, references, metas: [1 - rate for rate, _, _ in in_pool(ter_score, texts, references)]


def ter_metric():
    """TER/100 of each sample, and of the set: all edits over all average reference lengths. Lower is better."""
    process_pool()

    def combine(rows):
        rates, edits, lengths = zip(*rows, strict=True)
        # Where no sample has a reference of any length, sacrebleu counts 1 for any text and 0 for none.
        corpus = sum(edits) / sum(lengths) if sum(lengths) else float(sum(edits) > 0)
        return {"ter": (list(rates), corpus)}

    return by_sample(lambda prompts, texts, references, metas: in_pool(ter_score, texts, references), combine)


def require_nltk(name: str, *packages: str) -> None:
    """Fetches those of NLTK's data packages that are not here, if there is a network; UsageError if there is none."""
    places = {"wordnet": "corpora/wordnet/data.noun", "punkt_tab": "tokenizers/punkt_tab"}

    def missing():
        absent = list(packages)
        for package in packages:
            with contextlib.suppress(LookupError):
                nltk.data.find(places[package])
                absent.remove(package)
        return absent

    downloader = nltk.downloader.Downloader()
    if missing() and not huggingface_hub.constants.HF_HUB_OFFLINE and answers(downloader.url):
        folder = Path(downloader.default_download_dir())
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # under torchrun all processes come here
            for package in missing():
                downloader.download(package, quiet=True)
    if missing():
        fetch = f"python -m nltk.downloader {' '.join(packages)}"
        raise UsageError(f"{name} needs NLTK's data: {fetch} (or set NLTK_DATA to its folder)")


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
    require_nltk("meteor", "wordnet", "punkt_tab")
    in_pool(meteor_of, ["a dog"] * 64, [["the hound"]] * 64)  # so that every worker has WordNet loaded

    def reward(prompts, generations, references, metas):
        compared = [texts[:1] for texts in references] if first_reference else references
        return in_pool(meteor_of, generations, compared)

    return reward


# ---- CIDEr and SPICE -------------------------------------------------------------------------------------------------
def require(module: str, package: str, name: str):
    """The module, imported; UsageError that names the package to install if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"{name} needs the package {package}: pip install {package}") from None


class Cider:
    """CIDEr-D of each sample (n-grams up to 4, sigma 6, times 10), by pycocoevalcap's scorer. In [0, 10].

    tokenize: "spacy" (its English rules), "unicode", or a tokenizer of sacrebleu's, such as 13a or zh.
    `prepare` takes the document frequencies from the references of a whole split. Without it they come, as in the
    original, from the references of each call: then a sample's value depends on its batch, and is 0 in a batch of one.
    """

    def __init__(self, tokenize: str = "spacy"):
        spacy = require("spacy", "spacy", "cider").blank("en").tokenizer if tokenize == "spacy" else None
        by_spacy = {"spacy": lambda text: " ".join(token.text for token in spacy(text)).split()}
        split = word_splitter("cider", tokenize, {**by_spacy, "unicode": unicode_words})
        library = require("pycocoevalcap.cider.cider_scorer", "pycocoevalcap==1.2", "cider")
        self.new_scorer, self.documents = library.CiderScorer, None
        self.line = lru_cache(maxsize=PREPARED)(lambda text: " ".join(split(text)))

    def document_frequencies(self, references) -> tuple[Counter, int]:
        """In how many samples' references each n-gram is, and the number of samples."""
        frequencies, samples = Counter(), 0
        for texts in references:
            scorer = self.new_scorer(refs=[self.line(text) for text in texts])
            frequencies.update(set(chain.from_iterable(scorer.crefs[0])))
            samples += 1
        return frequencies, samples

    def prepare(self, references) -> None:
        self.documents = self.document_frequencies(references)

    def __call__(self, prompts, generations, references, metas):
        frequencies, samples = self.documents or self.document_frequencies(references)
        scorer = self.new_scorer()
        for generation, texts in zip(generations, references, strict=True):
            scorer += (self.line(generation), [self.line(text) for text in texts])
        # Its compute_score() would count these texts alone; compute_cider() takes the number of samples as the length.
        scorer.document_frequency = frequencies
        scorer.crefs = type("Split", (list,), {"__len__": lambda self: samples})(scorer.crefs)
        return [float(score) for score in scorer.compute_cider()]


def spice():
    """SPICE F1 by pycocoevalcap's Java program: overlap of the scene graphs. In [0, 1]. An empty text scores 0."""
    module = require("pycocoevalcap.spice.spice", "pycocoevalcap==1.2", "spice")
    if not shutil.which("java"):
        raise UsageError("spice needs Java (8 or later), and there is no 'java' on the PATH")
    folder = Path(module.__file__).parent / "lib"
    jars = ["stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"]
    if missing := [jar for jar in jars if not (folder / jar).exists()]:
        fetch = "python -m pycocoevalcap.spice.get_stanford_models"
        raise UsageError(f"spice needs {' and '.join(missing)} in {folder}: {fetch}")
    scorer = module.Spice()

    def reward(prompts, generations, references, metas):
        scores = np.zeros(len(generations))
        targets = [[text for text in texts if text.strip()] for texts in references]
        whole = [i for i, texts in enumerate(targets) if texts and generations[i].strip()]
        if whole:
            rows = scorer.compute_score({i: targets[i] for i in whole}, {i: [generations[i]] for i in whole})[1]
            scores[whole] = np.nan_to_num([row["All"]["f"] for row in rows])  # NaN without any relation to compare
        return scores.tolist()

    return reward


def spider(spice_coef: float = 0.5, cider_coef: float = 0.5, tokenize: str = "spacy"):
    """spice_coef * SPICE + cider_coef * CIDEr. See `spice`, `Cider`."""
    spice_reward, cider_reward = spice(), Cider(tokenize)
    reward = weighted_sum((spice_coef, spice_reward), (cider_coef, cider_reward))
    reward.prepare = cider_reward.prepare
    return reward


# ---- ToTTo: PARENT and BLEU as in its official evaluation ------------------------------------------------------------
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
    for previous, word in zip(["", *words], words, strict=False):
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
    """The mean over the table's values of the part of each that is in the words, in order; 0 if there are none."""
    return sum(lcs_length(value, words) / len(value) for value in values) / max(len(values), 1)


def entailed(counts: list[Counter], line: str) -> list[dict]:
    """For each order each n-gram's probability of being entailed: the part of its words that are in the table."""
    known = set(chain.from_iterable(table_values(line)))
    return [{ngram: sum(word in known for word in ngram) / len(ngram) for ngram in order} for order in counts]


SMOOTHING = 1e-5  # of PARENT


@lru_cache(maxsize=PREPARED)
def parent_reference(reference: str, precision_line: str, recall_line: str) -> tuple[list[Counter], list[dict], float]:
    """A reference's n-grams, their weights, and the weight lambda of recall from the table."""
    words, values = parent_words(reference), table_values(recall_line)
    counts = ngram_counts(words)
    # With nothing highlighted and no titles there is no recall from the table to weigh.
    return counts, entailed(counts, precision_line), 1 - mean_mention(values, words) if values else 0.0


def parent_of(generation: str, references: list[str], table: dict) -> tuple[float, float, float]:
    """PARENT precision, recall and F of one text; of the references the one with the best F."""
    precision_line, recall_line = table_lines(table)
    words = parent_words(totto_line(generation))
    counts = ngram_counts(words)
    weights = entailed(counts, precision_line)
    mentioned = mean_mention(table_values(recall_line), words) or SMOOTHING
    scores = []
    for reference in totto_references(references):
        reference_counts, reference_weights, table_weight = parent_reference(reference, precision_line, recall_line)
        precision = recall = 1.0
        for order in range(4):
            mine, theirs = counts[order], reference_counts[order]
            matched = sum(
                shared + (count - shared) * weights[order][ngram]
                for ngram, count in mine.items()
                for shared in [min(count, theirs.get(ngram, 0))]
            )
            weighted = found = 0.0
            for ngram, count in theirs.items():
                weighted += count * reference_weights[order][ngram]
                found += min(count, mine.get(ngram, 0)) * reference_weights[order][ngram]
            # Only the higher orders are smoothed: without one shared or entailed word the score is 0.
            least = SMOOTHING if order else 0.0
            precision *= matched / max(mine.total(), 1) or least
            recall *= (found / weighted if weighted else 1.0) or least
        precision, recall = precision**0.25, recall**0.25 or SMOOTHING
        recall = recall ** (1 - table_weight) * mentioned**table_weight
        scores.append((precision, recall, 2 * precision * recall / (precision + recall + 1e-8)))
    return max(scores, key=lambda score: score[2])


def parent_rows(prompts, generations, references, metas) -> list[tuple[float, float, float]]:
    """`parent_of` of each sample, by its table."""
    return list(map(parent_of, generations, references, (meta["raw_table"] for meta in metas)))


def parent():
    """PARENT F of each text against meta["raw_table"] and the references, as in ToTTo's evaluation. In [0, 1]."""
    return lambda *batch: [f_score for _, _, f_score in parent_rows(*batch)]


def totto_subsets(metas) -> dict[str, list[int]]:
    """The samples of each subset that ToTTo's evaluation reports. The hub has the flag as a string."""
    overlap = [str(meta["raw_table"].get("overlap_subset")) == "True" for meta in metas]
    inside, outside = ([i for i, value in enumerate(overlap) if value is wanted] for wanted in (True, False))
    return {"overall": list(range(len(metas))), "overlap": inside, "non_overlap": outside}


def parent_metric():
    """PARENT precision, recall and F, for all samples and for those in and outside ToTTo's overlap subset."""

    def rows(*batch):
        return list(zip(parent_rows(*batch), batch[-1], strict=True))

    def combine(rows):
        scored, metas = zip(*rows, strict=True)
        result = {}
        for subset, indices in totto_subsets(metas).items():
            for column, suffix in enumerate(("/precision", "/recall", "_f_score")):
                scores = [scored[i][column] for i in indices]
                mean = sum(scores) / len(scores) if scores else 0.0
                result[f"table_to_text/parent_{subset}{suffix}"] = (scores if subset == "overall" else None, mean)
        return result

    return by_sample(rows, combine)


def bleu_totto():
    """sacreBLEU/100 of ToTTo's evaluation, for all samples and its subsets (0 for one without samples).

    The official command prints one decimal; bleu_{subset} is rounded like that, bleu_{subset}_unrounded is not.
    """

    def metric(prompts, generations, references, metas):
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


# ---- CommonGen's penalty ---------------------------------------------------------------------------------------------
def repeat_penalty():
    """-1 if the text repeats the prompt's concepts in a row, its prefix, "generate" or "sentence"; else 0.

    Meant to be added to another reward. A prompt of one concept is thereby penalised for using it, as in the original.
    """

    def penalty(prompt, generation):
        text, (_, found, concepts) = generation.lower(), prompt.partition(COMMONGEN_PREFIX)
        # What follows a second prefix does not count; the last character is the full stop.
        repeated = found and concepts.split(COMMONGEN_PREFIX)[0][:-1].lower() in text
        return -1.0 if repeated or "generate" in text or "sentence" in text else 0.0  # the prefix has both words

    return lambda prompts, generations, references, metas: list(map(penalty, prompts, generations))


def missing_concepts(generation: str, concepts: list[str]) -> int:
    """How many of the concepts are not in the text, as lower-case substrings."""
    text = generation.lower()
    return sum(concept not in text for concept in concepts)


# ---- Learned rewards -------------------------------------------------------------------------------------------------
def load_pretrained(
    reward: str, name: str, device: str, max_length=None, auto_class=AutoModelForSequenceClassification, **for_tokenizer
):  # fmt: skip
    """Tokenizer and model (in eval mode, on the device) by hub name or path, and how many tokens it is to read: those
    that it has positions for, or max_length, if less."""
    if not Path(name).exists():
        offline_if_unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **for_tokenizer)
        model, loading = auto_class.from_pretrained(name, output_loading_info=True)
    except LOADING_ERRORS as error:
        reason = " ".join(repr(error).split())[:300]
        raise UsageError(f"{reward}: the model {name!r} cannot be loaded (a hub name or a folder): {reason}") from None
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UsageError(f"{reward}: the model {name!r} has no weights for {missing}: it was not trained for this")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UsageError(f"{reward}: the tokenizer of {name!r} has no token for padding, and none for the end")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    length = max_tokens(tokenizer, model.config)
    return tokenizer, model.to(device).eval(), min(length, max_length or length)


def max_tokens(tokenizer, config) -> int:
    """The most tokens the model has positions for: tokenizers saved without a limit claim an absurd one."""
    # RoBERTa and its kin count positions from the padding index on.
    offset = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
    return min(tokenizer.model_max_length, position_limit(config) - offset, 1 << 20)


def beginnings(tokenizer, texts: list[str], tokens: int) -> list[str]:
    """The texts, cut after so many tokens."""
    cut = dict(add_special_tokens=False, truncation=True, max_length=tokens, return_offsets_mapping=True)
    ends = [max((end for _, end in row), default=0) for row in tokenizer(texts, **cut).offset_mapping]
    return [text[:end] for text, end in zip(texts, ends, strict=True)]


def encode_texts(tokenizer, length: int, device, *columns, special=True) -> dict:
    """A classifier's inputs for texts, or for pairs: (N, L) each. special: add the tokenizer's special tokens."""
    cut = dict(padding=True, truncation=True, max_length=length, add_special_tokens=special, return_tensors="pt")
    encoded = tokenizer(*columns, **cut).to(device)
    if encoded["input_ids"].shape[1] == 0:  # no text has a token: one of padding, as beside longer ones
        padding = torch.full((len(columns[0]), 1), tokenizer.pad_token_id, device=device)
        encoded = dict(input_ids=padding, attention_mask=torch.zeros_like(padding))
    return dict(encoded, use_cache=False)


@torch.no_grad()
def classify(model, tokenizer, length: int, batch_size: int, *columns, special=True) -> torch.Tensor:
    """(N, C) fp32 logits of texts, or of pairs if there are two columns of texts, truncated to the length.

    special: add the tokenizer's special tokens; not to texts of a chat template, which has them.
    """
    accepted = inspect.signature(model.forward).parameters
    if len(columns) == 2:
        # The tokenizers library builds all combinations of what it cuts off two texts: too many if both are long.
        columns = [beginnings(tokenizer, column, 2 * length) for column in columns]
    rows = []
    for start in range(0, len(columns[0]), batch_size):
        batch = (column[start : start + batch_size] for column in columns)
        inputs = encode_texts(tokenizer, length, model.device, *batch, special=special)
        rows.append(model(**{key: x for key, x in inputs.items() if key in accepted}).logits.float().cpu())
    return torch.cat(rows)


def classifier(
    device: str, separator: str, model: str, label: int | str = 1, logit: bool = False, include_prompt: bool = True,
    batch_size: int = 64, max_length: int | None = None,
):  # fmt: skip
    """Probability of one label of any sequence classifier, of prompt + text or of the text alone. In [0, 1].

    model: hub name or folder. label: the label's index, or its name in the model's config. The labels' probabilities
    sum to 1, or are each by itself where the config has problem_type multi_label_classification. logit: the logit
    instead of the probability, unbounded. Texts too long for the model, or of more than max_length tokens, lose their
    beginning.
    """
    tokenizer, scorer, length = load_pretrained("classifier", model, device, max_length, truncation_side="left")
    labels = [str(scorer.config.id2label[i]) for i in range(scorer.config.num_labels)]
    independent = scorer.config.problem_type == "multi_label_classification"
    if len(labels) == 1 and not (logit or independent):
        raise UsageError(f"classifier: {model!r} has one output, a score and no probability; take reward_model for it")
    if isinstance(label, str):
        if label not in labels:
            raise UsageError(f"classifier: {model!r} has no label {label!r}{nearest(label, labels)}, but {labels}")
        label = labels.index(label)
    if not 0 <= label < len(labels):
        raise UsageError(f"classifier: {model!r} has labels 0 to {len(labels) - 1}, not {label}")

    def reward(prompts, generations, references, metas):
        pairs = zip(prompts, generations, strict=True)
        texts = [join(*pair, separator) for pair in pairs] if include_prompt else list(generations)
        values = classify(scorer, tokenizer, length, batch_size, texts)
        if not logit:
            values = values.sigmoid() if independent else values.softmax(dim=1)
        return values[:, label].tolist()

    return reward


def sentiment(
    device: str, separator: str, model: str = "lvwerra/distilbert-imdb", label_ix: int = 1, include_prompt: bool = True,
    batch_size: int = 64,
):  # fmt: skip
    """The probability that a film review is positive: `classifier`, with a default model."""
    return classifier(device, separator, model, label_ix, include_prompt=include_prompt, batch_size=batch_size)


def reward_model(
    device: str, separator: str, model: str, center: float = 0.0, clip: float | None = None, batch_size: int = 16,
    max_length: int | None = None,
):  # fmt: skip
    """The logit of a scalar reward model, as trained on preferences (Bradley-Terry), of prompt and text. Unbounded.

    model: hub name or folder of a sequence classifier with one output. center: subtracted, such as the mean score of
    the references. clip: what is left is cut to [-clip, clip]. If the model's tokenizer has a chat template, the text
    is the assistant's message after the prompt's messages, or after the prompt as the user's. Texts too long for the
    model, or of more than max_length tokens, lose their beginning.
    """
    tokenizer, scorer, length = load_pretrained("reward_model", model, device, max_length, truncation_side="left")
    if scorer.config.num_labels != 1:
        labels = ", ".join(map(str, scorer.config.id2label.values()))
        raise UsageError(f"reward_model: {model!r} has the labels {labels}, not one output; take classifier for it")
    if clip is not None and not clip > 0:
        raise UsageError(f"reward_model: clip must be above 0, not {clip}")

    def reward(prompts, generations, references, metas):
        pairs = zip(prompts, generations, strict=True)
        texts = [judged_text(tokenizer, *pair, separator) for pair in pairs]
        special = tokenizer.chat_template is None
        scores = classify(scorer, tokenizer, length, batch_size, texts, special=special)[:, 0] - center
        return (scores if clip is None else scores.clamp(-clip, clip)).tolist()

    reward.reads_messages = True
    return reward


def judged_text(tokenizer, prompt: str | list[dict], generation: str, separator: str) -> str:
    """Prompt and response as a reward model reads them: by its chat template, or as one text if it has none."""
    if tokenizer.chat_template is None:
        return join(as_text(prompt), generation, separator)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    # A causal policy's response begins with the space that joins it to a prompt; a message does not.
    return clean(chat_text(tokenizer, [*messages, {"role": "assistant", "content": generation.lstrip()}]))


INTENT_CLASSIFIER = "rajkumarrrk/roberta-daily-dialog-intent-classifier"
END_OF_UTTERANCE = "<EOU>"


def intent_accuracy(device: str, separator: str, model: str = INTENT_CLASSIFIER, batch_size: int = 64):
    """1 if the classifier finds the wanted intent (meta["intent"], counted from 1) in last utterance + text; else 0."""
    tokenizer, classifier, length = load_pretrained("intent", model, device)

    def reward(prompts, generations, references, metas):
        last_utterances = (["", *filter(None, prompt.split(END_OF_UTTERANCE))][-1] for prompt in prompts)
        texts = [join(*pair, separator) for pair in zip(last_utterances, generations, strict=True)]
        found = classify(classifier, tokenizer, length, batch_size, texts).argmax(dim=1).tolist()
        return [float(label == meta["intent"] - 1) for label, meta in zip(found, metas, strict=True)]

    return reward


def intent_metric(device: str, separator: str, model: str = INTENT_CLASSIFIER, batch_size: int = 64):
    """The share of texts with the wanted intent; see `intent_accuracy`."""
    return mean_of("intent", intent_accuracy(device, separator, model, batch_size))


def intent(
    device: str, separator: str, model: str = INTENT_CLASSIFIER, intent_coef: float = 1.0, meteor_coef: float = 1.0,
    batch_size: int = 64,
):  # fmt: skip
    """intent_coef * (1 if the intent is the wanted one) + meteor_coef * METEOR. See `intent_accuracy`, `meteor`."""
    meteor_reward = meteor()  # first: its processes are to be forked before a model is on the device
    accuracy = intent_accuracy(device, separator, model, batch_size)
    return weighted_sum((intent_coef, accuracy), (meteor_coef, meteor_reward))


def best_of_references(score_pairs: Callable) -> Callable:
    """The reward of each sample's best reference by score_pairs(texts, references), called once with all pairs."""

    def reward(prompts, generations, references, metas):
        texts = [text for text, others in zip(generations, references, strict=True) for _ in others]
        scores = iter(score_pairs(texts, list(chain.from_iterable(references))))
        return [max(islice(scores, len(others)), default=-math.inf) for others in references]

    return reward


def bleurt(device: str, model: str = "Elron/bleurt-base-128", batch_size: int = 64):
    """BLEURT, best of the references: the regression head of a sequence classifier. About [-2, 1.5], unbounded."""
    tokenizer, scorer, length = load_pretrained("bleurt", model, device)
    if scorer.config.num_labels != 1:
        raise UsageError(f"bleurt: {model!r} has {scorer.config.num_labels} labels, not one output")

    def score_pairs(texts, references):
        return classify(scorer, tokenizer, length, batch_size, references, texts)[:, 0].tolist()

    return best_of_references(score_pairs)


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
    except (*LOADING_ERRORS, AssertionError) as error:  # the latter of a layer that it has not
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"bertscore: {model_type!r} with num_layers {num_layers} cannot be loaded: {reason}") from None
    if isinstance(scorer._tokenizer, (library.utils.GPT2Tokenizer, library.utils.RobertaTokenizer)):
        # bert-score asks these for a space before the first word at each call, which transformers 5 ignores.
        scorer._tokenizer = AutoTokenizer.from_pretrained(model_type, add_prefix_space=True)
    scorer._tokenizer.model_max_length = max_tokens(scorer._tokenizer, scorer._model.config)

    def score_pairs(texts, references):
        scores = np.zeros(len(texts))
        whole = [i for i in range(len(texts)) if texts[i].strip() and references[i].strip()]
        if whole:
            scores[whole] = scorer.score([texts[i] for i in whole], [references[i] for i in whole])[2]
        return scores.tolist()

    return best_of_references(score_pairs)


def commongen_preference(
    device: str, model: str = "t5-11b", weights: str | None = None, concept_coef: float = 0.0, meteor_coef: float = 0.0,
    batch_size: int = 8,
):  # fmt: skip
    """P(good) / (1 + concept_coef * missing concepts) + meteor_coef * METEOR, for meta["concepts"].

    P(good) is the softmax over the words "good" and "bad" as the first token that a T5 trained on human preferences
    answers the text with. model: its hub name or folder. weights: a state dict to load into it, such as the published
    t5-11b~commongen_prefs.pt; None if the model has them already.
    """
    meteor_reward = meteor() if meteor_coef else None  # first: its processes are to be forked before a model is loaded
    if weights is not None and not Path(weights).is_file():
        raise UsageError(f"commongen_preference: no file {weights!r} (the published one is t5-11b~commongen_prefs.pt)")
    tokenizer, scorer, length = load_pretrained("commongen_preference", model, device, None, AutoModelForSeq2SeqLM)
    if weights is not None:
        state = torch.load(weights, map_location=device, weights_only=True)
        scorer.resize_token_embeddings(len(tokenizer))  # the published one was trained with the embeddings cut to this
        scorer.load_state_dict(state.get("model_state_dict", state))
    answers = [tokenizer(word).input_ids[0] for word in ("good", "bad")]

    @torch.no_grad()
    def reward(prompts, generations, references, metas):
        scores = []
        for start in range(0, len(generations), batch_size):
            inputs = encode_texts(tokenizer, length, scorer.device, generations[start : start + batch_size])
            first = torch.full_like(inputs["input_ids"][:, :1], scorer.config.decoder_start_token_id)
            logits = scorer(**inputs, decoder_input_ids=first).logits[:, 0, answers]
            scores += logits.float().softmax(dim=1)[:, 0].tolist()
        missing = (missing_concepts(text, meta["concepts"]) for text, meta in zip(generations, metas, strict=True))
        return [good / (1 + concept_coef * count) for good, count in zip(scores, missing, strict=True)]

    return weighted_sum((1.0, reward), (meteor_coef, meteor_reward)) if meteor_coef else reward


# ---- SummaC: is the summary entailed by the document (the prompt)? ---------------------------------------------------
def split_text(text: str, granularity: str) -> list[str]:
    """The text's pieces of more than 10 characters; as "document" the text itself."""
    if granularity == "document":
        return [text]
    paragraphs = map(str.strip, text.split("\n\n" if "\n\n" in text else "\n"))
    pieces = paragraphs if granularity == "paragraph" else sent_tokenize(text)
    pieces = [piece for piece in pieces if len(piece) > 10]
    return [" ".join(pieces[i : i + 2]) for i in range(len(pieces))] if granularity == "2sents" else pieces


def nli_reward(name: str, device: str, model: str, granularity: str, batch_size: int, score: Callable) -> Callable:
    """The reward score(image) of an image (2, pieces of prompt, pieces of text) of the probabilities of entailment and
    of contradiction, all 0 in the shape (2, 1, 1) if either has no piece."""
    granularities = granularity.split("-")
    known = ("sentence", "2sents", "paragraph", "document")
    if len(granularities) > 2 or not set(granularities) <= set(known):
        raise UsageError(f"{name}: granularity {granularity!r} is not one of {', '.join(known)}, or two joined by '-'")
    require_nltk(name, "punkt_tab")
    tokenizer, classifier, length = load_pretrained(name, model, device)
    labels = {label.lower(): index for index, label in classifier.config.id2label.items()}
    if not {"entailment", "contradiction"} <= set(labels):
        wanted = "with labels entailment and contradiction"
        raise UsageError(f"{name}: {model!r} is no NLI model {wanted}, but {sorted(labels)}")
    columns = [labels["entailment"], labels["contradiction"]]

    def reward(prompts, generations, references, metas):
        pieces = [
            (split_text(prompt, granularities[0])[:100], split_text(generation, granularities[-1]))
            for prompt, generation in zip(prompts, generations, strict=True)
        ]
        pairs, table = list(chain.from_iterable(starmap(product, pieces))), np.zeros((2, 0))
        if pairs:
            premises, claims = map(list, zip(*pairs, strict=True))
            logits = classify(classifier, tokenizer, min(length, 500), batch_size, premises, claims)
            table = logits.softmax(dim=1)[:, columns].T.numpy()
        shapes = [(2, len(premises), len(claims)) for premises, claims in pieces]
        parts = np.split(table, np.cumsum([rows * columns for _, rows, columns in shapes])[:-1], axis=1)
        images = (x.reshape(shape) if x.size else np.zeros((2, 1, 1)) for x, shape in zip(parts, shapes, strict=True))
        return list(map(score, images))

    return reward


def summac_zs(
    device: str, model: str = "roberta-large-mnli", granularity: str = "sentence", use_entailment: bool = True,
    use_contradiction: bool = True, batch_size: int = 32,
):  # fmt: skip
    """SummaC-ZS: each sentence's best entailment minus its worst contradiction, mean over the summary. In [-1, 1].

    Without contradiction: the entailment, in [0, 1]; without entailment: 1 - contradiction, in [0, 1]. A summary or a
    document without a sentence of more than 10 characters scores as if both were 0.
    """
    if not use_entailment and not use_contradiction:
        raise UsageError("summac_zs: one of use_entailment and use_contradiction must be on")

    def score(image):
        entailment, contradiction = image.max(axis=1)
        values = entailment - use_contradiction * contradiction if use_entailment else 1 - contradiction
        return float(values.mean())

    return nli_reward("summac_zs", device, model, granularity, batch_size, score)


# Edges of the bins of the published SummaC-Conv model, narrow where NLI probabilities crowd.
PERCENTILE_BINS = [
    0, 0.01, 0.02, 0.03, 0.04, 0.07, 0.13, 0.37, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975,
    0.98, 0.985, 0.99, 0.995, 1,
]  # fmt: skip


def summac_conv(
    device: str, weights: str | None = None, model: str = "tals/albert-xlarge-vitaminc-mnli",
    granularity: str = "sentence", bins: str = "percentile", batch_size: int = 32,
):  # fmt: skip
    """SummaC-Conv: a learned layer over the histogram of each sentence's entailments, then a softmax. In [0, 1].

    weights: the trained layers (a state dict with mlp.* and layer_final.*), such as SummaC's published
    summac_conv_vitc_sent_perc_e.bin, which goes with the default model, granularity and bins. bins: "percentile", or
    "evenN" for N equal ones. The first 10 sentences of the summary count.
    """
    if weights is None or not Path(weights).is_file():
        published = "summac_conv_vitc_sent_perc_e.bin of the repository tingofurro/summac"
        raise UsageError(f"summac_conv: weights must be the file of the trained layers, not {weights!r}: {published}")
    if bins != "percentile" and not re.fullmatch(r"even[1-9]\d*", bins):
        raise UsageError(f"summac_conv: bins must be 'percentile' or 'evenN' with a number N, not {bins!r}")
    edges = np.array(PERCENTILE_BINS) if bins == "percentile" else np.linspace(0, 1, int(bins.removeprefix("even")) + 1)
    layers = {key: value.float() for key, value in torch.load(weights, weights_only=True, map_location="cpu").items()}
    if layers["mlp.weight"].shape[1] != len(edges) - 1:
        made_for = layers["mlp.weight"].shape[1]
        raise UsageError(f"summac_conv: {weights!r} is for {made_for} bins, {bins!r} has {len(edges) - 1}")

    def score(image):
        histograms = np.array([np.histogram(column, bins=edges)[0] for column in image[0].T[:10]])
        feature = (torch.tensor(histograms).float() @ layers["mlp.weight"].T + layers["mlp.bias"]).mean()
        # The three features are the least, mean and greatest in SummaC's other variants, three means in this one.
        logits = layers["layer_final.weight"] @ feature.repeat(3) + layers["layer_final.bias"]
        return logits.softmax(dim=0)[1].item()

    return nli_reward("summac_conv", device, model, granularity, batch_size, score)


# ---- Metrics that are no rewards -------------------------------------------------------------------------------------
def segmental_ttr(words: list[str], window: int) -> float:
    """Mean type-token ratio of the whole windows of the text; of all its words if they fill none."""
    whole = [words[i : i + window] for i in range(0, len(words) - window + 1, window)] or [words]
    return round(sum(len(set(part)) / max(len(part), 1) for part in whole) / len(whole), 5)


def entropy(counts: Counter, contexts: Counter | None = None) -> float:
    """Shannon entropy in bits of how often n-grams occur; given the counts of the words before, that of the last word.

    The latter as GEM estimates it: contexts are counted over whole texts, so it may come out a little below 0.
    """
    joint = np.array(list(counts.values())) / max(counts.total(), 1)
    context = 1.0
    if contexts is not None:
        context = np.array([contexts[ngram[:-1]] for ngram in counts]) / max(contexts.total(), 1)
    return float((joint * np.log2(context / joint)).sum())


def diversity(window_size: int = 100):
    """GEM's statistics of the generations' words, lower-cased, with and without punctuation: lengths, MSTTR, and for
    1-, 2- and 3-grams the distinct share, the number of types and of those seen once, and entropies in bits."""
    require_nltk("diversity", "punkt_tab")

    def metric(prompts, generations, references, metas):
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
                values[f"distinct-{order}{suffix}"] = len(counts) / max(counts.total(), 1)
                values[f"vocab_size-{order}{suffix}"] = len(counts)
                values[f"unique-{order}{suffix}"] = sum(count == 1 for count in counts.values())
                values[f"entropy-{order}{suffix}"] = entropy(counts)
                if contexts is not None:
                    values[f"cond_entropy-{order}{suffix}"] = entropy(counts, contexts)
                contexts = counts
        return {f"diversity_metrics/{name}": (None, float(value)) for name, value in values.items()}

    return metric


def perplexity(separator: str, stride: int = 512, reference_key: str | None = None):
    """Perplexity of a causal policy (the `model` passed in) on the references, in one text joined by blank lines.

    stride: tokens scored per window, each seeing as much before it as the model's positions allow (2,048 tokens with it
    at most, as the logits of a whole window are in memory); at most those.
    reference_key: take each sample's text from this key of its meta instead of its references.
    """
    if separator:  # a decoder-only policy's responses bring their own
        raise UsageError("perplexity is defined for a decoder-only policy, not for an encoder-decoder")

    @torch.no_grad()
    def metric(prompts, generations, references, metas, model, tokenizer):
        texts = [meta[reference_key] for meta in metas] if reference_key else list(chain.from_iterable(references))
        ids = torch.tensor([tokenizer("\n\n".join(texts)).input_ids], dtype=torch.long, device=model.device)
        window, total = min(position_limit(model.config), 2048), ids.shape[1]
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
    taken = [schema["references"] for schema in schemas if "references" in schema]
    prefix = Path(name).stem

    def metric(prompts, generations, references, metas):
        given = {"predictions": [text.strip() for text in generations]}  # a causal model's begin with a space
        if taken:
            one_each = all(hasattr(feature, "dtype") for feature in taken)
            given["references"] = [texts[0] for texts in references] if one_each else references
        result = {}
        for key, value in module.compute(**given, **options).items():
            label = prefix if key == prefix else f"{prefix}/{key}"
            if isinstance(value, (list, np.ndarray)) and len(value) == len(generations):
                result[label] = ([float(score) for score in value], float(np.mean(value)))
            elif isinstance(value, (int, float, np.number)):
                result[label] = (None, float(value))
        return result

    return metric


# ---- The tables ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """How to make a reward or metric from its options, and what it needs of a sample, possibly by those options."""

    make: Callable
    needs: tuple[str, ...] | Callable = ()


COUNTS = {"batch_size", "max_length", "min_tokens", "stride", "window_size"}  # options that are at least 1
REFERENCES = ("references",)
LATIN = (*REFERENCES, "latin")  # sees the letters a to z and digits
SPACED = (*REFERENCES, "spaced")  # sees words between spaces
WORDED = (*REFERENCES, "worded")  # sees the letters and digits of any language


def needs_of_tokens(options: dict, default: str | None = None) -> tuple[str, ...]:
    """Of a reward with a `tokenize` of its own; these do not part what is written without spaces, the others do."""
    spaced = dict.fromkeys((None, "spacy", "13a", "intl", "none"), SPACED)
    return ({"rouge": LATIN, "unicode": WORDED} | spaced).get(options.get("tokenize", default), REFERENCES)


needs_of_rouge = partial(needs_of_tokens, default="rouge")


def needs_of_perplexity(options: dict) -> tuple[str, ...]:
    key = options.get("reference_key")
    return REFERENCES if key is None else (f"meta.{key}",)


REWARDS = {
    "increasing_numbers": Entry(increasing_numbers),
    "dates": Entry(dates),
    **{type: Entry(partial(rouge, (type,)), needs_of_rouge) for type in ROUGE},
    # The original's combination looks at the first reference only.
    "rouge_combined": Entry(partial(rouge, ("rouge1", "rouge2", "rougeL"), first_reference=True), needs_of_rouge),
    "rouge_l_max": Entry(rouge_l_max, LATIN),
    "bleu": Entry(bleu, SPACED),
    "sacrebleu": Entry(sacrebleu, needs_of_tokens),
    "chrf": Entry(chrf, REFERENCES),
    "ter": Entry(ter, SPACED),
    "meteor": Entry(meteor, SPACED),
    "cider": Entry(Cider, needs_of_tokens),
    "spice": Entry(spice, LATIN),
    "spider": Entry(spider, LATIN),
    "parent": Entry(parent, (*SPACED, "meta.raw_table")),
    "bertscore": Entry(bertscore, REFERENCES),
    "bleurt": Entry(bleurt, REFERENCES),
    "classifier": Entry(classifier),
    "sentiment": Entry(sentiment),
    "reward_model": Entry(reward_model),
    "intent": Entry(intent, (*SPACED, "meta.intent")),
    "commongen_preference": Entry(commongen_preference, (*REFERENCES, "meta.concepts")),
    "repeat_penalty": Entry(repeat_penalty, ("commongen prompt",)),
    "summac_zs": Entry(summac_zs),
    "summac_conv": Entry(summac_conv),
}

# Every reward is a metric too, as its mean, unless there is another one of its name here.
METRICS = {
    "rouge": Entry(rouge_metric, needs_of_rouge),
    "bleu": Entry(bleu_metric, SPACED),
    "sacrebleu": Entry(sacrebleu_metric, needs_of_tokens),
    "chrf": Entry(chrf_metric, REFERENCES),
    "ter": Entry(ter_metric, SPACED),
    "parent": Entry(parent_metric, (*SPACED, "meta.raw_table")),
    "bleu_totto": Entry(bleu_totto, (*SPACED, "meta.raw_table")),
    "intent": Entry(intent_metric, ("meta.intent",)),
    "diversity": Entry(diversity),
    "perplexity": Entry(perplexity, needs_of_perplexity),
}


# ---- What the scripts call to make them ------------------------------------------------------------------------------
LOOKED_AT = 1000  # samples whose references and metas are checked before a run; there may be millions


def make_rewards(names, typed, defaults, samples, tokenizer, device, separator) -> dict[str, Callable]:
    """{name: reward} for names of REWARDS, 'path/to/file.py:function' and 'package.module:function'.

    typed: the options from the command line, KEY or NAME.KEY -> text; defaults: the task's, name -> {option: value}.
    samples: the split that is trained on, any sequence. Each reward is called once, with a few references as
    generations. device, such as "cuda:0", and separator, what stands between a prompt and a response that are read as
    one text, reach those that have such a parameter. UsageError, one line, for all that cannot work.
    """
    rewards, (few, texts) = {}, trial(samples)
    for name, options in checked_options("reward", names, typed, defaults, samples).items():
        rewards[name] = make_reward(name, device, separator, **options)
        if hasattr(rewards[name], "prepare"):
            rewards[name].prepare(clean_references(samples))
        try:
            score_texts({name: rewards[name]}, [1.0], few, texts, response_ids(texts, tokenizer), 0)
        except BadReturn as error:
            raise UsageError(f"reward {error}") from None
    return rewards


def make_metrics(names, typed, defaults, samples, tokenizer, device, separator) -> dict[str, Callable]:
    """{name: metric} for names of METRICS and REWARDS, 'evaluate:NAME', and functions of one's own, which may be
    rewards as well: then the metric is the mean. Arguments and errors as in make_rewards; samples: what is evaluated.
    """
    metrics, (few, texts) = {}, trial(samples)
    for name, options in checked_options("metric", names, typed, defaults, samples).items():
        metric = metrics[name] = make_metric(name, device, separator, **options)
        if "model" in inspect.signature(metric).parameters:
            continue  # a metric of the policy, which is not there yet
        if is_own(name):
            with noted(lambda: "before the run, with references as generations"):
                found = call(name, metric, few, texts, response_ids(texts, tokenizer), tokenizer=tokenizer)
            if not isinstance(found, dict):
                metrics[name] = mean_of(name.rpartition(":")[2], metric)
        try:
            measure({name: metrics[name]}, few, texts, None, tokenizer)
        except BadReturn as error:
            raise UsageError(f"metric {error}") from None
    return metrics


def trial(samples) -> tuple[list, list[str]]:
    """A few samples to try a reward with, and as generations their references or, where there are none, prompts."""
    few = list(islice(samples, 4))
    return few, [sample.references[0] if sample.references else as_text(sample.prompt) for sample in few]


def make_reward(name: str, device: str = "cpu", separator: str = "", **options) -> Callable:
    """One reward, as make_rewards makes it, not tried yet. `reward.prepare(references)`, where there is one, is to be
    called once with the references of all samples of the split before the first use."""
    return make("reward", REWARDS, name, options, device=device, separator=separator)


def make_metric(name: str, device: str = "cpu", separator: str = "", **options) -> Callable:
    """One metric, as make_metrics makes it, not tried yet: a function of one's own as it is."""
    if name.startswith("evaluate:"):
        return evaluate_metric(name.removeprefix("evaluate:"), options)
    made = make("metric", REWARDS | METRICS, name, options, device=device, separator=separator)
    return mean_of(name, made) if name in REWARDS and name not in METRICS else made


def make(kind: str, table: dict[str, Entry], name: str, options: dict, **given):
    """What make_reward and make_metric share. given: what is handed to those that have such a parameter."""
    own = is_own(name)
    if not own and name not in table:
        known = f"{', '.join(sorted(table))}; or path/to/file.py:function for your own"
        raise UsageError(f"unknown {kind} {name!r}{nearest(name, table)}; known are: {known}")
    scorer = load_function(name) if own else table[name].make
    if not own or inspect.isclass(scorer):
        check_options(name, scorer, options, hidden=given)
        if not own:
            check_positive(**{key: options[key] for key in COUNTS & options.keys()})
        wanted = inspect.signature(scorer).parameters
        scorer, options = scorer(**options, **{key: value for key, value in given.items() if key in wanted}), {}
    if own:
        check_options(name, scorer, options, hidden=called_with(kind, name, scorer))
    return update_wrapper(partial(scorer, **options), scorer) if options else scorer


def is_own(name: str) -> bool:
    return ":" in name and not name.startswith("evaluate:")


def called_with(kind: str, name: str, function: Callable) -> set[str]:
    """The parameters that are not options but what a reward or metric is called with; UsageError if they do not fit."""
    arguments, signature, bound = ("prompts", "generations", "references", "metas"), "", {}
    with contextlib.suppress(TypeError, ValueError):  # too few parameters, or nothing that can be called
        signature = inspect.signature(function)
        bound = signature.bind_partial(*arguments).arguments
    if not bound or any(bound.get(argument, argument) != argument for argument in arguments):
        has = f"{name.rpartition(':')[2]}{signature}"
        raise UsageError(f"{kind} {name!r} is {has}; must be: def {kind}({', '.join(arguments)})")
    return {*bound, "token_ids"} | ({"model", "tokenizer"} & {*signature.parameters} if kind == "metric" else set())


def load_function(spec: str) -> Callable:
    """The function or class that 'path/to/file.py:name' or 'package.module:name' names. UsageError if there is none.

    The file is imported as Python imports it: its folder is on sys.path, it is in sys.modules, and executed only once.
    """
    path, _, name = spec.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_file(Path(path).resolve()) if path.endswith(".py") else importlib.import_module(path)
    except (SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError, OSError) as error:
        place, reason = traceback.extract_tb(error.__traceback__)[-1], " ".join(str(error).split())
        what = f"{type(error).__name__}: {reason} ({place.filename}:{place.lineno})"
        raise UsageError(f"{path}: cannot be imported: {what}") from None
    if not callable(getattr(module, name, None)):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UsageError(f"{path!r} has no function {name!r}{nearest(name, own)}; it has: {', '.join(own) or 'none'}")
    return getattr(module, name)


def import_file(file: Path):
    """The module of a file: of the package that its folder is, if it is one, else under the file's name, or, where that
    is another module's, one with a number."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}")
    root, parts = file.parent, [file.stem]
    while (root / "__init__.py").is_file():
        root, parts = root.parent, [root.name, *parts]
    for folder in (root, file.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))

    def taken(name, by):
        return name in sys.modules and Path(getattr(sys.modules[name], "__file__", None) or "").resolve() != by

    if len(parts) > 1 and not taken(parts[0], root / parts[0] / "__init__.py"):
        return importlib.import_module(".".join(parts))
    name = f"{file.stem}_{zlib.crc32(str(file).encode()):08x}" if taken(file.stem, file) else file.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


# ---- What cannot work, said before a model is loaded -----------------------------------------------------------------
def checked_options(kind: str, names, typed, defaults, samples) -> dict[str, dict]:
    """{name: its options}; UsageError if samples lack what one of them works on."""
    options = parse_kwargs(typed, names, defaults)
    looked_at = list(islice(samples, LOOKED_AT))
    for name in names:
        if list(names).count(name) > 1:
            raise UsageError(f"{kind} {name!r} is named twice")
        entry = (REWARDS | METRICS if kind == "metric" else REWARDS).get(name, Entry(None))
        for need in entry.needs(options[name]) if callable(entry.needs) else entry.needs:
            if need in ("latin", "spaced", "worded"):
                check_script(f"{kind} {name!r}", need, looked_at)
                continue
            for sample in looked_at:
                check_sample(f"{kind} {name!r}", need, sample)
        if name == "ter" and int(os.environ.get("RANK", 0)) == 0:
            words = np.mean([len(text.split()) for sample in looked_at for text in sample.references])
            if words > 120:
                seconds = f"{(words / 250) ** 3:.1f} s each on one core"
                print(f"{kind} 'ter': references of {words:.0f} words take about {seconds}; see chrf", file=sys.stderr)
    return options


def check_options(name: str, make: Callable, given: dict, hidden=()) -> None:
    """UsageError if `make` takes no option of one of the given names, or misses one that it must have."""
    options = {key: option for key, option in inspect.signature(make).parameters.items() if key not in hidden}
    if any(option.kind is option.VAR_KEYWORD for option in options.values()):
        return
    options = {key: option for key, option in options.items() if option.kind is not option.VAR_POSITIONAL}
    for key in given:
        if key not in options:
            known = ", ".join(options) or "none"
            raise UsageError(f"{name!r} has no option {key!r}{nearest(key, options)}; its options are: {known}")
        kinds = set(get_args(options[key].annotation) or (options[key].annotation,))  # of int | None both
        fits = kinds | ({int} if float in kinds else set())
        if kinds <= {int, float, bool, str, type(None)} and type(given[key]) not in fits:
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
            raise UsageError(f"option {key!r} of {name!r} must be of type {wanted}, not {given[key]!r}")
    missing = [key for key, option in options.items() if option.default is option.empty and key not in given]
    if missing:
        raise UsageError(f"{name!r} needs a value for its option {missing[0]!r}")


def check_sample(who: str, need: str, sample) -> None:
    """UsageError if the sample has not what the reward `who` needs: references, a prompt of CommonGen, meta.KEY."""
    if need == "references" and not sample.references:
        raise UsageError(f"{who} compares with references, and sample {sample.id!r} has none")
    if need == "commongen prompt" and COMMONGEN_PREFIX not in as_text(sample.prompt):
        raise UsageError(f"{who} needs prompts with {COMMONGEN_PREFIX!r}: not so in {sample.id!r}")
    if need.startswith("meta."):
        key = need.removeprefix("meta.")
        if key not in sample.meta:
            there = ", ".join(sample.meta) or "none"
            raise UsageError(f"{who} needs meta[{key!r}]: {sample.id!r} has only {there}")
        right, fits = META.get(key, ("a text", lambda value: isinstance(value, str)))
        with contextlib.suppress(TypeError, LookupError, AttributeError, ValueError):  # no table
            if fits(sample.meta[key]):
                return
        raise UsageError(f"{who}: meta[{key!r}] of {sample.id!r} is {sample.meta[key]!r:.60}; must be {right}")


META = {
    "intent": ("a whole number from 1 on", lambda value: type(value) is int and value >= 1),
    "concepts": (
        'a list of texts such as ["dog", "run"]',
        lambda value: isinstance(value, list) and all(isinstance(concept, str) for concept in value),
    ),
    "raw_table": ("a table with ToTTo's keys: table, highlighted_cells, table_page_title, ...", table_lines),
}


def check_script(who: str, need: str, samples) -> None:
    """UsageError if less than half of the references' letters are such as the reward `who` can make words of."""
    text = " ".join(reference for sample in samples for reference in sample.references)[:200_000]
    letters = sum(map(str.isalnum, text))
    seen, what = {
        "latin": (len(re.findall("[a-zA-Z0-9]", text)), "the letters a to z and digits only"),
        "spaced": (letters - len(regex.findall(f"[{WITHOUT_SPACES}]", text)), "words between spaces"),
        "worded": (letters, "letters and digits only"),
    }[need]
    others = "chrf, sacrebleu with tokenize zh, ja-mecab, ko-mecab or char, rouge1 and its kin with tokenize unicode"
    if text.strip() and 2 * seen <= letters and (letters or need != "spaced"):
        raise UsageError(f"{who} sees {what}, which the references have not, as in {samples[0].id!r}; take {others}")
