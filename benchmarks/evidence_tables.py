"""What evidence.py --gather writes: the tables of docs/results.md between its two marks, and the pictures.

Intervals are 95% percentile bootstraps over seeds (10,000 draws). P(better) is the share of pairs of runs, one of each
algorithm, of which that of the first is better, as in Agarwal et al. 2021, https://arxiv.org/abs/2108.13264.
"""

import re

import numpy as np
from evidence import (
    ABLATIONS,
    ALGORITHMS,
    SEARCH_SEED,
    chosen,
    finished,
    folder_of,
    objective,
    other_steps,
    rows_of,
    settings_of,
)
from matplotlib.figure import Figure

BEGIN, END = "<!-- tables: evidence.py --gather -->", "<!-- end of tables -->"
DRAWS = 10_000


def interval(values, draw):
    """The 95% interval of a statistic of resampled runs; `draw(rng)` gives one."""
    rng = np.random.default_rng(0)
    return np.percentile([draw(rng, values) for _ in range(DRAWS)], [2.5, 97.5])


def mean_and_interval(values, digits=3):
    values = np.array([value for value in values if value is not None], float)
    if len(values) == 0:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, high = interval(values, lambda rng, x: rng.choice(x, len(x)).mean())
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def better(first, second):
    """P(a run of the first is better than one of the second), ties a half, with its interval."""

    def share(a, b):
        return ((a[:, None] > b).mean() + (a[:, None] >= b).mean()) / 2

    pair = np.array(first, float), np.array(second, float)
    low, high = interval(pair, lambda rng, x: share(*(rng.choice(part, len(part)) for part in x)))
    return f"{share(*pair):.2f} [{low:.2f}, {high:.2f}]"


def curve(folder):
    return [row for row in rows_of(folder / "eval.jsonl") if row["split"] == "val"]


def last_test(folder):
    return [row for row in rows_of(folder / "eval.jsonl") if row["split"] == "test"][-1]


def runs_of(task, out):
    """{label: (setting, {seed: folder})} of the finished reported runs."""
    kinds = [(name, chosen(task, name, out), None) for name in ALGORITHMS]
    kinds[2:2] = [(name, setting, setting) for name, setting in other_steps(task, out)]
    runs = {}
    for name, setting, in_name in kinds:
        folders = {seed: folder_of(out, name, seed, in_name) for seed in range(1, 11)}
        label = f"{name} at {'NLPO' if name == 'PPO' else 'PPO'}'s step" if in_name else name
        runs[label] = setting, {seed: folder for seed, folder in folders.items() if finished(folder)}
    return {label: (setting, folders) for label, (setting, folders) in runs.items() if folders}


def setting_text(setting):
    return "; ".join(f"{flag} {value:g}" for flag, value in setting.items())


