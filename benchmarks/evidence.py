"""Does it work on real text, and does NLPO's mask help? Every algorithm from the same start, several seeds, one budget.

    pip install -r benchmarks/requirements.txt
    python benchmarks/evidence_data.py --out runs/evidence/data
    nohup nice python benchmarks/evidence.py --out runs/evidence > evidence.log &
    python benchmarks/evidence.py --out runs/evidence --gather docs

The first call of evidence.py makes all runs, one after the other, what matters most first; called again it goes on
where it ended. The second reads what there is, and writes docs/results_tables.md and the pictures.

All algorithms sample the same number of responses, pay the same fixed weight for KL, and get the same search: four
sizes of step on seed 100, of which that with the highest objective on val (score - kl_coef * KL of a response) is
taken. Reported seeds are 1 to 5. KL is that of the policy as it is evaluated: without NLPO's mask.
"""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
OWN = Path(__file__).resolve().parent / "evidence_rewards.py"
SEARCH_SEED = 100


@dataclass
class Args:
    out: Path = Path("runs/evidence")  # where data and runs are
    scripts: Path = ROOT  # the folder of the scripts that are run
    tasks: tuple[str, ...] = ("sentiment", "summaries", "numbers")  # which of them
    ablations: bool = True  # the sentiment task with one thing changed, after all else
    gather: Path | None = None  # read what there is, and write tables and pictures into this folder


@dataclass(frozen=True)
class Task:
    """start: flags of supervised.py; shared: those of all; rl: those of every RL run."""

    kind: str
    score: str
    others: dict  # metrics that nothing is trained on: column -> name in eval.jsonl
    kl_coef: float
    length: int  # tokens of a response, about: what turns KL per token into KL per response
    start: dict
    shared: dict
    rl: dict


@dataclass(frozen=True)
class Algorithm:
    script: str
    steps: dict  # the settings of the search: flag -> values
    flags: dict


RATES = {"learning_rate": (1e-4, 3e-4, 1e-3, 3e-3)}
EPOCHS = dict(num_minibatches=4, update_epochs=1)
ALGORITHMS = {
    "PPO": Algorithm("ppo", RATES, EPOCHS),
    "NLPO": Algorithm("nlpo", RATES, EPOCHS | dict(top_mask=0.9, target_update_iterations=5)),
    "NLPO as released": Algorithm(
        "nlpo", RATES, EPOCHS | dict(top_mask=0.9, target_update_iterations=0, ratio="unmasked")
    ),
    "A2C": Algorithm("a2c", RATES, {}),
    "TRPO": Algorithm(
        "trpo", {"delta": (0.003, 0.01, 0.03, 0.1)}, dict(learning_rate=1e-3, cg_steps=5, critic_epochs=5)
    ),
    "GRPO": Algorithm("grpo", RATES, EPOCHS | dict(group_size=8)),
}
MASKED = ["PPO", "NLPO", "NLPO as released"]  # what the comparison is about


