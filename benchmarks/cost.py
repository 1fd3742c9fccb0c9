"""What each script pays on `numbers` until the mean reward of a batch is 0.9, beside TRL's GRPO.

    OMP_NUM_THREADS=1 python benchmarks/cost.py --seeds 11 12 13 --trl-python ~/trl/bin/python

trains one supervised model per policy type and seed, then every script from it with its defaults for the task, and
prints a table: rollouts (iterations of 64 responses) until one scores 0.9 on average, and their CPU seconds on one
thread, the start of the program and evaluations left out. TRL runs from the same decoder-only models, in an environment
of its own: `python -m venv ~/trl && ~/trl/bin/pip install -r requirements.txt trl==1.16.0`. Runs that are there already
are read, not repeated.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
GOAL, BATCH, LENGTH = 0.9, 64, 20  # the mean reward that is waited for, responses of a batch, tokens of a response


@dataclass
class Args:
    seeds: tuple[int, ...] = (11, 12, 13)  # of the supervised and the RL runs
    scripts: tuple[str, ...] = ("ppo", "nlpo", "a2c", "trpo", "grpo")  # which of the five
    policy_types: tuple[str, ...] = ("causal", "seq2seq")  # which policies
    trl_python: str | None = None  # a Python that has TRL; none: TRL is left out
    out: Path = Path("runs/cost")  # where the runs go


def cpu_seconds(words, log):
    """Runs a command on one thread; its CPU seconds."""
    quiet = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with open(log, "w") as output:
        process = subprocess.Popen(list(map(str, words)), stdout=output, stderr=output, env=os.environ | quiet)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, words))}: failed, see {log}")
    return usage.ru_utime + usage.ru_stime


def ours(script, model, seed, run_dir):
    """Rollouts to the goal (None: not reached) and their CPU seconds: the share of a run that they are."""
    result = run_dir.with_suffix(".json")
    if not result.exists():
        words = [sys.executable, ROOT / f"{script}.py", "--task", "numbers", "--model", model, "--seed", seed]
        words += ["--eval-every", 10000, "--save-every", 10000, "--eval-samples", 1]
        for left in (run_dir, Path(f"{run_dir}_start")):  # of a run that was stopped
            shutil.rmtree(left, ignore_errors=True)
        start = cpu_seconds([*words, "--num-iterations", 0, "--run-dir", f"{run_dir}_start"], f"{run_dir}.log")
        whole = cpu_seconds([*words, "--run-dir", run_dir], f"{run_dir}.log")
        scores = [json.loads(row)["objective/score"] for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
        rollouts = next((i for i, score in enumerate(scores, 1) if score >= GOAL), None)
        result.write_text(json.dumps([rollouts, rollouts and (whole - start) * rollouts / len(scores)]))
    return json.loads(result.read_text())


def trl(python, model, seed, run_dir):
    """The same of TRL, which this file runs when it is started as `cost.py --trl`."""
    result = run_dir.with_suffix(".json")
    if not result.exists():
        cpu_seconds([python, __file__, "--trl", model, seed, result], f"{run_dir}.log")
    return json.loads(result.read_text())


def run_trl(model, seed, result):
    """TRL's GRPO on the same prompts and reward: groups of 8, four passes over four minibatches, learning rate 3e-4,
    beta 0.01."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    sys.path.insert(0, str(ROOT))
    import datapools
    import rewards

    train = datapools.load_task("numbers", "train")
    score, means, started = rewards.increasing_numbers(), [], time.process_time()

    def reward(completions, **kwargs):
        scores = score([""] * len(completions), completions, [[]] * len(completions), [{}] * len(completions))
        means.append(sum(scores) / len(scores))
        return list(scores)

    class StopAtGoal(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = means[-1] >= GOAL

    config = GRPOConfig(
        output_dir=f"{result}.trl", seed=int(seed), num_generations=8, max_completion_length=LENGTH, beta=0.01,
        per_device_train_batch_size=BATCH // 4, steps_per_generation=4, num_iterations=4, learning_rate=3e-4,
        max_steps=1000, lr_scheduler_type="constant", report_to="none", logging_steps=1000, save_strategy="no",
        use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": sample.prompt} for sample in train])
    GRPOTrainer(model, reward, args=config, train_dataset=prompts, callbacks=[StopAtGoal()]).train()
    reached = means[-1] >= GOAL
    row = [len(means), time.process_time() - started] if reached else [None, None]
    Path(result).write_text(json.dumps(row))


def main():
    args = tyro.cli(Args, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    print("| script | policy | rollouts to 0.9, by seed | mean | CPU seconds, by seed | mean |\n" + "|---" * 6 + "|")
    for kind in args.policy_types:
        models = {seed: args.out / f"supervised_{kind}_{seed}" for seed in args.seeds}
        for seed, folder in models.items():
            if not (folder / "model").exists():
                words = ["--task", "numbers", "--policy-type", kind, "--seed", seed, "--run-dir", folder, "--resume"]
                cpu_seconds([sys.executable, ROOT / "supervised.py", *words], f"{folder}.log")
        names = [f"{name}_{kind}" if name in ("ppo", "nlpo") else name for name in args.scripts]
        names += ["TRL"] if args.trl_python and kind == "causal" else []
        for name in names:
            rows = []
            for seed, folder in models.items():
                place = (folder / "model", seed, args.out / f"{name}_{kind}_{seed}")
                rows.append(trl(args.trl_python, *place) if name == "TRL" else ours(name, *place))
            rollouts, seconds = zip(*rows, strict=True)
            means = ["not in all", "not in all"] if None in rollouts else [
                f"{statistics.mean(rollouts):.0f}", f"{statistics.mean(seconds):.1f}"
            ]  # fmt: skip
            costs = ", ".join("-" if s is None else f"{s:.1f}" for s in seconds)
            label = "GRPO of TRL" if name == "TRL" else f"{name}.py"
            shown = ", ".join("-" if n is None else str(n) for n in rollouts)
            print(f"| {label} | {kind} | {shown} | {means[0]} | {costs} | {means[1]} |", flush=True)


if __name__ == "__main__":
    run_trl(*sys.argv[2:]) if sys.argv[1:2] == ["--trl"] else main()
