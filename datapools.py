"""Every task: where its texts come from, how they become prompts and references, and what training on it needs.

`load_splits(name, ...)` gives the samples of train, val and test; `get_task(name)` gives the lengths, models, rewards,
metrics and decoding that the scripts use unless told otherwise. One loader function per task, one table `TASKS` at the
end. Names are those of the table, one's own file or folder, or a dataset of the hub (see `load_own`).

To add a task: write a function `load(split, data=None, **options)` that gives a Split, or a list of Sample where these
are few, and a line in TASKS. Also here, as no algorithm differs in it: reading a model folder and a command line, with
one line for what is wrong.
Sources, licences, sizes and an example of each task: docs/tasks.md.
"""

import argparse
import contextlib
import csv
import difflib
import gzip
import hashlib
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import sys
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import huggingface_hub
import jinja2
import numpy as np
import pyarrow.compute
import torch
import transformers
import tyro
from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import httpx
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)


def lazily(name: str):
    """A module that is imported when something of it is first asked for."""
    spec = importlib.util.find_spec(name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


datasets = sys.modules.get("datasets") or lazily("datasets")  # half a second, which `--help` can do without
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # no tables of weights: what is wrong with them is said in one line
csv.field_size_limit(2**31 - 1)  # articles are longer than the 131,072 characters that csv allows

SPLITS = {"train": ("train",), "val": ("validation", "val", "dev"), "test": ("test",)}  # our name -> the hub's, others
CONVERTED = "refs/convert/parquet"  # where the hub keeps a loadable copy of a dataset that has a loading script
OWN_FILES = (".jsonl", ".jsonl.gz", ".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".json", ".json.gz")
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error)  # what reading a text file, gzipped or not, can raise
# what transformers can raise at a model folder's broken files: of configs, of safetensors, of pickles, of tokenizers
LOADING_ERRORS = (
    OSError, ValueError, LookupError, ImportError, RuntimeError, TypeError, AttributeError, EOFError,
    StrictDataclassError, SafetensorError, pickle.UnpicklingError,
)  # fmt: skip
ANSWER_SECONDS = 4  # a server that takes longer counts as out of reach: it must be said within ten, start included


class UsageError(ValueError):
    """What the user asked for cannot be done. One line: what is wrong, the value, what would be right."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, the texts that answer it well (at least one where the task has references), and what rewards need.

    A prompt is a text, or a list of messages {"role": ..., "content": ...} for the tokenizer's chat template.
    """

    id: str
    prompt: str | list[dict]
    references: list[str]
    meta: dict


class Split(Sequence):
    """The samples of one split, each made from its row of an Arrow table on disk when it is asked for; none is kept.

    rows: a `datasets.Dataset`; make(row, n) gives sample number n; row_of: the row of each sample, if not one each.
    A slice is a Split of the same table.
    """

    def __init__(self, rows, make: Callable, row_of=None, numbers=None):
        self.rows, self.make = rows, make
        self.row_of = range(len(rows)) if row_of is None else row_of
        self.numbers = range(len(self.row_of)) if numbers is None else numbers

    def __len__(self):
        return len(self.numbers)

    def take(self, indices) -> list[Sample]:
        """The samples at these indices, by one access to the table, several times faster than one by one."""
        numbers = [self.numbers[i] for i in indices]
        rows = self.rows.__getitems__([int(self.row_of[n]) for n in numbers])
        return [self.make(row, n) for row, n in zip(rows, numbers, strict=True)]

    def __getitem__(self, key):
        if isinstance(key, slice):
            return Split(self.rows, self.make, self.row_of, self.numbers[key])
        return self.take([key])[0]

    def __iter__(self):
        for start in range(0, len(self), 256):
            yield from self.take(range(start, min(start + 256, len(self))))


@dataclass(frozen=True)
class Task:
    """How a task is loaded and what it is trained with unless the user says otherwise. Lengths are in tokens."""

    load: Callable  # load(split, data=None, **options) -> Split or list of Sample; --task-kwargs gives the options
    prompt_length: int  # longer prompts are truncated
    response_length: int  # at most that many tokens are sampled
    min_response_length: int = 0  # EOS cannot be sampled before that many tokens
    truncation_side: str = "left"  # the side of a long prompt that is cut off
    seq2seq_model: str = "t5-base"
    causal_model: str = "gpt2"
    reward: tuple[str, ...] = ("rouge1",)
    reward_weights: tuple[float, ...] = (1.0,)
    reward_kwargs: dict[str, dict] = field(default_factory=dict)  # name of a reward -> its keyword arguments
    metrics: tuple[str, ...] = ("rouge", "diversity")
    metric_kwargs: dict[str, dict] = field(default_factory=dict)  # name of a metric -> its keyword arguments
    # decoding for evaluation: sampling or a beam search, of at least min_response_length tokens too
    generation: dict = field(default_factory=lambda: {"do_sample": True, "temperature": 1.0, "top_k": 0})

    def flags(self, policy_type: str) -> dict:
        """{name of a flag: what this task sets it to}."""
        names = ("reward", "metrics", "prompt_length", "response_length", "min_response_length", "truncation_side")
        flags = {name: getattr(self, name) for name in names}
        if policy_type == "seq2seq":  # perplexity of the references is defined for decoder-only models
            flags["metrics"] = tuple(name for name in self.metrics if name != "perplexity")
        return flags | dict(model=getattr(self, f"{policy_type}_model", self.causal_model))


def nearest(name: str, known) -> str:
    """' (did you mean X?)' for the known name most like `name`, '' if none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# ---- Rows from the hub, from a folder, or from a plain download ------------------------------------------------------
def open_text(file: Path):
    """A text file, gzipped or not, open for reading; UTF-8 in any locale, with or without a byte order mark."""
    opened = gzip.open if file.suffix == ".gz" else open
    return opened(file, "rt", encoding="utf-8-sig", newline="")


def split_file(data: str, split: str, suffixes: tuple[str, ...]) -> Path:
    """The file of a split in the folder `data`, under any name that the split goes by. UsageError if there is none."""
    folder = Path(data)
    if not folder.is_dir():
        raise UsageError(f"--data {data}: not a folder with {SPLITS[split][0]}{suffixes[0]}")
    names = [f"{name}{suffix}" for name in SPLITS[split] for suffix in suffixes]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise UsageError(f"{data}: the split {split!r} is missing, no {' or '.join(names[:4])}; there is: {there}")
    try:
        with open_text(file) as lines:
            if file.suffix == ".parquet" or any(line.strip() for line in lines):
                return file
    except UNREADABLE as error:
        raise UsageError(f"{file} cannot be read ({error})") from None
    raise UsageError(f"{file}: the split {split!r} is empty")


def answers(url: str) -> bool:
    """Whether a server answers a request within ANSWER_SECONDS, however long its name takes to resolve."""
    answered = []

    def ask():
        with contextlib.suppress(httpx.HTTPError):
            answered.append(httpx.head(url, timeout=ANSWER_SECONDS))  # "not found" is an answer as well

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return bool(answered)


def offline_if_unreachable() -> None:
    """Without a hub, lets the libraries look into their caches alone: their retries take longer than a user waits."""
    if not datasets.config.HF_HUB_OFFLINE and not answers(datasets.config.HF_ENDPOINT):
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


def open_rows(where: str, way_out: str = "", load: Callable | None = None, **source):
    """What `datasets` loads from `source`; UsageError, in one line, if it does not. way_out: what else can be done."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong reaches the user as one line, below
    datasets.config.DEFAULT_MAX_BATCH_SIZE = 10_000  # rows of a block on disk; opening a table touches 64 KB of each
    if not sys.stderr.isatty():  # in a log, bars are noise around the one line that says what is wrong
        datasets.disable_progress_bars()
    try:
        return (load or datasets.load_dataset)(**source)
    except (OSError, ValueError, LookupError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error.__cause__, UsageError):  # of the generator that reads one's own texts
            raise error.__cause__ from None
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        if load is None and "data_files" not in source and datasets.config.HF_HUB_OFFLINE:
            reason = "the Hugging Face hub cannot be reached, and it is not in the local cache"
        raise UsageError(f"{where} cannot be loaded ({reason}){way_out}") from None


def check_columns(where: str, rows, columns: dict[str, str]) -> None:
    """UsageError if a column is missing, empty in any row, or not of its type: string, int, list, or "" for any."""
    for column, kind in columns.items():
        if column not in rows.features:
            there = ", ".join(rows.column_names)
            raise UsageError(f"{where} has no column {column!r}{nearest(column, rows.features)}; it has: {there}")
        found = rows.features[column]
        found = "list" if isinstance(found, datasets.List | datasets.LargeList) else getattr(found, "dtype", "mixed")
        if rows.data.column(column).null_count:
            row = rows.data.column(column).is_null().to_pylist().index(True)
            raise UsageError(f"{where}: the column {column!r} is missing in row {row + 1}")
        if kind not in found:
            raise UsageError(f"{where}: the column {column!r} must be of type {kind}, and is {found}")


def load_rows(task: str, split: str, data: str | None, columns: dict[str, str], max_size: int | None = None, **hub):
    """The rows of one split as a `datasets.Dataset`, structures flattened ("translation.en").

    hub: the arguments of load_dataset; with `data` the split's file in that folder is read instead. columns: name ->
    its type (string, int, list), all needed and none empty in any row; max_size: only that many rows from the start.
    UsageError if any of that cannot be had.
    """
    check_positive(max_size=max_size)
    if data is None:
        offline_if_unreachable()
        where, source = f"{task}: dataset {hub['path']}", {**hub, "split": SPLITS[split][0]}
        way_out = f"; with --data FOLDER, {SPLITS[split][0]}.jsonl of that folder is read instead"
    else:
        file = split_file(data, split, (".jsonl", ".jsonl.gz", ".parquet"))
        kind, where, way_out = "parquet" if file.suffix == ".parquet" else "json", f"{task}: {file}", ""
        source = {"path": kind, "data_files": {split: str(file)}, "split": split}
    rows = open_rows(where, way_out, **source).flatten()
    if len(rows) == 0:
        raise UsageError(f"{where}: the split {split!r} is empty")
    check_columns(where, rows, columns)
    return rows if max_size is None else rows.select(range(min(max_size, len(rows))))


def download(task: str, url: str, sha256: str | None = None) -> Path:
    """The file at `url`, fetched once into the datasets cache. Only whole files, of the right checksum, get there.

    UsageError if the server does not answer, breaks off, or sends something else.
    """
    path = Path(datasets.config.HF_DATASETS_CACHE) / task / url.rpartition("/")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with FileLock(str(path) + ".lock"):  # under torchrun all processes come here
        if path.exists():
            return path
        try:
            if datasets.config.HF_HUB_OFFLINE or not answers(url):
                raise ConnectionError("offline, or the server does not answer")
            with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as response, open(part, "wb") as file:
                size = int(response.headers.get("Content-Length", 0))
                with tqdm.wrapattr(file, "write", total=size or None, desc=f"{task} {path.name}") as target:
                    shutil.copyfileobj(response, target)
            if size and part.stat().st_size != size:
                raise ConnectionError(f"broke off after {part.stat().st_size} of {size} bytes")
            with open(part, "rb") as file:
                if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise ConnectionError("wrong checksum: the file is not the one that this task was written for")
            part.replace(path)
        except (OSError, http.client.HTTPException) as error:
            raise UsageError(f"{task}: {url} cannot be downloaded ({error}); --data FOLDER reads a copy") from None
        finally:
            part.unlink(missing_ok=True)
    return path


def grouped(keys) -> list[list[int]]:
    """The numbers of the rows of each key, in the order of the first: rows of one key make one sample."""
    rows_of = {}
    for i, key in enumerate(keys):
        rows_of.setdefault(key, []).append(i)
    return list(rows_of.values())


def check_positive(**options: int | None) -> None:
    """UsageError if one of the options is given and not at least 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")


# ---- Synthetic tasks: nothing to download ----------------------------------------------------------------------------
def synthetic(task: str, prompt: str, write: Callable, few: int, split: str, data, n_samples, seed) -> list[Sample]:
    """The same prompt again and again, each with one reference by `write(rng)`; the same for a split and a seed.

    n_samples: 2000 for train, so that there is something to imitate, and `few` for val and test, unless given.
    """
    if data is not None:
        raise UsageError(f"{task} is synthetic and reads no --data, given: {data}")
    check_positive(n_samples=n_samples)
    n_samples = n_samples or (2000 if split == "train" else few)
    rng = random.Random(f"{task} {split} {seed}")
    return [Sample(f"{split}_{n}", prompt, [write(rng)], {}) for n in range(n_samples)]


def broken_count(rng: random.Random) -> str:
    """12 to 18 numbers that rise by small steps, but fall back at every fifth."""
    number = rng.randint(0, 100)
    numbers = [number]
    for _ in range(rng.randint(11, 17)):
        number = rng.randint(0, number - 1) if number > 0 and rng.random() < 0.2 else number + rng.randint(1, 7)
        numbers.append(number)
    return " ".join(map(str, numbers))


def load_numbers(split, data=None, n_samples: int | None = None, seed: int = 0) -> list[Sample]:
    """Write numbers that rise. The references show how, and break off often: imitating them is worth about a third.

    All prompts are the same, so val and test measure the same; they differ in their references only.
    """
    return synthetic("numbers", "Count upwards:", broken_count, 50, split, data, n_samples, seed)


WHO = ("The ferry", "Our neighbour", "The old bridge", "A new library", "The choir", "My sister", "The last train")
DID = ("opened", "left town", "came back", "was painted", "was seen", "closed", "moved to the coast", "won a prize")
WHEN = ("in spring", "last Tuesday", "at noon", "before the storm", "a year ago", "after the war", "in the evening")


def sentence_with_time(rng: random.Random) -> str:
    """A short sentence that says when: at every fourth as a date (1987-05-14), otherwise in words."""
    date = f"on {rng.randint(1900, 2029)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return f"{rng.choice(WHO)} {rng.choice(DID)} {date if rng.random() < 0.25 else rng.choice(WHEN)}."


def load_dates(split, data=None, n_samples: int | None = None, seed: int = 0) -> list[Sample]:
    """Write a sentence with a date like 1987-05-14 in it. Every fourth reference has one."""
    return synthetic("dates", "Write a date:", sentence_with_time, 100, split, data, n_samples, seed)


# ---- Film reviews to go on with (IMDB) -------------------------------------------------------------------------------
def imdb_rows(task: str, split: str, data: str | None):
    """train and val: the first 80% and the rest of the hub's train split, shuffled; test: 5,000 of its test split."""
    hub = {"path": "stanfordnlp/imdb", "revision": "e6281661ce1c48d982bc483cf8a173c1bbeb5d31"}
    hub_split = "test" if split == "test" else "train"
    rows = load_rows(task, hub_split, data, {"text": "string", "label": "int"}, **hub).shuffle(seed=42)
    first_val = int(0.8 * len(rows))
    part = {"train": range(first_val), "val": range(first_val, len(rows)), "test": range(min(5000, len(rows)))}[split]
    return rows.select(part)


def halves(text: str) -> tuple[str, str]:
    """The first half of a text's words, and the second, which is longer by a word if their number is odd."""
    words = text.split(" ")
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def load_imdb(split, data=None) -> Split:
    """The first half of a film review, to be gone on with in a positive mood; its reference is the whole review."""
    rows = imdb_rows("imdb", split, data)
    return Split(rows, lambda row, n: Sample(f"{split}_{n}", halves(row["text"])[0], [row["text"]], {}))


def load_imdb_seq2seq(split, data=None, positive_ratio: int | float = 1.0) -> Split:
    """The first half of a film review to the second. train has positive reviews only, the first positive_ratio of them.

    meta: reference, the whole review.
    """
    if not 0 < positive_ratio <= 1:
        raise UsageError(f"positive_ratio must be over 0 and at most 1, not {positive_ratio!r}")
    rows = imdb_rows("imdb_seq2seq", split, data)
    row_of = np.arange(len(rows))
    if split == "train":
        row_of = np.flatnonzero(np.array(rows["label"][:]) == 1)
        row_of = row_of[: int(positive_ratio * len(row_of))]

    def make(row, n):
        first, second = halves(row["text"])
        return Sample(f"{split}_{row_of[n]}", first, [second], {"reference": row["text"]})

    return Split(rows, make, row_of)


# ---- Words to a sentence ---------------------------------------------------------------------------------------------
def load_commongen(split, data=None, prefix: str = "generate a sentence with: ") -> Split:
    """A few concepts to a sentence that has them all (CommonGen). train: a sample per sentence; val, test: per set.

    meta: concepts. The hub's test split hides the sentences; its references are "empty reference".
    """
    columns = {"concept_set_idx": "int", "concepts": "list", "target": "string"}
    rows = load_rows("commongen", split, data, columns, path="allenai/common_gen")
    groups = grouped(range(len(rows)) if split == "train" else rows["concept_set_idx"][:])

    def make(row, n):
        references = [target or "empty reference" for target in rows[groups[n]]["target"]]
        concepts = row["concepts"]
        return Sample(f"{split}_{n}", prefix + " ".join(concepts) + ".", references, {"concepts": concepts})

    return Split(rows, make, [group[0] for group in groups])


# ---- Summaries -------------------------------------------------------------------------------------------------------
def load_cnn_dm(
    split, data=None, prefix: str = "Summarize: ", truncate_article: int | None = None, max_size: int | None = None
) -> Split:
    """A news article to its highlights (CNN / Daily Mail). truncate_article: only that many words of the article."""
    check_positive(truncate_article=truncate_article)
    hub = {"path": "abisee/cnn_dailymail", "name": "3.0.0", "revision": "96df5e686bee6baa90b8bee7c28b81fa3fa6223d"}
    rows = load_rows("cnn_dm", split, data, {"article": "string", "highlights": "string"}, max_size, **hub)

    def make(row, n):
        article = row["article"] if truncate_article is None else " ".join(row["article"].split()[:truncate_article])
        return Sample(f"{split}_{n}", prefix + article, [row["highlights"]], {})

    return Split(rows, make)


def load_xsum(split, data=None, suffix: str = "TL;DR:", max_size: int | None = None) -> Split:
    """A BBC article to one sentence (XSum)."""
    hub = {"path": "EdinburghNLP/xsum", "revision": CONVERTED, "data_dir": "default"}
    rows = load_rows("xsum", split, data, {"document": "string", "summary": "string"}, max_size, **hub)
    return Split(rows, lambda row, n: Sample(f"{split}_{n}", row["document"] + suffix, [row["summary"]], {}))


# ---- Tables to a sentence (ToTTo) ------------------------------------------------------------------------------------
def tagged(tag: str, *texts: str) -> str:
    """'<tag> text text </tag>'."""
    return " ".join((f"<{tag}>", *texts, f"</{tag}>"))


def linearize_table(table: list[list[dict]], highlighted: list[list[int]], whole: bool) -> str:
    """The highlighted cells (row, column), or the whole table with those marked, each with its headers.

    Column headers of a cell are the header cells of the rows above that share a column with it, row headers the header
    cells to its left. Only column_span counts for where a cell stands, not row_span.
    """
    columns = []  # of each row: of each cell: the range of columns that it covers
    for row in table:
        ends = list(itertools.accumulate(cell["column_span"] for cell in row))
        columns.append([range(end - cell["column_span"], end) for cell, end in zip(row, ends, strict=True)])

    def linearize_cell(tag: str, r: int, c: int) -> str:
        mine = columns[r][c]
        above = [
            tagged("col_header", cell["value"])
            for row, covered in zip(table[:r], columns, strict=False)
            for cell, other in zip(row, covered, strict=True)
            if cell["is_header"] and other.start < mine.stop and mine.start < other.stop
        ]
        left = [tagged("row_header", cell["value"]) for cell in table[r][:c] if cell["is_header"]]
        return tagged(tag, table[r][c]["value"], *above, *left)

    if not whole:
        return tagged("table", *(linearize_cell("cell", r, c) for r, c in highlighted))
    tags = {(r, c): "highlighted_cell" for r, c in highlighted}
    rows = ([linearize_cell(tags.get((r, c), "cell"), r, c) for c in range(len(row))] for r, row in enumerate(table))
    return tagged("table", *(tagged("row", *cells) for cells in rows))


def load_totto(split, data=None, representation: str = "subtable", max_size: int | None = None) -> Split:
    """A Wikipedia table with highlighted cells to a sentence that says what is in these (ToTTo).

    representation: subtable, the highlighted cells only, or fulltable. The prompt has it without titles, then with.
    meta: raw_table, the row of the dataset, its annotations one by one, overlap_subset a bool. The hub's test split
    hides the sentences; its references are "".
    """
    if representation not in ("subtable", "fulltable"):
        raise UsageError(f"representation must be subtable or fulltable, not {representation!r}")
    hub = {"path": "google-research-datasets/totto", "revision": CONVERTED, "data_dir": "default"}
    texts = ("table_page_title", "table_section_title", "table_section_text", "overlap_subset")
    stages = ("original_sentence", "sentence_after_deletion", "sentence_after_ambiguity", "final_sentence")
    columns = {"table": "list", "highlighted_cells": "list", **dict.fromkeys(texts, "string")}
    columns |= {f"sentence_annotations.{stage}": "list" for stage in stages}

    def make(row, n):
        table = linearize_table(row["table"], row["highlighted_cells"], whole=representation == "fulltable")
        titles = {tag: row[f"table_{tag}"] for tag in ("page_title", "section_title")}
        between = "".join(f"{tagged(tag, title)} " for tag, title in titles.items() if title)
        references = [""] if split == "test" else row["sentence_annotations.final_sentence"]
        by_stage = [row.pop(f"sentence_annotations.{stage}") for stage in stages]
        annotations = [dict(zip(stages, texts, strict=True)) for texts in zip(*by_stage, strict=True)]
        raw = {**row, "overlap_subset": row["overlap_subset"] == "True", "sentence_annotations": annotations}
        return Sample(f"{split}_{n}", table + between + table, references, {"raw_table": raw})

    return Split(load_rows("totto", split, data, columns, max_size, **hub), make)


# ---- Questions about stories -----------------------------------------------------------------------------------------
NARRATIVE_QA = {  # split -> file of UnifiedQA, SHA-256 (as TensorFlow Datasets records it)
    "train": ("train.tsv", "dd1220e0225947d57e25192a1e10ed0f34b1e123c3775588a8d6bec5b41e3005"),
    "val": ("dev.tsv", "c7f70a0bc92f1ef9fc660fd84d65420302d86a08e39de3c029e5e266b79680dd"),
    "test": ("test.tsv", "991e2fb05bd18b5379b0936cd61345e222d5a1eed115ea07bea043fd51994da5"),
}


def load_narrative_qa(split, data=None) -> Split:
    """A question and the summary of a story to the answer (NarrativeQA as UnifiedQA has it), all in lower case.

    data: a folder of {split}.tsv without a header: question and context, answer. All answers of a prompt are its
    references.
    """
    name, checksum = NARRATIVE_QA[split]
    url = f"https://storage.googleapis.com/unifiedqa/data/narrativeqa/{name}"
    file = download("narrative_qa", url, checksum) if data is None else split_file(data, split, (".tsv",))
    rows = open_rows(
        f"narrative_qa: {file}", path="csv", data_files={split: str(file)}, split=split,
        sep="\t", column_names=["prompt", "answer"], index_col=False,  # else the first of three cells would be one
        features=datasets.Features({"prompt": datasets.Value("string"), "answer": datasets.Value("string")}),
        keep_default_na=False,  # "none" and "null" are answers
        quoting=csv.QUOTE_NONE,  # written without quoting: a quotation mark is a quotation mark
    )  # fmt: skip
    if not any(rows["answer"]):
        raise UsageError(f"narrative_qa: {file} has no answers: a line must be question and context, a tab, an answer")
    prompts = (prompt.as_py().lower().encode() for prompt in rows.data.column("prompt"))
    groups = grouped(hashlib.sha256(prompt).digest() for prompt in prompts)  # the stories stay on disk

    def make(row, n):
        answers = [answer.lower().strip() for answer in rows[groups[n]]["answer"]]
        return Sample(f"{split}_{n}", row["prompt"].lower(), answers, {})

    return Split(rows, make, [group[0] for group in groups])


# ---- Translation -----------------------------------------------------------------------------------------------------
LANGUAGES = dict(cs="Czech", de="German", en="English", fi="Finnish", ro="Romanian", ru="Russian", tr="Turkish")


def translations(task: str, split: str, data, max_size: int | None, languages=("en", "de"), **hub) -> Split:
    """Samples of a dataset with the column translation, {language: text}. languages: source and target."""
    source, target = (f"translation.{language}" for language in languages)
    prefix = "translate {} to {}: ".format(*(LANGUAGES[language] for language in languages))
    rows = load_rows(task, split, data, {source: "string", target: "string"}, max_size, **hub)
    return Split(rows, lambda row, n: Sample(f"{split}_{n}", prefix + row[source], [row[target]], {}))


def load_wmt16(
    split, data=None, source_language: str = "en", target_language: str = "de", max_size: int | None = None
) -> Split:
    """News from English into one of six other languages, or from it into English (WMT 2016)."""
    pair = {source_language, target_language}
    if "en" not in pair or len(pair) != 2 or not pair <= LANGUAGES.keys():
        others = ", ".join(sorted(LANGUAGES.keys() - {"en"}))
        raise UsageError(f"wmt16 has en with one of {others}, not {source_language!r} to {target_language!r}")
    hub = {"path": "wmt/wmt16", "name": f"{(pair - {'en'}).pop()}-en"}
    return translations("wmt16", split, data, max_size, (source_language, target_language), **hub)


def load_wmt14_en_de(split, data=None, max_size: int | None = None) -> Split:
    """English to German (WMT 2014), as cleaned by fairseq's script."""
    hub = {"path": "stas/wmt14-en-de-pre-processed", "revision": CONVERTED, "data_dir": "ende"}
    return translations("wmt14_en_de", split, data, max_size, **hub)


def load_wmt16_news(split, data=None, max_size: int | None = None) -> Split:
    """English to German: News Commentary to train on, WMT 2016 for val and test."""
    path = "Helsinki-NLP/news_commentary" if split == "train" else "wmt/wmt16"
    return translations("wmt16_news", split, data, max_size, path=path, name="de-en")


def load_iwslt2017(split, data=None, max_size: int | None = None) -> Split:
    """TED talks, English to German (IWSLT 2017)."""
    hub = {"path": "IWSLT/iwslt2017", "revision": CONVERTED, "data_dir": "iwslt2017-de-en"}
    return translations("iwslt2017", split, data, max_size, **hub)


# ---- Dialogue --------------------------------------------------------------------------------------------------------
CRD3_COMMIT = "6734253e8c584a0aea4eea9b02cb6990e9fb1598"


def load_crd3(split, data=None, max_context: int = 5) -> Split:
    """What is said next in a role-playing game (Critical Role), from a game's third turn on.

    max_context: turns in the prompt. data: a folder with the archive's "aligned data/{train,val,test}_files", the names
    of the split's games, and "cleaned data/*.json".
    """
    check_positive(max_context=max_context)
    if data is None:
        archive = download("crd3", f"https://github.com/RevanthRameshkumar/CRD3/archive/{CRD3_COMMIT}.zip")
        root = zipfile.Path(archive) / f"CRD3-{CRD3_COMMIT}" / "data"
    else:
        root = Path(data) / "data" if (Path(data) / "data").is_dir() else Path(data)
    file, games = root / "aligned data" / f"{split}_files", []
    try:
        for number, game in enumerate(file.read_text(encoding="utf-8").split()):
            file = root / "cleaned data" / f"{game}.json"
            turns = json.loads(file.read_text(encoding="utf-8"))["TURNS"]
            names = [turn["NAMES"][0] for turn in turns]
            texts = [" ".join(turn["UTTERANCES"]) for turn in turns]
            said = {"game": [number] * len(turns), "turn": range(len(turns)), "name": names, "text": texts}
            games.append(datasets.Dataset.from_dict(said))  # fails at half a character
        rows = datasets.concatenate_datasets(games)
    except OSError as error:
        raise UsageError(f"crd3: --data {root}: the split {split!r} is missing ({error})") from None
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{file} has no TURNS with NAMES and UTTERANCES ({error!r})") from None
    row_of = np.flatnonzero(np.array(rows["turn"][:]) >= 2)
    if len(row_of) == 0:
        raise UsageError(f"crd3: {root}: the split {split!r} is empty")

    def make(row, n):
        here, turn = int(row_of[n]), row["turn"]
        before = rows[here - min(turn, max_context) : here]
        context = "\n".join(f"{name}: {text}" for name, text in zip(before["name"], before["text"], strict=True))
        return Sample(f"{split}_ep_{row['game']}_turn_{turn}", f"{context}\n{row['name']}: ", [row["text"]], {})

    return Split(rows, make, row_of)


def load_daily_dialog(split, data=None, context_size: int = 5) -> Split:
    """What is said next in an everyday conversation, after context_size utterances (DailyDialog).

    meta: emotion (0 to 6) and intent, the dialogue act (1 inform, 2 question, 3 directive, 4 commissive), of the
    reference.
    """
    check_positive(context_size=context_size)
    hub = {"path": "li2017dailydialog/daily_dialog", "revision": CONVERTED, "data_dir": "default"}
    columns = {"dialog": "list", "act": "list", "emotion": "list"}
    rows = load_rows("daily_dialog", split, data, columns, **hub)
    lengths, *others = (pyarrow.compute.list_value_length(rows.data.column(name)).to_numpy() for name in columns)
    uneven = np.flatnonzero((lengths != others).any(0))
    if len(uneven):
        raise UsageError(f"daily_dialog: row {uneven[0] + 1} of {split} has not one act and one emotion per utterance")
    row_of = np.repeat(np.arange(len(rows)), lengths)
    turn_of = np.concatenate([np.arange(length) for length in lengths])
    said = np.flatnonzero(turn_of >= context_size)  # of each sample: its number among all utterances of the split

    def make(row, n):
        t = int(turn_of[said[n]])
        prompt = "<EOU>".join(row["dialog"][t - context_size : t]) + " <EOU>"
        meta = {"emotion": row["emotion"][t], "intent": row["act"][t]}
        return Sample(f"{split}_{said[n]}", prompt, [row["dialog"][t] + "<EOU>"], meta)

    return Split(rows, make, row_of[said])


# ---- One's own texts -------------------------------------------------------------------------------------------------
def from_text(text: str):
    """What was typed, or stands in a cell: read as JSON where it is, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def read_rows(file: Path):
    """(place, row) of each row of a text file, place as "line 3". UsageError with the line of what cannot be read."""
    place = "line 1"
    try:
        with open_text(file) as lines:
            if {".csv", ".tsv"} & set(file.suffixes):
                rows = csv.DictReader(lines, delimiter="\t" if ".tsv" in file.suffixes else ",", strict=True)
                for row in rows:
                    place = f"line {rows.line_num}"
                    if None in row or None in row.values():
                        raise UsageError(f"{file}, {place}: not as many cells as the first line has columns")
                    yield place, row
            elif ".json" in file.suffixes and (text := lines.read()).lstrip().startswith("["):
                for number, row in enumerate(json.loads(text), start=1):
                    yield f"row {number}", row
            else:
                lines.seek(0)
                for number, line in enumerate(lines, start=1):
                    place = f"line {number}"
                    if line.strip():
                        yield place, json.loads(line)
    except json.JSONDecodeError as error:
        place = place if error.lineno == 1 else f"line {error.lineno}"
        raise UsageError(f"{file}, {place}: not JSON ({error.msg})") from None
    except csv.Error as error:
        raise UsageError(f"{file}, after {place}: not a table ({error})") from None
    except UNREADABLE as error:
        raise UsageError(f"{file} cannot be read ({error})") from None


def own_sample(row, where: str, number: str, prompt_column: str, references_column: str | None) -> Sample:
    """The sample of a row of one's own, its id `number` unless it has one. UsageError, with `where`, if it is none."""
    if not isinstance(row, dict):
        raise UsageError(f"{where}: not a JSON object with the key {prompt_column!r}")
    for wanted in (prompt_column, references_column):
        if wanted is not None and row.get(wanted) is None:
            there = ", ".join(row) or "none"
            raise UsageError(f"{where}: no text under {wanted!r}{nearest(wanted, row)}; its keys: {there}")
    prompt = row[prompt_column]
    if isinstance(prompt, list):  # in a table each message has the keys of all
        prompt = [
            {name: value for name, value in message.items() if value is not None}
            for message in prompt
            if isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        ]
        if not prompt or len(prompt) != len(row[prompt_column]):
            raise UsageError(f"{where}: each message under {prompt_column!r} must have the texts 'role' and 'content'")
    elif not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"{where}: no text under {prompt_column!r}, which is {prompt!r:.60}")
    key = references_column or "references"
    references = row.get(key)
    references = [] if references is None else [references] if isinstance(references, str) else references
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise UsageError(f"{where}: {key!r} must be a text or a list of texts")
    meta = {name: value for name, value in row.items() if name not in ("id", prompt_column, key)}
    return Sample(str(number if row.get("id") is None else row["id"]), prompt, references, meta)


