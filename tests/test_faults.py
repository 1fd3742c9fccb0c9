"""What happens to a run that is killed, interrupted, starved or lied to: nothing is lost, nothing is wrong."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import script_runs
from safetensors.torch import save_file
from script_runs import (
    CASES,
    SCRIPTS,
    TINY,
    assert_same_outcome,
    checkpoint,
    flags,
    real_command,
    real_run,
    rows,
    run,
    run_ok,
    start,
)
from test_command_line import assert_one_line
from test_runs import assert_close

OWN = '''
"""Rewards of digits and letters, each with something that happens while they are computed."""
import os
import resource
import time
from pathlib import Path

MARK = Path(__file__).with_name("mark")
calls = 0


def share(generations):
    good = set("0123456789abcdefghijklm")
    return [sum(c in good for c in g.lower()) / max(len(g), 1) for g in generations]


def slow(prompts, generations, references, metas):
    time.sleep(0.0 if MARK.exists() else 0.4)
    return share(generations)


def very_slow(prompts, generations, references, metas):
    time.sleep(0.1 if MARK.exists() else 15)
    return share(generations)


def disk_full(prompts, generations, references, metas):
    """From the fourth call on, with the trial, no file may be longer than 10,000 bytes, unless there is the mark."""
    global calls
    calls += 1
    if calls == 4 and not MARK.exists():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return share(generations)


def fills_disk(prompts, generations, references, metas):
    """At the fourth call all that is left of the disk is taken."""
    global calls
    calls += 1
    if calls == 4 and not MARK.exists():
        try:
            with open("run/fill", "wb", buffering=0) as file:
                while True:
                    file.write(b"0" * 4096)
        except OSError:
            pass
    return share(generations)


def kills(prompts, generations, references, metas):
    """At its fifth call the second process kills itself, once."""
    global calls
    calls += 1
    if calls == 5 and os.environ.get("RANK") == "1" and not MARK.exists():
        MARK.touch()
        os.kill(os.getpid(), 9)
    return share(generations)
'''
# one policy type of each script is killed in the short form, all in the long one
KINDS = dict(ppo_seq2seq="seq2seq", nlpo_causal="causal", a2c="seq2seq", trpo="causal", grpo="causal")
KINDS["supervised"] = "seq2seq"
SHORT_CASES = [case for case in CASES if KINDS.get(case[0]) == case[1]]
FUNCTIONS = (
    "main",
    "sample_responses",
    "evaluate",
    "decode_split",
    "save_checkpoint",
    "write_row",
    "save_model",
)


@pytest.fixture
def own(tmp_path):
    """Own rewards in a folder of this test's, so that its mark is too."""
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


@pytest.fixture(scope="session")
def whole(tmp_path_factory, texts, digits):
    """whole(script, kind): the folder of an uninterrupted run, and the number of calls in each of its functions."""
    done = {}

    def get(script, kind, processes=1):
        if (script, kind, processes) not in done:
            cwd = tmp_path_factory.mktemp("whole")
            argv = command(script, kind, texts, digits)
            run_ok(script, argv, cwd, processes=processes, events_file=cwd / "events.json")
            done[script, kind, processes] = cwd / "run", json.loads((cwd / "events.json").read_text())
        return done[script, kind, processes]

    return get


def command(script, kind, task, reward, /, **changes):
    return flags(script, **TINY | dict(policy_type=kind, task=task, reward=reward, run_dir="run") | changes)


