"""Every task: where its texts come from, how they become prompts and references, and what training on it needs.

`load_task(name, split)` gives the list of `Sample` of one split; `get_task(name)` gives the lengths, models, rewards,
metrics and decoding that the scripts use unless told otherwise. One loader function per task, one table `TASKS` at the
end. Names are those of the table, or the path of one's own JSONL (see `load_jsonl`).

To add a task: write a function `load(split, data=None, **options) -> list[Sample]` and give it a line in TASKS.
Sources, licences, sizes and an example of each task: docs/tasks.md.
"""

import csv
import difflib
import gzip
import hashlib
import http.client
import inspect
import itertools
import json
import random
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.utils import httpx
from tqdm.auto import tqdm

if not sys.stderr.isatty():  # in a log, bars are noise around the one line that says what is wrong
    datasets.disable_progress_bars()

SPLITS = {"train": ("train",), "val": ("validation", "val", "dev"), "test": ("test",)}  # our name -> the hub's, others
CONVERTED = "refs/convert/parquet"  # where the hub keeps a loadable copy of a dataset that has a loading script
ANSWER_SECONDS = 4  # a server that takes longer counts as out of reach: it must be said within ten, start included


class UsageError(ValueError):
    """What the user asked for cannot be done. One line: what is wrong, the value, what would be right."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, the texts that answer it well (at least one where the task has references), and what rewards need."""

    id: str
    prompt: str
    references: list[str]
    meta: dict


@dataclass(frozen=True)
class Task:
    """How a task is loaded and what it is trained with unless the user says otherwise. Lengths are in tokens."""

    load: Callable
    """load(split, data=None, **options) -> list[Sample]; the options are what --task-kwargs may give."""
    prompt_length: int
    """Longer prompts are truncated."""
    response_length: int
    """At most that many tokens are sampled."""
    min_response_length: int = 0
    """EOS cannot be sampled before that many tokens."""
    truncation_side: str = "left"
    """The side of a long prompt that is cut off."""
    seq2seq_model: str = "t5-base"
    causal_model: str = "gpt2"
    reward: tuple[str, ...] = ("rouge1",)
    reward_weights: tuple[float, ...] = (1.0,)
    reward_kwargs: dict[str, dict] = field(default_factory=dict)
    """Name of a reward -> its keyword arguments."""
    metrics: tuple[str, ...] = ("rouge", "diversity")
    metric_kwargs: dict[str, dict] = field(default_factory=dict)
    """Name of a metric -> its keyword arguments."""
    generation: dict = field(default_factory=lambda: {"do_sample": True, "temperature": 1.0, "top_k": 0})
    """Decoding for evaluation: sampling or a beam search, of at least min_response_length tokens too."""