def checked_rows(file: str, **columns):
    """The rows of a text file as {place, json}, each known to make a sample."""
    place = None
    for place, row in read_rows(Path(file)):
        own_sample(row, f"{file}, {place}", "", **columns)
        if {".csv", ".tsv"} & set(Path(file).suffixes):  # cells are texts; in meta "3" becomes a number
            texts = {"id", "references", *columns.values()}
            row = {key: cell if key in texts else from_text(cell) for key, cell in row.items()}
        text = json.dumps(row, ensure_ascii=False)
        if half := re.search(r"[\ud800-\udfff]", text):
            raise UsageError(f"{file}, {place}: \\u{ord(half[0]):04x} is half a character (a lone surrogate), no text")
        yield {"place": place, "json": text}
    if place is None:
        raise UsageError(f"{file} has no rows")


def open_own(path: str, split: str, parts: dict[str, str | None], hub: dict, columns: dict) -> tuple:
    """(rows, where they are from, whether they are of that split alone) of one's own texts. See load_own."""
    place, part, typed = Path(path), parts[split], any(parts.values())
    named_splits = (place / "dataset_dict.json").is_file() or not place.exists()
    if typed and not named_splits or place.exists() and any(hub.values()):
        raise UsageError(f"{path} has no named splits, config or revision: these are for datasets of the hub")
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        rows, where = open_rows(path, load=datasets.load_from_disk, dataset_path=path), path
    elif not place.exists():
        offline_if_unreachable()
        where = f"{path}: no such file or folder; as a dataset of the hub it"
        rows, where = open_rows(where, path=path, split=part, **hub), f"dataset {path}"
    else:
        file = place if place.is_file() else split_file(path, split, OWN_FILES)
        if file.suffix == ".parquet":
            source = {"path": "parquet", "data_files": {split: str(file)}, "split": split}
        else:  # datasets would give all rows the keys of all, and read dates and times into texts
            state = (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns, sorted(columns.items()))
            source = {
                "load": datasets.Dataset.from_generator,
                "generator": checked_rows,
                "gen_kwargs": {"file": str(file), **columns},
                "fingerprint": hashlib.sha256(repr(state).encode()).hexdigest()[:32],  # read once, kept in the cache
            }
        return open_rows(str(file), **source), str(file), file != place
    if isinstance(rows, datasets.Dataset):
        return rows, where, part is not None
    if len(rows) == 1 and not typed:
        return next(iter(rows.values())), where, False
    for name in SPLITS[split] if part is None else (part,):
        if name in rows:
            return rows[name], where, True
    way_out = f"name one: --task-kwargs {split}_split NAME"
    raise UsageError(f"{where}: no split {part or split!r}; there is: {', '.join(rows)}; {way_out}")


