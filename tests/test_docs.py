"""The pages under docs/ that explain the scripts: their places, names and links exist, their examples run."""

import ast
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from script_runs import ROOT, SCRIPTS, run_ok
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

DOCS = ROOT / "docs"
# Pages of scripts that are there, as in script_runs
SCRIPT_OF = dict(ppo="ppo_causal", nlpo="nlpo_causal", a2c="a2c", trpo="trpo", grpo="grpo", supervised="supervised")
ALGORITHMS = [name for name, script in SCRIPT_OF.items() if script in SCRIPTS] + ["reward_model"]
PAGES = [*ALGORITHMS, "troubleshooting", "changing", "contributing"]
WORDS = "<eos> <unk> Count upwards : the a cat dog".split() + [str(n) for n in range(60)]
# What makes a run short; a script takes those that it has
SHORT = {
    "--batch-size": 8, "--num-minibatches": 2, "--update-epochs": 1, "--eval-samples": 4, "--response-length": 8,
    "--num-epochs": 1, "--cg-steps": 2, "--critic-epochs": 1, "--group-size": 2,
    "--scratch-vocab-size": 300, "--scratch-width": 32, "--scratch-layers": 1, "--scratch-heads": 2,
}  # fmt: skip


def page(name):
    return (DOCS / f"{name}.md").read_text()


