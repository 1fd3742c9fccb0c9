"""The scripts share by copying: what has the same name is the same text, but for what is listed here."""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import itertools
import json
import re
import sys

import pytest
from script_runs import ALL_SCRIPTS, ROOT, SCRIPTS, fields

import datapools

OURS = {"datapools", "rewards"}
ALL = (*ALL_SCRIPTS, "reward_model")
NAMES = [*SCRIPTS, *(["reward_model"] if "\ndef main():" in (ROOT / "reward_model.py").read_text() else [])]
RL = [name for name in SCRIPTS if name != "supervised"]
EITHER = {"a2c", "trpo", "grpo", "supervised"}
NLPO = {"nlpo_seq2seq", "nlpo_causal"}
# Scripts of one policy type, and those that know both
GROUPS = [{"ppo_seq2seq", "nlpo_seq2seq"}, {"ppo_causal", "nlpo_causal"}, EITHER]
# Functions that touch the model: the same within each group
BY_POLICY_TYPE = {"load_policy", "value_backbone", "response_pass", "start_decoding", "decode_step"}
# Functions of an algorithm: the scripts in which they may stand otherwise
BY_ALGORITHM = {
    "check_args": {*NLPO, "a2c", "trpo", "grpo", "supervised", "reward_model"},
    "parse_args": {"supervised", "reward_model"},
    "sample_responses": NLPO,
    "rollout_passes": {*NLPO, "grpo"},
    "main": set(ALL),
    "Args": set(ALL),  # field by field, below
}
# Fields of Args whose default or text differs on purpose; texts are compared among RL scripts only
BY_SCRIPT_FIELDS = {
    "gae_lambda": {"doc"},  # what RL4LMs has
    "task": {"default"},  # what the policy type is usually shown on
    "model": {"default"},
    "batch_size": {"default"},
    "learning_rate": {"default", "doc"},
    "max_grad_norm": {"default", "doc"},
    "norm_adv": {"doc"},  # over what
    "seed": {"doc"},
    "fsdp": {"doc"},  # which models
    "anneal_lr": {"default"},
    "num_epochs": {"default"},
    "eval_every": {"default"},
    "save_every": {"default"},
}


def source(name):
    return (ROOT / f"{name}.py").read_text()


def definitions(name):
    """Name -> text of every function and class at the top level of a script."""
    text = source(name)
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    found = {}
    for node in nodes:
        lines = text.splitlines()[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno]
        found[node.name] = "\n".join(lines)
    return found


def main_of(name):
    """The text of the script's main()."""
    return definitions(name)["main"]


