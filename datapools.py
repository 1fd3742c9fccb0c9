"""Every task: where its texts come from, how they become prompts and references, and what training on it needs.

`load_task(name, split)` gives the list of `Sample` of one split; `get_task(name)` gives the lengths, models, rewards,
metrics and decoding that the scripts use unless told otherwise. One loader function per task, one table `TASKS` at the
end. Names are those of the table, or the path of one's own JSONL (see `load_jsonl`).

To add a task: write a function `load(split, data=None, **options) -> list[Sample]` and give it a line in TASKS.
Sources, licences, sizes and an example of each task: docs/tasks.md.
"""

import difflib
import gzip
import inspect
import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
from huggingface_hub.utils import httpx
from tqdm.auto import tqdm

SPLITS = {"train": "train", "val": "validation", "test": "test"}  # our name -> the hub's
HUB_SECONDS = 5  # how long the hub may take to answer before we say that it cannot be reached


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
    """Decoding for evaluation: sampling or a beam search; its min_length counts tokens of the response."""


def nearest(name: str, known) -> str:
    """' (did you mean X?)' for the known name most like `name`, '' if none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# ---------------------------------------------------------------------------------------------------------------------
# Rows from the hub, or from a folder
# ---------------------------------------------------------------------------------------------------------------------
def split_file(data: str, split: str, suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz")) -> Path:
    """The file of a split in the folder `data`, under our or the hub's name of the split. UsageError if it has none."""
    folder = Path(data)
    if not folder.is_dir():
        raise UsageError(f"--data {data}: no such folder")
    names = [f"{name}{suffix}" for name in dict.fromkeys((SPLITS[split], split)) for suffix in suffixes]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise UsageError(f"{data}: the split {split!r} is missing, no {' or '.join(names)}; there is: {there}")


def answers(url: str) -> bool:
    """Whether a server answers a request within HUB_SECONDS, however long its name takes to resolve."""
    statuses = []

    def ask():
        try:
            statuses.append(huggingface_hub.get_session().head(url, timeout=HUB_SECONDS).status_code)
        except (httpx.HTTPError, huggingface_hub.errors.OfflineModeIsEnabled):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(statuses)


def load_rows(task: str, split: str, data: str | None, columns: dict[str, str], max_size: int | None = None, **hub):
    """The rows of one split as a `datasets.Dataset`, structures flattened ("translation.en").

    task: for messages; split: train, val or test; data: a folder of {split}.jsonl in the hub's columns, or None for the
    hub; columns: name -> its type (string, int64, list), all needed and none empty in any row; max_size: that many rows
    from the start; hub: the arguments of load_dataset. UsageError if any of that cannot be had.
    """
    if max_size is not None and (not isinstance(max_size, int) or max_size < 1):
        raise UsageError(f"max_size must be a whole number of at least 1, not {max_size!r}")
    if data is None:
        source, where = {**hub, "split": SPLITS[split]}, f"dataset {hub['path']}"
        # Its own retries take longer than a user waits; from here on it looks into its cache only, and fails at once.
        if not datasets.config.HF_HUB_OFFLINE and not answers(datasets.config.HF_ENDPOINT):
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    else:
        file = split_file(data, split)
        source, where = {"path": "json", "data_files": {split: str(file)}, "split": split}, str(file)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong reaches the user as one line, below
    try:
        rows = datasets.load_dataset(**source)
    except StopIteration:  # what the JSON reader makes of a file without a line
        raise UsageError(f"{where}: the split {split!r} is empty") from None
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        if data is None and datasets.config.HF_HUB_OFFLINE:
            reason = "the Hugging Face hub cannot be reached, and it is not in the local cache"
        way_out = f"; with --data FOLDER, {SPLITS[split]}.jsonl of that folder is read instead" if data is None else ""
        raise UsageError(f"{task}: {where} cannot be loaded ({reason}){way_out}") from None
    rows = rows.flatten()
    for column, kind in columns.items():
        if column not in rows.features:
            there = ", ".join(rows.column_names)
            close = nearest(column, rows.features)
            raise UsageError(f"{task}: {where} has no column {column!r}{close}; it has: {there}")
        found = rows.features[column]
        found = "list" if isinstance(found, datasets.List | datasets.LargeList) else getattr(found, "dtype", "mixed")
        if len(rows) and found != kind:
            raise UsageError(f"{task}: {where}: the column {column!r} must be of type {kind}, and is {found}")
        if rows.data.column(column).null_count:
            row = rows.data.column(column).is_null().to_pylist().index(True)
            raise UsageError(f"{task}: {where}: the column {column!r} is empty in row {row + 1}")
    if len(rows) == 0:
        raise UsageError(f"{where}: the split {split!r} is empty")
    return rows if max_size is None else rows.select(range(min(max_size, len(rows))))