def blocks(name, language):
    """The fenced code of a page in this language."""
    return [code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```", page(name), re.S | re.M) if kind == language]


def prose(name):
    return re.sub(r"^```.*?^```", "", page(name), flags=re.S | re.M)


@functools.cache
def source(module):
    return (ROOT / f"{module}.py").read_text()


@functools.cache
def names_of(module):
    """Functions, classes and methods of a file."""
    nodes = ast.walk(ast.parse(source(module)))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@functools.cache
def flags_of(script):
    (args,) = (node for node in ast.parse(source(script)).body if getattr(node, "name", "") == "Args")
    return {f"--{node.target.id.replace('_', '-')}" for node in args.body if isinstance(node, ast.AnnAssign)}


def scripts_of(name):
    """The scripts that a page is about: those that its line "Script: ..." links."""
    line = re.search(r"^Scripts?: .*$", page(name), re.M)
    return re.findall(r"\]\(\.\./(\w+)\.py\)", line[0])


# ------------------------------------------------------------------------------------------------ what pages name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_places_exist(name):
    """Each detail's place is a function, a flag, a constant or a numbered step of the page's scripts, or a function
    of the two modules."""
    scripts, modules, found = scripts_of(name), names_of("datapools") | names_of("rewards"), 0
    assert scripts
    for table in re.findall(r"^\|[^|\n]*\| where \| from \|\n.*?(?:\n\n|\Z)", prose(name), re.S | re.M):
        for row in table.strip().splitlines()[2:]:
            place = row.split(" | ")[1]
            steps, words = re.findall(r"\bstep (\d)\b", place), re.findall(r"`([^`]+)`", place)
            assert steps or words or "set-up" in place, row
            for step in steps:
                for script in scripts:
                    assert re.search(rf"^ +# {step}\. ", source(script), re.M), f"{script}: no step {step}: {row}"
            for word in words:  # what only one kind of model needs is in one of two scripts
                known = [word in names_of(s) | modules | flags_of(s) or f"\n{word} = " in source(s) for s in scripts]
                assert any(known), f"no {word}: {row}"
            found += 1
    assert found >= 5


@pytest.mark.parametrize("name", PAGES)
def test_flags_and_figures_exist(name):
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"datapools", "rewards"}
    known = set().union(*map(flags_of, scripts)) | {"--help", "--nproc_per_node", "--no-norm-adv"}
    added = set(re.findall(r"^\+    (\w+): ", "".join(blocks(name, "diff")), re.M))
    known |= {f"--{'-'.join(flag.split('_'))}" for flag in added}
    code = " ".join(re.findall(r"`([^`\n]+)`", prose(name)) + blocks(name, "bash"))
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known
    assert not unknown, unknown
    figures = set(re.findall(r"`((?:objective|losses|rollout|time)/\w+)`", prose(name)))
    missing = {figure for figure in figures if f"`{figure}`" not in page("metrics")}
    assert not missing, missing


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere_and_lines_fit(name):
    for target in re.findall(r"\]\(\s*([^)\s]+)\)", prose(name)):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            assert (DOCS / file).exists(), target
            headings = re.findall(r"^#+ (.+)$", (DOCS / file).read_text(), re.M) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
    wide = [line for line in prose(name).splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not wide, wide


# ------------------------------------------------------------------------------------------------ examples


def save_models(folder):
    """runs/sft/model and runs/sft_causal/model, what supervised.py leaves, but of random weights."""
    set_seed(0)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = dict(vocab_size=len(WORDS), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    causal = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **ids))
    size = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=1)
    seq2seq = T5ForConditionalGeneration(T5Config(**size, **ids))
    for place, model in (("runs/sft_causal/model", causal), ("runs/sft/model", seq2seq)):
        if model is seq2seq:
            tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
        words = dict(eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words).save_pretrained(folder / place)
        model.save_pretrained(folder / place)


def shortened(command):
    """(script, the words of its command line), cut short where the command does not say otherwise."""
    python, script, *words = shlex.split(command)
    assert python == "python" and script.endswith(".py"), command
    script = script.removesuffix(".py")
    if "--num-iterations" in words:
        place = words.index("--num-iterations") + 1
        words[place] = {"0": "0"}.get(words[place], "2" if "--resume" in words else "1")
    if "--num-epochs" in words:
        words[words.index("--num-epochs") + 1] = "2"
    short = {} if "--resume" in words else SHORT | {"--num-iterations": 1}
    for flag, value in short.items():
        if flag in flags_of(script) - set(words):
            words += [flag, str(value)]
    return script, words


def commands(name):
    return [line for code in blocks(name, "bash") for line in code.strip().splitlines()]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_commands_run(name, tmp_path):
    """Every command of the page, in its order; what supervised.py would make is there, but on its own page."""
    if name != "supervised":
        save_models(tmp_path)
    for rows_of in blocks(name, "json"):  # of a file that the text before it names; twenty rows are split
        file = re.findall(r"`(\w+\.jsonl)`:\n\n```json\n" + re.escape(rows_of), page(name))[0]
        (tmp_path / file).write_text(rows_of * 10)
    assert commands(name)
    for command in commands(name):
        folder = re.search(r"--run-dir (\S+)", command)[1]
        if not (command.startswith("python supervised.py") and (tmp_path / folder / "model").exists()):
            script, words = shortened(command)
            run_ok(script, words, tmp_path, draw=True)
            assert (tmp_path / folder / "eval.jsonl").exists()


def run_python(code, cwd):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_picture_of_nlpo_can_be_drawn(tmp_path):
    (tmp_path / "docs").mkdir()
    (code,) = blocks("nlpo", "python")
    run_python(code + "\nassert kept.sum() == 5 and abs(sampled.sum() - 1) < 1e-6", tmp_path)
    assert (tmp_path / "docs" / "nlpo.png").read_bytes()[:4] == b"\x89PNG" == (DOCS / "nlpo.png").read_bytes()[:4]


def test_curves_can_be_read(tmp_path):
    save_models(tmp_path)
    script, words = shortened(next(command for command in commands("ppo") if "--run-dir runs/ppo_causal" in command))
    run_ok(script, words, tmp_path, draw=True)
    (code,) = blocks("troubleshooting", "python")
    assert "objective/score" in run_python(code, tmp_path)


# ------------------------------------------------------------------------------------------------ changes


@pytest.fixture
def copy(tmp_path):
    """A folder with the scripts and small start models."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    save_models(tmp_path)
    return tmp_path


def section(title):
    """The diff and the command of a section of changing.md."""
    text = page("changing").split(f"\n## {title}\n")[1].split("\n## ")[0]
    (diff,), (command,) = (re.findall(rf"^```{kind}\n(.*?)^```", text, re.S | re.M) for kind in ("diff", "bash"))
    return diff, command


def run_copy(command, cwd):
    """Runs the changed script; its flags are its own."""
    _, script, *words = shlex.split(command)
    for flag in ("--batch-size", "--num-minibatches", "--update-epochs", "--eval-samples", "--response-length"):
        words += [flag, str(SHORT[flag])]
    words += [] if "--num-iterations" in words else ["--num-iterations", "1"]
    run_ok(script.removesuffix(".py"), words, cwd, root=cwd)
    return cwd / re.search(r"--run-dir (\S+)", command)[1]


def changed(copy, title):
    """Applies the diff of a section to the copy, runs its command, and returns the folder of the run."""
    diff, command = section(title)
    apply = ["git", "apply", "-"] if shutil.which("git") else ["patch", "-p1"]
    done = subprocess.run(apply, input=diff, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, f"the diff no longer fits: {done.stdout}{done.stderr}"
    return run_copy(command, copy)


def rows(file):
    return [json.loads(line) for line in open(file)]


def test_lora(copy):
    run_dir = changed(copy, "LoRA")
    (row,) = rows(run_dir / "metrics.jsonl")
    assert row["objective/kl"] == 0.0 and row["losses/grad_norm"] > 0
    before, after = (
        GPT2LMHeadModel.from_pretrained(folder) for folder in (copy / "runs/sft_causal/model", run_dir / "model")
    )
    after = dict(after.named_parameters())
    moved = {name for name, weight in before.named_parameters() if not weight.equal(after[name])}
    assert moved and all(name.endswith("weight") and ".ln_" not in name and "wte" not in name for name in moved)


def test_shared_backbone(copy):
    """The critic is a head, and what it costs is one layer more."""
    run_dir = changed(copy, "A shared backbone")
    state = torch.load(run_dir / "checkpoint" / "latest.pt", weights_only=True)
    assert list(state["value_model"]) == ["head.weight"] and state["value_model"]["head.weight"].any()
    (row,) = rows(run_dir / "metrics.jsonl")
    assert row["losses/value"] > 0 and row["losses/value_grad_norm"] > 0 and row["rollout/sampler_error"] < 1e-5


def test_length_penalty(copy):
    (row,) = rows(changed(copy, "A length penalty") / "metrics.jsonl")
    weighted = row["reward/increasing_numbers"] + 0.5 * row["reward/own_rewards.py:length_penalty"]
    assert row["objective/score"] == pytest.approx(weighted, abs=1e-5)
    spec = importlib.util.spec_from_file_location("own_rewards", copy / "own_rewards.py")
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    assert own.length_penalty([""] * 3, ["a b", "a b c d", ""], [[]] * 3, [{}] * 3, words=2) == [0, -1, 0]


def test_best_of_n(copy):
    run_dir = changed(copy, "Best of n")
    best = rows(run_dir / "eval.jsonl")
    command = section("Best of n")[1].replace("--best-of 4", "--best-of 1").replace("runs/best_of_4", "runs/first")
    first = rows(run_copy(command, copy) / "eval.jsonl")
    assert [row["split"] for row in best] == [row["split"] for row in first]
    pairs = list(zip(best, first, strict=True))
    assert all(a["increasing_numbers"] >= b["increasing_numbers"] for a, b in pairs)
    assert any(a["increasing_numbers"] > b["increasing_numbers"] for a, b in pairs)


def test_betas_and_warm_up(copy):
    """The two short examples, put where the page says."""
    adam, warm_up = blocks("changing", "python")
    script, text = copy / "ppo_causal.py", (copy / "ppo_causal.py").read_text()
    text, count = re.subn(r"(?m)^    optimizer = torch\.optim\.Adam\(.*$", "    " + adam.strip(), text)
    assert count == 1
    lines = "\n".join(" " * 8 + line for line in warm_up.strip().splitlines()) + "\n"
    text, count = re.subn(r"(?m)^        left = .*\n.*\n", lines, text)
    assert count == 1
    script.write_text(text)
    flags = "--task numbers --model runs/sft_causal/model --learning-rate 1e-3 --run-dir runs/warm"
    run_dir = run_copy(f"python ppo_causal.py {flags}", copy)
    assert rows(run_dir / "metrics.jsonl")[0]["losses/learning_rate"] == pytest.approx(1e-4)
    state = torch.load(run_dir / "checkpoint" / "latest.pt", weights_only=True)
    assert {group["betas"] for group in state["optimizer"]["param_groups"]} == {(0.9, 0.95)}
