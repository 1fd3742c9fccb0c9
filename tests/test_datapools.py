"""Every task's prompts, references and meta, pinned on hand-written rows in the hub's columns, and the errors.

tests/data/TASK/ has the rows, in the very columns of the hub and of the archives; they go through the same code as
downloaded ones. tests/data/totto_prompts.jsonl has tables with the prompts that the original linearisation gives.
"""

import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import zipfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets
import huggingface_hub
import numpy as np
import pytest
import tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import datapools
from datapools import TASKS, Sample, UsageError, get_task

DATA = Path(__file__).parent / "data"
HUB_TASKS = [name for name in TASKS if name not in ("numbers", "dates")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """datasets copies what it reads: not into the cache of whoever runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def online(monkeypatch):
    """As if HF_HUB_OFFLINE were not set."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def folder(task):
    return str(DATA / {"imdb_seq2seq": "imdb"}.get(task, task))


def load_task(*args, **kwargs):
    """All samples of a split."""
    return list(datapools.load_task(*args, **kwargs))


def load(task, split, **kwargs):
    return load_task(task, split, data=folder(task), **kwargs)


def rows_of(task, file):
    return [json.loads(line) for line in (DATA / task / file).read_text(encoding="utf-8").splitlines()]


def write_jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def message(call, *args, **kwargs):
    """The one line of the UsageError that the call must end in."""
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Synthetic tasks


def rising_prefix(text):
    numbers = [int(word) for word in text.split()]
    rise = 1
    while rise < len(numbers) and numbers[rise] > numbers[rise - 1]:
        rise += 1
    return rise / max(len(numbers), 10)


def test_numbers():
    samples = load_task("numbers", "train")
    assert len(samples) == 2000 and len(load_task("numbers", "val")) == len(load_task("numbers", "test")) == 50
    assert load_task("numbers", "train") == samples != load_task("numbers", "train", seed=1)
    assert load_task("numbers", "val", n_samples=7) == load_task("numbers", "val")[:7]
    assert {sample.prompt for sample in samples} == {"Count upwards:"}
    texts = [sample.references[0] for sample in samples]
    assert texts[0] == "69 74 81 87 93 96 103 16 17 10 11 10 13 14 17"
    assert 0.3 < sum(map(rising_prefix, texts)) / len(texts) < 0.4
    assert all(12 <= len(text.split()) <= 18 for text in texts)
    assert all(0 <= int(word) <= 300 for text in texts for word in text.split())


def test_dates():
    samples = load_task("dates", "train")
    assert len(samples) == 2000 and len(load_task("dates", "val")) == len(load_task("dates", "test")) == 100
    assert load_task("dates", "train") == samples != load_task("dates", "train", seed=1)
    assert {sample.prompt for sample in samples} == {"Write a date:"}
    dated = sum(any(word[:4].isdigit() for word in sample.references[0].split()) for sample in samples)
    assert 0.2 < dated / 2000 < 0.3
    assert len({sample.references[0] for sample in samples}) > 700


# The prompts, references and meta of every task


def test_imdb():
    texts = [row["text"] for row in rows_of("imdb", "train.jsonl")]
    shuffled = datasets.Dataset.from_dict({"text": texts}).shuffle(seed=42)["text"]
    train, val, test = (load("imdb", split) for split in datapools.SPLITS)
    assert [len(train), len(val), len(test)] == [32, 8, 10]
    assert [sample.references for sample in train + val] == [[text] for text in shuffled]
    assert train[0] == Sample(
        id="train_0",
        prompt="Nobody's Umbrella is a warm and funny film that I would gladly see again.<br /><br />The cast plays",
        references=[
            "Nobody's Umbrella is a warm and funny film that I would gladly see again.<br /><br />The cast plays "
            "together as if they had known each other for years, and the last scene stayed with me all week."
        ],
        meta={},
    )
    assert test[0].prompt == "I did not expect much from Salt Road and walked out smiling. The story"
    assert datapools.halves("one two  three") == ("one two", " three")
    assert datapools.halves("one two three") == ("one", "two three")


def test_imdb_test_split_has_5000_reviews(tmp_path):
    reviews = [{"text": f"review number {i}", "label": i % 2} for i in range(5003)]
    write_jsonl(tmp_path / "test.jsonl", reviews)
    samples = load_task("imdb", "test", data=str(tmp_path))
    shuffled = datasets.Dataset.from_list(reviews).shuffle(seed=42)["text"][:5000]
    assert [sample.references[0] for sample in samples] == shuffled


def test_imdb_seq2seq():
    train, val = load("imdb_seq2seq", "train"), load("imdb_seq2seq", "val")
    labels = {row["text"]: row["label"] for row in rows_of("imdb", "train.jsonl")}
    every = load("imdb", "train")
    assert [sample.id for sample in train] == [sample.id for sample in every if labels[sample.references[0]] == 1]
    assert {labels[sample.meta["reference"]] for sample in val} == {0, 1}
    assert train[0].prompt == every[0].prompt
    assert train[0].references == [
        "together as if they had known each other for years, and the last scene stayed with me all week."
    ]
    assert all(f"{sample.prompt} {sample.references[0]}" == sample.meta["reference"] for sample in train + val)
    assert load("imdb_seq2seq", "train", positive_ratio=0.5) == train[: len(train) // 2]
    assert load("imdb_seq2seq", "val", positive_ratio=0.5) == val


def test_commongen():
    train, val, test = (load("commongen", split) for split in datapools.SPLITS)
    assert len(train) == len(rows_of("commongen", "train.jsonl")) and len(val) == len(test) == 8
    assert [sample.references for sample in train[:2]] == [
        ["Two girls row a boat across the lake."],
        ["An old man rows his boat on the lake every morning."],
    ]
    assert val[2] == Sample(
        id="val_2",
        prompt="generate a sentence with: cook soup kitchen.",
        references=[
            "The cook makes soup in the kitchen.",
            "There is soup on the stove and the cook is in the kitchen.",
            "In the kitchen a cook tastes the soup.",
        ],
        meta={"concepts": ["cook", "soup", "kitchen"]},
    )
    assert all(sample.references == ["empty reference"] for sample in test)
    assert load("commongen", "val", prefix="say: ")[0].prompt == "say: kite wind fly."


def test_commongen_groups_rows_that_lie_apart(tmp_path):
    rows = [{"concept_set_idx": i, "concepts": ["cat", "sit"], "target": f"text {n}"} for n, i in enumerate((3, 1, 3))]
    write_jsonl(tmp_path / "val.jsonl", rows)
    samples = load_task("commongen", "val", data=str(tmp_path))
    assert [sample.references for sample in samples] == [["text 0", "text 2"], ["text 1"]]


def test_cnn_dm():
    train, val, test = (load("cnn_dm", split) for split in datapools.SPLITS)
    assert len(train) == len(val) == len(test) == 8
    assert val[2] == Sample(
        id="val_2",
        prompt="Summarize: A goat that had lived for a week on the roof of the school in Old Harrow was brought down "
        "on Friday. Firemen used a ladder and a bag of apples. Nobody knows how the animal got up there. The pupils "
        "have asked to keep it, and the head teacher is thinking about it.",
        references=["Goat brought down from school roof in Old Harrow.\nPupils want to keep it."],
        meta={},
    )
    short = load("cnn_dm", "val", truncate_article=4, prefix="TL: ", max_size=3)
    assert [sample.prompt for sample in short] == [
        "TL: The town of Castle",
        "TL: Ferries from Gull Point",
        "TL: A goat that had",
    ]


def test_xsum():
    samples = load("xsum", "test")
    assert len(samples) == 8
    assert samples[1] == Sample(
        id="test_1",
        prompt="Ferries from Halmere will run only twice a day from Monday.\nThe company says that one of its two "
        "boats needs a new engine.\nPeople who work on the other shore fear that they will lose an hour each morning.\n"
        "The repair is to take three weeks.TL;DR:",
        references=["Ferry traffic from Halmere is to be halved for three weeks because of an engine repair."],
        meta={},
    )


@pytest.mark.parametrize("case", [json.loads(line) for line in open(DATA / "totto_prompts.jsonl", encoding="utf-8")])
def test_totto_prompts_are_the_originals(case, tmp_path):
    table = [
        [{"value": value, "column_span": span, "is_header": bool(header), "row_span": 1} for value, span, header in row]
        for row in case["table"]
    ]
    row = rows_of("totto", "validation.jsonl")[0] | {
        "table": table,
        "table_page_title": case["page_title"],
        "table_section_title": case["section_title"],
        "highlighted_cells": case["highlighted_cells"],
    }
    write_jsonl(tmp_path / "val.jsonl", [row])
    for representation in ("subtable", "fulltable"):
        samples = load_task("totto", "val", data=str(tmp_path), representation=representation)
        assert samples[0].prompt == case[representation]


def test_totto():
    train, val, test = (load("totto", split) for split in datapools.SPLITS)
    assert len(train) == len(val) == len(test) == 8
    cells = (
        "<table> <cell> 1992 <col_header> Year </col_header> </cell> "
        "<cell> Halmere <col_header> Lake </col_header> </cell> "
        "<cell> 21 <col_header> Time (min) </col_header> </cell> </table>"
    )
    titles = "<page_title> Rosa Whitlock (swimmer) </page_title> <section_title> Crossings </section_title> "
    assert val[1].prompt == cells + titles + cells
    assert val[1].references == [
        "In 1992, Rosa Whitlock crossed Halmere in 21 minutes.",
        "Rosa Whitlock swam across Halmere in 21 minutes in 1992.",
        "It took Rosa Whitlock 21 minutes to cross Halmere in 1992.",
    ]
    row = rows_of("totto", "validation.jsonl")[1]
    raw = val[1].meta["raw_table"]
    assert {key for key in row if raw[key] != row[key]} == {"overlap_subset", "sentence_annotations"}
    assert raw["sentence_annotations"][2] == {
        "original_sentence": "It took Rosa Whitlock 21 minutes to cross Halmere in 1992, as the club noted.",
        "sentence_after_deletion": "It took Rosa Whitlock 21 minutes to cross Halmere in 1992.",
        "sentence_after_ambiguity": "It took Rosa Whitlock 21 minutes to cross Halmere in 1992.",
        "final_sentence": "It took Rosa Whitlock 21 minutes to cross Halmere in 1992.",
    }
    assert [sample.meta["raw_table"]["overlap_subset"] for sample in val] == [i % 3 == 0 for i in range(8)]
    assert all(
        sample.references == [""] and len(sample.meta["raw_table"]["sentence_annotations"]) == 1 for sample in test
    )
    assert val[3].prompt.count("<page_title>") == 0 and val[3].prompt.count("<section_title>") == 1
    whole = load("totto", "val", representation="fulltable")[1].prompt
    assert whole.count("<row>") == 6 and whole.count("<highlighted_cell>") == 6


def test_narrative_qa():
    story = (
        "mara keeps a lighthouse with her uncle. one night the lamp fails and mara rows out with a lantern to warn the "
        "mail boat. the captain gives her a brass compass. "
    )
    train, val, test = (load("narrative_qa", split) for split in datapools.SPLITS)
    assert len(train) == len(val) == len(test) == 10
    assert train[0] == Sample("train_0", f"what does mara keep? \\n {story}", ["a lighthouse", "a lighthouse"], {})
    assert train[1].references == ["a lantern", '"her" lantern']  # quotation marks are text
    assert train[2].references == ["none", "a brass compass"]  # and so is "None"
    assert len(train[3].prompt.split(" \\n ")) == 2


def test_narrative_qa_groups_rows_that_lie_apart(tmp_path):
    (tmp_path / "dev.tsv").write_text('A? \\n s \t 007 \nB? \\n s \t"x \na? \\n s \t NA \n', encoding="utf-8")
    samples = load_task("narrative_qa", "val", data=str(tmp_path))
    assert [(sample.prompt, sample.references) for sample in samples] == [
        ("a? \\n s ", ["007", "na"]),
        ("b? \\n s ", ['"x']),
    ]


def test_narrative_qa_reads_the_first_two_cells(tmp_path):
    (tmp_path / "train.tsv").write_text("Who? A story\tBob\tthird\nWhere? A story\there\tthird\n")
    with pytest.warns(match="loss of data"):
        samples = list(load_task("narrative_qa", "train", data=str(tmp_path)))
    assert [(s.prompt, s.references) for s in samples] == [("who? a story", ["bob"]), ("where? a story", ["here"])]


@pytest.mark.parametrize(
    "task, city", [("wmt16", "Bremen"), ("wmt14_en_de", "Jena"), ("wmt16_news", "Essen"), ("iwslt2017", "Lindau")]
)
def test_translations(task, city):
    train, val, test = (load(task, split) for split in datapools.SPLITS)
    assert len(train) == len(val) == len(test) == 8
    assert test[0] == Sample(
        id="test_0",
        prompt=f"translate English to German: The train to {city} is late again.",
        references=[f"Der Zug nach {city} hat wieder Verspätung."],
        meta={},
    )
    assert load(task, "train", max_size=3) == train[:3]


def test_wmt16_other_directions(tmp_path):
    sample = load("wmt16", "test", source_language="de", target_language="en")[1]
    assert sample.prompt == "translate German to English: Wir haben in Ulm Brot und Käse gekauft."
    assert sample.references == ["We bought bread and cheese in Ulm."]
    write_jsonl(tmp_path / "test.jsonl", [{"translation": {"en": "Good day.", "ro": "Bună ziua."}}])
    sample = load_task("wmt16", "test", data=str(tmp_path), target_language="ro")[0]
    assert (sample.prompt, sample.references) == ("translate English to Romanian: Good day.", ["Bună ziua."])
    assert "'fr'" in message(load, "wmt16", "test", target_language="fr")
    assert "'en' to 'en'" in message(load, "wmt16", "test", target_language="en")


def test_crd3():
    train, val, test = (load("crd3", split) for split in datapools.SPLITS)
    assert len(train) == 20 and len(val) == len(test) == 10
    assert train[0] == Sample(
        id="train_ep_0_turn_2",
        prompt="MARTA: Good evening, everyone, and welcome back to the table.\nTOM: Hello!\nMARTA: ",
        references=["Last time you stood in front of the mill, and the door was open."],
        meta={},
    )
    assert train[15] == Sample(
        id="train_ep_1_turn_7",
        prompt="MARTA: Last time you stood in front of the mill, and the door was open.\nLENA: I look inside.\n"
        "MARTA: Roll for perception.\nLENA: 12.\n"
        "MARTA: You see a lantern, a sack of flour and a pair of very small boots.\nTOM: ",
        references=["Boots!"],
        meta={},
    )
    assert load("crd3", "val", max_context=1)[4].prompt == "LENA: 13.\nMARTA: "
    second_game = next(sample for sample in train if sample.id == "train_ep_1_turn_2")
    assert second_game.prompt.count("\n") == 2  # nothing of the game before


def test_crd3_with_half_a_character(tmp_path):
    shutil.copytree(DATA / "crd3", tmp_path / "crd3")
    for game in (tmp_path / "crd3" / "cleaned data").iterdir():
        turns = json.loads(game.read_text())["TURNS"]
        turns[0]["UTTERANCES"][0] += "\ud83d"
        game.write_text(json.dumps({"TURNS": turns}))
    assert re.search(r"\.json .*surrogates not allowed", message(load_task, "crd3", "train", str(tmp_path / "crd3")))


def test_crd3_from_its_archive():
    archive = Path(datasets.config.HF_DATASETS_CACHE) / "crd3" / f"{datapools.CRD3_COMMIT}.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as file:
        for path in (DATA / "crd3").rglob("*_files"), (DATA / "crd3").rglob("*.json"):
            for member in path:
                file.write(member, f"CRD3-{datapools.CRD3_COMMIT}/data/{member.relative_to(DATA / 'crd3')}")
    for split in datapools.SPLITS:
        assert load_task("crd3", split) == load("crd3", split)


def test_daily_dialog():
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        lengths = [len(row["dialog"]) for row in rows_of("daily_dialog", f"{name}.jsonl")]
        assert len(load("daily_dialog", split)) == sum(max(0, length - 5) for length in lengths) == 20
    samples = load("daily_dialog", "val")
    assert samples[1] == Sample(
        id="val_6",
        prompt=" Yes , by the window or near the oven ? <EOU> The window , please . <EOU> Here is the menu . The soup "
        "today is tomato . <EOU> Then I will take the soup and some oven . <EOU> Very well . Anything to drink ?  "
        "<EOU>",
        references=[" Just water , thank you . <EOU>"],
        meta={"emotion": 0, "intent": 3},
    )
    assert (samples[3].id, samples[3].meta) == ("val_13", {"emotion": 0, "intent": 4})
    pair = load("daily_dialog", "val", context_size=1)[0]
    assert (pair.prompt, pair.id) == ("Good morning , do you have a table for two ?  <EOU>", "val_1")


def test_one_file_is_split_8_1_1(tmp_path):
    rows = [{"prompt": f"p{i}", "references": f"r{i}", "id": i, "mood": [i]} for i in range(20)]
    file = str(write_jsonl(tmp_path / "own.jsonl", rows))
    train, val, test = (load_task(file, split) for split in datapools.SPLITS)
    assert [sample.id for sample in val] == ["8", "18"] and [sample.id for sample in test] == ["9", "19"]
    assert [sample.id for sample in train] == [str(i) for i in range(20) if i % 10 < 8]
    assert train[1] == Sample("1", "p1", ["r1"], {"mood": [1]})
    assert (get_task(file).prompt_length, get_task(file).response_length) == (512, 100)


def test_own_folder(tmp_path):
    write_jsonl(
        tmp_path / "train.jsonl", [{"prompt": "p", "references": ["a", "b"], "line": 3}, {"prompt": "2011-05-03"}]
    )
    with gzip.open(tmp_path / "validation.jsonl.gz", "wt") as file:
        file.write('{"prompt": "größer"}\n\n')
    assert load_task(str(tmp_path), "train") == [
        Sample("train_0", "p", ["a", "b"], {"line": 3}),
        Sample("train_1", "2011-05-03", [], {}),
    ]
    assert load_task(str(tmp_path), "val") == [Sample("val_0", "größer", [], {})]
    assert "the split 'test' is missing" in message(load_task, str(tmp_path), "test")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv", "a.tsv.gz"])
def test_one_file_of_every_kind(name, tmp_path):
    """The same rows, and the same samples in all splits; numbers in the cells of a CSV are numbers again."""
    rows = [
        {"id": f"row {i}", "prompt": f'{i:03}, "größer"\n{i}', "references": "null", "mood": i, "name": "2011-05-03"}
        for i in range(20)
    ]
    expected = [Sample(row["id"], row["prompt"], ["null"], {"mood": row["mood"], "name": row["name"]}) for row in rows]
    file = tmp_path / name
    if ".parquet" in name:
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        text = io.StringIO()
        if ".json" in name:
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            text.write("[" + ",\n".join(lines) + "]" if ".jsonl" not in name else "\n".join(lines))
        else:
            table = csv.DictWriter(text, rows[0], delimiter="\t" if ".tsv" in name else ",")
            table.writeheader()
            table.writerows(rows)
        content = b"\xef\xbb\xbf" + text.getvalue().encode()  # with a byte order mark, as Windows writes it
        file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    train, val, test = datapools.load_splits(str(file), None, {})
    assert list(train) == [sample for i, sample in enumerate(expected) if i % 10 < 8]
    assert list(val) == expected[8::10] and list(test) == expected[9::10]
    other = datapools.load_splits(str(file), None, {"prompt_column": "name", "references_column": "prompt"})[1][0]
    assert (other.prompt, other.references) == ("2011-05-03", [expected[8].prompt])
    assert other.meta == {"references": "null", "mood": 8}


def test_rows_of_different_shapes_stay_as_they_are(tmp_path):
    """datasets alone would give each row the keys of all, and refuse a key that is a number here and a list there."""
    rows = [{"prompt": "p", "a": {"x": 1}}, {"prompt": "p", "a": [1, "2"]}, {"prompt": "p", "id": None, "b": 1e400}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    samples = load_task(str(tmp_path), "train")
    assert [sample.meta for sample in samples] == [{"a": {"x": 1}}, {"a": [1, "2"]}, {"b": float("inf")}]
    assert [sample.id for sample in samples] == ["train_0", "train_1", "train_2"]


def test_own_file_is_read_anew_when_it_changes(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "old"}])
    assert load_task(str(tmp_path), "train")[0].prompt == "old"
    with monkeypatch.context() as patched:  # the second time from the cache
        patched.setattr(datapools, "read_rows", None)
        assert load_task(str(tmp_path), "train")[0].prompt == "old"
    write_jsonl(file, [{"prompt": "new"}])
    assert load_task(str(tmp_path), "train")[0].prompt == "new"


def test_saved_to_disk(tmp_path):
    rows = [{"prompt": f"p{i}", "references": [f"r{i}"], "mood": i} for i in range(10)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "dev": whole.select([3]), "odd": whole.select([5])}).save_to_disk(
        tmp_path / "many"
    )
    train, val, test = datapools.load_splits(str(tmp_path / "one"), None, {})
    assert (len(train), val[0], test[0].prompt) == (8, Sample("val_0", "p8", ["r8"], {"mood": 8}), "p9")
    many = str(tmp_path / "many")
    assert "no split 'test'; there is: train, dev, odd" in message(datapools.load_splits, many, None, {})
    train, val, test = datapools.load_splits(many, None, {"test_split": "odd"})
    assert (len(train), val[0].prompt, test[0].prompt) == (10, "p3", "p5")
    assert "no split 'add'" in message(datapools.load_splits, many, None, {"test_split": "add"})
    assert "no named splits" in message(datapools.load_splits, str(tmp_path / "one"), None, {"test_split": "odd"})
    (tmp_path / "one" / "state.json").write_text("{")
    assert "cannot be loaded" in message(datapools.load_splits, str(tmp_path / "one"), None, {})