def documented_fields(name):
    """Name -> (type, comment, default) of each field of Args, as written."""
    text = source(name).splitlines()
    node = next(n for n in ast.parse(source(name)).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    found = {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            comment = " ".join(re.findall("  # .*", "\n".join(text[field.lineno - 1 : field.end_lineno])))
            found[field.target.id] = {
                "type": ast.unparse(field.annotation),
                "doc": comment.strip().removeprefix("#").strip(),
                "default": ast.unparse(field.value),
            }
    return found


def test_same_names_are_the_same_text():
    texts = {name: definitions(name) for name in NAMES}
    assert min(map(len, texts.values())) > 20
    differing = []
    for one, two in itertools.combinations(NAMES, 2):
        for name in texts[one].keys() & texts[two].keys():
            same_group = any({one, two} <= group for group in GROUPS)
            free = name in BY_POLICY_TYPE and not same_group
            free |= bool({one, two} & BY_ALGORITHM.get(name, set()))
            if not free and texts[one][name] != texts[two][name]:
                differing.append(f"{name} of {one} and {two}")
    assert not differing, "\n".join(differing)


def test_lists_of_exceptions_are_no_longer_than_needed():
    """An exception whose texts are the same everywhere is one that hides the next slip."""
    texts = {name: definitions(name) for name in NAMES}
    for name in BY_POLICY_TYPE:
        for one, two in itertools.combinations(GROUPS, 2):
            versions = [{texts[s][name] for s in group & set(NAMES) if name in texts[s]} for group in (one, two)]
            assert not (versions[0] & versions[1]), f"{name} is the same in {one} and {two}"
    for name, scripts in BY_ALGORITHM.items():
        for script in scripts & set(NAMES):
            others = {texts[s][name] for s in NAMES if s not in scripts and name in texts[s]}
            assert texts[script].get(name) not in others, f"{name} of {script} is that of the others"
    written = {name: documented_fields(name) for name in NAMES}
    for field, parts in BY_SCRIPT_FIELDS.items():
        for part in parts:
            among = RL if part == "doc" else NAMES
            versions = {written[name][field][part] for name in among if field in written[name]}
            assert len(versions) > 1 or len(NAMES) < len(ALL), f"{part} of {field} is the same everywhere"


def test_helpers_stand_in_the_same_order():
    """A reader finds a helper in the same place of every script, and a diff shows only what differs."""
    orders = {name: list(definitions(name)) for name in NAMES}
    for one, two in itertools.combinations(NAMES, 2):
        shared = set(orders[one]) & set(orders[two])
        assert [n for n in orders[one] if n in shared] == [n for n in orders[two] if n in shared], f"{one} and {two}"


STEPS = [
    "sample",
    "score",
    "log-probs",
    "per-token rewards",
    "advantages",
    "update",
    "KL controller",
    "log",
    "evaluate",
]


@pytest.mark.parametrize("script", RL)
def test_steps_of_the_loop_are_in_order(script):
    steps = re.findall(r"^        # (\d)\. (.+)$", main_of(script), re.M)
    assert [int(number) for number, _ in steps] == list(range(1, 10))
    for (_, text), start in zip(steps, STEPS, strict=True):
        assert text.startswith(start), f"step {text!r} is not {start!r}"


def test_shared_steps_have_the_same_words():
    """Steps 1 to 4 and 7 to 9 begin with the same words; advantages and update are an algorithm's own."""
    for group in GROUPS:
        titles = {}
        for script in group & set(RL):
            for number, text in re.findall(r"^        # (\d)\. (.+)$", main_of(script), re.M):
                titles.setdefault(number, set()).add(re.split("[;:,]| under", text)[0])
        several = {number: texts for number, texts in titles.items() if len(texts) > 1 and number not in "56"}
        assert not several, several


def test_args_agree():
    documented = {name: documented_fields(name) for name in NAMES}
    differing = []
    for name, args in documented.items():
        differing += [f"{name}: --{field} says nothing" for field, told in args.items() if not told["doc"].strip()]
    for one, two in itertools.combinations(NAMES, 2):
        for field in documented[one].keys() & documented[two].keys():
            for part in ("type", "doc", "default"):
                free = part in BY_SCRIPT_FIELDS.get(field, ()) or (part == "doc" and not {one, two} <= set(RL))
                if not free and documented[one][field][part] != documented[two][field][part]:
                    differing.append(f"{part} of {field}: {one} and {two}")
        orders = [
            [f for f in documented[s] if f in documented[one].keys() & documented[two].keys()] for s in (one, two)
        ]
        if orders[0] != orders[1]:
            differing.append(f"order of fields: {one} and {two}")
    assert not differing, "\n".join(differing)


@pytest.mark.parametrize("script", NAMES)
def test_nothing_of_ours_is_imported_but_the_two(script):
    modules = {path.stem for path in ROOT.glob("*.py")}
    for node in ast.walk(ast.parse(source(script))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        assert not {name.split(".")[0] for name in names} & (modules - OURS)


@pytest.mark.parametrize("script", NAMES)
def test_helpers_read_no_name_of_main(script):
    """A name that only main assigns is no global of a helper: helpers take what they use as arguments."""
    tree = ast.parse(source(script))
    main = next(node for node in tree.body if getattr(node, "name", "") == "main")
    top = [node for node in tree.body if node is not main]
    assigned = {n.id for n in ast.walk(main) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    known = {n.id for node in top if isinstance(node, ast.Assign) for n in ast.walk(node) if isinstance(n, ast.Name)}
    known |= {node.name for node in top if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    known |= {a.asname or a.name for n in top if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    for function in [node for node in top if isinstance(node, ast.FunctionDef | ast.ClassDef)]:
        nodes = list(ast.walk(function))
        own = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {n.arg for n in nodes if isinstance(n, ast.arg)} | {n.name for n in nodes if hasattr(n, "name")}
        used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - own - known
        assert not used & assigned, f"{function.name} reads {used & assigned}"


@pytest.mark.parametrize("script", NAMES)
def test_no_silent_fallbacks(script):
    """Never `except Exception`, never a bare `except`, and nesting of six levels at most."""
    tree = ast.parse(source(script))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and not {"Exception", "BaseException"} & set(
                re.findall(r"\w+", ast.unparse(node.type))
            )
    deepest = max(
        len(line) - len(line.lstrip()) for line in source(script).splitlines() if re.match(r" +\w+.*:$", line)
    )
    assert deepest / 4 <= 6, f"a block begins at level {deepest / 4:.0f}"


def help_of(script, monkeypatch, *words):
    module, out = importlib.import_module(script), io.StringIO()
    kind = "causal" if script.endswith("causal") else "seq2seq"
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        module.parse_args([*words, "--help"], kind)
    assert stop.value.code in (0, None)
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", out.getvalue()).split())


def row_of(module, task):
    """The row of the script's table that has this task."""
    (row,) = (row for tasks, row in module.TASK_DEFAULTS.items() if task in tasks.split())
    columns = module.TASK_COLUMNS  # a row may end before those of the algorithm alone, which stand last
    least = columns.index("target_kl") + 1 if "target_kl" in columns else len(columns)
    assert least <= len(row) <= len(columns), task
    return dict(zip(columns, row, strict=False))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_defaults_of_the_task(script, monkeypatch):
    """--help ends with 0, names every flag, and shows the values that this task would be run with."""
    module = importlib.import_module(script)
    for task in ("cnn_dm", "numbers", "commongen"):
        shown = help_of(script, monkeypatch, "--task", task)
        for name in fields(script):
            assert f"--{name.replace('_', '-')}" in shown, name
        entry = datapools.get_task(task)
        wanted = dict(prompt_length=entry.prompt_length, response_length=entry.response_length) | row_of(module, task)
        for name, value in wanted.items():
            found = re.search(rf"--{name.replace('_', '-')}(?: [A-Z{{\[]|, --no-).*?\(default: (.*?)\)", shown)
            assert found and found.group(1) == str(value), f"{task} --{name}: {found and found.group(1)}, not {value}"
        assert f"(default: {' '.join(entry.metrics)})" in shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_headings_in_the_order_of_use(script, monkeypatch):
    shown = help_of(script, monkeypatch)
    headings = re.findall(r"# --- (.+)", inspect.getsource(importlib.import_module(script).Args))
    assert headings[0] == "what is learned" and "the machine" in headings and len(headings) >= 4
    places = [shown.index(f" {heading} --") for heading in headings]
    assert places == sorted(places)
    assert shown.index(" the machine --seed ") and shown.index(" evaluation, checkpoints, logs --eval-every ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_takes_the_same_command_and_the_dictionaries_of_its_run(script, tmp_path):
    module = importlib.import_module(script)
    kind = "causal" if script.endswith("causal") else "seq2seq"
    words = ["--task", "numbers", "--decoding", "num_beams", "2", "--metric-kwargs", "a.b", "1", "c", "x=y"]
    words += ["--task-kwargs", "n_samples", "20", "--run-dir", str(tmp_path)]
    first, _ = module.parse_args(words, kind)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(first)))
    for again in (words, words[-2:]):
        args, record = module.parse_args([*again, "--resume"], kind)
        assert record and args == dataclasses.replace(first, resume=True)
    args, _ = module.parse_args([*words[-2:], "--resume", "--decoding", "do_sample", "true"], kind)
    assert args == dataclasses.replace(first, resume=True, decoding={"do_sample": "true"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_typed_values_win(script):
    module = importlib.import_module(script)
    kind = "causal" if script.endswith("causal") else "seq2seq"
    for words in (["--task", "cnn_dm", "--response-length", "77"], ["--response-length=77", "--task=cnn_dm"]):
        args, record = module.parse_args(words, kind)
        assert (args.task, args.response_length, args.prompt_length, record) == ("cnn_dm", 77, 512, {})
    assert module.parse_args([], kind)[0].task == module.Args.task
    assert module.parse_args([], kind) == module.parse_args(["--task", module.Args.task], kind)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_task_has_defaults_of_its_own(script):
    module = importlib.import_module(script)
    named = [task for tasks in module.TASK_DEFAULTS for task in tasks.split()]
    assert sorted(named) == sorted(datapools.TASKS)
    assert set(module.TASK_COLUMNS) <= set(fields(script))
    for task in named:
        args = dataclasses.replace(module.Args(), **row_of(module, task))
        args.reward_weights = (1.0,)
        module.check_args(args)
