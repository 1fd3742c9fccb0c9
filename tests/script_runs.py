"""Runs of the scripts, as a user starts them, for the tests.

`start` runs a script in a process forked from one that has imported torch and transformers already: its command line,
environment, output and exit code are those of `python SCRIPT ...`, but it starts in milliseconds. test_runs.py and
test_command_line.py hold that against real ones.
"""

import atexit
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import pandas
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
ALL_SCRIPTS = ("ppo_seq2seq", "ppo_causal", "nlpo_seq2seq", "nlpo_causal", "a2c", "trpo", "grpo", "supervised")
SCRIPTS = [s for s in ALL_SCRIPTS if (ROOT / f"{s}.py").exists() and "\ndef main():" in (ROOT / f"{s}.py").read_text()]
# (script, policy type) of everything that can be run
CASES = [
    (script, kind)
    for script in SCRIPTS
    for kind in ("seq2seq", "causal")
    if script.rpartition("_")[2] in (kind, script)
]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["ppo_seq2seq", "torch._dynamo", "safetensors.torch", "rouge_score.rouge_scorer", "multiprocessing.synchronize"]
    + [f"transformers.models.{name}.modeling_{name}" for name in ("auto", "t5", "gpt2")]
)


def fields(script):
    """Name -> field of the script's Args."""
    return {field.name: field for field in dataclasses.fields(importlib.import_module(script).Args)}


@functools.cache
def tiny_model(kind):
    """The folder of a tiny random model of this policy type, made once by the process that asks first."""
    import tiny_models

    root = tempfile.mkdtemp(prefix="tiny_")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return tiny_models.save_policy(Path(root) / kind, kind == "seq2seq")


def flags(script, **wanted):
    """A command line from keyword arguments; those that the script's Args does not have are left out.

    model="tiny" is the tiny model of the policy type, which a script of both is told by policy_type.
    """
    words = []
    if wanted.get("model") == "tiny":
        kind = script.rpartition("_")[2]
        wanted["model"] = tiny_model(kind if kind in ("seq2seq", "causal") else wanted.get("policy_type", "seq2seq"))
    for name, value in wanted.items():
        if name not in fields(script) or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


# A model that trains in milliseconds; five iterations of eight sequences, a checkpoint at every second.
TINY = dict(
    model="tiny",
    prompt_length=12,
    response_length=8,
    metrics="rouge",
    eval_samples=5,
    batch_size=8,
    num_minibatches=2,
    group_size=2,
    update_epochs=2,
    num_iterations=5,
    num_epochs=2,  # of supervised.py: of 20 pairs, thus six iterations
    learning_rate=1e-3,
    kl_coef=0.05,
    target_kl=0.1,
    cg_steps=4,
    critic_epochs=2,
    eval_every=2,
    save_every=2,
)


@functools.cache
def ports():
    """Of this process' own, below those that the system gives out: nothing takes one before the run that it is for."""
    return itertools.count(10000 + os.getpid() % 44 * 500)


def free_port():
    for port in ports():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):  # nobody listens
                return port


def run_in_child(script, argv, cwd, env, out, err, root, draw, missing, kill_at, events_file):
    """What the forked process does.

    root: the folder of the script and of the two modules that it imports. draw: whether it draws curves.png, which
    takes longer than all else. missing: a module that cannot be imported. kill_at (function, n): it kills itself at
    the n-th call in that function of the script. events_file: where it leaves the number of calls in each.
    """
    if not draw:
        pandas.DataFrame.plot = MagicMock()
    if missing:
        sys.modules[missing] = None
    if root != ROOT:
        sys.path.insert(0, str(root))
        for module in ("datapools", "rewards"):  # those of the preloaded script
            del sys.modules[module]
    os.environ.update(env)
    os.chdir(cwd)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), descriptor)
    if "PYTHONIOENCODING" in env:
        sys.stdout.reconfigure(encoding=env["PYTHONIOENCODING"], errors="strict")
    path = str(root / f"{script}.py")
    sys.argv = [path, *argv]
    events = Counter()

    def count(frame, event, arg):
        if event in ("call", "c_call") and frame.f_code.co_filename == path:
            function = frame.f_code.co_name
            events[function] += 1
            if kill_at == (function, events[function]):
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at or events_file:
        sys.setprofile(count)
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.setprofile(None)
        if events_file:
            Path(events_file).write_text(json.dumps(events))