def test_a_dataset_of_the_hub(monkeypatch, online):
    calls = []

    def hub(**kwargs):
        calls.append(kwargs)
        rows = datasets.Dataset.from_list([{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)])
        return datasets.DatasetDict({"train": rows}) if kwargs["split"] is None else rows.select(range(2))

    monkeypatch.setattr(datapools, "answers", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    typed = {"config": "2017", "prompt_column": "question", "references_column": "answer"}
    train, val, test = datapools.load_splits("org/data.set", None, typed)
    assert calls[0] == {"path": "org/data.set", "name": "2017", "revision": None, "split": None}
    assert (len(train), val[0]) == (8, Sample("val_0", "q8", ["a8"], {}))
    slices = {"train_split": "train[20%:]", "val_split": "train[:20%]"}
    assert "no split 'test'" in message(datapools.load_splits, "org/data.set", None, typed | slices)
    val = datapools.load_task("org/data.set", "val", prompt_column="question", **slices)
    assert [sample.prompt for sample in val] == ["q0", "q1"] and calls[-1]["split"] == "train[:20%]"
    text = message(datapools.load_splits, "org/data.set", None, typed | {"prompt_column": "questions"})
    assert "no column 'questions' (did you mean 'question'?); it has: question, answer" in text
    text = message(datapools.load_splits, "org/data.set", None, typed | {"references_column": "answers"})
    assert "no text under 'answers' (did you mean 'answer'?)" in text


def test_a_dataset_that_is_nowhere():
    text = message(datapools.load_splits, "org/data", None, {})
    assert text.startswith("org/data: no such file or folder; as a dataset of the hub it cannot be loaded")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_prompts_of_messages(kind, tmp_path):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    rows = [{"prompt": chat}, {"prompt": chat[1:]}]
    if kind == "jsonl":
        write_jsonl(tmp_path / "train.jsonl", rows)
    else:
        named = [[message | {"name": None} for message in row["prompt"]] for row in rows]
        datasets.Dataset.from_list([{"prompt": prompt} for prompt in named]).to_parquet(tmp_path / "train.parquet")
    assert [sample.prompt for sample in load_task(str(tmp_path), "train")] == [chat, chat[1:]]


def test_chat_makes_messages_of_texts(tmp_path, monkeypatch):
    chat = [{"role": "system", "content": "Be kind."}]
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i}" if i != 9 else chat} for i in range(10)])
    train, val, test = datapools.load_splits(str(tmp_path / "a.jsonl"), None, {}, chat=True)
    assert [sample.prompt for sample in train[1:3]] == [[{"role": "user", "content": f"p{i}"}] for i in (1, 2)]
    assert val[0].prompt == [{"role": "user", "content": "p8"}] and test[0].prompt == chat
    samples = [Sample("0", "p", ["r"], {}), test[0]]  # as a task of one's own may load
    monkeypatch.setitem(datapools.TASKS, "own", datapools.Task(lambda split, data=None: samples, 8, 8))
    train = datapools.load_splits("own", None, {}, chat=True)[0]
    assert train.take([1, 0]) == [test[0], Sample("0", [{"role": "user", "content": "p"}], ["r"], {})]
    assert list(train[1:]) == [test[0]] and len(train) == 2