# ------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.parametrize("script, kind", SHORT_CASES)
def test_killed_again_and_again(script, kind, whole, texts, digits, tmp_path):
    """One run, killed in each of its functions and resumed every time: in the end as if nothing had happened."""
    uninterrupted, events = whole(script, kind)
    rng, argv, killed = random.Random(script), command(script, kind, texts, digits, resume=True), 0
    # first when there is a checkpoint to go on from; what a resumed run still has to do is less than the whole
    moments = [("main", events["main"] * 7 // 10)]
    for function in ("evaluate", "sample_responses", "main", "save_checkpoint", "write_row", "save_model"):
        moments.append((function, rng.randint(1, max(1, events.get(function, 1) // 4))))
    for moment in moments:
        result = run(script, argv, tmp_path, kill_at=moment)
        assert result.code in (0, -signal.SIGKILL), f"{moment}: {result.stderr}"
        assert checkpoint(tmp_path / "run")["iteration"] >= 2
        killed += result.code != 0
    assert killed >= 3
    run_ok(script, argv, tmp_path)
    assert_same_outcome(uninterrupted, tmp_path / "run")
    run_ok(script, argv, tmp_path)  # a finished run has nothing left to do
    assert_same_outcome(uninterrupted, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("script, kind", CASES)
def test_killed_at_twenty_moments(script, kind, whole, texts, digits, tmp_path):
    """Each kill on its own: three random calls in each function, and every call while a checkpoint is written."""
    uninterrupted, events = whole(script, kind)
    rng, argv = random.Random(1), command(script, kind, texts, digits)
    moments = [(f, rng.randint(1, events[f])) for f in FUNCTIONS if f in events for _ in range(3)]
    first_save = events["save_checkpoint"] // 3
    moments += [("save_checkpoint", first_save + n) for n in range(1, first_save, 4)]
    assert len(moments) >= 20
    for i, moment in enumerate(moments):
        cwd = tmp_path / str(i)
        cwd.mkdir()
        assert run(script, argv, cwd, kill_at=moment).code == -signal.SIGKILL, moment
        run_ok(script, [*argv, "--resume"], cwd)
        assert_same_outcome(uninterrupted, cwd / "run")
        shutil.rmtree(cwd)


@pytest.mark.slow
@pytest.mark.parametrize("script, kind", SHORT_CASES)
def test_killed_by_the_clock(script, kind, whole, texts, digits, tmp_path):
    """Kills that know nothing of the script, in the middle of system calls too."""
    uninterrupted, _ = whole(script, kind)
    rng, argv = random.Random(2), command(script, kind, texts, digits, resume=True)
    for i in range(10):
        cwd = tmp_path / str(i)
        cwd.mkdir()
        for _ in range(2):
            started = start(script, argv, cwd)
            time.sleep(rng.uniform(0.1, 1.5))
            started.processes[0].kill()
            assert started.finish().code in (0, -signal.SIGKILL)
        run_ok(script, argv, cwd)
        assert_same_outcome(uninterrupted, cwd / "run")


@pytest.mark.parametrize("script, kind", SHORT_CASES[:1] + SHORT_CASES[-1:])
def test_world_size_may_change(script, kind, whole, texts, digits, tmp_path):
    """Killed as two processes and resumed as one, and the reverse: the figures of the uninterrupted run to 1e-5."""
    uninterrupted, events = whole(script, kind)
    for first, second in ((2, 1), (1, 2)):
        cwd = tmp_path / str(first)
        cwd.mkdir()
        argv = command(script, kind, texts, digits)
        moment = ("write_row", 1 + events["write_row"] * 2 // 3)
        started = start(script, argv, cwd, processes=first, kill_at=moment)
        started.processes[0].join(60)
        for process in started.processes:
            process.kill()
        assert started.finish().code == -signal.SIGKILL
        assert checkpoint(cwd / "run")["iteration"] >= 2
        run_ok(script, [*argv, "--resume"], cwd, processes=second)
        assert_close(rows(uninterrupted / "metrics.jsonl"), rows(cwd / "run" / "metrics.jsonl"), 1e-5)
        iterations = [row["iteration"] for row in rows(cwd / "run" / "metrics.jsonl")]
        assert iterations == list(range(1, len(iterations) + 1))


@pytest.mark.parametrize("script", ["ppo_seq2seq"])
def test_two_processes_killed_and_resumed(script, whole, texts, digits, tmp_path):
    """Two processes, to the bit."""
    uninterrupted, events = whole(script, "seq2seq", processes=2)
    argv = command(script, "seq2seq", texts, digits)
    started = start(script, argv, tmp_path, processes=2, kill_at=("main", events["main"] * 3 // 4))
    started.processes[0].join(60)
    started.processes[1].kill()
    assert started.finish().code == -signal.SIGKILL
    run_ok(script, [*argv, "--resume"], tmp_path, processes=2)
    assert_same_outcome(uninterrupted, tmp_path / "run")


# ------------------------------------------------------------------------------------------------ one of two processes


@pytest.mark.parametrize("rank", [0, 1])
def test_other_process_does_not_hang(rank, whole, texts, digits, tmp_path):
    """One of two is killed in an update: the other, left alone, ends within a minute, not with success."""
    _, events = whole("ppo_seq2seq", "seq2seq")
    argv = command("ppo_seq2seq", "seq2seq", texts, digits)
    moment = ("main", events["main"] * 3 // 4)
    started = start("ppo_seq2seq", argv, tmp_path, processes=2, kill_at=moment, kill_rank=rank)
    started.finish(timeout=90)
    codes = [process.exitcode for process in started.processes]
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] not in (0, -signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("script, kind", [case for case in SHORT_CASES if case[0] != "supervised"])
def test_torchrun_restarts_a_killed_process(script, kind, texts, own, tmp_path):
    """--max-restarts with --resume: the run goes on from its checkpoint by itself, and ends as one without the kill."""
    argv = command(script, kind, texts, f"{own}:kills", save_every=1, resume=True)
    result = real_run(script, argv, tmp_path, torchrun=2, torchrun_options=["--max-restarts", "1"], timeout=300)
    assert result.code == 0, result.stderr
    assert own.with_name("mark").exists()
    shutil.move(tmp_path / "run", tmp_path / "restarted")
    run_ok(script, argv, tmp_path, processes=2)  # with the mark nothing is killed
    assert_same_outcome(tmp_path / "restarted", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("script, kind", [case for case in SHORT_CASES if case[0] != "supervised"])
def test_torchrun_ends_when_a_process_is_killed(script, kind, texts, own, tmp_path):
    """Without restarts everything ends within a minute, with a message that names the signal."""
    argv = command(script, kind, texts, f"{own}:kills", save_every=1)
    result = real_run(script, argv, tmp_path, torchrun=2, timeout=120)
    assert result.code != 0 and result.seconds < 90
    assert "SIGKILL" in result.stderr or "Signal 9" in result.stderr
    assert checkpoint(tmp_path / "run")["iteration"] == 3


# ------------------------------------------------------------------------------------------------ disk and damage


@pytest.mark.parametrize("script, kind", [case for case in SHORT_CASES if case[0] != "supervised"])
def test_checkpoint_that_cannot_be_written(script, kind, texts, own, tmp_path):
    """One line that says which file and why; the checkpoint before is whole, and with room again the run goes on."""
    argv = command(script, kind, texts, f"{own}:disk_full", save_every=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    result = run(script, argv, tmp_path)
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == limit
    assert_one_line(result, script, 1, ["latest.pt", "the one before it is whole", "File too large"])
    assert checkpoint(tmp_path / "run")["iteration"] == 2
    own.with_name("mark").touch()
    run_ok(script, [*argv, "--resume"], tmp_path)
    shutil.move(tmp_path / "run", tmp_path / "resumed")
    run_ok(script, argv, tmp_path)
    assert_same_outcome(tmp_path / "run", tmp_path / "resumed")


def test_full_disk(texts, own, tmp_path):
    """The same on a small disk that is really full."""
    (tmp_path / "run").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path / "run")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk of one's own cannot be mounted here")
    try:
        argv = command("ppo_seq2seq", "seq2seq", texts, f"{own}:fills_disk", save_every=1)
        assert_one_line(run("ppo_seq2seq", argv, tmp_path), "ppo_seq2seq", 1, ["No space left"])
        assert checkpoint(tmp_path / "run")["iteration"] == 2
        (tmp_path / "run" / "fill").unlink()
        own.with_name("mark").touch()
        run_ok("ppo_seq2seq", [*argv, "--resume"], tmp_path)
        assert checkpoint(tmp_path / "run")["iteration"] == 5
        assert [row["iteration"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    finally:
        subprocess.run(["umount", str(tmp_path / "run")], check=True)


def copy_of(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("script, kind", SHORT_CASES)
def test_damaged_checkpoint(script, kind, whole, texts, digits, tmp_path):
    """Refused by name with the one before offered; its way out leads to the outcome of the uninterrupted run."""
    uninterrupted, _ = whole(script, kind)
    run_dir = copy_of(uninterrupted, tmp_path)
    file = run_dir / "checkpoint" / "latest.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    argv = command(script, kind, texts, digits, resume=True)
    assert_one_line(run(script, argv, tmp_path), script, 2, ["latest.pt", "damaged", "remove", "the one before"])
    assert_same_rows(uninterrupted, run_dir)
    file.unlink()
    run_ok(script, argv, tmp_path)
    assert_same_outcome(uninterrupted, run_dir)


def assert_same_rows(one, two):
    """Not a byte of the logs has changed."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


# ------------------------------------------------------------------------------------------------ the best model


HASHED = '''
"""A metric whose best is somewhere in the middle of a run: a number made of all texts."""
import zlib


def hashed(prompts, generations, references, metas):
    return {"hashed": (None, zlib.crc32("|".join(["0", *generations]).encode()) / 2**32)}
'''


@pytest.mark.parametrize("script, kind", SHORT_CASES)
def test_best_model_is_kept(script, kind, texts, digits, tmp_path):
    """best/ decodes as the best evaluation did, also if the run was killed while it was written and went on."""
    (tmp_path / "own.py").write_text(HASHED)
    settings = dict(metrics="own.py:hashed", keep_best="hashed", eval_every=1, save_every=100, learning_rate=3e-3)
    argv = command(script, kind, texts, digits, **settings)
    events = tmp_path / "events.json"
    run_ok(script, argv, tmp_path, events_file=events)
    values = [row["hashed"] for row in rows(tmp_path / "run" / "eval.jsonl") if row["split"] == "val"]
    if max(values) == values[0]:  # rounding of another machine may have led to other texts
        pytest.skip("the start model is the best")
    again = settings | dict(model=tmp_path / "run" / "best", run_dir="again", num_iterations=0, num_epochs=0)
    run_ok(script, command(script, kind, texts, digits, **again), tmp_path)
    assert rows(tmp_path / "again" / "eval.jsonl")[0]["hashed"] == max(values)

    calls = json.loads(events.read_text())["save_model"]
    shutil.move(tmp_path / "run", tmp_path / "whole")
    for moment in (1, calls // 2, calls - 1):
        killed = run(script, argv, tmp_path, kill_at=("save_model", moment))
        assert killed.code == -signal.SIGKILL
        run_ok(script, [*argv, "--resume"], tmp_path)
        assert_same_outcome(tmp_path / "whole", tmp_path / "run")
        assert contents(tmp_path / "whole" / "best") == contents(tmp_path / "run" / "best")
        shutil.rmtree(tmp_path / "run")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_best_by_a_metric_that_is_not_measured(texts, digits, tmp_path):
    argv = command("ppo_causal", "causal", texts, digits, keep_best="rouge")
    assert_one_line(run("ppo_causal", argv, tmp_path), "ppo_causal", 2, ["--keep-best rouge", "rouge1, rouge2"])


# ------------------------------------------------------------------------------------------------ other settings


@pytest.mark.parametrize("script, kind", SHORT_CASES)
def test_resumed_run_goes_on_with_its_settings(script, kind, whole, texts, digits, tmp_path):
    """--resume alone needs no other flag: the rest is in config.json. What is typed wins, and is named in a line."""
    uninterrupted, _ = whole(script, kind)
    copy_of(uninterrupted, tmp_path)
    result = run_ok(script, ["--run-dir", "run", "--resume"], tmp_path)
    assert_same_outcome(uninterrupted, tmp_path / "run")
    assert "goes on with" not in result.stdout
    words = ["--run-dir", "run", "--resume", "--learning-rate", "1e-4", "--eval-samples", "3"]
    result = run_ok(script, words, tmp_path)
    (line,) = (line for line in result.stdout.splitlines() if "goes on with" in line)
    assert "--learning-rate 0.001 -> 0.0001" in line
    assert "--eval-samples 5 -> 3" in line and "--task" not in line and "--batch-size" not in line


@pytest.mark.parametrize("script, kind", SHORT_CASES)
def test_stopped_run_goes_on_without_its_command_line(script, kind, whole, texts, digits, tmp_path):
    """Killed, and resumed by --run-dir and --resume alone: as if nothing had happened."""
    uninterrupted, events = whole(script, kind)
    argv = command(script, kind, texts, digits)
    assert run(script, argv, tmp_path, kill_at=("main", events["main"] * 7 // 10)).code == -signal.SIGKILL
    run_ok(script, ["--run-dir", "run", "--resume"], tmp_path)
    assert_same_outcome(uninterrupted, tmp_path / "run")


def test_changed_start_model_is_refused(whole, texts, digits, tmp_path):
    """Under the same name or another: the reference must be the one that it was. Not a byte is written."""
    uninterrupted, _ = whole("ppo_seq2seq", "seq2seq")
    shutil.copytree(uninterrupted / "model", tmp_path / "start")
    argv = command("ppo_seq2seq", "seq2seq", texts, digits, model=tmp_path / "start")
    run_ok("ppo_seq2seq", argv, tmp_path)
    logs = {name: (tmp_path / "run" / name).read_bytes() for name in ("metrics.jsonl", "eval.jsonl", "config.json")}
    other = script_runs.load_file(tmp_path / "start" / "model.safetensors")
    next(iter(other.values()))[0] += 0.01
    save_file(other, tmp_path / "start" / "model.safetensors", metadata={"format": "pt"})
    told = ["--model", str(tmp_path / "start"), "changed"]
    assert_one_line(run("ppo_seq2seq", [*argv, "--resume"], tmp_path), "ppo_seq2seq", 2, told)
    words = [*argv, "--resume", "--model", script_runs.tiny_model("seq2seq")]
    assert "changed" in run("ppo_seq2seq", words, tmp_path).stderr
    assert logs == {name: (tmp_path / "run" / name).read_bytes() for name in logs}


def test_longer_run_goes_on_from_a_finished_one(whole, texts, digits, tmp_path):
    """With more iterations; the rows before stay, and a run of 7 from the start has the same."""
    uninterrupted, _ = whole("ppo_seq2seq", "seq2seq")
    run_dir = copy_of(uninterrupted, tmp_path)
    result = run_ok("ppo_seq2seq", ["--run-dir", "run", "--resume", "--num-iterations", "7"], tmp_path)
    assert "--num-iterations 5 -> 7" in result.stdout
    metrics = rows(run_dir / "metrics.jsonl")
    assert metrics[:5] == rows(uninterrupted / "metrics.jsonl") and [row["iteration"] for row in metrics[5:]] == [6, 7]
    run_ok("ppo_seq2seq", command("ppo_seq2seq", "seq2seq", texts, digits, run_dir="seven", num_iterations=7), tmp_path)
    assert rows(tmp_path / "seven" / "metrics.jsonl") == metrics


@pytest.mark.parametrize("script, kind", [*SHORT_CASES, ("ppo_causal", "causal"), ("nlpo_seq2seq", "seq2seq")])
def test_resumed_run_learns_at_the_rate_and_the_penalty_that_are_typed(script, kind, whole, texts, digits, tmp_path):
    """Not at those of the checkpoint, which hold where nothing is typed, and the next time."""
    run_dir = copy_of(whole(script, kind)[0], tmp_path)
    before = rows(run_dir / "metrics.jsonl")[-1]
    for longer, typed in ((1, dict(learning_rate=1e-5, kl_coef=0.9)), (2, {})):
        longer = dict(num_iterations=before["iteration"] + longer, num_epochs=2 + longer)
        run_ok(script, flags(script, run_dir="run", resume=True, **longer, **typed), tmp_path)
        after = [row for row in rows(run_dir / "metrics.jsonl") if row["iteration"] > before["iteration"]]
        assert {row["losses/learning_rate"] for row in after} == {1e-5}
        if script != "supervised":
            assert after[0]["objective/kl_coef"] == 0.9 and all(0.8 < row["objective/kl_coef"] < 1 for row in after)
            assert len({row["objective/kl_coef"] for row in after}) == len(after)  # the controller's


def test_resumed_run_takes_another_optimizer(texts, digits, tmp_path):
    """Which cannot go on from the other's moments."""
    run_ok("a2c", command("a2c", "causal", texts, digits, num_iterations=2, optimizer="rmsprop"), tmp_path)
    assert all("square_avg" in slots for slots in checkpoint(tmp_path / "run")["optimizer"]["state"].values())
    run_ok("a2c", ["--run-dir", "run", "--resume", "--num-iterations", "3", "--optimizer", "adam"], tmp_path)
    state = checkpoint(tmp_path / "run")["optimizer"]["state"]
    assert {slots["step"].item() for slots in state.values()} == {1.0}
    assert all("exp_avg_sq" in slots for slots in state.values())


def test_best_by_a_metric_that_the_resumed_run_adds(whole, texts, digits, tmp_path):
    """The evaluations before have no value of it."""
    run_dir = copy_of(whole("ppo_causal", "causal")[0], tmp_path)
    words = ["--run-dir", "run", "--resume", "--num-iterations", "6", "--metrics", "chrf", "--keep-best", "chrf"]
    run_ok("ppo_causal", words, tmp_path)
    assert (run_dir / "best").is_dir()
    assert [set(row) >= {"chrf"} for row in rows(run_dir / "eval.jsonl")][-2:] == [True, True]


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_without_a_run_starts_it(script, whole, texts, digits, tmp_path):
    kind = "causal" if script.endswith("causal") else "seq2seq"
    uninterrupted, _ = whole(script, kind)
    (tmp_path / "run").mkdir()
    run_ok(script, command(script, kind, texts, digits, resume=True), tmp_path)
    assert_same_outcome(uninterrupted, tmp_path / "run")


# ------------------------------------------------------------------------------------------------ signals, two runs


def wait_for_rows(run_dir, n=1, timeout=60):
    """Waits until the run has logged n iterations."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        file = Path(run_dir) / "metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= n:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run_dir} has not logged {n} iterations after {timeout} s")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_saves_and_ends(number, code, processes, texts, own, tmp_path):
    """A checkpoint of the last iteration, one line that says how to go on; going on gives the uninterrupted run."""
    argv = command("ppo_seq2seq", "seq2seq", texts, f"{own}:slow", save_every=100)
    started = start("ppo_seq2seq", argv, tmp_path, processes=processes)
    wait_for_rows(tmp_path / "run")
    os.kill(started.processes[-1].pid, number)  # one is enough: all end together
    if number == signal.SIGINT and processes == 2:
        os.kill(started.processes[0].pid, number)  # a terminal sends it to all
    result = started.finish()
    own.with_name("mark").touch()
    assert result.code == code and "Traceback" not in result.stderr
    last = rows(tmp_path / "run" / "metrics.jsonl")[-1]["iteration"]
    assert last < TINY["num_iterations"] and checkpoint(tmp_path / "run")["iteration"] == last
    line = result.stdout.splitlines()[-1]
    assert f"{last} of {TINY['num_iterations']} iterations" in line and "--run-dir run --resume" in line
    run_ok("ppo_seq2seq", [*argv, "--resume"], tmp_path, processes=processes)
    shutil.move(tmp_path / "run", tmp_path / "resumed")
    run_ok("ppo_seq2seq", argv, tmp_path, processes=processes)
    assert_same_outcome(tmp_path / "run", tmp_path / "resumed")


def test_second_signal_ends_at_once(texts, own, tmp_path):
    """In the middle of a slow reward: no waiting for it, and the checkpoint before is whole."""
    own.with_name("mark").touch()
    argv = command("ppo_seq2seq", "seq2seq", texts, f"{own}:very_slow", save_every=1)
    started = start("ppo_seq2seq", argv, tmp_path)
    wait_for_rows(tmp_path / "run", 2)
    own.with_name("mark").unlink()
    time.sleep(0.5)  # now it sleeps
    os.kill(started.processes[0].pid, signal.SIGTERM)
    time.sleep(1.5)
    assert started.processes[0].is_alive()
    asked = time.monotonic()
    os.kill(started.processes[0].pid, signal.SIGTERM)
    assert started.finish().code == 128 + signal.SIGTERM and time.monotonic() - asked < 3
    assert checkpoint(tmp_path / "run")["iteration"] >= 2
    own.with_name("mark").touch()
    run_ok("ppo_seq2seq", [*argv, "--resume"], tmp_path)
    shutil.move(tmp_path / "run", tmp_path / "resumed")
    run_ok("ppo_seq2seq", argv, tmp_path)
    assert_same_outcome(tmp_path / "run", tmp_path / "resumed")


def test_two_runs_in_one_folder(texts, own, tmp_path):
    """The second is refused, whether it would start or resume; the first never notices."""
    argv = command("ppo_seq2seq", "seq2seq", texts, f"{own}:slow", save_every=1)
    started = start("ppo_seq2seq", argv, tmp_path)
    wait_for_rows(tmp_path / "run")
    assert_one_line(run("ppo_seq2seq", argv, tmp_path), "ppo_seq2seq", 2, ["--run-dir run", "--resume"])
    second = run("ppo_seq2seq", [*argv, "--resume"], tmp_path)
    assert_one_line(second, "ppo_seq2seq", 2, ["--run-dir run", "another run"])
    assert started.finish().code == 0
    own.with_name("mark").touch()
    shutil.move(tmp_path / "run", tmp_path / "first")
    run_ok("ppo_seq2seq", argv, tmp_path)
    assert_same_outcome(tmp_path / "run", tmp_path / "first")


def test_two_runs_started_at_once(texts, own, tmp_path):
    """Exactly one of them runs."""
    argv = command("ppo_seq2seq", "seq2seq", texts, f"{own}:slow")
    both = [start("ppo_seq2seq", argv, tmp_path) for _ in range(2)]
    results = sorted((started.finish() for started in both), key=lambda result: result.code)
    assert [result.code for result in results] == [0, 2]
    assert "--run-dir run" in results[1].stderr and "Traceback" not in results[1].stderr
    assert [row["iteration"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_real_process_on_signals(texts, own, tmp_path):
    """`python` and `torchrun` themselves: SIGTERM to the one that was started, a line, code 0, everything saved."""
    line = "stopping after this iteration, with a checkpoint; again to end now"
    for torchrun in (0, 2):
        argv = command("ppo_seq2seq", "seq2seq", texts, f"{own}:slow", run_dir=f"run{torchrun}", num_iterations=500)
        words = real_command("ppo_seq2seq", argv, torchrun=torchrun)
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_rows(tmp_path / f"run{torchrun}", timeout=120)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        last = rows(tmp_path / f"run{torchrun}" / "metrics.jsonl")[-1]["iteration"]
        assert checkpoint(tmp_path / f"run{torchrun}")["iteration"] == last
        assert f"{last} of 500 iterations" in out
        assert torchrun or (process.returncode == 0 and err.strip() == line)