def nearest(name: str, known) -> str:
    """' (did you mean X?)' for the known name most like `name`, '' if none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# ---------------------------------------------------------------------------------------------------------------------
# Rows from the hub, from a folder, or from a plain download
# ---------------------------------------------------------------------------------------------------------------------
def open_text(file: Path):
    """A text file, gzipped or not, open for reading."""
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8")


def split_file(data: str, split: str, suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz")) -> Path:
    """The file of a split in the folder `data`, under any name that the split goes by. UsageError if there is none."""
    folder = Path(data)
    if not folder.is_dir():
        raise UsageError(f"{data} is not a folder with {SPLITS[split][0]}{suffixes[0]}")
    names = [f"{name}{suffix}" for name in SPLITS[split] for suffix in suffixes]
    for file in (folder / name for name in names):
        if file.is_file():
            try:
                with open_text(file) as lines:
                    if any(line.strip() for line in lines):
                        return file
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"{file} cannot be read ({error})") from None
            raise UsageError(f"{file}: the split {split!r} is empty")
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise UsageError(f"{data}: the split {split!r} is missing, no {' or '.join(names)}; there is: {there}")


def answers(url: str) -> bool:
    """Whether a server answers a request within ANSWER_SECONDS, however long its name takes to resolve."""
    answered = []

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer as well
        except OSError:
            return
        answered.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return bool(answered)


def offline_if_unreachable() -> None:
    """Without a hub, lets the libraries look into their caches alone: their retries take longer than a user waits."""
    if not datasets.config.HF_HUB_OFFLINE and not answers(datasets.config.HF_ENDPOINT):
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


def hub_or_folder(split: str, data: str | None, **hub) -> dict:
    """The arguments of load_dataset: `hub`'s, or with `data` those of the split's file in that folder."""
    if data is not None:
        return {"path": "json", "data_files": {split: str(split_file(data, split))}, "split": split}
    offline_if_unreachable()
    return {**hub, "split": SPLITS[split][0]}


def load_rows(task: str, split: str, source: dict, columns: dict[str, str], max_size: int | None = None):
    """The rows of one split as a `datasets.Dataset`, structures flattened ("translation.en").

    source: the arguments of load_dataset; columns: name -> its type (string, int, list), all needed and none empty in
    any row; max_size: only that many rows from the start. UsageError if any of that cannot be had.
    """
    check_positive(max_size=max_size)
    local = source.get("data_files")
    where = f"{task}: {local[split] if local else 'dataset ' + source['path']}"
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong reaches the user as one line, below
    try:
        rows = datasets.load_dataset(**source)
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        if not local and datasets.config.HF_HUB_OFFLINE:
            reason = "the Hugging Face hub cannot be reached, and it is not in the local cache"
        way_out = "" if local else f"; with --data FOLDER, {SPLITS[split][0]}.jsonl of that folder is read instead"
        raise UsageError(f"{where} cannot be loaded ({reason}){way_out}") from None
    rows = rows.flatten()
    if len(rows) == 0:
        raise UsageError(f"{where}: the split {split!r} is empty")
    for column, kind in columns.items():
        if column not in rows.features:
            there = ", ".join(rows.column_names)
            close = nearest(column, rows.features)
            raise UsageError(f"{where} has no column {column!r}{close}; it has: {there}")
        found = rows.features[column]
        found = "list" if isinstance(found, datasets.List | datasets.LargeList) else getattr(found, "dtype", "mixed")
        if rows.data.column(column).null_count:
            row = rows.data.column(column).is_null().to_pylist().index(True)
            raise UsageError(f"{where}: the column {column!r} is missing in row {row + 1}")
        if kind not in found:
            raise UsageError(f"{where}: the column {column!r} must be of type {kind}, and is {found}")
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
                with tqdm(desc=f"{task} {path.name}", total=size or None, unit="B", unit_scale=True) as bar:
                    while chunk := response.read(1 << 20):
                        file.write(chunk)
                        bar.update(len(chunk))
            if size and part.stat().st_size != size:
                raise ConnectionError(f"broke off after {part.stat().st_size} of {size} bytes")
            with open(part, "rb") as file:
                if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise ConnectionError("wrong checksum: the file is not the one that this task was written for")
            part.replace(path)
        except (OSError, http.client.HTTPException) as error:
            way_out = "with --data FOLDER its files are read from there instead"
            raise UsageError(f"{task}: {url} cannot be downloaded ({error}); {way_out}") from None
        finally:
            part.unlink(missing_ok=True)
    return path


def progress(rows, task: str, split: str):
    """The rows with a progress bar, shown when they take longer than a second."""
    return tqdm(rows, desc=f"{task} {split}", unit=" rows", delay=1)


def check_positive(**options: int | None) -> None:
    """UsageError if one of the options is given and not at least 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic tasks: nothing to download