def load_own(
    path: str, split, data=None, prompt_column: str = "prompt", references_column: str | None = None,
    config: str | None = None, revision: str | None = None, train_split: str | None = None,
    val_split: str | None = None, test_split: str | None = None,
) -> Split:  # fmt: skip
    """One's own texts. Each row: prompt (a text or a list of messages); references (a text or a list of texts); id.

    All other columns go into meta. path: a folder with train.jsonl, validation.jsonl (or val.jsonl) and test.jsonl,
    each possibly .gz, or .parquet, .csv, .tsv or .json; one such file; a folder of `save_to_disk`; or the name of a
    dataset of the hub, with its config, revision and splits ("train[:90%]"). Of one file or one split every tenth row,
    starting with the ninth, is val, every tenth, starting with the tenth, test, the rest train.
    """
    if data is not None:
        raise UsageError(f"--task {path} names the data already; --data {data} is for the named tasks")
    columns = {"prompt_column": prompt_column, "references_column": references_column}
    parts = {"train": train_split, "val": val_split, "test": test_split}
    rows, where, is_split = open_own(path, split, parts, {"name": config, "revision": revision}, columns)
    as_text = rows.column_names == ["place", "json"]
    if not as_text:
        check_columns(where, rows, {prompt_column: ""})
    row_of = range(len(rows))
    if not is_split:
        if 0 < len(rows) < 10:
            raise UsageError(f"{where}: {len(rows)} rows are too few to split 8:1:1; give a folder of {{split}}.jsonl")
        tenth = np.arange(len(rows)) % 10
        row_of = np.flatnonzero({"train": tenth < 8, "val": tenth == 8, "test": tenth == 9}[split])
    if len(row_of) == 0:
        raise UsageError(f"{where}: the split {split!r} is empty")

    def make(row, n):
        place = f"{where}, {row['place']}" if as_text else f"{where}, row {row_of[n] + 1}"
        return own_sample(json.loads(row["json"]) if as_text else row, place, f"{split}_{n}", **columns)

    samples = Split(rows, make, row_of)
    samples[0]  # wrong columns are found before a model is loaded
    return samples