def tasks_of(out):
    data = out / "data"
    lengths = dict(prompt_length=20, response_length=16, min_response_length=16)
    small = dict(model="scratch", batch_size=16, anneal_lr=True, learning_rate=1e-3)
    reward = dict(model=out / "sentiment" / "reward" / "model", include_prompt="false")
    sentiment = Task(
        kind="causal", score="classifier", kl_coef=0.01, length=16,
        others={"judge": "judge", "perplexity": "reference_perplexity", "distinct-2": "diversity_metrics/distinct-2"},
        start=small | dict(policy_type="causal", scratch_vocab_size=3000, scratch_layers=4, num_epochs=1,
                           eval_every=1000, save_every=500, metrics=("perplexity", "diversity"), response_length=24,
                           min_response_length=24),
        shared=dict(task=data / "sentiment", eval_samples=400, decoding=dict(do_sample="true")) | lengths,
        rl=dict(reward="classifier", reward_kwargs=reward, num_iterations=24, eval_every=6, save_every=24,
                metrics=("classifier", f"{OWN}:judge", f"{OWN}:start_kl", "diversity"),
                metric_kwargs={f"classifier.{k}": v for k, v in reward.items()} | {
                    f"{OWN}:judge.counts": data / "judge.json",
                    f"{OWN}:start_kl.start": out / "sentiment" / "start" / "model",
                    f"{OWN}:start_kl.prompt_length": 20, f"{OWN}:start_kl.truncation_side": "left",
                    f"{OWN}:start_kl.without_eos": "true"}),
    )  # fmt: skip
    summaries = Task(
        kind="seq2seq", score="rouge1", kl_coef=0.01, length=9,
        others={"rougeL": "rougeL", "chrF": "chrf", "distinct-2": "diversity_metrics/distinct-2"},
        start=small | dict(policy_type="seq2seq", scratch_vocab_size=3000, num_epochs=2, eval_every=1000,
                           save_every=500, metrics=("rouge", "chrf", "diversity")),
        shared=dict(task=data / "summaries", eval_samples=400, decoding=dict(do_sample="true"), prompt_length=48,
                    response_length=20, truncation_side="right"),
        rl=dict(reward="rouge1", num_iterations=24, eval_every=6, save_every=24,
                metrics=("rouge", "chrf", f"{OWN}:start_kl", "diversity"),
                metric_kwargs={
                    f"{OWN}:start_kl.start": out / "summaries" / "start" / "model",
                    f"{OWN}:start_kl.prompt_length": 48, f"{OWN}:start_kl.truncation_side": "right"}),
    )  # fmt: skip
    numbers = Task(
        kind="causal", score="increasing_numbers", others={}, kl_coef=0.01, length=15,
        start=dict(policy_type="causal", model="scratch", metrics="increasing_numbers"),
        shared=dict(task="numbers", task_kwargs=dict(n_samples=300), eval_samples=300),
        rl=dict(reward="increasing_numbers", num_iterations=20, eval_every=10, save_every=20,
                metrics=("increasing_numbers", f"{OWN}:start_kl"),
                metric_kwargs={
                    f"{OWN}:start_kl.start": out / "numbers" / "start" / "model",
                    f"{OWN}:start_kl.prompt_length": 5, f"{OWN}:start_kl.truncation_side": "left"}),
    )  # fmt: skip
    return dict(sentiment=sentiment, summaries=summaries, numbers=numbers)


# ---------------------------------------------------------------------------------------------------------- the runs


def words(flags):
    """Flags as a command line: name=value, name=(value, value), name={key: value}."""
    line = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            line.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            line += [flag, *map(str, itertools.chain.from_iterable(value.items()))]
        else:
            line += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return line


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def finished(folder):
    return any(row["split"] == "test" and row["iteration"] > 0 for row in rows_of(folder / "eval.jsonl"))


def run(folder, script, flags, scripts):
    """Runs a script to its end, from its checkpoint if there is one; nothing if it has ended already."""
    if finished(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(script), *words(flags), "--run-dir", str(folder), "--resume"]
    environment = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(scripts)) | os.environ
    with open(folder.with_name(folder.name + ".log"), "w") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    print(f"{folder}: {'finished' if code == 0 else f'exit code {code}, {folder.name}.log says why'}", flush=True)
    if code and folder.name in ("start", "reward"):
        raise SystemExit(code)  # what all other runs need


def flags_of(task, name, setting, seed, out):
    algorithm, target = ALGORITHMS[name], dict(target_kl="None", kl_coef=task.kl_coef, batch_size=128)
    model = dict(model=out / "start" / "model", seed=seed, micro_batch_size=32, sample_batch_size=64)
    return task.shared | task.rl | target | model | algorithm.flags | setting


def settings_of(name):
    ((flag, values),) = ALGORITHMS[name].steps.items()
    return [{flag: value} for value in values]


def folder_of(out, name, seed, setting=None):
    end = "" if setting is None else "_{}_{}".format(*next(iter(setting.items())))
    return out / f"{name.lower().replace(' ', '_')}{end}_{seed}"


def objective(task, row):
    """What all algorithms maximise; of a row of eval.jsonl."""
    return row[task.score] - task.kl_coef * task.length * row["kl"]


def chosen(task, name, out):
    """The setting whose run on the search seed ends with the highest objective on val; None while one is missing."""
    ends = []
    for setting in settings_of(name):
        folder = folder_of(out, name, SEARCH_SEED, setting)
        if not finished(folder):
            return None
        val = [row for row in rows_of(folder / "eval.jsonl") if row["split"] == "val"]
        ends.append((objective(task, val[-1]), setting))
    return max(ends, key=lambda end: end[0])[1]


