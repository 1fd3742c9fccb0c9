"""Reward functions and metrics, one flat file.

A reward is called as `reward(prompts, generations, references, metas)` and returns one number per sample; a metric as
`metric(prompts, generations, references, metas, model=None, tokenizer=None)` and returns
`{name: (one number per sample or None, number for the whole set)}`. Here `prompts` and `generations` are lists of texts,
`references` is a list (one entry per sample) of lists of texts, and `metas` a list of dicts.

To add one: write a function that takes the reward's options and returns such a callable, and give it a line in REWARDS or
METRICS at the end of this file; or leave this file alone and pass `path/to/file.py:function` where a name is expected.
What each one measures, its range and its cost: docs/rewards.md.
"""

import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize as rouge_tokenize

from datapools import UsageError

COMMONGEN_PREFIX = "generate a sentence with: "


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
# The tables, and what the scripts call
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """How to make a reward or metric, and what it needs of a sample: "references", "concepts" (a CommonGen prompt),
    or "meta.KEY"."""

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
}

METRICS = {
    "rouge": Entry(rouge_metric, REFERENCES),
    **{name: as_metric(name, entry) for name, entry in REWARDS.items()},
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
    module_spec.loader.exec_module(module)
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
    arguments = ("prompts", "generations", "references", "metas", "model", "tokenizer")
    return make_entry("metric", METRICS, arguments, name, device, kwargs)


def check_needs(kind: str, table: dict[str, Entry], name: str, samples) -> None:
    """What check_reward and check_metric share."""
    for need in table[name].needs if name in table else ():
        key = need.removeprefix("meta.")
        for sample in samples:
            if need == "references" and not sample.references:
                raise UsageError(f"{kind} {name!r} compares with references, and sample {sample.id!r} has none")
            if need == "concepts" and COMMONGEN_PREFIX not in sample.prompt:
                raise UsageError(f"{kind} {name!r} needs prompts with {COMMONGEN_PREFIX!r}; not so sample {sample.id!r}")
            if key != need and key not in sample.meta:
                there = ", ".join(sample.meta) or "none"
                raise UsageError(f"{kind} {name!r} needs meta[{key!r}], not in sample {sample.id!r} (its keys: {there})")


def check_reward(name: str, samples) -> None:
    """UsageError if one of the samples lacks what the reward `name` works on. Loads no model."""
    check_needs("reward", REWARDS, name, samples)


def check_metric(name: str, samples) -> None:
    """UsageError if one of the samples lacks what the metric `name` works on. Loads no model."""
    check_needs("metric", METRICS, name, samples)
