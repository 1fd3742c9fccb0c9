"""GRUE, RL4LMs' benchmark, as runs: seven tasks; zero-shot, supervised, PPO, NLPO, and both from a supervised model.

    python benchmarks/grue.py --tasks imdb --seeds 1 2 3                      # prints the commands
    python benchmarks/grue.py --tasks imdb --seeds 1 2 3 --run --launcher "torchrun --nproc_per_node 4"
    python benchmarks/grue.py --tasks imdb --seeds 1 2 3 --table              # from what has ended so far

Each command that is printed can be run by hand, and goes on where it ended. Settings are those of the scripts' own
tables, which are RL4LMs' configurations; what differs from a supervised start stands here. Nobody has run the whole: it
needs the hub and GPUs. `--flags=" --metrics meteor rouge"` is added to every command: this leaves out the metrics of
`commongen` that need Java.
"""

import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("zero-shot", "supervised", "PPO", "NLPO", "supervised+PPO", "supervised+NLPO")


@dataclass(frozen=True)
class Row:
    """nlpo: flags of NLPO alone; from_supervised: of PPO and NLPO from a supervised model. A flag's value is a text."""

    kind: str  # of policy
    figures: tuple[str, ...]  # names in eval.jsonl, a column each
    supervised: str  # the supervised model that RL4LMs published
    nlpo: dict = field(default_factory=dict)
    from_supervised: dict = field(default_factory=dict)
    nlpo_from_supervised: dict = field(default_factory=dict)
    split: str = "test"


# RL4LMs' configurations of a supervised start. Learning rates are converted as in the scripts' TASK_DEFAULTS: what is a
# quarter there is a quarter here.
TASKS = {
    "imdb": Row("causal", ("sentiment", "perplexity"), "rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews"),
    "commongen": Row(
        "seq2seq",
        ("meteor", "rougeL", "bleu", "cider", "spice"),
        "rajkumarrrk/t5-common-gen",
        from_supervised={
            "reward": "meteor", "reward-weights": "1", "kl-coef": "0.01", "target-kl": "1", "batch-size": "64",
            "num-minibatches": "8", "num-iterations": "100",
        },
    ),
    "cnn_dm": Row(
        "seq2seq",
        ("rouge1", "rougeL", "meteor", "bleu", "bertscore"),
        "rajkumarrrk/t5-base-fine-tuned-on-cnn-dm",
        nlpo={"reward": "meteor"},
        from_supervised={"kl-coef": "0.01", "num-iterations": "50"},
        nlpo_from_supervised={"target-update-iterations": "30"},
    ),
    "totto": Row(
        "seq2seq",
        ("table_to_text/bleu_overall", "table_to_text/parent_overall_f_score", "meteor"),
        "rajkumarrrk/t5-base-fine-tuned-on-totto",
        from_supervised={"learning-rate": "1.25e-6", "kl-coef": "0.01", "target-kl": "0.2"},
        split="val",  # the references of test are hidden
    ),
    "narrative_qa": Row(
        "seq2seq",
        ("rouge_l_max", "meteor", "bleu"),
        "allenai/unifiedqa-t5-base",
        from_supervised={"learning-rate": "1.25e-6", "target-kl": "0.2"},
    ),
    "iwslt2017": Row(
        "seq2seq",
        ("sacrebleu", "chrf", "ter", "meteor"),
        "rajkumarrrk/t5-fine-tuned-on-iwslt2017en_de",
        from_supervised={"learning-rate": "2e-6"},
    ),
    "daily_dialog": Row(
        "causal",
        ("intent", "meteor", "perplexity"),
        "rajkumarrrk/gpt2-fine-tuned-on-daily-dialog",
        from_supervised={"target-kl": "0.05", "reward-kwargs": "intent_coef 0.25 meteor_coef 0.75"},
    ),
}  # fmt: skip

