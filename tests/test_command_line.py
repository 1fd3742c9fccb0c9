"""Wrong command lines, and rewards that go wrong: one clear line, the right exit code, nothing half-written.

A new case is a line in WRONG: the script (or ANY: each in its turn), the words, and what the line must say. {names} in
words are made by the fixture `things`. What a case does not say itself is filled in: a task, a model, a run folder.
"""

import json
import resource
import shutil
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import script_runs
import torch
import transformers
from script_runs import ROOT, SCRIPTS, TINY, fields, flags, real_run, run, run_ok, start

from datapools import load_tokenizer

ANY = "any"
RL = "rl"
WRONG = [
    # names that are not known
    (ANY, "--task numbrs", "'numbrs'", "'numbers'"),
    (ANY, "--task no/such/texts.jsonl", "no/such/texts.jsonl", "no such file"),
    (RL, "--reward rogue1", "'rogue1'", "'rouge1'"),
    (RL, "--reward rouge1 nonsense", "'nonsense'", "known are"),
    (ANY, "--metrics rogue", "'rogue'", "'rouge'"),
    (ANY, "--metrics evaluate:no_such_metric_anywhere", "no_such_metric_anywhere"),
    (RL, "--reward {folder}/nowhere.py:f", "nowhere.py", "no file"),
    (RL, "--reward {own}:digts", "'digts'", "'digits'"),
    (RL, "--reward {own}:NUMBER", "NUMBER"),
    (RL, "--reward {own}:two_arguments", "two_arguments"),
    (RL, "--reward {broken}:f", "broken.py", "SyntaxError"),
    (RL, "--reward {raising}:f", "raising.py", "no_such_package"),
    (ANY, "--metrics {folder}/nowhere.py:f", "nowhere.py", "no file"),
    (ANY, "--metrics {own}:digts", "'digts'", "'digits'"),
    (ANY, "--model no/such/model", "--model no/such/model", "folder"),
    (ANY, "--model no-such-model-anywhere", "--model no-such-model-anywhere", "hub"),
    (ANY, "--model {nothing}", "--model {nothing}"),
    (ANY, "--model {own}", "--model {own}"),
    (ANY, "--model {bad_config}", "--model {bad_config}"),
    (ANY, "--model {config_only}", "--model {config_only}"),
    (ANY, "--model {no_tokenizer}", "--model {no_tokenizer}", "tokenizer"),
    ("ppo_seq2seq", "--model {gpt2}", "--model {gpt2}", "gpt2", "causal script"),
    ("nlpo_seq2seq", "--model {gpt2}", "--model {gpt2}", "gpt2", "causal script"),
    ("ppo_causal", "--model {t5}", "--model {t5}", "t5", "seq2seq script"),
    ("nlpo_causal", "--model {t5}", "--model {t5}", "t5", "seq2seq script"),
    ("ppo_causal", "--model {picture}", "--model {picture}", "vit"),
    ("a2c", "--model {picture}", "--model {picture}", "vit"),
    # flags
    (ANY, "--lerning-rate 0.1", "--lerning-rate", "--learning-rate"),
    (ANY, "--no-such-flag 3", "--no-such-flag"),
    (ANY, "--lr 1e-4", "--lr", "--learning-rate"),
    (ANY, "--bs=8", "--bs", "--batch-size"),
    (ANY, "--anneal-lr False", "--anneal-lr False", "write --no-anneal-lr"),
    (ANY, "--no-anneal_lr=true", "--no-anneal-lr true", "write --no-anneal-lr"),
    (RL, "--whiten-rewards True", "--whiten-rewards True", "write --whiten-rewards"),
    (ANY, "extra", "extra"),
    (ANY, "--batch-size many", "--batch-size", "many"),
    (ANY, "--batch-size 8.5", "--batch-size", "8.5"),
    (ANY, "--batch-size", "--batch-size"),
    (ANY, "--learning-rate fast", "--learning-rate", "fast"),
    (ANY, "--dtype float16", "--dtype", "float16", "bfloat16"),
    (RL, "--target-kl little", "--target-kl", "little"),
    ("a2c", "--policy-type decoder", "--policy-type", "decoder", "causal"),
    ("supervised", "--policy-type decoder", "--policy-type", "decoder", "causal"),
    ("a2c", "--optimizer sgd", "--optimizer", "sgd", "rmsprop"),
    ("supervised", "--reward rouge1", "--reward"),
    ("nlpo_seq2seq", "--mask-type top_q", "--mask-type", "top_q", "learned_top_p"),
    ("nlpo_causal", "--top-mask 1.5", "--top-mask", "1.5"),
    # numbers out of range
    (ANY, "--batch-size 0", "--batch-size 0", "greater than 0"),
    (ANY, "--batch-size -8", "--batch-size -8", "greater than 0"),
    (ANY, "--micro-batch-size 0", "--micro-batch-size 0", "greater than 0"),
    (RL, "--sample-batch-size 0", "--sample-batch-size 0", "greater than 0"),
    (RL, "--num-iterations -1", "--num-iterations -1", "greater than or equal to 0"),
    ("supervised", "--num-epochs -1", "--num-epochs -1", "greater than or equal to 0"),
    ("ppo_seq2seq", "--num-minibatches 0", "--num-minibatches 0", "greater than 0"),
    ("ppo_causal", "--update-epochs 0", "--update-epochs 0", "greater than 0"),
    (ANY, "--learning-rate 0", "--learning-rate 0", "greater than 0"),
    (ANY, "--learning-rate -1e-3", "--learning-rate -0.001", "greater than 0"),
    (ANY, "--learning-rate nan", "--learning-rate nan", "finite"),
    (RL, "--gamma 1.5", "--gamma 1.5", "less than or equal to 1"),
    (RL, "--gae-lambda -0.1", "--gae-lambda -0.1", "greater than or equal to 0"),
    ("ppo_seq2seq", "--clip-coef 0", "--clip-coef 0", "greater than 0"),
    ("nlpo_seq2seq", "--clip-vf-coef -1", "--clip-vf-coef -1", "greater than 0"),
    ("ppo_causal", "--early-stop-kl 0", "--early-stop-kl 0", "greater than 0"),
    ("ppo_causal", "--ent-coef -0.5", "--ent-coef -0.5", "greater than or equal to 0"),
    ("ppo_causal", "--ent-coef inf", "--ent-coef inf"),
    (RL, "--vf-coef -1", "--vf-coef -1", "greater than or equal to 0"),
    (RL, "--vf-coef inf", "--vf-coef inf"),
    (ANY, "--max-grad-norm 0", "--max-grad-norm 0", "greater than 0"),
    (RL, "--kl-coef -0.1", "--kl-coef -0.1", "greater than or equal to 0"),
    (RL, "--kl-coef nan", "--kl-coef nan", "finite"),
    (RL, "--target-kl 0", "--target-kl 0", "greater than 0"),
    (RL, "--temperature 0", "--temperature 0", "greater than 0"),
    (RL, "--temperature inf", "--temperature inf"),
    ("ppo_causal", "--top-k -1", "--top-k -1", "greater than or equal to 0"),
    (ANY, "--eval-every 0", "--eval-every 0", "greater than 0"),
    (ANY, "--save-every 0", "--save-every 0", "greater than 0"),
    (ANY, "--eval-samples -1", "--eval-samples -1", "greater than or equal to 0"),
    (ANY, "--seed -1", "--seed -1", "greater than or equal to 0"),
    (ANY, "--prompt-length 0", "--prompt-length 0", "greater than 0"),
    (ANY, "--response-length -5", "--response-length -5", "greater than 0"),
    (RL, "--min-response-length -1", "--min-response-length -1", "greater than or equal to 0"),
    ("supervised", "--scratch-vocab-size 100", "--scratch-vocab-size 100"),
    ("supervised", "--scratch-width 0", "--scratch-width 0", "greater than"),
    ("supervised", "--scratch-layers 0", "--scratch-layers 0", "greater than"),
    ("supervised", "--scratch-heads 0", "--scratch-heads 0", "greater than"),
    # what does not go together
    ("ppo_seq2seq", "--batch-size 10 --num-minibatches 4", "--batch-size 10", "--num-minibatches 4"),
    ("nlpo_causal", "--batch-size 9 --num-minibatches 2", "--batch-size 9", "--num-minibatches 2"),
    ("ppo_causal", "WORLD_SIZE=3 --batch-size 8 --num-minibatches 2", "--batch-size 8", "3 processes", "6"),
    ("a2c", "WORLD_SIZE=3 --batch-size 8", "--batch-size 8", "3 processes"),
    ("trpo", "WORLD_SIZE=3 --batch-size 8", "--batch-size 8", "3 processes"),
    ("supervised", "WORLD_SIZE=3 --batch-size 8", "--batch-size 8", "3 processes"),
    ("supervised", "--scratch-width 32 --scratch-heads 3", "--scratch-heads 3", "--scratch-width 32"),
    (RL, "--min-response-length 21 --response-length 20", "--min-response-length 21", "--response-length 20"),
    ("ppo_seq2seq", "--model {bart} --prompt-length 40 --response-length 9", "--prompt-length", "40", "32"),
    ("a2c", "--model {bart} --prompt-length 9 --response-length 40", "--response-length", "40", "32"),
    ("ppo_causal", "--model {gpt2} --prompt-length 30 --response-length 10", "40", "32"),
    ("supervised", "--model {gpt2} --prompt-length 30 --response-length 10", "--prompt-length", "32"),
    (RL, "--reward-weights 1 2", "--reward-weights", "2", "1"),
    (RL, "--reward rouge1 rouge2 --reward-weights 1", "--reward-weights", "1", "2"),
    (RL, "--reward-weights nan", "--reward-weights", "nan"),
    (RL, "--reward-weights inf", "--reward-weights", "inf"),
    (RL, "--reward rouge1 rouge1", "rouge1", "twice"),
    (RL, "--reward", "--reward"),
    (RL, "--reward-kwargs min_token 3", "'min_token'", "'min_tokens'"),
    (RL, "--reward-kwargs rouge1.x 3", "rouge1", "increasing_numbers.x"),
    (RL, "--reward-kwargs min_tokens", "--reward-kwargs min_tokens:", "KEY VALUE"),
    (RL, "--reward-kwargs min_tokens=5", "--reward-kwargs min_tokens=5:", "as in --reward-kwargs min_tokens 5"),
    (RL, "--reward-kwargs min_tokens=5 x=3", "min_tokens 5 x 3"),
    (RL, "--reward-kwargs min_tokens many", "min_tokens", "many"),
    (ANY, "--metric-kwargs nonsense 3", "'nonsense'", "min_tokens"),
    (ANY, "--task-kwargs samples 3", "'samples'", "'n_samples'"),
    (ANY, "--task-kwargs n_samples many", "n_samples", "many"),
    (ANY, "--task-kwargs n_samples 0", "n_samples", "0", "at least 1"),
    # data
    (ANY, "--task cnn_dm --data no/such/folder", "no/such/folder", "folder"),
    (ANY, "--task cnn_dm --data {own}", "{own}", "folder"),
    (ANY, "--task cnn_dm --data {texts}", "article", "prompt"),
    (ANY, "--task cnn_dm --data {no_val}", "{no_val}", "val", "train.jsonl"),
    (ANY, "--task cnn_dm", "cnn_dm", "--data"),
    (ANY, "--task numbers --data {texts}", "--data", "{texts}"),
    (ANY, "--task {texts} --data {texts}", "--data {texts}"),
    (ANY, "--task {no_val}", "{no_val}", "val", "train.jsonl"),
    (ANY, "--task {nothing}", "{nothing}", "train"),
    (ANY, "--task {empty_val}", "{empty_val}", "validation.jsonl", "empty"),
    (ANY, "--task {not_json}", "{not_json}", "line 2"),
    (ANY, "--task {no_prompt}", "'prompt'", "promt"),
    (ANY, "--task {few_rows}", "{few_rows}", "3 rows"),
    (ANY, "--task {bad_references}", "'references'", "line 1"),
    (ANY, "--chat", "messages", "no chat template"),
    (ANY, "--task {messages}", "messages", "no chat template"),
    (RL, "--task {no_references} --reward rouge1 --metrics diversity", "'rouge1'", "references"),
    (RL, "--task {no_references} --reward {own}:digits --metrics rouge", "'rouge'", "references"),
    ("supervised", "--task {no_references} --metrics diversity", "{no_references}", "references"),
    ("supervised", "--task {hidden_references} --metrics rouge", "'rouge'", "'test_0'", "references"),
    (RL, "--reward parent", "'parent'", "meta"),
    # the run folder
    (ANY, "--run-dir {exists}", "--run-dir {exists}", "--resume", "name another"),
    (ANY, "--run-dir {own}", "--run-dir {own}", "folder"),
    (ANY, "--run-dir {own}/run", "--run-dir {own}/run"),
    (ANY, "--resume", "--resume", "--run-dir"),
    (ANY, "--resume --run-dir {damaged}", "latest.pt", "damaged"),
    (ANY, "--resume --run-dir {of_another}", "--resume", "--run-dir of_another", "another.py"),
]