# A split


def test_a_split_is_a_sequence():
    texts = [f"t{i}" for i in range(600)]
    rows = datasets.Dataset.from_dict({"text": texts})
    split = datapools.Split(rows, lambda row, n: (row["text"], n), np.arange(599, -1, -2))
    every = [(f"t{row}", n) for n, row in enumerate(range(599, -1, -2))]
    assert list(split) == every and len(split) == 300 and list(reversed(split)) == every[::-1]
    assert (split[0], split[-1], split[np.int64(7)]) == (every[0], every[-1], every[7])
    assert split.take([5, -2, 5]) == [every[5], every[-2], every[5]] and split.take(np.array([3])) == [every[3]]
    assert list(split[10:50:3][2:-1]) == every[10:50:3][2:-1] and split[10:50:3][-2] == every[10:50:3][-2]
    assert list(split[300:]) == [] and split[:0].take([]) == []
    for wrong in (300, -301):
        with pytest.raises(IndexError):
            split[wrong]


def test_a_split_makes_no_sample_before_it_is_asked(tmp_path, monkeypatch):
    """Of a file in the cache one row is looked at, whatever its length; 64 samples are 64 rows."""
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i}"} for i in range(1000)])
    load_task(str(tmp_path / "a.jsonl"), "train")
    made = []
    own_sample = datapools.own_sample
    monkeypatch.setattr(datapools, "own_sample", lambda *args, **kwargs: made.append(1) or own_sample(*args, **kwargs))
    train = datapools.load_task(str(tmp_path / "a.jsonl"), "train")
    assert len(train) == 800 and len(made) == 1
    train.take(range(64))
    train[100:700]
    assert len(made) == 65