# (task, method) -> (source, {figure: value}). The paper's other tables were not at hand: their cells stay empty.
PAPER = "Ramamurthy et al. 2022, https://arxiv.org/abs/2210.01241"
TOTTO = "leaderboard of https://github.com/google-research-datasets/ToTTo, hidden test split, not val"
PUBLISHED = {
    ("imdb", "zero-shot"): (PAPER, {"sentiment": 0.489, "perplexity": 32.2}),
    ("imdb", "supervised"): (PAPER, {"sentiment": 0.539, "perplexity": 35.5}),
    ("imdb", "PPO"): (PAPER, {"sentiment": 0.602, "perplexity": 33.8}),
    ("imdb", "NLPO"): (PAPER, {"sentiment": 0.611, "perplexity": 33.8}),
    ("imdb", "supervised+PPO"): (PAPER, {"sentiment": 0.626, "perplexity": 35.1}),
    ("imdb", "supervised+NLPO"): (PAPER, {"sentiment": 0.620, "perplexity": 34.8}),
    ("totto", "supervised+NLPO"): (
        TOTTO, {"table_to_text/bleu_overall": 0.474, "table_to_text/parent_overall_f_score": 0.596}
    ),
}  # fmt: skip


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(TASKS)  # which of the seven
    methods: tuple[str, ...] = METHODS  # which of the six
    seeds: tuple[int, ...] = (1,)  # of PPO and NLPO (RL4LMs: five)
    supervised: Literal["published", "own"] = "published"  # the supervised model: RL4LMs', or one that supervised.py
    # trains (on imdb from all reviews, where RL4LMs' is from the positive ones)
    run: bool = False  # run what is not finished, instead of printing it
    table: bool = False  # print the table of what is finished
    out: Path = Path("runs/grue")  # where the runs go
    data: Path | None = None  # a folder with a folder for each task, read instead of the hub
    launcher: str = ""  # what starts a script instead of python: "torchrun --nproc_per_node 4"
    flags: str = ""  # added to every command: "--metrics meteor rouge"


def run_dir(args, task, method, seed):
    return args.out / task / f"{method}_{seed}"


def seeds_of(method, args):
    """Zero-shot and supervised models are evaluated or trained once."""
    return args.seeds if "PPO" in method or "NLPO" in method else args.seeds[:1]


def command(args, task, method, seed):
    """The command of a run as words. --flags stand before what makes it this run, and after what it is set to."""
    row, settings, own = TASKS[task], {}, method == "supervised" and args.supervised == "own"
    run = {"seed": str(seed), "run-dir": str(run_dir(args, task, method, seed))}
    if method in ("zero-shot", "supervised") and not own:
        run["num-iterations"] = "0"
    if method in ("NLPO", "supervised+NLPO"):
        settings |= row.nlpo
    if method.startswith("supervised+"):
        settings |= row.from_supervised | (row.nlpo_from_supervised if "NLPO" in method else {})
    if method.startswith("supervised") and not own:
        trained = run_dir(args, task, "supervised", args.seeds[0]) / "model"
        run["model"] = str(trained) if args.supervised == "own" else row.supervised
    if args.data:
        run["data"] = str(args.data / task)
    if own:
        settings["policy-type"] = row.kind
    script = "supervised" if own else f"{'nlpo' if 'NLPO' in method else 'ppo'}_{row.kind}"
    first, last = (
        [word for name, value in flags.items() for word in (f"--{name}", *value.split())]
        for flags in ({"task": task} | settings, run)
    )
    start = shlex.split(args.launcher) if args.launcher else [sys.executable]
    return [*start, str(ROOT / f"{script}.py"), *first, *shlex.split(args.flags), *last, "--resume"]


def rows_of(folder):
    file = folder / "eval.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def result(args, task, method, seed):
    """The last evaluation of a finished run; None before."""
    folder, split = run_dir(args, task, method, seed), TASKS[task].split
    last = 0
    if method not in ("zero-shot", "supervised") or method == "supervised" and args.supervised == "own":
        last = 1  # the evaluation before training is not it
    rows = [row for row in rows_of(folder) if row["iteration"] >= last]
    done = any(row["split"] == "test" for row in rows)  # the last to be written
    return next((row for row in reversed(rows) if done and row["split"] == split), None)


def cell(values):
    values = [value for value in values if value is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread} ({len(values)})"


def table(args):
    """Markdown: for each figure the mean over seeds, their deviation and number, and what was published."""
    lines, sources = [], {}
    for task in args.tasks:
        row = TASKS[task]
        heads = [head for figure in row.figures for head in (figure.split("/")[-1], "published")]
        lines += [f"\n{task}, {row.split}\n", "| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for method in args.methods:
            found = [result(args, task, method, seed) or {} for seed in seeds_of(method, args)]
            source, published = PUBLISHED.get((task, method), ("", {}))
            mark = f" [{sources.setdefault(source, len(sources) + 1)}]" if source else ""
            cells = []
            for figure in row.figures:
                value = published.get(figure)
                cells += [cell([each.get(figure) for each in found]), "" if value is None else f"{value}{mark}"]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", *(f"[{number}] {source}" for source, number in sources.items())]
    return "\n".join(lines)


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.table:
        print(table(args))
        return
    for task in args.tasks:
        for method in args.methods:
            for seed in seeds_of(method, args):
                if result(args, task, method, seed):
                    continue
                line = command(args, task, method, seed)
                print(shlex.join(line), flush=True)
                if args.run and subprocess.run(line).returncode:
                    sys.exit(f"{task}, {method}, seed {seed}: failed; the same command goes on from its checkpoint")


if __name__ == "__main__":
    main()