@dataclasses.dataclass
class Result:
    code: int
    stdout: str
    stderr: str
    seconds: float


class Started:
    """A script that runs, in one process or several."""

    def __init__(self, processes, outputs):
        self.processes, self.outputs, self.started = processes, outputs, time.monotonic()

    def finish(self, timeout=60):
        """Waits for the end of all processes; the Result is that of rank 0, its code the greatest of all."""
        for process in self.processes:
            process.join(max(0.0, self.started + timeout - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        out, err = (Path(path).read_text(errors="replace") for path in self.outputs[0])
        assert not late, f"not ended after {timeout} s\n{out}\n{err}"
        code = max((process.exitcode for process in self.processes), key=abs)
        return Result(code, out, err, time.monotonic() - self.started)


def start(
    script, argv, cwd, processes=1, env=None, root=ROOT, draw=False, missing=None, kill_at=None, kill_rank=0,
    events_file=None,
):  # fmt: skip
    """Starts `python SCRIPT ARGV`, or as many processes of it as torchrun would."""
    env, children, outputs = dict(env or {}), [], []
    if processes > 1:
        env |= dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
        env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    stem = Path(cwd) / f"output_{time.monotonic_ns()}"
    for rank in range(processes):
        ranks = dict(RANK=str(rank), LOCAL_RANK=str(rank)) if processes > 1 else {}
        output = (f"{stem}_{rank}.out", f"{stem}_{rank}.err")
        kill, events = (kill_at, events_file) if rank == kill_rank else (None, None)
        arguments = (script, list(map(str, argv)), str(cwd), env | ranks, *output, root, draw, missing, kill, events)
        child = context.Process(target=run_in_child, args=arguments)
        child.start()
        children.append(child)
        outputs.append(output)
    return Started(children, outputs)


def run(script, argv, cwd, timeout=60, **options):
    return start(script, argv, cwd, **options).finish(timeout)


def run_ok(script, argv, cwd, timeout=120, **options):
    """A run that must succeed."""
    result = run(script, argv, cwd, timeout, **options)
    assert result.code == 0, f"{script} {argv}: exit code {result.code}\n{result.stdout}\n{result.stderr}"
    return result


def real_command(script, argv, torchrun=0, torchrun_options=()):
    """The words of a real command line, with torchrun where that is the number of its processes."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(torchrun)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", *torchrun_options]
    return [*command, str(ROOT / f"{script}.py"), *map(str, argv)]


def real_run(script, argv, cwd, timeout=120, env=None, **options):
    """Really `python SCRIPT ...` or `torchrun ...`."""
    started = time.monotonic()
    command = real_command(script, argv, **options)
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, timeout=timeout
    )
    return Result(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


# ------------------------------------------------------------------------------------------------ what a run leaves


def rows(file, times=False):
    """The rows of a .jsonl file, without what a clock has measured."""
    lines = [json.loads(line) for line in open(file)]
    return lines if times else [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def predictions(run_dir):
    return {path.name: path.read_text() for path in sorted((Path(run_dir) / "predictions").iterdir())}


def weights(run_dir):
    """The parameters of model/."""
    return load_file(Path(run_dir) / "model" / "model.safetensors")


def same(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def checkpoint(run_dir):
    """The last checkpoint, without the logs, which have times in them."""
    state = torch.load(Path(run_dir) / "checkpoint" / "latest.pt", weights_only=True)
    return {key: value for key, value in state.items() if key != "logs"}


def assert_same_outcome(one, two):
    """Both runs have left the same to the bit, but for times."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert rows(Path(one) / name) == rows(Path(two) / name)
    assert predictions(one) == predictions(two)
    assert same(weights(one), weights(two))
    assert same(checkpoint(one), checkpoint(two))