def test_every_task_makes_its_samples_when_asked():
    for task in HUB_TASKS:
        split = datapools.load_task(task, "val", data=folder(task))
        assert isinstance(split, datapools.Split) and isinstance(split.rows, datasets.Dataset)
        assert split[1:][0] == split[1] == list(split)[1] and split[-1] == list(split)[-1]


def test_prompt_order(monkeypatch):
    """One permutation per epoch, whatever is asked for; the numbers of generators made by hand."""
    datapools.epoch_order.cache_clear()

    def epoch(seed, number):
        generator = np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, 2]))
        return list(generator.permutation(7))

    expected = epoch(3, 0) + epoch(3, 1) + epoch(3, 2)
    assert datapools.prompt_order(range(21), 7, 3) == expected
    assert datapools.prompt_order([20, 6, 7], 7, 3) == [expected[20], expected[6], expected[7]]
    assert sorted(expected[:7]) == list(range(7)) and expected[:7] != expected[7:14] != datapools.prompt_order(
        range(7), 7, 4
    )
    datapools.epoch_order.cache_clear()
    for start in range(0, 1000, 10):
        datapools.prompt_order(range(start, start + 10), 1000, 0)
    assert datapools.epoch_order.cache_info().misses == 1


# From texts to tokens, and back


def make_tokenizer(template=None, seq2seq_tail=None, **kwargs):
    """Letters as tokens, "▁" for a space as sentencepiece has it; `template` is what is put around a text."""
    words = ["<s>", "</s>", "<pad>", "<unk>", "<de>", *"▁abcdefghijklmnopqrstuvwxyz:.!?"]
    model = tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    if template:
        specials = [(token, made.token_to_id(token)) for token in ("<s>", "</s>", "<de>")]
        made.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=specials)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=["<de>"], **special)