def result_table(task, runs):
    if not runs:
        return []
    first_run = next(iter(next(iter(runs.values()))[1].values()))
    start = [row for row in rows_of(first_run / "eval.jsonl") if row["split"] == "test"][0]
    heads = ["algorithm", "step", "seeds", task.score, *task.others, "KL", "objective"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    cells = [f"{start[name]:.3f}" for name in (task.score, *task.others.values())]
    lines.append("| " + " | ".join(["supervised", "", "", *cells, "0", f"{start[task.score]:.3f}"]) + " |")
    for label, (setting, folders) in runs.items():
        tests = [last_test(folder) for folder in folders.values()]
        cells = [
            mean_and_interval([test[key] for test in tests], digits=0 if "perplexity" in key else 3)
            for key in (task.score, *task.others.values(), "kl")
        ]
        cells.append(mean_and_interval([objective(task, test) for test in tests]))
        lines.append("| " + " | ".join([label, setting_text(setting), str(len(folders)), *cells]) + " |")
    return lines


PAIRS = [
    ("NLPO", "PPO"),
    ("NLPO", "PPO at NLPO's step"),
    ("NLPO at PPO's step", "PPO"),
    ("NLPO as released", "PPO"),
]


def comparison_table(task, runs):
    """P(better) of both NLPOs over PPO, on every figure that rates."""
    held_out = [name for name in task.others.values() if name in ("judge", "chrf")]
    figures = {name: (lambda row, name=name: row[name]) for name in (task.score, *held_out)}
    figures["objective"] = lambda row: objective(task, row)
    lines = ["| P(better) on test | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for pair in PAIRS:
        if all(label in runs for label in pair):
            tests = [[last_test(folder) for folder in runs[label][1].values()] for label in pair]
            cells = [better(*([figure(test) for test in part] for part in tests)) for figure in figures.values()]
            lines.append(f"| {pair[0]} over {pair[1]} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


def search_table(task, out):
    lines = ["| algorithm | step | score on val | KL | objective |", "|---|---|---|---|---|"]
    for name in ALGORITHMS:
        for setting in settings_of(name):
            folder = folder_of(out, name, SEARCH_SEED, setting)
            if finished(folder):
                row = curve(folder)[-1]
                mark = "**" if setting == chosen(task, name, out) else ""
                cells = f"{row[task.score]:.3f} | {row['kl']:.3f} | {mark}{objective(task, row):.3f}{mark}"
                lines.append(f"| {name} | {setting_text(setting)} | {cells} |")
    return lines if len(lines) > 2 else []


def mask_table(runs):
    """What the masks did in training, means over all iterations and runs."""
    lines = ["| | mass within the mask | vocabulary kept | tokens at which it excludes any |", "|---|---|---|---|"]
    for name in [name for name in runs if name.startswith("NLPO")]:
        rows = [row for folder in runs[name][1].values() for row in rows_of(folder / "metrics.jsonl")]
        names = ("rollout/mask_mass", "rollout/mask_kept_fraction", "rollout/mask_bite_fraction")
        lines.append(f"| {name} | " + " | ".join(f"{np.mean([row[n] for row in rows]):.3f}" for n in names) + " |")
    return lines if len(lines) > 2 else []


def ablation_table(task, out):
    lines = ["| changed | seeds | score | judge | KL | objective | objective, minus that of the same seeds without |"]
    lines.append("|---" * 7 + "|")
    for label, (name, *_) in ABLATIONS.items():
        folders = {seed: folder_of(out / "ablations", label, seed) for seed in (1, 2, 3)}
        pairs = [
            (last_test(folder), last_test(folder_of(out / "sentiment", name, seed)))
            for seed, folder in folders.items()
            if finished(folder) and finished(folder_of(out / "sentiment", name, seed))
        ]
        if pairs:
            cells = [mean_and_interval([test[key] for test, _ in pairs]) for key in (task.score, "judge", "kl")]
            cells.append(mean_and_interval([objective(task, test) for test, _ in pairs]))
            cells.append(mean_and_interval([objective(task, test) - objective(task, base) for test, base in pairs]))
            lines.append(f"| {name}: {label} | {len(pairs)} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


def draw(axes, runs, figure, title):
    """A figure on val against KL: a line for each algorithm through the means of its evaluations, a thin one a run."""
    for color, (name, (_, folders)) in enumerate(runs.items()):
        curves = [curve(folder) for folder in folders.values()]
        points = np.array([[(row["kl"], row[figure]) for row in rows] for rows in curves])  # (runs, evaluations, 2)
        for each in points:
            axes.plot(*each.T, color=f"C{color}", linewidth=0.6, alpha=0.35)
        axes.plot(*points.mean(0).T, color=f"C{color}", marker=".", linewidth=2, label=f"{name} ({len(points)})")
    axes.set(xlabel="KL from the supervised model, nats per token", ylabel=title)
    axes.grid(alpha=0.4)


def pictures(tasks, all_runs, folder):
    """results.png: PPO and NLPO on the sentiment task; results_{task}.png: the algorithms on each task."""
    if sentiment := all_runs["sentiment"]:
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        masked = {label: runs for label, runs in sentiment.items() if "PPO" in label or "NLPO" in label}
        draw(left, masked, "classifier", "score: the classifier that is trained on")
        draw(right, masked, "judge", "held-out judge")
        left.legend(fontsize=8)
        figure.savefig(folder / "results.png", dpi=110)
    for key, runs in all_runs.items():
        if runs:
            figure = Figure(figsize=(6.5, 3.8), layout="constrained")
            axes = figure.add_subplot()
            of_all = {name: runs[name] for name in ALGORITHMS if name in runs}
            draw(axes, of_all, tasks[key].score, f"{key}: {tasks[key].score}")
            axes.legend(fontsize=8)
            figure.savefig(folder / f"results_{key}.png", dpi=110)


def gather(tasks, args):
    parts, all_runs = [], {}
    for key, task in tasks.items():
        out = args.out / key
        all_runs[key] = runs = runs_of(task, out)
        if runs:
            parts += [[f"### {key}"], result_table(task, runs), comparison_table(task, runs), mask_table(runs)]
        if search := search_table(task, out):
            parts += [["The search, on val:"], search]
    if ablations := ablation_table(tasks["sentiment"], args.out):
        parts += [["### One thing changed, sentiment"], ablations]
    text = "\n\n".join("\n".join(part) for part in parts if part)
    pictures(tasks, all_runs, args.gather)
    page = args.gather / "results.md"
    before = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{text}\n\n{END}", before, flags=re.DOTALL))
    print(text)