# ---- From texts to batches of tokens, and back -----------------------------------------------------------------------
@lru_cache(maxsize=2)  # a batch may lie in two epochs
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in one epoch."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 2]))
    return generator.permutation(num_samples)


def prompt_order(positions, num_samples: int, seed: int) -> list[int]:
    """Indices of the samples at these positions of an endless stream of epochs, each shuffled anew."""
    places = (divmod(int(position), num_samples) for position in positions)
    return [int(epoch_order(num_samples, seed, epoch)[place]) for epoch, place in places]


def prompt_text(tokenizer, prompt: str | list[dict]) -> str:
    """The text of a prompt; messages go through the tokenizer's chat template, up to where the answer begins."""
    return prompt if isinstance(prompt, str) else chat_text(tokenizer, prompt, add_generation_prompt=True)


def chat_text(tokenizer, messages: list[dict], **options) -> str:
    """The messages as the tokenizer's chat template writes them; UsageError if there is none or it refuses them."""
    if tokenizer.chat_template is None:
        raise UsageError("the prompts are messages, and the model's tokenizer has no chat template; take a chat model")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError as error:
        where = f"the tokenizer's chat template does not take these messages ({error})"
        raise UsageError(f"{where}: {messages!r:.200}") from None


def encode_prompts(tokenizer, prompts, max_length: int, truncation_side: str, seq2seq: bool) -> list[list[int]]:
    """Token ids of each prompt, special tokens included, at most max_length: of longer ones the texts are cut.

    What the tokenizer puts before a text (BOS) is there once, also if the text has it already. What it puts behind
    (EOS) is left off for a decoder-only model, which goes on from the text itself. Nothing at all becomes one BOS or
    EOS. Chats lose their beginning whatever the side: their end says whose turn it is.
    """
    encoded = tokenizer(
        [prompt_text(tokenizer, prompt) for prompt in prompts],
        return_special_tokens_mask=True,
        verbose=False,  # no warning of lengths: it is cut here, since a tokenizer keeps and saves what it truncated to
    )
    rows = []
    for prompt, ids, added in zip(prompts, encoded.input_ids, encoded.special_tokens_mask, strict=True):
        start, end = (added.index(0), len(added) - added[::-1].index(0)) if 0 in added else (0, 0)
        before, text, behind = ids[:start], ids[start:end], ids[end:] if seq2seq else []
        if text[: len(before)] == before:
            text = text[len(before) :]
        room = max(0, max_length - len(before) - len(behind))
        if len(text) > room:
            left = truncation_side == "left" or not isinstance(prompt, str)
            text = text[len(text) - room :] if left else text[:room]
        nothing = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        rows.append(before + text + behind or [nothing])
    return rows