# ---------------------------------------------------------------------------------------------------------------------
def synthetic(task: str, prompt: str, write: Callable, split: str, data, n_samples: int, seed: int) -> list[Sample]:
    """n_samples times the same prompt, each with one reference by `write(rng)`; the same for a split and a seed."""
    if data is not None:
        raise UsageError(f"{task} is synthetic and reads no --data, given: {data}")
    check_positive(n_samples=n_samples)
    rng = random.Random(f"{task} {split} {seed}")
    return [Sample(f"{split}_{i}", prompt, [write(rng)], {}) for i in range(n_samples)]


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

    n_samples: 2000 for train, so that there is something to imitate, and 50 for val and test.
    """
    n_samples = {"train": 2000}.get(split, 50) if n_samples is None else n_samples
    return synthetic("numbers", "Count upwards:", broken_count, split, data, n_samples, seed)


WHO = ("The ferry", "Our neighbour", "The old bridge", "A new library", "The choir", "My sister", "The last train")
DID = ("opened", "left town", "came back", "was painted", "was seen", "closed", "moved to the coast", "won a prize")
WHEN = ("in spring", "last Tuesday", "at noon", "before the storm", "a year ago", "after the war", "in the evening")


def sentence_with_time(rng: random.Random) -> str:
    """A short sentence that says when: at every fourth as a date (1987-05-14), otherwise in words."""
    date = f"on {rng.randint(1900, 2029)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return f"{rng.choice(WHO)} {rng.choice(DID)} {date if rng.random() < 0.25 else rng.choice(WHEN)}."


def load_dates(split, data=None, n_samples: int | None = None, seed: int = 0) -> list[Sample]:
    """Write a sentence with a date like 1987-05-14 in it. Every fourth reference has one.

    n_samples: 2000 for train, so that there is something to imitate, and 100 for val and test.
    """
    n_samples = {"train": 2000}.get(split, 100) if n_samples is None else n_samples
    return synthetic("dates", "Write a date:", sentence_with_time, split, data, n_samples, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Film reviews to go on with (IMDB)
# ---------------------------------------------------------------------------------------------------------------------
def imdb_rows(task: str, split: str, data: str | None):
    """train and val: the first 80% and the rest of the hub's train split, shuffled; test: 5,000 of its test split."""
    hub = {"path": "stanfordnlp/imdb", "revision": "e6281661ce1c48d982bc483cf8a173c1bbeb5d31"}
    hub_split = "test" if split == "test" else "train"
    source = hub_or_folder(hub_split, data, **hub)
    rows = load_rows(task, hub_split, source, {"text": "string", "label": "int"}).shuffle(seed=42)
    first_val = int(0.8 * len(rows))
    part = {"train": range(first_val), "val": range(first_val, len(rows)), "test": range(min(5000, len(rows)))}[split]
    return rows.select(part)


def halves(text: str) -> tuple[str, str]:
    """The first half of a text's words, and the second, which is longer by a word if their number is odd."""
    words = text.split(" ")
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def load_imdb(split, data=None) -> list[Sample]:
    """The first half of a film review, to be gone on with in a positive mood; its reference is the whole review."""
    rows = progress(imdb_rows("imdb", split, data), "imdb", split)
    return [Sample(f"{split}_{i}", halves(row["text"])[0], [row["text"]], {}) for i, row in enumerate(rows)]


def load_imdb_seq2seq(split, data=None, positive_ratio: int | float = 1.0) -> list[Sample]:
    """The first half of a film review to the second. train has positive reviews only, the first positive_ratio of them.

    meta: reference, the whole review.
    """
    if not 0 < positive_ratio <= 1:
        raise UsageError(f"positive_ratio must be over 0 and at most 1, not {positive_ratio!r}")
    samples = []
    for i, row in enumerate(progress(imdb_rows("imdb_seq2seq", split, data), "imdb_seq2seq", split)):
        if split != "train" or row["label"] == 1:
            first, second = halves(row["text"])
            samples.append(Sample(f"{split}_{i}", first, [second], {"reference": row["text"]}))
    return samples if split != "train" else samples[: int(positive_ratio * len(samples))]


# ---------------------------------------------------------------------------------------------------------------------
# Words to a sentence
# ---------------------------------------------------------------------------------------------------------------------
def load_commongen(split, data=None, prefix: str = "generate a sentence with: ") -> list[Sample]:
    """A few concepts to a sentence that has them all (CommonGen). train: a sample per sentence; val, test: per set.

    meta: concepts. The hub's test split hides the sentences; its references are "empty reference".
    """
    columns = {"concept_set_idx": "int", "concepts": "list", "target": "string"}
    rows = load_rows("commongen", split, hub_or_folder(split, data, path="allenai/common_gen"), columns)
    samples = []
    of_set = {}
    for row in progress(rows, "commongen", split):
        target = row["target"] or "empty reference"
        if split != "train" and row["concept_set_idx"] in of_set:
            of_set[row["concept_set_idx"]].references.append(target)
            continue
        prompt = prefix + " ".join(row["concepts"]) + "."
        sample = Sample(f"{split}_{len(samples)}", prompt, [target], {"concepts": row["concepts"]})
        of_set[row["concept_set_idx"]] = sample
        samples.append(sample)
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# Summaries
# ---------------------------------------------------------------------------------------------------------------------
def load_cnn_dm(
    split, data=None, prefix: str = "Summarize: ", truncate_article: int | None = None, max_size: int | None = None
) -> list[Sample]:
    """A news article to its highlights (CNN / Daily Mail). truncate_article: only that many words of the article."""
    check_positive(truncate_article=truncate_article)
    hub = {"path": "abisee/cnn_dailymail", "name": "3.0.0", "revision": "96df5e686bee6baa90b8bee7c28b81fa3fa6223d"}
    columns = {"article": "string", "highlights": "string"}
    rows = load_rows("cnn_dm", split, hub_or_folder(split, data, **hub), columns, max_size)
    samples = []
    for i, row in enumerate(progress(rows, "cnn_dm", split)):
        article = row["article"] if truncate_article is None else " ".join(row["article"].split()[:truncate_article])
        samples.append(Sample(f"{split}_{i}", prefix + article, [row["highlights"]], {}))
    return samples