OWN = '''
"""Rewards and metrics that go wrong, each in its way."""
import math
import time

NUMBER = 3
calls = 0


def digits(prompts, generations, references, metas):
    return [sum(c.isdigit() for c in g) / max(len(g), 1) for g in generations]


def two_arguments(prompts, generations):
    return [1.0] * len(prompts)


def changed(prompts, change):
    """Good values in the trial and in the first iteration, which leaves a checkpoint; then what goes wrong."""
    global calls
    calls += 1
    values = [0.5] * len(prompts)
    return change(values) if calls > 2 else values


def replaced(values, bad):
    values[1] = bad
    return values


def fails(values):
    raise RuntimeError("the reward is\\nout of order")


def fails_on_one(prompts, generations, references, metas):
    return changed(prompts, lambda values: [1.0 / (i - 1) for i in range(len(values))])


def raises(prompts, generations, references, metas):
    return changed(prompts, fails)


def exits(prompts, generations, references, metas):
    return changed(prompts, lambda values: exit(3))


def nan(prompts, generations, references, metas):
    return changed(prompts, lambda values: replaced(values, math.nan))


def inf(prompts, generations, references, metas):
    return changed(prompts, lambda values: replaced(values, -math.inf))


def none(prompts, generations, references, metas):
    return changed(prompts, lambda values: replaced(values, None))


def strings(prompts, generations, references, metas):
    return changed(prompts, lambda values: replaced(values, "0.5"))


def nothing(prompts, generations, references, metas):
    return changed(prompts, lambda values: None)


def too_few(prompts, generations, references, metas):
    return changed(prompts, lambda values: values[:-1])


def one_number(prompts, generations, references, metas):
    return changed(prompts, lambda values: 0.5)


def lists_too_long(prompts, generations, references, metas):
    return changed(prompts, lambda values: [[0.1] * 99 for _ in values])


def prints(prompts, generations, references, metas):
    print("noise " * 200000)
    return [0.5] * len(prompts)


def sleeps(prompts, generations, references, metas):
    time.sleep(0.3)
    return [0.5] * len(prompts)


def numpy_values(prompts, generations, references, metas):
    import numpy as np
    return np.full(len(prompts), 0.5, dtype=np.float32)


def metric_raises(prompts, generations, references, metas, model=None, tokenizer=None):
    raise RuntimeError("the metric is out of order")


def metric_number(prompts, generations, references, metas, model=None, tokenizer=None):
    return 0.5


def metric_numpy(prompts, generations, references, metas, model=None, tokenizer=None):
    import numpy as np
    return {"own": (np.ones(len(prompts), dtype=np.float32), np.float32(1.0))}


def metric_few(prompts, generations, references, metas, model=None, tokenizer=None):
    return {"own": ([1.0], 1.0)}
'''


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def things(tmp_path_factory, texts):
    """{name: path} of what the command lines name."""
    folder = tmp_path_factory.mktemp("things")
    row = {"prompt": "one two", "references": ["three"]}
    (folder / "own.py").write_text(OWN)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "raising.py").write_text("import no_such_package\n")
    (folder / "nothing").mkdir()
    write_rows(folder / "no_val" / "train.jsonl", [row])
    for split, rows in {"train": [row], "validation": [], "test": [row]}.items():
        write_rows(folder / "empty_val" / f"{split}.jsonl", rows)
    for split in ("train", "validation", "test"):
        write_rows(folder / "no_references" / f"{split}.jsonl", [{"prompt": "one two three"}] * 4)
        rows = [{"prompt": "one two"} if split == "test" else row]
        write_rows(folder / "hidden_references" / f"{split}.jsonl", rows)
    (folder / "not_json.jsonl").write_text(json.dumps(row) + "\n{'prompt': 3}\n" + (json.dumps(row) + "\n") * 10)
    write_rows(folder / "no_prompt.jsonl", [{"promt": "one"}] * 12)
    write_rows(folder / "few_rows.jsonl", [row] * 3)
    message = {"role": "user", "content": "one"}
    write_rows(folder / "messages.jsonl", [{"prompt": [message], "references": ["two"]}] * 12)
    write_rows(folder / "bad_references.jsonl", [{"prompt": "one", "references": [1]}] * 12)
    (folder / "exists").mkdir()
    (folder / "exists" / "metrics.jsonl").write_text("mine\n")
    (folder / "of_another").mkdir()
    (folder / "of_another" / "config.json").write_text('{"script": "another", "run_dir": "of_another"}')
    (folder / "damaged" / "checkpoint").mkdir(parents=True)
    (folder / "damaged" / "checkpoint" / "latest.pt").write_text("half")

    tokenizer = load_tokenizer(script_runs.tiny_model("seq2seq"))
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=1)
    sizes = {f"{p}_{n}": 2 for p in ("encoder", "decoder") for n in ("layers", "attention_heads", "ffn_dim")}
    torch.manual_seed(0)
    models = {
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, **ids)
        ),
        "bart": transformers.BartForConditionalGeneration(
            transformers.BartConfig(d_model=8, max_position_embeddings=32, decoder_start_token_id=1, **sizes, **ids)
        ),
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_positions=32, n_embd=8, n_layer=1, n_head=2, **ids)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "t5", folder / "no_tokenizer", ignore=lambda _, names: [n for n in names if "token" in n])
    (folder / "config_only").mkdir()
    shutil.copy(folder / "t5" / "config.json", folder / "config_only")
    (folder / "bad_config").mkdir()
    (folder / "bad_config" / "config.json").write_text("{")
    tokenizer.save_pretrained(folder / "picture")
    (folder / "picture" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    named = {path.name.split(".")[0]: str(path) for path in folder.iterdir()}
    return named | {"folder": str(folder), "texts": str(texts)}


def flag_names(words):
    return {word.split("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}


def spread(cases):
    """The cases with ANY and RL replaced by one script each, in turn; those of scripts that are not there left out."""
    turns = {ANY: cycle(SCRIPTS), RL: cycle([name for name in SCRIPTS if name != "supervised"])}
    for script, line, *told in cases:
        # the two that know only one policy type cannot be given the models of the other
        names = ("--vf-coef", "--gamma", "--gae-lambda")  # not every script has these
        critic = any(name in line for name in names)
        if script in turns:
            script = "ppo_causal" if critic else next(turns[script])
        if "{config_only}" in line or "{no_tokenizer}" in line:
            script = "a2c" if "a2c" in SCRIPTS else "ppo_seq2seq"
        if script in SCRIPTS:
            yield pytest.param(script, line, told, id=f"{script} {line}")


def complete(script, line, things):
    """Environment and words of a case, with what it does not say itself filled in, so that only one thing is wrong."""
    words = [word.format(**things) for word in line.split()]
    env = dict(word.split("=") for word in words if word.startswith("WORLD_SIZE"))
    words, given = [word for word in words if not word.startswith("WORLD_SIZE")], flag_names(words)
    missing = TINY | dict(task="numbers", run_dir="run", num_iterations=1, num_epochs=1)
    missing.pop("metrics")
    if line == "--resume":
        missing.pop("run_dir")
    if "cnn_dm" in words:
        missing.pop("response_length")
    # what is wrong stands last: a list takes all words up to the next flag
    return env, [*flags(script, **{name: value for name, value in missing.items() if name not in given}), *words]


def assert_one_line(result, script, code, told):
    assert "Traceback" not in result.stderr, result.stderr
    assert result.code == code, f"exit code {result.code}: {result.stdout}\n{result.stderr}"
    lines = result.stderr.splitlines()
    assert len(lines) == 1, f"{len(lines)} lines:\n{result.stderr}"
    assert lines[0].startswith(f"{script}.py: error: ")
    for text in told:
        assert text in lines[0], f"{text!r} is not in: {lines[0]}"


def contents(folder):
    """{path: bytes} of all files, without Python's own, and a run's lock and settings."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {
        path: path.read_bytes() for path in files if path.name not in (".lock", "config.json") and path.suffix != ".pyc"
    }


def test_critic_that_does_not_fit_is_named(things, tmp_path):
    argv = flags("ppo_causal", **TINY | dict(task="numbers", value_model=things["t5"]))
    assert_one_line(run("ppo_causal", argv, tmp_path), "ppo_causal", 2, [f"with --value-model {things['t5']}"])


@pytest.mark.parametrize("script, line, told", list(spread(WRONG)))
def test_wrong_command_line(script, line, told, things, tmp_path):
    env, words = complete(script, line, things)
    before = contents(things["folder"])
    result = run(script, words, tmp_path, timeout=30, env=env)
    assert_one_line(result, script, 2, [text.format(**things) for text in told])
    assert result.stdout == ""
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith("output_")]
    assert left == [], f"left behind: {left}"
    assert contents(things["folder"]) == before


def test_there_are_sixty_cases():
    assert len(WRONG) >= 60


def test_forked_runs_are_like_real_ones(things, tmp_path):
    """The same code, stdout and stderr from `python SCRIPT ...`, which takes less than 10 seconds of a processor."""
    lines = ["--lerning-rate 0.1", "--model {nothing}"]
    for script, line in zip(cycle(SCRIPTS), lines, strict=False):
        _, words = complete(script, line, things)
        forked, before = run(script, words, tmp_path), resource.getrusage(resource.RUSAGE_CHILDREN)
        real, after = real_run(script, words, tmp_path), resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (forked.code, forked.stdout, forked.stderr) == (real.code, real.stdout, real.stderr)
        # the processor's seconds: a busy machine is none of the script's fault
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_track_without_wandb_is_told_before_anything_starts(tmp_path):
    words = flags("ppo_seq2seq", task="numbers", run_dir="run", track=True, **TINY)
    assert_one_line(run("ppo_seq2seq", words, tmp_path, missing="wandb"), "ppo_seq2seq", 2, ["--track", "wandb"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_track_without_login_is_told_before_anything_starts(script, tmp_path):
    words = flags(script, task="numbers", run_dir="run", track=True, **TINY)
    nobody = dict(HOME=str(tmp_path), WANDB_API_KEY="", WANDB_MODE="online", WANDB_SILENT="true")
    assert_one_line(run(script, words, tmp_path, env=nobody), script, 2, ["--track", "wandb login", "WANDB_MODE"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_terminal_without_the_letters(script, encoding, tmp_path):
    """A wrong flag is told; a run goes on, what the terminal lacks is shown by its number, and files are UTF-8."""
    wrong = run(script, ["--task", "numbers", "--lerning-rate", "1"], tmp_path, env=dict(PYTHONIOENCODING=encoding))
    assert_one_line(wrong, script, 2, ["--lerning-rate", "'--learning-rate'"])
    rows = [{"prompt": "zähle 日本語 1 2", "references": ["much larger größer 日本"]}] * 20
    write_rows(tmp_path / "texts.jsonl", rows)
    settings = TINY | dict(task="texts.jsonl", run_dir="run", num_iterations=1, num_epochs=1)
    result = run_ok(script, flags(script, **settings), tmp_path, env=dict(PYTHONIOENCODING=encoding))
    assert ("ä" in result.stdout or "\\xe4" in result.stdout or encoding == "latin-1") and "\\u65e5" in result.stdout
    assert "größer 日本" in (tmp_path / "run" / "predictions" / "val_0.jsonl").read_text(encoding="utf-8")


def test_error_of_two_processes_is_said_once(tmp_path):
    words = flags("ppo_causal", **TINY | dict(task="numbers", learning_rate=-1, run_dir="run"))
    started = start("ppo_causal", words, tmp_path, processes=2)
    assert_one_line(started.finish(), "ppo_causal", 2, ["--learning-rate -1.0"])
    assert [process.exitcode for process in started.processes] == [2, 2]
    assert Path(started.outputs[1][1]).read_text() == "" and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ errors in the run


RUNTIME = [
    ("raises", "out of order", "own.py", "sample train-"),
    ("fails_on_one", "ZeroDivisionError", "own.py"),
    ("exits",),
    ("nan", "nan", "sample train-"),
    ("inf", "inf", "sample train-"),
    ("none", "None", "sample train-"),
    ("strings", "'0.5'", "sample train-"),
    ("nothing", "nothing", "None"),
    ("too_few", "too_few", "7 values", "8 samples"),
    ("one_number", "one_number", "0.5"),
    ("lists_too_long", "lists_too_long", "sample train-"),
]
RL_SCRIPTS = [name for name in SCRIPTS if name != "supervised"]


@pytest.mark.parametrize(
    "script, function, told", [(s, f, told) for s, (f, *told) in zip(cycle(RL_SCRIPTS), RUNTIME, strict=False)]
)
def test_reward_that_goes_wrong(script, function, told, things, texts, tmp_path):
    """The reward's own traceback, or what it returned and for which sample; the checkpoint before is whole."""
    settings = TINY | dict(save_every=1, num_iterations=3)
    words = flags(script, task=texts, reward=f"{things['own']}:{function}", run_dir="run", **settings)
    result = run(script, words, tmp_path)
    assert result.code == (3 if function == "exits" else 1), result.stderr
    for text in told and [*told, "in iteration 2"]:
        assert text in result.stderr, f"{text!r} is not in: {result.stderr}"
    metrics = script_runs.rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in metrics] == [1]
    assert script_runs.checkpoint(tmp_path / "run")["iteration"] == 1


def test_reward_that_goes_wrong_in_one_of_two_processes(things, texts, tmp_path):
    """Both processes end, with one line, although only one has the sample."""
    settings = TINY | dict(save_every=1, num_iterations=3)
    words = flags("ppo_seq2seq", task=texts, reward=f"{things['own']}:nan", run_dir="run", **settings)
    result = run("ppo_seq2seq", words, tmp_path, processes=2)
    assert result.code != 0 and "sample train-" in result.stderr


@pytest.mark.parametrize("function", ["prints", "sleeps", "numpy_values"])
def test_reward_that_is_odd_but_right(function, things, texts, tmp_path):
    settings = TINY | dict(num_iterations=2)
    run_ok("ppo_seq2seq", flags("ppo_seq2seq", task=texts, reward=f"{things['own']}:{function}", **settings), tmp_path)


METRICS = {"metric_raises": "the metric is out of order", "metric_number": "own.py", "metric_few": "own"}


@pytest.mark.parametrize("function", METRICS)
def test_metric_that_goes_wrong(function, things, texts, tmp_path):
    script = "supervised" if "supervised" in SCRIPTS else "ppo_seq2seq"
    words = flags(script, task=texts, run_dir="run", **TINY | dict(metrics=f"{things['own']}:{function}"))
    result = run(script, words, tmp_path)
    assert result.code in (1, 2) and METRICS[function] in result.stderr and "own.py" in result.stderr


def test_metric_in_numpy_numbers(things, texts, tmp_path):
    settings = TINY | dict(metrics=f"{things['own']}:metric_numpy", num_iterations=1)
    run_ok("ppo_seq2seq", flags("ppo_seq2seq", task=texts, run_dir="run", **settings), tmp_path)
    assert script_runs.rows(tmp_path / "run" / "eval.jsonl")[0]["own"] == 1.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_model_that_is_not_finite_is_told(script, things, texts, tmp_path):
    """NaN in the weights: one line before the first evaluation, and no checkpoint or model of it."""
    name = "gpt2" if "causal" in script else "t5"
    kind = {"gpt2": transformers.AutoModelForCausalLM, "t5": transformers.AutoModelForSeq2SeqLM}[name]
    model = kind.from_pretrained(things[name])
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    shutil.copytree(things[name], tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    settings = TINY | dict(model=tmp_path / "model", prompt_length=8, response_length=8, min_response_length=0)
    result = run(script, flags(script, task=texts, run_dir="run", **settings), tmp_path)
    assert_one_line(result, script, 2, ["nan"])
    assert not (tmp_path / "run" / "checkpoint").exists() and not (tmp_path / "run" / "model").exists()


def test_every_flag_with_a_number_has_limits():
    """A numeric flag without limits would take -1 silently: a plain int or float is one of few that may be anything."""
    for script in SCRIPTS:
        kinds = (int, float, int | None, float | None)
        unlimited = {name for name, field in fields(script).items() if field.type in kinds}
        assert unlimited <= {"eos_penalty"}, f"{script}: {sorted(unlimited)}"


def test_what_help_can_do_without_is_not_imported():
    code = "import sys, ppo_causal; print([n for n in sys.argv[1:] if n in sys.modules])"
    late = ["datasets.arrow_dataset", "matplotlib", "wandb", "evaluate", "bert_score", "transformers.activations"]
    done = subprocess.run([sys.executable, "-c", code, *late], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "[]"
