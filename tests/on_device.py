"""Every script on the device of this machine: what CI, which has no GPU, does not see.

    python tests/on_device.py runs/on_device --jobs 8

For each script and type of policy, in float32 and in bfloat16, tiny runs of four iterations: a whole one, one that ends
after two and is resumed, one in a process group of one process (NCCL on a GPU), one with --fsdp, resumed as well, and
one that computes its layers again. Prints by how much their metrics.jsonl differs from that of the whole run, relative
to the figure or to 0.001, with the worst figure's name; the end of what a run said where it failed. Each job is a
process that makes all runs of one script and type, since most of a tiny run is its imports.
"""

import argparse
import contextlib
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import conftest
import script_runs
import tiny_models

VARIANTS = {"resumed": {}, "group": {}, "fsdp": dict(fsdp=True), "recomputed": dict(gradient_checkpointing=True)}
GROUP = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")


def make_inputs(folder):
    """A task, a reward and a model of each type."""
    (folder / "texts").mkdir(parents=True)
    rng = random.Random(0)
    for split, size in (("train", 20), ("validation", 5), ("test", 3)):
        texts = (
            " ".join(rng.choices("the a cat dog runs sleeps 12 345".split(), k=rng.randint(1, 8))) for _ in range(size)
        )
        rows = (json.dumps({"prompt": text, "references": [text[:9]]}) + "\n" for text in texts)
        (folder / "texts" / f"{split}.jsonl").write_text("".join(rows))
    (folder / "own.py").write_text(conftest.REWARDS)
    for kind in ("seq2seq", "causal"):
        tiny_models.save_policy(folder / kind, kind == "seq2seq")


def run(script, argv, log, group_port=None):
    """The script's own main in this process, with its output in a file. Returns its exit code."""
    sys.argv = [f"{script}.py", *map(str, argv)]
    if group_port:
        os.environ |= GROUP | dict(MASTER_PORT=str(group_port))
    with open(log, "a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(str(script_runs.ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            for name in (*GROUP, "MASTER_PORT"):
                os.environ.pop(name, None)


def job(folder, script, kind, port):
    """All runs of one script and type."""
    longer = "--num-epochs=2" if script == "supervised" else "--num-iterations=4"
    for dtype in ("float32", "bfloat16"):
        for variant, options in {"whole": {}, **VARIANTS}.items():
            stops, port = variant in ("resumed", "fsdp"), port + 1
            run_dir = folder / f"{script}_{kind}_{variant}_{dtype}"
            wanted = dict(model=folder / kind, task=folder / "texts", reward=f"{folder}/own.py:digits", dtype=dtype)
            wanted |= dict(policy_type=kind, num_iterations=2 if stops else 4, num_epochs=1 if stops else 2)
            first = run_dir.with_suffix(".half") if stops else run_dir
            group_port = port if variant in ("group", "fsdp") else None
            argv, log = (
                script_runs.flags(script, **script_runs.TINY | wanted | options, run_dir=first),
                f"{run_dir}.log",
            )
            code = run(script, argv, log, group_port)
            if stops and not code:  # a copy, since this process holds the lock of the first
                shutil.copytree(first, run_dir, ignore=shutil.ignore_patterns(".lock"))
                code = run(script, ["--run-dir", run_dir, "--resume", longer], log, group_port)
            if code:
                print(f"FAILED with {code}: {run_dir.name}: ...{Path(log).read_text().strip()[-700:]}", flush=True)


def figures(run_dir):
    rows = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
    return [{name: x for name, x in json.loads(row).items() if not name.startswith("time/")} for row in rows]


def compare(folder, script, kind):
    for dtype in ("float32", "bfloat16"):
        whole, said = figures(folder / f"{script}_{kind}_whole_{dtype}"), []
        for variant in VARIANTS:
            other = figures(folder / f"{script}_{kind}_{variant}_{dtype}")
            pairs = [(abs(a[n] - b[n]) / (1e-3 + abs(a[n])), n) for a, b in zip(whole, other, strict=False) for n in a]
            same = (
                "as whole" if not max(pairs, default=(1,))[0] else "{:.0e} {}".format(*max(pairs, default=(1, "none")))
            )
            said.append(f"{variant}: {same if len(whole) == len(other) else f'{len(other)} of {len(whole)} rows'}")
        error = max((row.get("rollout/sampler_error", 0.0) for row in whole), default=0.0)
        print(f"{script} {kind} {dtype}: {'; '.join(said)}; sampler_error {error:.0e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--scripts", nargs="+", default=script_runs.SCRIPTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return job(options.folder, *options.job[:2], int(options.job[2]))
    make_inputs(options.folder)
    cases = [(script, kind) for script, kind in script_runs.CASES if script in options.scripts]

    def start(i):
        command = [sys.executable, __file__, str(options.folder), "--job", *cases[i], str(21000 + 100 * i)]
        subprocess.run(command, cwd=script_runs.ROOT, check=True)
        compare(options.folder, *cases[i])

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(start, range(len(cases))))


if __name__ == "__main__":
    main()