def load_xsum(split, data=None, suffix: str = "TL;DR:", max_size: int | None = None) -> list[Sample]:
    """A BBC article to one sentence (XSum)."""
    source = hub_or_folder(split, data, path="EdinburghNLP/xsum", revision=CONVERTED, data_dir="default")
    rows = load_rows("xsum", split, source, {"document": "string", "summary": "string"}, max_size)
    rows = enumerate(progress(rows, "xsum", split))
    return [Sample(f"{split}_{i}", row["document"] + suffix, [row["summary"]], {}) for i, row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Tables to a sentence (ToTTo)
# ---------------------------------------------------------------------------------------------------------------------
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


def load_totto(split, data=None, representation: str = "subtable", max_size: int | None = None) -> list[Sample]:
    """A Wikipedia table with highlighted cells to a sentence that says what is in these (ToTTo).

    representation: subtable, the highlighted cells only, or fulltable. The prompt has it without titles, then with.
    meta: raw_table, the row of the dataset, its annotations one by one, overlap_subset a bool. The hub's test split
    hides the sentences; its references are "".
    """
    if representation not in ("subtable", "fulltable"):
        raise UsageError(f"representation must be subtable or fulltable, not {representation!r}")
    source = hub_or_folder(split, data, path="google-research-datasets/totto", revision=CONVERTED, data_dir="default")
    texts = ("table_page_title", "table_section_title", "table_section_text", "overlap_subset")
    stages = ("original_sentence", "sentence_after_deletion", "sentence_after_ambiguity", "final_sentence")
    columns = {"table": "list", "highlighted_cells": "list", **dict.fromkeys(texts, "string")}
    columns |= {f"sentence_annotations.{stage}": "list" for stage in stages}
    samples = []
    for i, row in enumerate(progress(load_rows("totto", split, source, columns, max_size), "totto", split)):
        table = linearize_table(row["table"], row["highlighted_cells"], whole=representation == "fulltable")
        titles = [
            tagged(tag, row[f"table_{tag}"]) + " " for tag in ("page_title", "section_title") if row[f"table_{tag}"]
        ]
        prompt = table + "".join(titles) + table
        references = [""] if split == "test" else row["sentence_annotations.final_sentence"]
        by_stage = [row.pop(f"sentence_annotations.{stage}") for stage in stages]
        annotations = [dict(zip(stages, texts, strict=True)) for texts in zip(*by_stage, strict=True)]
        raw = {**row, "overlap_subset": row["overlap_subset"] == "True", "sentence_annotations": annotations}
        samples.append(Sample(f"{split}_{i}", prompt, references, {"raw_table": raw}))
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# Questions about stories
# ---------------------------------------------------------------------------------------------------------------------
NARRATIVE_QA = {  # split -> file of UnifiedQA, SHA-256 (as TensorFlow Datasets records it)
    "train": ("train.tsv", "dd1220e0225947d57e25192a1e10ed0f34b1e123c3775588a8d6bec5b41e3005"),
    "val": ("dev.tsv", "c7f70a0bc92f1ef9fc660fd84d65420302d86a08e39de3c029e5e266b79680dd"),
    "test": ("test.tsv", "991e2fb05bd18b5379b0936cd61345e222d5a1eed115ea07bea043fd51994da5"),
}


def load_narrative_qa(split, data=None) -> list[Sample]:
    """A question and the summary of a story to the answer (NarrativeQA as UnifiedQA has it), all in lower case.

    data: a folder of {split}.tsv without a header: question and context, answer. All answers of a prompt are its
    references.
    """
    name, checksum = NARRATIVE_QA[split]
    url = f"https://storage.googleapis.com/unifiedqa/data/narrativeqa/{name}"
    file = download("narrative_qa", url, checksum) if data is None else split_file(data, split, (".tsv",))
    source = {
        "path": "csv",
        "data_files": {split: str(file)},
        "split": split,
        "sep": "\t",
        "column_names": ["prompt", "answer"],
        "features": datasets.Features({"prompt": datasets.Value("string"), "answer": datasets.Value("string")}),
        "keep_default_na": False,  # "none" and "null" are answers
        "quoting": csv.QUOTE_NONE,  # written without quoting: a quotation mark is a quotation mark
    }
    answers_of = {}
    rows = load_rows("narrative_qa", split, source, {"prompt": "string", "answer": "string"})
    if not any(rows["answer"]):
        raise UsageError(f"narrative_qa: {file} has no answers: a line must be question and context, a tab, an answer")
    for row in progress(rows, "narrative_qa", split):
        answers_of.setdefault(row["prompt"].lower(), []).append(row["answer"].lower().strip())
    return [Sample(f"{split}_{i}", prompt, texts, {}) for i, (prompt, texts) in enumerate(answers_of.items())]


# ---------------------------------------------------------------------------------------------------------------------
# Translation
# ---------------------------------------------------------------------------------------------------------------------
LANGUAGES = {"en": "English", "cs": "Czech", "de": "German", "fi": "Finnish", "ro": "Romanian", "ru": "Russian"}
LANGUAGES["tr"] = "Turkish"


def translations(
    task: str, split: str, source: dict, source_language: str, target_language: str, max_size: int | None
) -> list[Sample]:
    """Samples of a dataset with the column translation, {language: text}."""
    columns = {f"translation.{language}": "string" for language in (source_language, target_language)}
    prefix = f"translate {LANGUAGES[source_language]} to {LANGUAGES[target_language]}: "
    samples = []
    for i, row in enumerate(progress(load_rows(task, split, source, columns, max_size), task, split)):
        prompt = prefix + row[f"translation.{source_language}"]
        samples.append(Sample(f"{split}_{i}", prompt, [row[f"translation.{target_language}"]], {}))
    return samples


def load_wmt16(
    split, data=None, source_language: str = "en", target_language: str = "de", max_size: int | None = None
) -> list[Sample]:
    """News from English into one of six other languages, or from it into English (WMT 2016)."""
    pair = {source_language, target_language}
    if "en" not in pair or len(pair) != 2 or not pair <= LANGUAGES.keys():
        others = ", ".join(LANGUAGES.keys() - {"en"})
        raise UsageError(f"wmt16 has en with one of {others}, not {source_language!r} to {target_language!r}")
    other = (pair - {"en"}).pop()
    source = hub_or_folder(split, data, path="wmt/wmt16", name=f"{other}-en")
    return translations("wmt16", split, source, source_language, target_language, max_size)


def load_wmt14_en_de(split, data=None, max_size: int | None = None) -> list[Sample]:
    """English to German (WMT 2014), as cleaned by fairseq's script."""
    source = hub_or_folder(split, data, path="stas/wmt14-en-de-pre-processed", revision=CONVERTED, data_dir="ende")
    return translations("wmt14_en_de", split, source, "en", "de", max_size)


def load_wmt16_news(split, data=None, max_size: int | None = None) -> list[Sample]:
    """English to German: News Commentary to train on, WMT 2016 for val and test."""
    path = "Helsinki-NLP/news_commentary" if split == "train" else "wmt/wmt16"
    source = hub_or_folder(split, data, path=path, name="de-en")
    return translations("wmt16_news", split, source, "en", "de", max_size)


def load_iwslt2017(split, data=None, max_size: int | None = None) -> list[Sample]:
    """TED talks, English to German (IWSLT 2017)."""
    hub = {"path": "IWSLT/iwslt2017", "revision": CONVERTED, "data_dir": "iwslt2017-de-en"}
    return translations("iwslt2017", split, hub_or_folder(split, data, **hub), "en", "de", max_size)


# ---------------------------------------------------------------------------------------------------------------------
# Dialogue
# ---------------------------------------------------------------------------------------------------------------------
CRD3_COMMIT = "6734253e8c584a0aea4eea9b02cb6990e9fb1598"


def load_crd3(split, data=None, max_context: int = 5) -> list[Sample]:
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
    games = root / "aligned data" / f"{split}_files"
    if not games.is_file():
        raise UsageError(f"{data}: the split {split!r} is missing, no file 'aligned data/{games.name}'")
    samples = []
    for g, game in enumerate(progress(games.read_text(encoding="utf-8").split(), "crd3", split)):
        file = root / "cleaned data" / f"{game}.json"
        if not file.is_file():
            raise UsageError(f"{data}: {games.name} names the game {game}, and there is no 'cleaned data/{file.name}'")
        try:
            turns = json.loads(file.read_text(encoding="utf-8"))["TURNS"]
            turns = [(turn["NAMES"][0], " ".join(turn["UTTERANCES"])) for turn in turns]
        except (ValueError, LookupError, TypeError) as error:
            raise UsageError(f"{file} has no TURNS with NAMES and UTTERANCES ({error!r})") from None
        context = []
        for t, (name, utterance) in enumerate(turns):
            if t >= 2:
                prompt = "\n".join(context[-max_context:]) + f"\n{name}: "
                samples.append(Sample(f"{split}_ep_{g}_turn_{t}", prompt, [utterance], {}))
            context.append(f"{name}: {utterance}")
    if not samples:
        raise UsageError(f"{data}: the split {split!r} is empty")
    return samples


def load_daily_dialog(split, data=None, context_size: int = 5) -> list[Sample]:
    """What is said next in an everyday conversation, after context_size utterances (DailyDialog).

    meta: emotion (0 to 6) and intent, the dialogue act (1 inform, 2 question, 3 directive, 4 commissive), of the
    reference.
    """
    check_positive(context_size=context_size)
    hub = {"path": "li2017dailydialog/daily_dialog", "revision": CONVERTED, "data_dir": "default"}
    columns = {"dialog": "list", "act": "list", "emotion": "list"}
    rows = load_rows("daily_dialog", split, hub_or_folder(split, data, **hub), columns)
    samples = []
    said = 0
    for number, row in enumerate(progress(rows, "daily_dialog", split), start=1):
        if not len(row["dialog"]) == len(row["act"]) == len(row["emotion"]):
            raise UsageError(f"daily_dialog: row {number} of {split} has not one act and one emotion per utterance")
        turns = zip(row["dialog"], row["emotion"], row["act"], strict=True)
        for t, (utterance, emotion, act) in enumerate(turns):
            if t >= context_size:
                prompt = "<EOU>".join(row["dialog"][t - context_size : t]) + " <EOU>"
                meta = {"emotion": emotion, "intent": act}
                samples.append(Sample(f"{split}_{said}", prompt, [utterance + "<EOU>"], meta))
            said += 1
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# One's own JSONL
# ---------------------------------------------------------------------------------------------------------------------
def read_jsonl(file: Path) -> list[tuple[int, dict]]:
    """The objects of a .jsonl or .jsonl.gz file, each with its line number; UsageError naming the line that is none."""
    rows = []
    try:
        with open_text(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append((number, json.loads(line)))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file}, line {number}: not JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({error})") from None
    for number, row in rows:
        if not isinstance(row, dict):
            raise UsageError(f"{file}, line {number}: not a JSON object with the key 'prompt'")
    return rows


def load_jsonl(path: str, split, data=None) -> list[Sample]:
    """One's own texts. Each line: prompt; references (a text or a list of texts); id; all other keys go into meta.

    path: a folder with train.jsonl, validation.jsonl (or val.jsonl) and test.jsonl, each possibly .gz; or one file, of
    which every tenth line, starting with the ninth, is val, every tenth, starting with the tenth, test, the rest train.
    """
    if data is not None:
        raise UsageError(f"--task {path} names the data already; --data {data} is for the named tasks")
    file = Path(path) if Path(path).is_file() else split_file(path, split)
    rows = read_jsonl(file)
    if file == Path(path):
        if len(rows) < 10:
            raise UsageError(f"{file}: {len(rows)} rows are too few to split 8:1:1; give a folder of {{split}}.jsonl")
        rows = [row for i, row in enumerate(rows) if {8: "val", 9: "test"}.get(i % 10, "train") == split]
    if not rows:
        raise UsageError(f"{file}: the split {split!r} is empty")
    samples = []
    for line, row in rows:
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            there = ", ".join(row) or "none"
            raise UsageError(f"{file}, line {line}: no text under 'prompt'{nearest('prompt', row)}; its keys: {there}")
        references = row.get("references", [])
        references = [references] if isinstance(references, str) else references
        if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
            raise UsageError(f"{file}, line {line}: 'references' must be a text or a list of texts")
        meta = {key: value for key, value in row.items() if key not in ("id", "prompt", "references")}
        samples.append(Sample(str(row.get("id", f"{split}_{len(samples)}")), row["prompt"], references, meta))
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# From texts to batches of tokens
# ---------------------------------------------------------------------------------------------------------------------
def prompt_order(positions, num_samples, seed):
    """Indices of the samples at these positions of an endless stream of epochs, each shuffled anew."""
    orders, indices = {}, []
    for position in positions:
        epoch, place = divmod(position, num_samples)
        if epoch not in orders:
            generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 2]))
            orders[epoch] = generator.permutation(num_samples)
        indices.append(int(orders[epoch][place]))
    return indices