def decode_responses(tokenizer, queries, responses, seq2seq: bool) -> list[str]:
    """The text of each response (ids, EOS may be among them), without special tokens.

    After a prompt it is what the response adds to the prompt's text: decoded alone it would lose the space that a
    sentencepiece tokenizer begins a word with, and prompt + generation would not be the text that was written.
    """
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if seq2seq:
        return decode(responses)
    wholes = decode([[*query, *response] for query, response in zip(queries, responses, strict=True)])
    return [  # alone where the prompt was cut within a character
        whole[len(before) :] if whole.startswith(before) else decode([response])[0]
        for before, whole, response in zip(decode(queries), wholes, responses, strict=True)
    ]


def until_eos(responses, eos) -> list[list[int]]:
    """The ids of each response (B, T) up to and including its first EOS, as lists."""
    ended = torch.isin(responses, eos)
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, responses.shape[1])  # (B,)
    return [row[:length] for row, length in zip(responses.tolist(), lengths.tolist(), strict=True)]


def eos_ids(tokenizer, generation_config, vocabulary: int) -> list[int]:
    """The tokens that end a response: the tokenizer's EOS and the model's, which may be several. UsageError if none."""
    of_model = generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list | tuple) else [of_model]
    found = {token for token in (tokenizer.eos_token_id, *of_model) if token is not None}
    if not found:
        raise UsageError("neither the tokenizer nor generation_config.json has an EOS token: no response could end")
    if wrong := [token for token in found if not (isinstance(token, int) and 0 <= token < vocabulary)]:
        raise UsageError(f"EOS of tokenizer or generation_config.json: {wrong}, no ids below {vocabulary:,}")
    return sorted(found)