LLAMA, APPENDS, BARE, T5 = "<s> $A", "<s> $A </s>", None, "$A </s>"
CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"


@pytest.mark.parametrize(
    "template, seq2seq, side, prompt, length, tokens",
    [
        (LLAMA, False, "left", "abc", 9, "<s> ▁ a b c"),
        (LLAMA, False, "left", "abc", 4, "<s> a b c"),  # BOS is kept
        (LLAMA, False, "right", "abc", 4, "<s> ▁ a b"),
        (LLAMA, False, "left", "<s>abc", 9, "<s> a b c"),  # not twice
        (LLAMA, False, "left", "<s>abc", 3, "<s> b c"),
        (LLAMA, False, "left", "", 9, "<s>"),
        (LLAMA, False, "left", "a</s>", 9, "<s> ▁ a </s>"),  # the prompt's own
        (APPENDS, False, "left", "abc", 9, "<s> ▁ a b c"),  # a response does not begin after EOS
        (APPENDS, False, "right", "abc", 3, "<s> ▁ a"),
        (APPENDS, False, "right", "", 3, "<s>"),
        (T5, False, "right", "", 3, "<s>"),
        (BARE, False, "left", "abc", 2, "b c"),
        (BARE, False, "left", "", 2, "<s>"),
        (BARE, False, "left", "<s>a", 9, "<s> a"),
        (T5, True, "right", "abc", 9, "▁ a b c </s>"),
        (T5, True, "right", "abc", 3, "▁ a </s>"),  # EOS is kept
        (T5, True, "left", "abc", 3, "b c </s>"),
        (T5, True, "left", "", 3, "</s>"),
        (APPENDS, True, "left", "abc", 4, "<s> b c </s>"),
        (APPENDS, True, "left", "<s>abc", 9, "<s> a b c </s>"),
        ("$A </s> <de>", True, "right", "abc", 4, "▁ a </s> <de>"),
        (BARE, True, "left", "", 3, "<s>"),
    ],
)
def test_encode_prompts(template, seq2seq, side, prompt, length, tokens):
    tokenizer = make_tokenizer(template)
    rows = datapools.encode_prompts(tokenizer, [prompt, "k"], length, side, seq2seq)
    assert tokenizer.convert_ids_to_tokens(rows[0]) == tokens.split()
    assert len(rows[1]) in (2, 3, 4)


def test_encode_prompts_without_bos():
    tokenizer = make_tokenizer(bos_token=None)
    assert datapools.encode_prompts(tokenizer, [""], 9, "left", False) == [[1]]


def test_encode_prompts_leaves_the_tokenizer_as_it_was(tmp_path):
    tokenizer = make_tokenizer(LLAMA)
    tokenizer("abc", truncation=True, max_length=3)  # what was left by others goes as well
    datapools.encode_prompts(tokenizer, ["abcdef" * 9], 4, "left", False)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None
    assert tokenizer.truncation_side == "right"


def test_chat_template():
    chat = [{"role": "user", "content": "abc"}]
    for template in (BARE, LLAMA, APPENDS):  # whether or not the tokenizer adds one, there is one BOS
        tokenizer = make_tokenizer(template, chat_template=CHAT)
        rows = datapools.encode_prompts(tokenizer, [chat], 99, "right", False)
        assert tokenizer.convert_ids_to_tokens(rows[0]) == "<s> u s e r : ▁ a b c !".split()
        rows = datapools.encode_prompts(tokenizer, [chat], 4, "right", False)
        tokens = tokenizer.convert_ids_to_tokens(rows[0])
        assert tokens[-3:] == ["b", "c", "!"]  # cut on the left: the end says whose turn it is
    tokenizer = make_tokenizer(LLAMA, chat_template=CHAT.replace("<s>", ""))
    rows = datapools.encode_prompts(tokenizer, [chat], 99, "right", False)
    assert tokenizer.convert_ids_to_tokens(rows[0])[:3] == ["<s>", "▁", "u"]
    rows = datapools.encode_prompts(tokenizer, [chat, "abc"], 99, "right", False)
    assert tokenizer.convert_ids_to_tokens(rows[1]) == ["<s>", "▁", "a", "b", "c"]


def test_chat_errors():
    chat = [{"role": "user", "content": "abc"}]
    assert "no chat template" in message(datapools.encode_prompts, make_tokenizer(), [chat], 9, "left", False)
    refusing = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in message(datapools.encode_prompts, refusing, [chat], 9, "left", False)


@pytest.mark.parametrize("prompt, response, text", [("say:", "▁ c a t </s>", " cat"), ("say: cat", "d o g", "dog")])
def test_a_response_goes_on_from_the_prompt(prompt, response, text):
    """The space that a sentencepiece tokenizer drops at the start of what it decodes stays where the model wrote it."""
    tokenizer = make_tokenizer(LLAMA)
    queries = datapools.encode_prompts(tokenizer, [prompt, "k"], 99, "left", False)
    responses = [tokenizer.convert_tokens_to_ids(response.split()), [tokenizer.eos_token_id]]
    assert datapools.decode_responses(tokenizer, queries, responses, False) == [text, ""]
    assert datapools.decode_responses(tokenizer, queries, responses, True) == [text.strip(), ""]
    whole = tokenizer.decode(queries[0] + responses[0], skip_special_tokens=True)
    assert prompt + text == whole