def describe_lengths(tokenizer, samples, max_length, response_length):
    """One line on how long the prompts and references are in tokens, and how many will be truncated."""
    lengths = [len(row) for row in tokenizer([s.prompt for s in samples]).input_ids]
    middle, high = np.percentile(lengths, [50, 95])
    cut = np.mean(np.array(lengths) > max_length)
    line = f"prompts: {middle:.0f} tokens (median), {high:.0f} (95%), {cut:.1%} truncated to {max_length}"
    references = [s.references[0] for s in samples if s.references]
    if references:
        lengths = [len(row) for row in tokenizer(references, add_special_tokens=False).input_ids]
        middle, high = np.percentile(lengths, [50, 95])
        cut = np.mean(np.array(lengths) >= response_length)
        line += f"; references: {middle:.0f} (median), {high:.0f} (95%), {cut:.1%} longer than a response can be"
    return line


def encode_prompts(tokenizer, prompts, max_length, truncation_side) -> list[list[int]]:
    """Token ids of each prompt, special tokens included; a prompt without any token becomes one EOS."""
    tokenizer.truncation_side = truncation_side
    ids = tokenizer(list(prompts), truncation=True, max_length=max_length, return_attention_mask=False).input_ids
    return [row or [tokenizer.eos_token_id] for row in ids]


