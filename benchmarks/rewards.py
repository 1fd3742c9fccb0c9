"""Prints how many texts per second each reward and metric scores: 256 texts of 60 words, on one core.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/rewards.py [--names rouge1 bleu] [--references 4] [--rounds 3]

Texts are made-up words drawn by Zipf's law, with punctuation; half of each text's words are its reference's at the same
place. "first" is the first visit of references, "again" new texts for the same references, as in later epochs and
evaluations: the best of the rounds each. Seconds are of this process's CPU time, so that other work on the machine does
not count; for METEOR and TER, which use a pool of processes, they are of the clock.

Learned rewards cost what their model costs. They are measured only with --models FOLDER, which holds a sequence
classifier with NLI labels under `nli` and a T5 under `t5`, such as tests/tiny_models.py makes.
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards import METRICS, REWARDS, make_metric, make_reward  # noqa: E402

TEXTS, WORDS = 256, 60
WITH_MODEL = {"sentiment", "classifier", "intent", "bleurt", "bertscore", "commongen_preference", "summac_zs"}
NOT_MEASURED = {
    "spice": "needs Java and the CoreNLP jars",
    "spider": "as SPICE",
    "perplexity": "costs what the policy costs",
    "reward_model": "costs what its model costs, as classifier",
    "summac_conv": "as summac_zs",
}


def make_vocabulary(rng: random.Random, size: int = 5000) -> tuple[list[str], list[float]]:
    words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(2, 9))) for _ in range(size)]
    return words, [1 / rank for rank in range(1, size + 1)]


def make_text(rng: random.Random, vocabulary) -> str:
    words = rng.choices(*vocabulary, k=WORDS)
    return " ".join(word + ("." if i % 15 == 14 else "," if i % 7 == 6 else "") for i, word in enumerate(words))


def near(rng: random.Random, reference: str, vocabulary) -> str:
    pairs = zip(reference.split(), make_text(rng, vocabulary).split(), strict=True)
    return " ".join(rng.choice(pair) for pair in pairs)


def make_meta(rng: random.Random, vocabulary) -> dict:
    cells = [{"is_header": i < 5, "value": " ".join(rng.choices(*vocabulary, k=2))} for i in range(25)]
    table = {"table": [cells[i : i + 5] for i in range(0, 25, 5)], "highlighted_cells": [[1, 0], [1, 1], [1, 4]]}
    table |= {"table_page_title": "A page title", "table_section_title": "Section", "table_section_text": ""}
    return {"raw_table": {**table, "overlap_subset": True}, "concepts": ["one", "two", "three"], "intent": 1}


def measure(scorer, clock, seed: str, references_each: int, rounds: int) -> tuple[float, float]:
    """Texts per second at the first visit of references, and at the next."""
    rng = random.Random(seed)  # of its own for each name: words and references seen before would be remembered
    vocabulary = make_vocabulary(rng)
    prompts = ["generate a sentence with: one two three."] * TEXTS
    first, again = [], []
    for _ in range(rounds):
        references = [[make_text(rng, vocabulary) for _ in range(references_each)] for _ in range(TEXTS)]
        metas = [make_meta(rng, vocabulary) for _ in range(TEXTS)]
        if hasattr(scorer, "prepare"):
            scorer.prepare(references)
        for times in (first, again):
            texts = [near(rng, group[0], vocabulary) for group in references]
            start = clock()
            scorer(prompts, texts, references, metas)
            times.append(clock() - start)
    return TEXTS / min(first), TEXTS / min(again)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", help="only these rewards and metrics")
    parser.add_argument("--references", type=int, default=1, help="per sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=Path, help="folder with small models, to measure the learned ones too")
    args = parser.parse_args()
    models = {"commongen_preference": {"model": f"{args.models}/t5"}, "bertscore": {"num_layers": 1}}
    models["bertscore"]["model_type"] = f"{args.models}/nli"
    print(f"{TEXTS} texts of {WORDS} words, {args.references} reference(s) each, texts per second")
    print(f"{'':28}{'first':>10}{'again':>10}")
    for kind, table, make in (("reward", REWARDS, make_reward), ("metric", METRICS, make_metric)):
        for name in table:
            if args.names and name not in args.names:
                continue
            if name in NOT_MEASURED or (name in WITH_MODEL and not args.models):
                print(f"{kind} {name:21}  {NOT_MEASURED.get(name, 'costs what its model costs')}")
                continue
            options = models.get(name, {"model": f"{args.models}/nli"}) if name in WITH_MODEL else {}
            clock = time.perf_counter if name in ("meteor", "ter") else time.process_time
            first, again = measure(make(name, **options), clock, f"{kind} {name}", args.references, args.rounds)
            print(f"{kind} {name:21}{first:10.0f}{again:10.0f}", flush=True)