def test_a_prompt_that_ends_within_a_character():
    """Its text is not how prompt and response begin, so the response is decoded alone."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    query, response = tokenizer("aü").input_ids, tokenizer("bc").input_ids
    assert len(query) == 3
    assert datapools.decode_responses(tokenizer, [query[:2]], [query[2:] + response], False) == ["\ufffdbc"]
    assert datapools.decode_responses(tokenizer, [query], [response], False) == ["bc"]


def test_eos_ids():
    def config(eos):
        return GenerationConfig(eos_token_id=eos)

    tokenizer = make_tokenizer()
    assert datapools.eos_ids(tokenizer, config(None), 99) == [1]
    assert datapools.eos_ids(tokenizer, config([9, 1, 4]), 99) == [1, 4, 9]
    assert datapools.eos_ids(make_tokenizer(eos_token=None), config([9]), 99) == [9]
    assert "no EOS" in message(datapools.eos_ids, make_tokenizer(eos_token=None), config(None), 99).replace("an", "no")


def test_pad():
    ids, mask = datapools.pad([[1, 2, 3], [0]], 0, "cpu")
    assert ids.tolist() == [[1, 2, 3], [0, 0, 0]] and mask.tolist() == [[True] * 3, [True, False, False]]
    ids, mask = datapools.pad([[1, 2, 3], [0]], 9, "cpu", left=True)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 0]] and mask.tolist() == [[True] * 3, [False, False, True]]


def test_describe_lengths(monkeypatch):
    tokenizer = make_tokenizer(LLAMA, chat_template=CHAT)
    samples = [Sample("", "a" * (i + 1), ["b" * i], {}) for i in range(10)]
    line = datapools.describe_lengths(tokenizer, samples, 10, 9)
    assert line == (
        "prompts: 8 tokens (median), 12 (95%), 20.0% truncated to 10; "
        "references: 6 tokens (median), 10 (95%), 20.0% longer than a response can be; "
        "logits of an update: 0.0 MiB a sequence"
    )
    assert f"update: {8 * 10**5 * len(tokenizer) / 2**20:.1f} MiB" in datapools.describe_lengths(
        tokenizer, samples, 10, 10**5
    )
    chat = [Sample("", [{"role": "user", "content": "a"}], [], {})] * 2
    line = datapools.describe_lengths(tokenizer, chat, 10, 9)
    assert line.startswith("prompts: 10 tokens (median)") and "val and test measure the same" in line
    assert "val and test measure the same" in datapools.describe_lengths(
        tokenizer, datapools.load_task("numbers", "train"), 10, 9
    )
    asked = []
    sequence = type(
        "Many", (), {"__len__": lambda self: 10**6, "__getitem__": lambda self, i: asked.append(i) or samples[0]}
    )
    datapools.describe_lengths(tokenizer, sequence(), 10, 9)
    assert len(asked) == 2000 and asked[0] == 0 and asked[-1] == 10**6 - 1


# What is typed


def test_typed_options(tmp_path):
    train = datapools.load_splits("numbers", None, {"n_samples": "7", "numbers.seed": "3"})[0]
    assert list(train) == load_task("numbers", "train", n_samples=7, seed=3)
    sample = datapools.load_splits("xsum", folder("xsum"), {"suffix": "2017"})[1][0]
    assert sample.prompt.endswith(".2017")
    assert "n_samples must be" in message(datapools.load_splits, "numbers", None, {"n_samples": "many"})
    assert "did you mean 'n_samples'?" in message(datapools.load_splits, "numbers", None, {"n_sample": "7"})


def test_what_is_typed_is_seen_before_it_is_parsed():
    for line in ("--policy-type causal", "--policy-type=causal", "--policy_type causal", "--policy_type=causal"):
        argv = ["--task", "numbers", *line.split(), "--reward", "a", "b"]
        assert datapools.typed(argv, "--policy-type", "seq2seq") == "causal"
    for line in ("", "--policy-type", "--policy causal"):  # nothing, nothing after it, and another flag
        assert datapools.typed(line.split(), "--policy-type", "seq2seq") == "seq2seq"


def test_parse_kwargs():
    typed = {"min_tokens": "5", "a.k": "[1, 2]", "b.k": "text", "b.none": "null"}
    kwargs = datapools.parse_kwargs(typed, ["a", "b"], {"a": {"min_tokens": 1, "z": 2}})
    assert kwargs == {"a": {"min_tokens": 5, "z": 2, "k": [1, 2]}, "b": {"min_tokens": 5, "k": "text", "none": None}}
    assert "did you mean a.k?" in message(datapools.parse_kwargs, {"c.k": "1"}, ["a"], {})
    text = message(datapools.parse_kwargs, {"min_tokens=5": "a.k=2"}, ["a"], {})
    assert text.endswith("written with a space between: min_tokens 5 a.k 2")


# What is asked of the hub


@pytest.mark.parametrize(
    "task, split, asked",
    [
        ("imdb", "val", {"path": "stanfordnlp/imdb", "split": "train"}),
        ("imdb_seq2seq", "test", {"path": "stanfordnlp/imdb", "split": "test"}),
        ("commongen", "val", {"path": "allenai/common_gen", "split": "validation"}),
        ("cnn_dm", "val", {"path": "abisee/cnn_dailymail", "name": "3.0.0", "split": "validation"}),
        ("xsum", "test", {"path": "EdinburghNLP/xsum", "revision": "refs/convert/parquet", "data_dir": "default"}),
        ("totto", "test", {"path": "google-research-datasets/totto", "revision": "refs/convert/parquet"}),
        ("wmt16", "train", {"path": "wmt/wmt16", "name": "de-en"}),
        ("wmt14_en_de", "val", {"path": "stas/wmt14-en-de-pre-processed", "data_dir": "ende"}),
        ("wmt16_news", "train", {"path": "Helsinki-NLP/news_commentary", "name": "de-en", "split": "train"}),
        ("wmt16_news", "test", {"path": "wmt/wmt16", "name": "de-en", "split": "test"}),
        ("iwslt2017", "val", {"path": "IWSLT/iwslt2017", "data_dir": "iwslt2017-de-en", "split": "validation"}),
        ("daily_dialog", "val", {"path": "li2017dailydialog/daily_dialog", "revision": "refs/convert/parquet"}),
    ],
)
def test_the_hub_is_asked_for(task, split, asked, monkeypatch, online):
    """The arguments of load_dataset; its answer has the hub's feature types where they are not those of JSON."""
    expected = load(task, split)
    load_dataset = datasets.load_dataset
    calls = []

    def hub(**kwargs):
        calls.append(kwargs)
        rows = load_dataset(**local)
        features = rows.features.copy()
        if "translation" in features:
            features["translation"] = datasets.Translation(["de", "en"])
        if "label" in features:
            features["label"] = datasets.ClassLabel(names=["neg", "pos"])
        if "act" in features:
            features["act"] = datasets.List(datasets.ClassLabel(names=["none", "a", "b", "c", "d"]))
        if "concept_set_idx" in features:
            features["concept_set_idx"] = datasets.Value("int32")
        return rows.cast(features).with_format(None)

    of_hub = "train" if task.startswith("imdb") and split == "val" else split
    file = datapools.split_file(folder(task), of_hub, (".jsonl",))
    local = {"path": "json", "data_files": {of_hub: str(file)}, "split": of_hub}
    monkeypatch.setattr(datapools, "answers", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load_task(task, split) == expected
    assert asked.items() <= calls[0].items()


@pytest.mark.parametrize("task", ["imdb", "commongen", "totto", "wmt16", "daily_dialog"])
def test_the_hubs_files_in_a_folder(task, tmp_path):
    """--data FOLDER with Parquet, as the hub has them, gives the same samples."""
    datasets.Dataset.from_list(rows_of(task, "train.jsonl")).to_parquet(tmp_path / "train.parquet")
    assert load_task(task, "train", data=str(tmp_path)) == load(task, "train")


# Errors


@pytest.mark.parametrize("task", HUB_TASKS)
def test_offline_fails_at_once_and_names_the_way_out(task):
    start = time.monotonic()
    text = message(load_task, task, "val")
    assert time.monotonic() - start < 3
    assert "--data FOLDER" in text and text.startswith(f"{task}: ")


def test_a_hub_that_never_answers_is_given_up_within_ten_seconds(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        text = message(load_task, "cnn_dm", "val")
    assert time.monotonic() - start < 10
    assert "abisee/cnn_dailymail" in text and "--data FOLDER" in text


def test_a_name_that_takes_long_to_resolve_is_given_up_as_well(monkeypatch):
    monkeypatch.setattr(datapools, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(datapools.httpx, "head", lambda *args, **kwargs: time.sleep(2))
    start = time.monotonic()
    assert not datapools.answers("http://slow.example")
    assert time.monotonic() - start < 1


@pytest.fixture
def server():
    """A web server with /whole, /short (breaks off) and nothing else; HEAD is answered for all."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            if self.path not in ("/whole", "/short"):
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", "9" if self.path == "/whole" else "99")
            self.end_headers()
            self.wfile.write(b"some text")

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()


def test_download(server, online, monkeypatch):
    checksum = hashlib.sha256(b"some text").hexdigest()
    wrong = message(datapools.download, "crd3", f"{server}/whole", "0" * 64)
    assert "checksum" in wrong and "--data FOLDER" in wrong
    assert "broke off after 9 of 99 bytes" in message(datapools.download, "crd3", f"{server}/short")
    assert "404" in message(datapools.download, "crd3", f"{server}/nothing")
    left = [path.name for path in Path(datasets.config.HF_DATASETS_CACHE, "crd3").iterdir()]
    assert all(name.endswith(".lock") for name in left)
    path = datapools.download("crd3", f"{server}/whole", checksum)
    assert path.read_bytes() == b"some text"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert datapools.download("crd3", f"{server}/whole", checksum) == path  # the second time without a server


COLUMNS = {
    "imdb": ("text", "label"),
    "commongen": ("concept_set_idx", "concepts", "target"),
    "cnn_dm": ("article", "highlights"),
    "xsum": ("document", "summary"),
    "totto": ("table", "highlighted_cells", "table_page_title", "overlap_subset", "sentence_annotations"),
    "wmt16": ("translation",),
    "daily_dialog": ("dialog", "act", "emotion"),
}


@pytest.mark.parametrize("task, column", [(task, column) for task, columns in COLUMNS.items() for column in columns])
def test_missing_columns_are_named(task, column, tmp_path):
    rows = [
        {("other" if key == column else key): value for key, value in row.items()}
        for row in rows_of(task, "train.jsonl")
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    text = message(load_task, task, "train", data=str(tmp_path))
    assert f"no column '{column}" in text and "it has: " in text and "other" in text


def test_bad_columns_are_named(tmp_path):
    def cnn_dm(*rows):
        write_jsonl(tmp_path / "train.jsonl", rows)
        return message(load_task, "cnn_dm", "train", data=str(tmp_path))

    assert "did you mean 'highlight'?" in cnn_dm({"article": "a", "highlight": "b"})
    row = {"article": "a", "highlights": "b"}
    assert "'article' is missing in row 2" in cnn_dm(row, {"highlights": "b"}, row)
    assert "'highlights' must be of type string, and is int64" in cnn_dm({"article": "a", "highlights": 3})
    write_jsonl(tmp_path / "train.jsonl", [{"translation": {"en": "a", "fr": "b"}}])
    assert "no column 'translation.de'" in message(load_task, "iwslt2017", "train", data=str(tmp_path))
    write_jsonl(tmp_path / "train.jsonl", [{"dialog": ["a"] * 7, "act": [1] * 7, "emotion": [0] * 6}])
    assert "row 1 of train" in message(load_task, "daily_dialog", "train", data=str(tmp_path))
    (tmp_path / "train.jsonl").write_text('{"article": "a", "highlights"')
    assert "cannot be loaded" in message(load_task, "cnn_dm", "train", data=str(tmp_path))
    (tmp_path / "train.tsv").write_text("question \\n context\n", encoding="utf-8")
    assert "train.tsv has no answers" in message(load_task, "narrative_qa", "train", data=str(tmp_path))


@pytest.mark.parametrize("content", ["", "\n"])
def test_empty_splits_are_named(content, tmp_path):
    for file in ("validation.jsonl", "val.tsv"):
        (tmp_path / file).write_text(content)
    with gzip.open(tmp_path / "test.jsonl.gz", "wt") as file:
        file.write(content)
    for task, split in (("cnn_dm", "val"), ("cnn_dm", "test"), ("narrative_qa", "val"), (str(tmp_path), "val")):
        data = None if task == str(tmp_path) else str(tmp_path)
        assert f"the split '{split}' is empty" in message(load_task, task, split, data)


def test_missing_splits_are_named(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"article": "a", "highlights": "b"}])
    text = message(load_task, "cnn_dm", "val", data=str(tmp_path))
    assert "'val' is missing" in text and "validation.jsonl" in text and "there is: train.jsonl" in text
    assert "not a folder" in message(load_task, "cnn_dm", "val", data=str(tmp_path / "nowhere"))
    assert "train_files" in message(load_task, "crd3", "train", data=str(tmp_path))
    (tmp_path / "aligned data").mkdir()
    (tmp_path / "aligned data" / "train_files").write_text("C1E009")
    assert "C1E009.json" in message(load_task, "crd3", "train", data=str(tmp_path))
    (tmp_path / "cleaned data").mkdir()
    (tmp_path / "cleaned data" / "C1E009.json").write_text('{"TURNS": [{"NAMES": ["A"]}]}')
    assert "UTTERANCES" in message(load_task, "crd3", "train", data=str(tmp_path))


def test_unknown_names(tmp_path):
    assert "did you mean 'cnn_dm'?" in message(get_task, "cnn_dn")
    write_jsonl(tmp_path / "own.jsonl", [])
    for name in ("own.jsnl", "owm.jsonl"):
        text = message(get_task, str(tmp_path / name))
        assert "no such file or folder (did you mean 'own.jsonl'?)" in text and "unknown task" not in text
    for name in ("texts.jsonl", "a/b/c", "tests/data", "./texts", "org/texts.parquet", f"{tmp_path}/"):
        if not Path(name).exists():
            assert "no such file or folder" in message(get_task, name)
    assert get_task("org/data.set").metrics == get_task(str(tmp_path)).metrics == ("rouge",)
    assert "known: train, val, test" in message(load_task, "numbers", "validation")
    text = message(load_task, "numbers", "val", n_sample=3)
    assert "did you mean 'n_samples'?" in text and "n_samples, seed" in text
    assert "its options are: none" in message(load, "imdb", "val", n_samples=3)


@pytest.mark.parametrize(
    "task, options",
    [
        ("numbers", {"n_samples": 0}),
        ("numbers", {"n_samples": "50"}),
        ("imdb_seq2seq", {"positive_ratio": 0.0}),
        ("imdb_seq2seq", {"positive_ratio": 2}),
        ("commongen", {"prefix": 3}),
        ("cnn_dm", {"truncate_article": 0}),
        ("cnn_dm", {"max_size": -1}),
        ("xsum", {"max_size": 1.5}),
        ("totto", {"representation": "table"}),
        ("crd3", {"max_context": 0}),
        ("daily_dialog", {"context_size": 0}),
    ],
)
def test_bad_options_are_named(task, options):
    name, value = next(iter(options.items()))
    text = message(load_task, task, "val", data=None if task == "numbers" else folder(task), **options)
    assert name in text and str(value) in text


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": ', "line 2: not JSON"),
        ('["p"]', "line 2: not a JSON object"),
        ('{"promt": "p"}', "line 2: no text under 'prompt' (did you mean 'promt'?); its keys: promt"),
        ('{"prompt": " "}', "line 2: no text under 'prompt'"),
        ('{"prompt": "p", "references": [1]}', "line 2: 'references' must be"),
        ('{"prompt": [{"role": "user", "text": "p"}]}', "line 2: each message"),
        ('{"prompt": []}', "line 2: each message"),
        ('{"prompt": 7}', "line 2: no text under 'prompt', which is 7"),
        ('{"prompt": "p", "references": ["a\\ud83d"]}', "line 2: \\ud83d is half a character"),
        ('{"prompt": "p", "mood": {"k\\udc00": 1}}', "line 2: \\udc00 is half a character"),
    ],
)
def test_bad_jsonl(line, said, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "p"}\n' + line + "\n")
    assert said in message(load_task, str(tmp_path), "train")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("train.json", '[{"prompt": "p"},\n{"prompt": }]', "line 2: not JSON"),
        ("train.json", '[{"prompt": "p"}, 3]', "row 2: not a JSON object"),
        ("train.csv", "prompt,mood\np,1\np\n", "line 3: not as many cells"),
        ("train.csv", "prompt,mood\np,1\np,2,3\n", "line 3: not as many cells"),
        ("train.csv", "promt,mood\np,1\n", "line 2: no text under 'prompt' (did you mean 'promt'?)"),
        ("train.csv", 'prompt,mood\np,1\n"p\n', "not a table"),
        ("train.tsv", "prompt\tmood\n\t1\n", "line 2: no text under 'prompt', which is ''"),
        ("train.csv", "prompt,mood\n", "train.csv has no rows"),
        ("train.parquet", "prompt", "cannot be loaded"),
        ("train.jsonl", '{"prompt": "a"} {"prompt": "b"}', "line 1: not JSON"),
    ],
)
def test_bad_files_of_other_kinds(name, content, said, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert said in message(load_task, str(tmp_path), "train")


def test_a_prompt_that_is_missing_in_a_table_is_named(tmp_path):
    datasets.Dataset.from_dict({"prompt": ["p", None]}).to_parquet(tmp_path / "train.parquet")
    assert "'prompt' is missing in row 2" in message(load_task, str(tmp_path), "train")
    datasets.Dataset.from_dict({"prompt": ["p", " "]}).to_parquet(tmp_path / "train.parquet")
    assert "train.parquet, row 2: no text under 'prompt'" in message(load_task, str(tmp_path), "train")


def test_bad_jsonl_files(tmp_path):
    file = write_jsonl(tmp_path / "few.jsonl", [{"prompt": "p"}] * 9)
    assert "9 rows are too few" in message(load_task, str(file), "val")
    file.write_bytes(b'{"prompt": "\xff"}\n')
    assert "cannot be read" in message(load_task, str(file), "val")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}' * 99)[:25])
    assert "train.jsonl.gz cannot be read" in message(load_task, str(tmp_path), "train")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 20)
    assert "train.jsonl.gz cannot be read" in message(load_task, str(tmp_path), "train")
    (tmp_path / "test.jsonl.gz").write_bytes(b"not gzipped")
    assert "test.jsonl.gz cannot be read" in message(load_task, "cnn_dm", "test", data=str(tmp_path))
    assert "names the data already" in message(load_task, str(file), "val", data=str(tmp_path))
    assert "synthetic" in message(load_task, "dates", "val", data=str(tmp_path))


# The table


def test_rewards_and_metrics_exist():
    rewards = pytest.importorskip("rewards")
    for name, task in TASKS.items():
        assert set(task.reward) <= set(rewards.REWARDS) and set(task.metrics) <= {*rewards.METRICS, *rewards.REWARDS}
        assert len(task.reward) == len(task.reward_weights)
        assert task.reward_kwargs.keys() <= set(task.reward) and task.metric_kwargs.keys() <= set(task.metrics)
        samples = load_task(name, "val", data=None if name in ("numbers", "dates") else folder(name))
        rewards.checked_options("reward", task.reward, {}, task.reward_kwargs, samples)
        rewards.checked_options("metric", task.metrics, {}, task.metric_kwargs, samples)


@pytest.mark.parametrize(
    "task, prompt, response, least, side, reward",
    [
        ("numbers", 5, 20, 0, "left", ("increasing_numbers",)),
        ("dates", 5, 30, 0, "left", ("dates",)),
        ("imdb", 64, 48, 48, "left", ("sentiment",)),
        ("commongen", 20, 20, 5, "right", ("meteor", "repeat_penalty")),
        ("cnn_dm", 512, 100, 50, "right", ("rouge1",)),
        ("totto", 512, 50, 10, "left", ("meteor",)),
        ("narrative_qa", 512, 50, 0, "right", ("rouge_l_max",)),
        ("iwslt2017", 128, 128, 0, "right", ("ter",)),
        ("wmt16", 128, 128, 0, "right", ("ter",)),
        ("daily_dialog", 128, 20, 2, "left", ("intent",)),
    ],
)
def test_settings_of_the_paper(task, prompt, response, least, side, reward):
    task = TASKS[task]
    assert (task.prompt_length, task.response_length, task.min_response_length) == (prompt, response, least)
    assert (task.truncation_side, task.reward) == (side, reward)
    assert ("num_beams" in task.generation) != ("do_sample" in task.generation)


def test_docs_say_what_the_table_says():
    text = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    for name, task in TASKS.items():
        source, settings = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")][:2]
        least = f" ({task.min_response_length})" if task.min_response_length else ""
        assert f"| {task.prompt_length} / {task.response_length}{least} | {task.truncation_side} |" in settings
        assert all(reward in settings for reward in task.reward)
        assert " ".join(task.metrics) in settings or "as wmt16" in settings
        assert all(option in settings for option in datapools.task_options(task.load))
    own = text[text.index("## Your own texts") :]
    assert all(f"`{option}`" in own for option in datapools.task_options(get_task("org/data").load))
    assert all(ending in own for ending in datapools.OWN_FILES if not ending.endswith(".gz"))


def test_decoding_is_said_in_full_and_in_the_types_that_the_library_takes():
    """Where model/ does not say top_k, its generate takes the 50 likeliest; and it refuses 2 for 2.0."""
    searching, sampling = get_task("wmt16"), get_task("numbers")
    told = datapools.decoding_options(searching, {"do_sample": "true", "temperature": "2"})
    assert told == {"do_sample": True, "temperature": 2.0, "top_k": 0} and type(told["temperature"]) is float
    assert datapools.decoding_options(sampling, {"top_k": "5"})["top_k"] == 5
    told = datapools.decoding_options(searching, {"repetition_penalty": "2", "early_stopping": "never"})
    assert told == searching.generation | {"do_sample": False, "repetition_penalty": 2.0, "early_stopping": "never"}
    for name, value, right in (
        ("temperature", "hot", "a number above 0"),
        ("temperature", "0", "a number above 0"),
        ("top_k", "2.5", "a whole number, at least 0"),
        ("top_p", "1.5", "a number above 0, at most 1"),
        ("num_beams", "0", "a whole number, at least 1"),
        ("length_penalty", "long", "a number"),
        ("early_stopping", "maybe", "true, false or never"),
        ("do_sample", "1", "true or false"),
    ):
        with pytest.raises(UsageError, match=f"--decoding {name} {value}: must be {right}$"):
            datapools.decoding_options(searching, {name: value})