def pad(rows: list[list[int]], pad_id, device, left=False):
    """ids (B, L) int64 and mask (B, L) bool. The mask comes from lengths: an id may be both a token and padding."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = True
    return ids.to(device), mask.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Finding and loading a task
# ---------------------------------------------------------------------------------------------------------------------
def get_task(name: str) -> Task:
    """The task called `name` in TASKS, or the one of a JSONL file or folder. UsageError if there is neither."""
    if name in TASKS:
        return TASKS[name]
    if Path(name).exists():
        return Task(partial(load_jsonl, name), prompt_length=512, response_length=100, truncation_side="right")
    known = ", ".join(TASKS)
    raise UsageError(f"unknown task {name!r}{nearest(name, TASKS)}; known: {known}, or a JSONL file or folder")


def parse_kwargs(typed: dict[str, str], names, defaults: dict[str, dict]) -> dict[str, dict]:
    """{name: keyword arguments}: the task's own, then what was typed as KEY or NAME.KEY, read as JSON where it is."""
    kwargs = {name: dict(defaults.get(name, {})) for name in names}
    for key, text in typed.items():
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        owner, _, option = key.rpartition(".")
        if owner and owner not in names:
            known = difflib.get_close_matches(owner, names, 1, 0) or ["no name"]
            raise UsageError(f"{key}: {owner} is not in use; did you mean {known[0]}.{option}?")
        for name in [owner] if owner else names:
            kwargs[name][option] = value
    return kwargs