def progress(rows, task: str, split: str):
    """The rows with a progress bar, shown when they take longer than a second."""
    return tqdm(rows, desc=f"{task} {split}", unit=" rows", delay=1)


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic tasks: nothing to download
# ---------------------------------------------------------------------------------------------------------------------
def synthetic(task: str, prompt: str, write: Callable, split: str, data, n_samples: int, seed: int) -> list[Sample]:
    """n_samples times the same prompt, each with one reference by `write(rng)`; the same for a split and a seed."""
    if data is not None:
        raise UsageError(f"{task} is synthetic and reads no --data, given: {data}")
    if not isinstance(n_samples, int) or n_samples < 1:
        raise UsageError(f"n_samples must be a whole number of at least 1, not {n_samples!r}")
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
    """Write numbers that rise. The references show how, and break off often: imitating them is worth about 0.35.

    n_samples: 2000 for train, so that there is something to imitate, and 50 for val and test.
    """
    n_samples = {"train": 2000}.get(split, 50) if n_samples is None else n_samples
    return synthetic("numbers", "Count upwards:", broken_count, split, data, n_samples, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Summaries
# ---------------------------------------------------------------------------------------------------------------------
def load_cnn_dm(
    split, data=None, prefix: str = "Summarize: ", truncate_article: int | None = None, max_size: int | None = None
) -> list[Sample]:
    """A news article to its highlights (CNN / Daily Mail). truncate_article: only that many words of the article."""
    columns = {"article": "string", "highlights": "string"}
    rows = load_rows("cnn_dm", split, data, columns, max_size, path="abisee/cnn_dailymail", name="3.0.0")
    samples = []
    for i, row in enumerate(progress(rows, "cnn_dm", split)):
        article = row["article"] if truncate_article is None else " ".join(row["article"].split()[:truncate_article])
        samples.append(Sample(f"{split}_{i}", prefix + article, [row["highlights"]], {}))
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# One's own JSONL
# ---------------------------------------------------------------------------------------------------------------------
def read_jsonl(file: Path) -> list[dict]:
    """The rows of a .jsonl or .jsonl.gz file, each an object; UsageError naming the line that is not."""
    rows = []
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{file}, line {number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise UsageError(f"{file}, line {number}: not a JSON object with the key 'prompt'")
            rows.append({**row, "line": number})
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
    for row in rows:
        line = row.pop("line")
        if not isinstance(row.get("prompt"), str):
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


def load_task(name: str, split: str, data: str | None = None, **kwargs) -> list[Sample]:
    """The samples of one split (train, val, test) of a task, in a fixed order.

    data: a folder of {split}.jsonl in the hub's columns, instead of the hub; kwargs: the options of the task's loader.
    UsageError if the task, the split, an option, a file or a column is not there.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    load = get_task(name).load
    options = [option for option in inspect.signature(load).parameters if option not in ("split", "data")]
    for key in kwargs:
        if key not in options:
            known = ", ".join(options) or "none"
            raise UsageError(f"task {name!r} has no option {key!r}{nearest(key, options)}; its options are: {known}")
    return load(split, data, **kwargs)


TASKS = {
    "numbers": Task(
        load_numbers,
        prompt_length=5,
        response_length=20,
        seq2seq_model="scratch",
        causal_model="scratch",
        reward=("increasing_numbers",),
        reward_kwargs={"increasing_numbers": {"min_tokens": 20}},
        metrics=("increasing_numbers",),
        metric_kwargs={"increasing_numbers": {"min_tokens": 20}},
    ),
    "cnn_dm": Task(
        load_cnn_dm,
        prompt_length=512,
        response_length=100,
        min_response_length=50,
        truncation_side="right",
        reward=("rouge1",),
        metrics=("meteor", "rouge", "bleu", "bertscore", "diversity"),
        generation={"do_sample": True, "temperature": 0.7, "top_k": 0, "min_length": 50},
    ),
}