def describe_lengths(tokenizer, samples, max_length: int, response_length: int) -> str:
    """One line on how long prompts and references are in tokens, and how many are cut, by at most 2,000 samples."""
    few = [samples[int(i)] for i in np.unique(np.linspace(0, len(samples) - 1, 2000).astype(int))]

    def spread(texts, **options):
        lengths = np.array([len(row) for row in tokenizer(texts, verbose=False, **options).input_ids])
        middle, high = np.percentile(lengths, [50, 95])
        return lengths, f"{middle:.0f} tokens (median), {high:.0f} (95%)"

    prompts = [prompt_text(tokenizer, sample.prompt) for sample in few]
    references = [sample.references[0] for sample in few if sample.references]
    lengths, said = spread(prompts)
    line = f"prompts: {said}, {np.mean(lengths > max_length):.1%} truncated to {max_length}"
    if references:
        lengths, said = spread(references, add_special_tokens=False)
        line += f"; references: {said}, {np.mean(lengths >= response_length):.1%} longer than a response can be"
    # an update holds two copies of the logits, with an entropy bonus three
    line += f"; logits of an update: {8 * response_length * len(tokenizer) / 2**20:.1f} MiB a sequence"
    if len(few) > 1 and len(set(prompts)) == 1:
        line += "; all prompts are the same: val and test measure the same, up to their references"
    return line


def model_config(name: str):
    """The config of a hub name or model folder. UsageError if it cannot be had, or is of an adapter alone."""
    if name == "scratch":
        raise UsageError(
            "--model: this task has no model on the hub; make a small one by `python supervised.py --task numbers "
            "--run-dir runs/sft` (decoder-only: --policy-type causal), and start from it by --model runs/sft/model"
        )
    if not Path(name).exists():
        offline_if_unreachable()
    if Path(name, "adapter_config.json").exists():
        raise UsageError(f"--model {name}: an adapter; merge it into its model first (peft: merge_and_unload)")
    for file in Path(name).glob("*"):
        if file.is_file() and open(file, "rb").read(24) == b"version https://git-lfs.":
            raise UsageError(f"--model {name}: {file.name} is a pointer of Git LFS, not the file; git lfs pull gets it")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise UsageError(f"--model {name}: no model folder, nor to be had from the hub: {error}") from None


def language_model_config(args, policy_type: str | None = None):
    """The config of --model; UsageError unless it is a language model of this type, with positions enough."""
    config, kinds = model_config(args.model), dict(causal="decoder-only", seq2seq="encoder-decoder")
    if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and config.is_encoder_decoder:
        found, wanted, how = "seq2seq", max(args.prompt_length, args.response_length), "or"
    elif config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.is_encoder_decoder:
        found, wanted, how = "causal", args.prompt_length + args.response_length, "+"
    else:
        raise UsageError(f"--model {args.model}: {config.model_type} is no language model")
    if policy_type not in (None, found):
        raise UsageError(f"--model {args.model}: {config.model_type} is {kinds[found]}; see the {found} script")
    if wanted > position_limit(config):
        limit = f"{args.model} has {position_limit(config)} positions"
        raise UsageError(f"--prompt-length {how} --response-length {wanted}: {limit}")
    return config


def load_weights(auto_class, flag: str, name: str):
    """A model in float32, dropout off; UsageError if files are broken, or leave any weight at random."""
    options = dict(dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)  # which is said below
    try:
        model, info = auto_class.from_pretrained(name, **options)
    except LOADING_ERRORS as error:
        raise UsageError(f"{flag} {name}: cannot be loaded: {error!r:.300}") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        names = ", ".join(sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))[:3])
        raise UsageError(f"{flag} {name}: its files lack weights or have other shapes: {names}")
    for module in model.modules():
        if type(getattr(module, "act", None)).__name__ == "NewGELUActivation":
            module.act = torch.nn.GELU(approximate="tanh")  # GPT-2's, the same function as one kernel instead of eight
    return model.eval()