def task_options(load: Callable) -> dict[str, type]:
    """What --task-kwargs may give to a loader: name of the option -> its type."""
    parameters = inspect.signature(load).parameters.values()
    return {option.name: option.annotation for option in parameters if option.name not in ("split", "data")}


def load_task(name: str, split: str, data: str | None = None, **kwargs) -> list[Sample]:
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
    return load(split, data, **kwargs)


NUMBERS = {"increasing_numbers": {"min_tokens": 20}}
SENTIMENT = Task(
    load_imdb,
    prompt_length=64,
    response_length=48,
    min_response_length=48,
    causal_model="lvwerra/gpt2-imdb",
    reward=("sentiment",),
    metrics=("sentiment", "perplexity", "diversity"),
    generation={"do_sample": True, "temperature": 1.0, "top_k": 50},
)
SUMMARIES = Task(
    load_cnn_dm,
    prompt_length=512,
    response_length=100,
    min_response_length=50,
    truncation_side="right",
    metrics=("meteor", "rouge", "bleu", "bertscore", "diversity"),
    generation={"do_sample": True, "temperature": 0.7, "top_k": 0},
)
TRANSLATION = Task(
    load_wmt16,
    prompt_length=128,
    response_length=128,
    truncation_side="right",
    reward=("ter",),
    metrics=("meteor", "rouge", "bleu", "bertscore", "sacrebleu", "ter", "chrf", "diversity"),
    metric_kwargs={"bertscore": {"lang": "de"}, "sacrebleu": {"tokenize": "intl"}},
    generation={"num_beams": 4, "length_penalty": 0.6},
)

