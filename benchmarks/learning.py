"""Each RL script from the same supervised model on `numbers`: what it takes to reach a score, and where it ends.

    OMP_NUM_THREADS=1 python benchmarks/learning.py --seeds 1 2 3 --jobs 2 --out runs/learning

trains one supervised model per policy type and seed, then every script from it with its defaults, and prints a table,
whose tokens are those sampled until the goal. `--jobs` processes run side by side; what is there already is read, not
repeated. `--pictures docs` draws the curves, all in one and those of each algorithm. `--changes` runs ppo_causal.py
with one thing changed at a time instead.
"""

import concurrent.futures
import functools
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)  # of the supervised and the RL runs
    algorithms: tuple[str, ...] = ("ppo", "nlpo", "a2c", "trpo", "grpo")  # which of the five
    policy_types: tuple[str, ...] = ("seq2seq", "causal")  # which policies
    goal: float = 0.9  # the mean score on validation data that is waited for
    jobs: int = 2  # runs side by side
    eval_every: int = 5  # iterations between evaluations: the resolution of the table
    out: Path = Path("runs/learning")  # where the runs go
    pictures: Path | None = None  # draw the scores on val into this folder
    changes: bool = False  # ppo_causal.py with each of CHANGES instead


RANDOM_HEAD = {"nn.init.zeros_(self.head.weight)": "pass"}
ONE_CLIPPING = {
    "[sum_and_clip_gradients(model, args.max_grad_norm) for model in learning]":
    "[sum_and_clip_gradients(nn.ModuleList(learning), args.max_grad_norm)] * 2",
}  # fmt: skip
# what is changed in ppo_causal.py: flags, and text that others take the place of
CHANGES = {
    "none": ({}, {}),
    "value head at random": ({}, RANDOM_HEAD),
    "one clipping for policy and critic": ({}, ONE_CLIPPING),
    "value head at random, one clipping": ({}, RANDOM_HEAD | ONE_CLIPPING),
    "`--value-warmup-iterations 5`": (dict(value_warmup_iterations=5), {}),
    "`--clip-coef-high 0.4`": (dict(clip_coef_high=0.4), {}),
    "`--eos-penalty -1`": (dict(eos_penalty=-1), {}),
    "`--whiten-rewards`": (dict(whiten_rewards=True), {}),
    "`--gamma 1`": (dict(gamma=1.0), {}),
}


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def scores_of(run_dir, split):
    """{iteration: score}"""
    rows = rows_of(run_dir / "eval.jsonl")
    return {row["iteration"]: row["increasing_numbers"] for row in rows if row["split"] == split}


def run(script, run_dir, **flags):
    """Runs a script to its end, unless its last evaluation is there already."""
    if any(scores_of(run_dir, "test")):
        return
    flags = dict(task="numbers", run_dir=run_dir) | flags
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = [word for word in words if word != "True"]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(run_dir.with_suffix(".log"), "w") as log:
        command = [sys.executable, ROOT / script, *words, "--resume"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)


def experiment(algorithm, policy_type, seed, args):
    """One RL run from its supervised model. Returns a row of the table, and the score at the end."""
    script = f"{algorithm}_{policy_type}.py" if algorithm in ("ppo", "nlpo") else f"{algorithm}.py"
    run_dir = args.out / f"{algorithm}_{policy_type}_{seed}"
    model = args.out / f"supervised_{policy_type}_{seed}" / "model"
    run(script, run_dir, model=model, seed=seed, eval_every=args.eval_every)
    scores, metrics = scores_of(run_dir, "val"), rows_of(run_dir / "metrics.jsonl")
    reached = next((iteration for iteration, score in scores.items() if score >= args.goal), None)
    batch_size = json.loads((run_dir / "config.json").read_text())["batch_size"]
    tokens = sum(row["rollout/response_length"] * batch_size for row in metrics[:reached])
    cost = f"{reached} | {tokens:,.0f}" if reached else "not reached |"
    best, last = max(scores.values()), scores[metrics[-1]["iteration"]]
    ends = f"{scores[0]:.2f} | {cost} | {best:.2f} | {last:.2f} after {metrics[-1]['iteration']}"
    return f"| {script} | {policy_type} | {seed} | {ends} |", last