def other_steps(task, out):
    """(algorithm, setting) of PPO with NLPO's step and of NLPO with PPO's, where the search took different ones."""
    steps = {name: chosen(task, name, out) for name in ("PPO", "NLPO")}
    return (
        []
        if None in steps.values() or steps["PPO"] == steps["NLPO"]
        else list(zip(steps, [*steps.values()][::-1], strict=True))
    )


def script_of(name, task, scripts):
    script = ALGORITHMS[name].script
    return scripts / (f"{script}_{task.kind}.py" if script in ("ppo", "nlpo") else f"{script}.py")


def run_task(key, task, args):
    out = args.out / key
    run(out / "start", args.scripts / "supervised.py", task.shared | task.start, args.scripts)
    if key == "sentiment":
        flags = dict(task=args.out / "data" / "sentiment_labels", model=out / "start" / "model", batch_size=64)
        flags |= dict(separator="", num_epochs=1, learning_rate=1e-3, micro_batch_size=32, max_length=44)
        run(out / "reward", args.scripts / "reward_model.py", flags, args.scripts)

    def reported(name, seed, setting, folder):
        if setting:
            run(folder, script_of(name, task, args.scripts), flags_of(task, name, setting, seed, out), args.scripts)

    for group in (MASKED, [name for name in ALGORITHMS if name not in MASKED]):
        for name, setting in ((each, setting) for each in group for setting in settings_of(each)):
            flags = flags_of(task, name, setting, SEARCH_SEED, out)
            run(folder_of(out, name, SEARCH_SEED, setting), script_of(name, task, args.scripts), flags, args.scripts)
        for seed, name in itertools.product((1, 2, 3), group):
            reported(name, seed, chosen(task, name, out), folder_of(out, name, seed))
        if group == MASKED:
            for seed, (name, setting) in itertools.product((1, 2, 3), other_steps(task, out)):
                reported(name, seed, setting, folder_of(out, name, seed, setting))
        for seed, name in itertools.product((4, 5), group):
            reported(name, seed, chosen(task, name, out), folder_of(out, name, seed))


RANDOM_HEAD = {"nn.init.zeros_(self.head.weight)": "pass"}
ONE_CLIPPING = {
    "[sum_and_clip_gradients(model, args.max_grad_norm) for model in learning]":
    "[sum_and_clip_gradients(nn.ModuleList(learning), args.max_grad_norm)] * 2",
}  # fmt: skip
# what is changed: algorithm, flags, text of its script and what takes its place
ABLATIONS = {
    "gamma 1": ("PPO", dict(gamma=1.0), {}),
    "value head at random": ("PPO", {}, RANDOM_HEAD),
    "one clipping for policy and critic": ("PPO", {}, ONE_CLIPPING),
    "critic alone for 4 iterations": ("PPO", dict(value_warmup_iterations=4), {}),
    "bfloat16": ("PPO", dict(dtype="bfloat16"), {}),
    "2 epochs": ("PPO", dict(update_epochs=2), {}),
    "value head at random, one clipping": ("PPO", {}, RANDOM_HEAD | ONE_CLIPPING),
    "mask of 0.5": ("NLPO", dict(top_mask=0.5), {}),
    "mask of 0.5, as released": ("NLPO as released", dict(top_mask=0.5), {}),
}


def run_ablations(task, args):
    """The sentiment task with the chosen setting and one thing changed; seeds 1 to 3."""
    out = args.out / "sentiment"
    for (label, (name, changed, replaced)), seed in itertools.product(ABLATIONS.items(), (1, 2, 3)):
        setting, script = chosen(task, name, out), script_of(name, task, args.scripts)
        if setting is None:
            continue
        if replaced:
            text = script.read_text()
            for old, new in replaced.items():
                assert old in text, f"{script} has no {old!r}"
                text = text.replace(old, new)
            script = args.out / "ablations" / f"{label.replace(' ', '_').replace(',', '')}.py"
            script.parent.mkdir(exist_ok=True)
            script.write_text(text)
        flags = flags_of(task, name, setting, seed, out) | changed
        run(folder_of(args.out / "ablations", label, seed), script, flags, args.scripts)


def main():
    args = tyro.cli(Args, description=__doc__)
    args = replace(args, out=args.out.resolve(), scripts=args.scripts.resolve())
    tasks = tasks_of(args.out)
    if args.gather:
        import evidence_tables

        evidence_tables.gather(tasks, args)
        return
    for key in args.tasks:
        run_task(key, tasks[key], args)
    if args.ablations:
        run_ablations(tasks["sentiment"], args)


if __name__ == "__main__":
    main()
