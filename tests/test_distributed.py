"""Sharded models, and more than one machine: the same run as without."""

import math
import os
import shutil
import subprocess

import pytest
import tiny_models
from script_runs import SCRIPTS, TINY, flags, free_port, predictions, real_command, rows, run, run_ok, weights

SETTINGS = TINY | dict(num_iterations=3, num_epochs=1, eval_every=2, save_every=1, learning_rate=1e-4)
SCALES = dict(seq2seq=20, causal=100)  # of EOS' embedding: its share of the tokens
SHARDING = [
    ("ppo_seq2seq", "seq2seq"),
    ("nlpo_causal", "causal"),
    ("a2c", "causal"),
    ("grpo", "seq2seq"),
    ("trpo", "seq2seq"),
    ("supervised", "seq2seq"),
]
SHARDING = [case for case in SHARDING if case[0] in SCRIPTS]


def assert_close(one, two, tolerance):
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        for name in a:
            if isinstance(a[name], float):
                assert math.isclose(a[name], b[name], rel_tol=tolerance, abs_tol=tolerance), (name, a[name], b[name])


@pytest.fixture
def soon_ending(tmp_path):
    """Saves a model that ends its responses after different lengths, so that one process is done before another."""

    def save(script, kind):
        seq2seq = kind == "seq2seq"
        return tiny_models.save_policy(tmp_path / "model", seq2seq, eos_scale=SCALES[kind])

    return save


@pytest.mark.parametrize("script, kind", SHARDING)
def test_sharded_run_is_the_same_and_resumes(script, kind, texts, digits, soon_ending, tmp_path):
    """--fsdp with 2 processes gives one process' figures (1e-4); its checkpoint resumes with it and without."""
    model = soon_ending(script, kind)

    def go(name, processes=1, **changes):
        settings = SETTINGS | dict(policy_type=kind, task=texts, reward=digits, model=model, run_dir=tmp_path / name)
        settings |= changes
        run_ok(script, flags(script, **settings), tmp_path, processes=processes)
        return tmp_path / name

    whole = go("whole")
    if script != "supervised":
        assert all(1 < row["rollout/response_length"] < 7 for row in rows(whole / "metrics.jsonl"))
    sharded = go("sharded", processes=2, fsdp=True, gradient_checkpointing=True)
    assert_close(rows(whole / "metrics.jsonl"), rows(sharded / "metrics.jsonl"), 1e-4)
    assert predictions(whole).keys() == predictions(sharded).keys()
    one, two = weights(whole), weights(sharded)
    assert one.keys() == two.keys()
    assert all((one[name] - two[name]).abs().max() <= 1e-3 for name in one)  # Adam makes steps of rounding errors

    if script != "supervised":
        go("again", processes=2, fsdp=True, num_iterations=2)
        shutil.copytree(tmp_path / "again", tmp_path / "alone")
        for name, processes, fsdp in (("again", 2, True), ("alone", 1, False)):
            resumed = go(name, processes=processes, fsdp=fsdp, resume=True, num_iterations=3)
            assert_close(rows(whole / "metrics.jsonl"), rows(resumed / "metrics.jsonl"), 1e-4)


def test_sharding_needs_torchrun(texts, digits, tmp_path):
    words = flags("ppo_causal", **SETTINGS | dict(task=texts, reward=digits, run_dir=tmp_path / "run", fsdp=True))
    done = run("ppo_causal", words, tmp_path)
    assert done.code == 2 and len(done.stderr.splitlines()) == 1 and "torchrun" in done.stderr


def test_two_machines(texts, digits, tmp_path):
    """Two torchrun agents that meet on the loopback give what one process gives."""
    settings = SETTINGS | dict(task=texts, reward=digits, num_iterations=2)
    run_ok("ppo_causal", flags("ppo_causal", **settings, run_dir=tmp_path / "one"), tmp_path)
    words = flags("ppo_causal", **settings, run_dir=tmp_path / "two")
    meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    command = real_command("ppo_causal", words)
    command[1:1] = ["-m", "torch.distributed.run", *meeting, "--rdzv_endpoint", f"localhost:{free_port()}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for agent in agents:
        output, _ = agent.communicate(timeout=120)
        assert agent.returncode == 0, output
    assert_close(rows(tmp_path / "one" / "metrics.jsonl"), rows(tmp_path / "two" / "metrics.jsonl"), 1e-5)