def changed(args, name, seed):
    """One run of ppo_causal.py with a change: iterations until a batch has the goal, explained variance, last score."""
    flags, replaced = CHANGES[name]
    text = (ROOT / "ppo_causal.py").read_text()
    for old, new in replaced.items():
        assert old in text, f"ppo_causal.py has no {old!r}"
        text = text.replace(old, new)
    run_dir = args.out / "".join(letter if letter.isalnum() else "_" for letter in f"{name}_{seed}")
    script = run_dir.with_suffix(".py").resolve()
    script.write_text(text)
    run(script, run_dir, model=args.out / f"supervised_causal_{seed}" / "model", seed=seed, **flags)
    rows = rows_of(run_dir / "metrics.jsonl")
    reached = next((row["iteration"] for row in rows if row["objective/score"] >= args.goal), None)
    explained = [row["losses/explained_variance"] for row in rows]
    return reached, explained, scores_of(run_dir, "val")[rows[-1]["iteration"]]


def table_of_changes(args, pool):
    print("| change | rollouts to 0.9 | explained variance, iterations 1, 3, 10 | score on val at the end | lowest |")
    print("|---|---|---|---|---|")
    for name in CHANGES:
        reached, explained, last = zip(*pool.map(functools.partial(changed, args, name), args.seeds), strict=True)
        at = ", ".join(f"{statistics.mean(run[i - 1] for run in explained):.2f}" for i in (1, 3, 10))
        shown = ", ".join("-" if n is None else str(n) for n in reached)
        print(f"| {name} | {shown} | {at} | {statistics.mean(last):.3f} | {min(last):.3f} |", flush=True)


def draw(args, algorithms, file):
    """The scores on val of each algorithm and policy type, a thin line for each seed, and their mean."""
    import matplotlib.pyplot as plt
    import pandas as pd

    panels = [(algorithm, kind) for kind in args.policy_types for algorithm in algorithms]
    shape = (len(args.policy_types), len(algorithms)) if len(algorithms) > 1 else (1, len(args.policy_types))
    figure, all_axes = plt.subplots(*shape, figsize=(2.4 * shape[1], 2.3 * shape[0]), squeeze=False, sharey=True)
    for (algorithm, kind), axes in zip(panels, all_axes.flat, strict=True):
        runs = {seed: scores_of(args.out / f"{algorithm}_{kind}_{seed}", "val") for seed in args.seeds}
        table = pd.DataFrame(runs)
        table.plot(ax=axes, linewidth=1, alpha=0.5, grid=True, ylim=(0, 1), legend=False)
        table.mean(axis=1).plot(ax=axes, color="black", linewidth=2)
        axes.set_title(f"{algorithm}, {kind}", fontsize=9)
        axes.set(xlabel="iterations", ylabel="mean score on val")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main():
    args = tyro.cli(Args, description=__doc__)
    kinds = [(kind, seed) for kind in args.policy_types for seed in args.seeds]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        folders = [args.out / f"supervised_{kind}_{seed}" for kind, seed in kinds]
        starts = [
            pool.submit(run, "supervised.py", folder, policy_type=kind, seed=seed)
            for folder, (kind, seed) in zip(folders, kinds, strict=True)
        ]
        for start in starts:
            start.result()
        if args.changes:
            return table_of_changes(args, pool)
        runs = {
            (algorithm, *kind): pool.submit(experiment, algorithm, *kind, args)
            for algorithm in args.algorithms
            for kind in kinds
        }
        print("| script | policy | seed | supervised | iterations to the goal | tokens | best | at the end |")
        print("|---|---|---|---|---|---|---|---|")
        for result in runs.values():
            print(result.result()[0], flush=True)
        for algorithm in args.algorithms:
            for kind in args.policy_types:
                last = [runs[algorithm, kind, seed].result()[1] for seed in args.seeds]
                print(f"{algorithm}, {kind}: {statistics.mean(last):.3f} at the end, none below {min(last):.3f}")
    if args.pictures:
        draw(args, args.algorithms, args.pictures / "learning_curve.png")
        for algorithm in args.algorithms:
            draw(args, (algorithm,), args.pictures / f"learning_{algorithm}.png")


if __name__ == "__main__":
    main()