def load_tokenizer(name: str, languages: tuple[str, str] | None = None):
    """The tokenizer of a hub name or model folder. UsageError if there is none or it cannot be read.

    languages: source and target of a translation model, as its tokenizer names them.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise UsageError(f"--model {name}: its tokenizer cannot be loaded: {error}") from None
    files = [file for pattern in ("tokenizer*", "vocab*", "*.model") for file in Path(name).glob(pattern)]
    if Path(name).is_dir() and not files:  # transformers makes up an empty one
        raise UsageError(f"--model {name}: has no tokenizer; save_pretrained that of the model there too")
    if languages:
        for language in languages:
            language_id(tokenizer, language)
        tokenizer.src_lang, tokenizer.tgt_lang = languages
    return tokenizer


def language_id(tokenizer, language: str) -> int:
    """The token of a language ("de_DE" of mBART, "deu_Latn" of NLLB, "de" of M2M100); UsageError if there is none."""
    for token in (language, f"__{language}__"):
        if token in tokenizer.all_special_tokens or token in tokenizer.get_added_vocab():
            return tokenizer.convert_tokens_to_ids(token)
    known = [token for token in tokenizer.get_added_vocab() if "_" in token]
    raise UsageError(f"--languages {language}: the tokenizer has no such language{nearest(language, known)}")


def position_limit(config) -> float:
    """The most positions that a model with learned or rotary ones has; inf if they go on without end."""
    config = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len", "max_decoder_position_embeddings")
    limits = [limit for limit in (getattr(config, name, None) for name in names) if limit and limit > 0]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):  # one longer row changes the angles of all others in its batch
        limits.append(rope["original_max_position_embeddings"])
    return math.inf if config.model_type in ("m2m_100", "pegasus_x", "xlnet") else min(limits, default=math.inf)


def encode_batch(tokenizer, samples, args, pad_id, device, seq2seq: bool):
    """The prompts of samples: a list of ids each, and ids and mask (B, Q), padded on the left if decoder-only."""
    prompts = [sample.prompt for sample in samples]
    rows = encode_prompts(tokenizer, prompts, args.prompt_length, args.truncation_side, seq2seq)
    return rows, *pad(rows, pad_id, device, left=not seq2seq)


def trial_prompts(tokenizer, samples, args, pad_id, device, seq2seq: bool):
    """ids and mask (B, Q) of a few prompts, one of which is shorter: it shows whether a model sees its padding."""
    rows = encode_batch(tokenizer, samples[:4], args, pad_id, device, seq2seq)[0]
    rows[0] = rows[0][: max(1, len(rows[0]) // 2)]
    return pad(rows, pad_id, device, left=not seq2seq)


def pad(rows: list[list[int]], pad_id, device, left=False):
    """ids (B, L) int64 and mask (B, L) bool. The mask comes from lengths: an id may be both a token and padding."""
    options = dict(batch_first=True, padding_side="left" if left else "right")
    ids = pad_sequence([torch.tensor(row) for row in rows], padding_value=pad_id, **options)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], **options)
    return ids.to(device), mask.to(device)


# ---- Finding and loading a task --------------------------------------------------------------------------------------
def get_task(name: str) -> Task:
    """The task called `name` in TASKS, of a file or folder, or of a dataset of the hub. UsageError if it is none."""
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir() and not name.endswith(OWN_FILES)
    if not on_hub and not path.exists():
        if "/" in name or name.endswith(OWN_FILES) or path.suffix in (".txt", ".gz", ".arrow", ".zip"):
            there = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UsageError(f"--task {name}: no such file or folder{nearest(path.name, there)}")
        known = f"known: {', '.join(TASKS)}, or a file, a folder, a dataset org/name of the hub"
        raise UsageError(f"unknown task {name!r}{nearest(name, TASKS)}; {known}")
    own = partial(load_own, name)
    return Task(own, prompt_length=512, response_length=100, truncation_side="right", metrics=("rouge",))


def parse_kwargs(typed: dict[str, str], names, defaults: dict[str, dict]) -> dict[str, dict]:
    """{name: keyword arguments}: the task's own, then what was typed as KEY or NAME.KEY, read as JSON where it is."""
    kwargs = {name: dict(defaults.get(name, {})) for name in names}
    for key, text in typed.items():
        if "=" in key:
            right = " ".join(f"{key} {text}".replace("=", " ").split())
            raise UsageError(f"{key}: a key and its value are written with a space between: {right}")
        owner, _, option = key.rpartition(".")
        if owner and owner not in names:
            known = difflib.get_close_matches(owner, names, 1, 0) or ["no name"]
            raise UsageError(f"{key}: {owner} is not in use; did you mean {known[0]}.{option}?")
        for name in [owner] if owner else names:
            kwargs[name][option] = from_text(text)
    return kwargs


def typed(argv: list[str], flag: str, default: str | None = None) -> str | None:
    """What follows a flag of a command line that is not parsed yet."""
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ahead.add_argument(flag, f"--{flag[2:].replace('-', '_')}", nargs="?", const=default, default=default, dest="value")
    return ahead.parse_known_args(argv)[0].value


def parse_flags(args_class: type, argv: list[str], defaults: dict, record: dict, description: str):
    """An object of the class: what is typed, else what the record of a resumed run says, else the defaults, each value
    of its type. UsageError for a wrong one; `--help` ends the process; what differs from the record is named."""
    script, message, settings = Path(sys.argv[0]).stem, io.StringIO(), TypeAdapter(args_class)
    if record.get("script", script) != script:
        raise UsageError(f"--resume: --run-dir {record['run_dir']} is a run of {record['script']}.py, not of this one")
    defaults = defaults | {name: value for name, value in record.items() if name in args_class.__dataclass_fields__}
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
            default = settings.validate_python(defaults)
            # of a dictionary that is not empty tyro makes a flag for each key: a resumed run's stay aside
            kept = {name: value for name, value in asdict(default).items() if isinstance(value, dict)}
            shown = replace(default, **dict.fromkeys(kept, {}))
            args = tyro.cli(args_class, description=description, default=shown, args=argv)
    except SystemExit as stop:
        if stop.code in (0, None):
            print(with_headings(message.getvalue(), args_class))
            raise
        raise UsageError(usage_line(message.getvalue(), argv, args_class.__dataclass_fields__)) from None
    try:
        args = settings.validate_python(asdict(args) | {n: kept[n] for n in kept if not getattr(args, n)})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--{first['loc'][0].replace('_', '-')} {first['input']}: {first['msg']}") from None
    changed = [n for n, value in asdict(default).items() if record and n != "resume" and value != getattr(args, n)]
    if changed and int(os.environ.get("RANK", 0)) == 0:
        now = ", ".join(f"--{n.replace('_', '-')} {getattr(default, n)} -> {getattr(args, n)}" for n in changed)
        print(f"{args.run_dir}: goes on with {now}")
    return args


def with_headings(text: str, args_class: type) -> str:
    """tyro's help, with the class's comments `# --- heading` above the flags that they stand over."""
    for heading, name in re.findall(r"# --- (.+)\n +(\w+):", inspect.getsource(args_class)):
        flag = f"--{name.replace('_', '-')}"
        text = re.sub(rf"^ *{flag}\b", rf"\n{heading}\n\g<0>", text, count=1, flags=re.M)
    return text


def usage_line(box: str, argv: list[str], fields: dict) -> str:
    """What tyro says of a wrong command line, in a box, as one line; the likeliest slips with the right form.

    fields: those of the script's Args.
    """
    flags = {f"--{name.replace('_', '-')}": name for name in fields}
    initials = {"--" + "".join(word[0] for word in name.split("_")): flag for flag, name in flags.items()}  # --lr
    lines = [line[1:-1].strip("─- ") for line in box.splitlines() if line.startswith(("│ ", "  "))]  # UTF-8, ASCII
    text = " ".join(itertools.takewhile(lambda line: not line.startswith(("For full", "Argument help")), lines))
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    typed = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    if "Unrecognized" in text:
        for flag, value in itertools.pairwise(typed):
            if flag.replace("--no-", "--") in flags and value.lower() in ("true", "false"):
                right = flag if value.lower() == "true" else flag.replace("--", "--no-", 1)
                return f"{flag} {value}: takes no value; write {right.replace('--no-no-', '--')}"
        unknown = [word for word in typed if word.startswith("--") and word.replace("--no-", "--") not in flags]
        if unknown:
            close = f" (did you mean {initials[unknown[0]]!r}?)" if unknown[0] in initials else ""
            return f"{unknown[0]}: no such flag{close or nearest(unknown[0], flags)}; --help shows all"
    if "key-value" in text:
        flag = re.search(r"--[\w-]+", text)[0]
        given = " ".join(itertools.takewhile(lambda word: not word.startswith("--"), words[typed.index(flag) + 1 :]))
        right = " ".join(given.replace("=", " ").split())
        return f"{flag} {given}: keys and values take turns, as in {flag} {right if '=' in given else 'KEY VALUE'}"
    return text


def check_wandb() -> None:
    """UsageError if --track cannot work: wandb is not there, or nobody is logged in. At a terminal wandb asks."""
    try:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and os.environ.get("RANK", "0") == "0":
            wandb.login()
    except ImportError:
        raise UsageError("--track: wandb is not installed; pip install wandb") from None
    except wandb.Error as error:
        raise UsageError(f"--track: {error} Or set WANDB_MODE=offline.") from None


SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
SEARCH = ("do_sample", "num_beams", "length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size")
ABOVE_0 = ("a number above 0", lambda value: type(value) is float and value > 0)
COUNT = ("a whole number, at least 0", lambda value: type(value) is int and value >= 0)
DECODING = {
    "do_sample": ("true or false", lambda value: type(value) is bool),
    "temperature": ABOVE_0,
    "top_k": COUNT,
    "top_p": ("a number above 0, at most 1", lambda value: type(value) is float and 0 < value <= 1),
    "num_beams": ("a whole number, at least 1", lambda value: type(value) is int and value >= 1),
    "length_penalty": ("a number", lambda value: type(value) is float),
    "early_stopping": ("true, false or never", lambda value: type(value) is bool or value == "never"),
    "repetition_penalty": ABOVE_0,
    "no_repeat_ngram_size": COUNT,
}


def decoding_options(task: Task, typed: dict[str, str]) -> dict:
    """How evaluation decodes: the task's way, with what --decoding says; UsageError for what it does not know."""
    typed = parse_kwargs(typed, ["decoding"], {})["decoding"]
    for key, value in typed.items():
        if key not in DECODING:
            raise UsageError(f"--decoding {key}: unknown{nearest(key, DECODING)}; known: {', '.join(DECODING)}")
        right, fits = DECODING[key]
        if type(value) is int and not fits(value):  # transformers wants 2.0 where 2 was typed
            typed[key] = float(value)
        if not fits(typed[key]):
            raise UsageError(f"--decoding {key} {value}: must be {right}")
    if "do_sample" not in typed and typed:  # what is named says which of the two is meant
        typed["do_sample"] = not any(key in SEARCH for key in typed)
    # where the model's own generate is told no top_k, it takes 50
    decoding = dict(top_k=0) | task.generation | typed
    names = SAMPLING if decoding.get("do_sample") else SEARCH
    for key in typed:
        if key not in names:
            way = "sampling" if decoding.get("do_sample") else "a search"
            raise UsageError(f"--decoding {key}: not with {way}, whose options are: {', '.join(names[1:])}")
    return {key: value for key, value in decoding.items() if key in names}


def task_options(load: Callable) -> dict[str, type]:
    """What --task-kwargs may give to a loader: name of the option -> its type."""
    parameters = inspect.signature(load).parameters.values()
    return {option.name: option.annotation for option in parameters if option.name not in ("split", "data")}


def load_task(name: str, split: str, data: str | None = None, **kwargs) -> Split:
    """The samples of one split (train, val, test) of a task, in a fixed order.

    data: a folder of {split}.jsonl in the hub's columns, instead of the hub; kwargs: the options of the task's loader.
    UsageError if the task, the split, an option, a file or a column is not there.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    load = get_task(name).load
    options = task_options(load)
    for key, value in kwargs.items():
        if key not in options:
            known = ", ".join(options) or "none"
            raise UsageError(f"task {name!r} has no option {key!r}{nearest(key, options)}; its options are: {known}")
        if not isinstance(value, options[key]):
            kind = getattr(options[key], "__name__", options[key])
            raise UsageError(f"{key} must be of type {kind}, not {value!r}")
    samples = load(split, data, **kwargs)
    if isinstance(samples, Split):
        return samples
    return Split(datasets.Dataset.from_dict({"n": range(len(samples))}), lambda row, n: samples[n])  # of a list


def load_splits(name: str, data: str | None, typed: dict[str, str], chat: bool = False) -> tuple[Split, Split, Split]:
    """train, val and test of a task. typed: --task-kwargs as typed; chat: texts as prompts become a user's message."""
    kwargs = parse_kwargs(typed, [name], {})[name]
    options = task_options(get_task(name).load)
    for key, text in typed.items():
        if options.get(key) in (str, str | None) and not isinstance(kwargs[key], str | None):
            kwargs[key] = text  # 2017 as the name of a config
    splits = (load_task(name, split, data, **kwargs) for split in SPLITS)
    return tuple(as_chat(split) if chat else split for split in splits)


def as_chat(samples):
    """The samples with each prompt that is a text as the message of a user."""

    def message(sample):
        prompt = sample.prompt
        return replace(sample, prompt=[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)

    return Split(samples.rows, lambda row, n: message(samples.make(row, n)), samples.row_of, samples.numbers)


NUMBERS = {"increasing_numbers": {"min_tokens": 20}}
SENTIMENT = Task(
    load_imdb, prompt_length=64, response_length=48, min_response_length=48, causal_model="lvwerra/gpt2-imdb",
    reward=("sentiment",), metrics=("sentiment", "perplexity", "diversity"),
    generation={"do_sample": True, "temperature": 1.0, "top_k": 50},
)  # fmt: skip
SUMMARIES = Task(
    load_cnn_dm, prompt_length=512, response_length=100, min_response_length=50, truncation_side="right",
    metrics=("meteor", "rouge", "bleu", "bertscore", "diversity"),
    generation={"do_sample": True, "temperature": 0.7, "top_k": 0},
)  # fmt: skip
TRANSLATION = Task(
    load_wmt16, prompt_length=128, response_length=128, truncation_side="right", reward=("ter",),
    metrics=("meteor", "rouge", "bleu", "bertscore", "sacrebleu", "ter", "chrf", "diversity"),
    metric_kwargs={"bertscore": {"lang": "de"}, "sacrebleu": {"tokenize": "intl"}},
    generation={"num_beams": 4, "length_penalty": 0.6},
)  # fmt: skip

TASKS = {
    "numbers": Task(
        load_numbers, prompt_length=5, response_length=20, seq2seq_model="scratch", causal_model="scratch",
        reward=("increasing_numbers",), reward_kwargs=NUMBERS, metrics=("increasing_numbers",), metric_kwargs=NUMBERS,
    ),
    "dates": Task(
        load_dates, prompt_length=5, response_length=30, seq2seq_model="scratch", causal_model="scratch",
        reward=("dates",), metrics=("dates",),
    ),
    "imdb": SENTIMENT,
    "imdb_seq2seq": replace(
        SENTIMENT, load=load_imdb_seq2seq, metric_kwargs={"perplexity": {"reference_key": "reference"}},
    ),
    "commongen": Task(
        load_commongen, prompt_length=20, response_length=20, min_response_length=5, truncation_side="right",
        reward=("meteor", "repeat_penalty"), reward_weights=(1.0, 1.0),
        metrics=("meteor", "rouge", "bleu", "bertscore", "cider", "spice", "diversity"),
        generation={"num_beams": 5, "length_penalty": 1.0},
    ),
    "cnn_dm": SUMMARIES,
    "xsum": replace(SUMMARIES, load=load_xsum, response_length=60, min_response_length=10),
    "totto": Task(
        load_totto, prompt_length=512, response_length=50, min_response_length=10, reward=("meteor",),
        metrics=("meteor", "parent", "rouge", "bleu_totto", "bertscore", "diversity"),
        generation={"num_beams": 5, "length_penalty": 1.0},
    ),
    "narrative_qa": Task(
        load_narrative_qa, prompt_length=512, response_length=50, truncation_side="right", reward=("rouge_l_max",),
        metrics=("meteor", "rouge", "bleu", "bertscore", "rouge_l_max", "diversity"),
        generation={"num_beams": 4, "length_penalty": 1.0},
    ),
    "wmt16": TRANSLATION,
    "wmt14_en_de": replace(TRANSLATION, load=load_wmt14_en_de),
    "wmt16_news": replace(TRANSLATION, load=load_wmt16_news),
    "iwslt2017": replace(TRANSLATION, load=load_iwslt2017),
    "crd3": Task(
        load_crd3, prompt_length=256, response_length=20, reward=("meteor",),
        metrics=("meteor", "rouge", "bleu", "sacrebleu", "bertscore", "diversity"),
        generation={"do_sample": True, "temperature": 1.0, "top_k": 50},
    ),
    "daily_dialog": Task(
        load_daily_dialog, prompt_length=128, response_length=20, min_response_length=2, reward=("intent",),
        reward_kwargs={"intent": {"intent_coef": 0.75, "meteor_coef": 0.25}},
        metrics=("intent", "perplexity", "diversity", "meteor", "rouge", "bleu", "bertscore", "sacrebleu"),
        metric_kwargs={"sacrebleu": {"tokenize": "intl"}},
        generation={"do_sample": True, "temperature": 1.0, "top_k": 20},
    ),
}  # fmt: skip
