"""Each RL script from the same supervised model on `numbers`: what it takes to reach a validation score.

    python benchmarks/learning.py --seeds 1 2 3 --jobs 2 --out runs/learning

trains one supervised model per policy type and seed, then every script from it until the score is reached, and prints
a table of iterations, sampled tokens and seconds of iterations (evaluations not counted). Each run is a process of one
thread; `--jobs` of them run side by side.
"""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
GOALS = {"ppo": 0.9, "nlpo": 0.9, "a2c": 0.8, "trpo": 0.8}


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the supervised and the RL runs"""
    algorithms: tuple[str, ...] = ("ppo", "nlpo", "a2c", "trpo")
    """which of the four"""
    policy_types: tuple[str, ...] = ("seq2seq", "causal")
    """which policies"""
    jobs: int = 2
    """runs side by side"""
    eval_every: int = 5
    """iterations between evaluations: the resolution of the table"""
    out: Path = Path("runs/learning")
    """where the runs go; those that are there already are read, not repeated"""


def rows_of(file):
    """The whole lines of a JSONL file that may still be growing."""
    return (
        [json.loads(line) for line in file.read_text().splitlines(True) if line.endswith("\n")] if file.exists() else []
    )


def reached(run_dir, goal):
    """The first evaluation on val with at least this score, or None."""
    scores = [row for row in rows_of(run_dir / "eval.jsonl") if row["split"] == "val"]
    return next((row for row in scores if row["increasing_numbers"] >= goal), None)


def run(script, run_dir, *options, goal=None):
    """Runs a script to its end, or, told by SIGTERM, until the goal is reached."""
    if (run_dir / "model").exists():
        return
    command = [sys.executable, ROOT / script, "--task", "numbers", "--run-dir", run_dir, "--resume", *map(str, options)]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(run_dir.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        )
        while process.poll() is None:
            time.sleep(1)
            if goal and reached(run_dir, goal):
                process.send_signal(signal.SIGTERM)
                process.wait()
    if process.returncode:
        raise SystemExit(f"{script} failed: see {run_dir.with_suffix('.log')}")


def experiment(algorithm, policy_type, seed, args):
    """One RL run from its supervised model. Returns a row of the table."""
    script = f"{algorithm}_{policy_type}.py" if algorithm in ("ppo", "nlpo") else f"{algorithm}.py"
    run_dir = args.out / f"{algorithm}_{policy_type}_{seed}"
    model = args.out / f"supervised_{policy_type}_{seed}" / "model"
    options = ["--model", model, "--seed", seed, "--eval-every", args.eval_every]
    run(script, run_dir, *options, goal=GOALS[algorithm])
    start, end = rows_of(run_dir / "eval.jsonl")[0], reached(run_dir, GOALS[algorithm])
    metrics = rows_of(run_dir / "metrics.jsonl")
    batch_size = json.loads((run_dir / "config.json").read_text())["batch_size"]
    taken = [row for row in metrics if end and row["iteration"] <= end["iteration"]]
    tokens = sum(row["rollout/response_length"] * batch_size for row in taken)
    seconds = sum(row["time/iteration_seconds"] for row in taken)
    if end is None:
        return f"| {script} | {policy_type} | {seed} | {start['increasing_numbers']:.2f} | not reached | | | |"
    scores = f"{start['increasing_numbers']:.2f} | {end['increasing_numbers']:.2f}"
    return f"| {script} | {policy_type} | {seed} | {scores} | {end['iteration']} | {tokens:,.0f} | {seconds:.0f} |"


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        starts = [
            pool.submit(
                run, "supervised.py", args.out / f"supervised_{kind}_{seed}", "--policy-type", kind, "--seed", seed
            )
            for kind in args.policy_types
            for seed in args.seeds
        ]
        for start in starts:
            start.result()
        runs = [
            pool.submit(experiment, algorithm, kind, seed, args)
            for algorithm in args.algorithms
            for kind in args.policy_types
            for seed in args.seeds
        ]
        print("| script | policy | seed | supervised | reached | iterations | tokens | seconds |")
        print("|---|---|---|---|---|---|---|---|")
        for row in runs:
            print(row.result(), flush=True)