TASKS = {
    "numbers": Task(
        load_numbers,
        prompt_length=5,
        response_length=20,
        seq2seq_model="scratch",
        causal_model="scratch",
        reward=("increasing_numbers",),
        reward_kwargs=NUMBERS,
        metrics=("increasing_numbers",),
        metric_kwargs=NUMBERS,
    ),
    "dates": Task(
        load_dates,
        prompt_length=5,
        response_length=30,
        seq2seq_model="scratch",
        causal_model="scratch",
        reward=("dates",),
        metrics=("dates",),
    ),
    "imdb": SENTIMENT,
    "imdb_seq2seq": replace(
        SENTIMENT, load=load_imdb_seq2seq, metric_kwargs={"perplexity": {"reference_key": "reference"}}
    ),
    "commongen": Task(
        load_commongen,
        prompt_length=20,
        response_length=20,
        min_response_length=5,
        truncation_side="right",
        reward=("meteor", "repeat_penalty"),
        reward_weights=(1.0, 1.0),
        metrics=("meteor", "rouge", "bleu", "bertscore", "cider", "spice", "diversity"),
        generation={"num_beams": 5, "length_penalty": 1.0},
    ),
    "cnn_dm": SUMMARIES,
    "xsum": replace(
        SUMMARIES,
        load=load_xsum,
        response_length=60,
        min_response_length=10,
    ),
    "totto": Task(
        load_totto,
        prompt_length=512,
        response_length=50,
        min_response_length=10,
        reward=("meteor",),
        metrics=("meteor", "parent", "rouge", "bleu_totto", "bertscore", "diversity"),
        generation={"num_beams": 5, "length_penalty": 1.0},
    ),
    "narrative_qa": Task(
        load_narrative_qa,
        prompt_length=512,
        response_length=50,
        truncation_side="right",
        reward=("rouge_l_max",),
        metrics=("meteor", "rouge", "bleu", "bertscore", "rouge_l_max", "diversity"),
        generation={"num_beams": 4, "length_penalty": 1.0},
    ),
    "wmt16": TRANSLATION,
    "wmt14_en_de": replace(TRANSLATION, load=load_wmt14_en_de),
    "wmt16_news": replace(TRANSLATION, load=load_wmt16_news),
    "iwslt2017": replace(TRANSLATION, load=load_iwslt2017),
    "crd3": Task(
        load_crd3,
        prompt_length=256,
        response_length=20,
        reward=("meteor",),
        metrics=("meteor", "rouge", "bleu", "sacrebleu", "bertscore", "diversity"),
        generation={"do_sample": True, "temperature": 1.0, "top_k": 50},
    ),
    "daily_dialog": Task(
        load_daily_dialog,
        prompt_length=128,
        response_length=20,
        min_response_length=2,
        reward=("intent",),
        reward_kwargs={"intent": {"intent_coef": 0.75, "meteor_coef": 0.25}},
        metrics=("intent", "perplexity", "diversity", "meteor", "rouge", "bleu", "bertscore", "sacrebleu"),
        metric_kwargs={"sacrebleu": {"tokenize": "intl"}},
        generation={"do_sample": True, "temperature": 1.0, "top_k": 20},
    ),
}
