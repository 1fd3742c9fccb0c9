"""Every task, from its sample data to the predictions of a trained model, with its own reward, metrics and lengths.

A scratch model learns for two iterations. Nothing comes from a hub: where a task's reward or metric holds a model, a
small random one is put in its place, so that the whole path runs. What cannot run here is named in a warning.
"""

import functools
import importlib
import json
import math
import socket
import tempfile
import warnings
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import script_runs
import tiny_models

import rewards
from datapools import TASKS, UsageError, load_task
from rewards import make_metric

DATA = Path(__file__).parent / "data"
SYNTHETIC = ("numbers", "dates")
CAUSAL = ("imdb", "daily_dialog", "crd3")

# A small model, small batches, two iterations; lengths, reward, metrics and decoding stay the task's own.
SMALL = dict(
    num_iterations=2,
    batch_size=8,
    num_minibatches=2,
    update_epochs=1,
)
OVERRIDDEN = {*SMALL, "model", "decoding", "data", "run_dir", "task_kwargs", "reward_kwargs", "metric_kwargs"}


@functools.cache
def start_model(seq2seq):
    """A tiny model that reads bytes, with room for the longest task."""
    return tiny_models.save_policy(Path(tempfile.mkdtemp(prefix="tiny_")) / "model", seq2seq, positions=1024)


# metric -> the names it reports: those with a value per sample, and those with one for the split only; * for any ending
MEANS = "increasing_numbers dates sentiment intent meteor bertscore cider spice rouge_l_max".split()
PARENT = [f"table_to_text/parent_{{}}{part}" for part in ("/precision", "/recall", "_f_score")]
REPORTED = {
    **{name: ([name], []) for name in (*MEANS, "bleu", "sacrebleu", "chrf", "ter")},
    "rouge": (["rouge1", "rouge2", "rougeL", "rougeLsum"], []),
    "parent": (
        [name.format("overall") for name in PARENT],
        [name.format(subset) for subset in ("overlap", "non_overlap") for name in PARENT],
    ),
    "bleu_totto": (
        [],
        [f"table_to_text/bleu_{s}{u}" for s in ("overall", "overlap", "non_overlap") for u in ("", "_unrounded")],
    ),
    "perplexity": ([], ["perplexity"]),
    "diversity": (
        [],
        [
            f"diversity_metrics/{n}{end}"
            for end in ("", "-nopunct")
            for n in ("total_length", "distinct-2", "entropy-1")
        ],
    ),
}
MEAN_VALUED = {*MEANS, *REPORTED["rouge"][0], *REPORTED["parent"][0]}  # the split's value is the mean of the samples'

# metrics that need no processes of their own and no policy: computed again from the predictions and the task's samples
RECOMPUTED = {*"rouge bleu sacrebleu chrf rouge_l_max parent bleu_totto diversity sentiment intent bertscore".split()}


def in_own_cache(cache, endpoint, *arguments):
    """What runs in the child: `datasets` copies what it reads, and not into the cache of whoever runs the tests.

    endpoint: where the hub is said to be; None: nowhere, all is offline.
    """
    datasets.config.HF_DATASETS_CACHE = cache
    if endpoint:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = False
        datasets.config.HF_ENDPOINT = huggingface_hub.constants.ENDPOINT = endpoint
    try:
        script_runs.run_in_child(*arguments)
    finally:
        # a script's own exit ends METEOR's pool; that of a multiprocessing child would wait for its processes
        if rewards.process_pool.cache_info().currsize:
            rewards.process_pool().shutdown()


@pytest.fixture(autouse=True)
def hub_at(tmp_path_factory, monkeypatch):
    """hub_at(endpoint): the scripts will look for the hub there. Offline unless called."""
    cache = tmp_path_factory.getbasetemp() / "datasets_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)

    def set_endpoint(endpoint):
        monkeypatch.setattr(script_runs, "run_in_child", functools.partial(in_own_cache, cache, endpoint))

    set_endpoint(None)
    return set_endpoint


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Options that put small random models in place of the hub's: reward or metric -> its keyword arguments."""
    root = tmp_path_factory.mktemp("classifiers")
    feelings = tiny_models.save_bert(root / "feelings", ["negative", "positive"])
    intents = tiny_models.save_bert(root / "intents", ["inform", "question", "directive", "commissive"])
    return {
        "sentiment": {"model": feelings},
        "intent": {"model": intents},
        "bertscore": {"model_type": feelings, "num_layers": 1},
    }


def data_folder(task):
    return DATA / ("imdb" if task == "imdb_seq2seq" else task)


def task_options(task):
    """(data, options) that load_task and the command line are both given."""
    return (None, {"n_samples": 12}) if task in SYNTHETIC else (str(data_folder(task)), {})


def default_metrics(task, script):
    """perplexity is a causal policy's; seq2seq scripts leave it out of a task's metrics."""
    return [name for name in TASKS[task].metrics if name != "perplexity" or script.endswith("causal")]


def runnable(metrics):
    """The metrics without those that lack a program or jar here; says which, and why, in a warning."""
    kept = []
    for name in metrics:
        try:
            if name == "spice":
                make_metric(name)
            kept.append(name)
        except UsageError as error:
            warnings.warn(f"NOT RUN: metric {name}: {error}", stacklevel=2)
    return kept


def as_words(options):
    """{"name": {"key": value}} as KEY VALUE ... of --reward-kwargs and --metric-kwargs."""
    return [word for name, given in options.items() for key, v in given.items() for word in (f"{name}.{key}", str(v))]


def plain(value):
    """As JSON has it."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("task", TASKS)
def test_task(task, tmp_path, classifiers):
    script = "ppo_causal" if task in CAUSAL else "ppo_seq2seq"
    data, options = task_options(task)
    defaults, metrics = TASKS[task], default_metrics(task, script)
    wanted = runnable(metrics)
    argv = script_runs.flags(
        script,
        task=task,
        data=data,
        run_dir="run",
        task_kwargs=[word for key, value in options.items() for word in (key, value)] or None,
        reward_kwargs=as_words({n: o for n, o in classifiers.items() if n in defaults.reward}) or None,
        metric_kwargs=as_words({n: o for n, o in classifiers.items() if n in metrics}) or None,
        metrics=wanted if wanted != metrics else None,  # else the task's own choice is put to the test
        model=start_model(script == "ppo_seq2seq"),
        **SMALL,
    )
    # METEOR's workers each load WordNet, for seconds: have but one
    result = script_runs.run_ok(script, argv, tmp_path, timeout=170, env={"LOCAL_WORLD_SIZE": "2"})
    run = tmp_path / "run"
    assert "truncated to" in result.stdout  # the lengths are printed at the start

    # what was not typed is the task's, and the script's for the task
    config = json.loads((run / "config.json").read_text())
    module = importlib.import_module(script)
    expected = {field.name: field.default for field in script_runs.fields(script).values()}
    expected |= dict(
        zip(
            module.TASK_COLUMNS,
            next(row for tasks, row in module.TASK_DEFAULTS.items() if task in tasks.split()),
            strict=False,
        )
    )
    expected |= dict(
        task=task,
        reward=defaults.reward,
        reward_weights=defaults.reward_weights,
        metrics=wanted,
        prompt_length=defaults.prompt_length,
        response_length=defaults.response_length,
        min_response_length=defaults.min_response_length,
        truncation_side=defaults.truncation_side,
    )
    for name in expected.keys() - OVERRIDDEN:
        assert config[name] == plain(expected[name]), name
    assert {name: config[name] for name in SMALL} == SMALL

    # training: two rows of numbers
    rows = script_runs.rows(run / "metrics.jsonl", times=True)
    assert [row["iteration"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(0 < row["rollout/response_length"] <= defaults.response_length for row in rows)
    assert all(row["rollout/response_length"] >= defaults.min_response_length for row in rows)
    if len(defaults.reward) > 1:
        for row in rows:
            parts = [w * row[f"reward/{n}"] for n, w in zip(defaults.reward, defaults.reward_weights, strict=True)]
            assert row["objective/score"] == pytest.approx(sum(parts), abs=1e-5)

    # evaluation before and after, on val and test: every name for every split, every sample of the split
    evals = {(row["iteration"], row["split"]): row for row in script_runs.rows(run / "eval.jsonl")}
    assert list(evals) == [(0, "val"), (0, "test"), (2, "val"), (2, "test")]
    of_samples = [name for metric in wanted for name in REPORTED[metric][0]]
    of_split = [name for metric in wanted for name in REPORTED[metric][1]]
    for (iteration, split), row in evals.items():
        assert {*of_samples, *of_split} <= row.keys()
        assert all(math.isfinite(value) for key, value in row.items() if key != "split")
        samples = load_task(task, split, data, **options)
        predictions = script_runs.rows(run / "predictions" / f"{split}_{iteration}.jsonl")
        assert len(samples) >= 3
        assert [(p["id"], p["prompt"], p["references"]) for p in predictions] == [
            (s.id, s.prompt, s.references) for s in samples
        ]
        assert all(isinstance(p["generation"], str) for p in predictions)
        assert any(p["generation"].strip() for p in predictions)
        for name in of_samples:
            values = [p[name] for p in predictions]
            assert all(isinstance(value, float) and math.isfinite(value) for value in values)
            if name in MEAN_VALUED:
                assert row[name] == pytest.approx(sum(values) / len(values), abs=1e-9)
        columns = [s.prompt for s in samples], [p["generation"] for p in predictions]
        columns += [s.references for s in samples], [s.meta for s in samples]
        for name in set(wanted) & RECOMPUTED if iteration == 2 else ():
            options_of_metric = {**defaults.metric_kwargs.get(name, {}), **classifiers.get(name, {})}
            for key, (per_sample, value) in make_metric(
                name, separator="" if task in CAUSAL else " ", **options_of_metric
            )(*columns).items():
                assert row[key] == pytest.approx(value, abs=1e-6)
                assert [p.get(key) for p in predictions] == pytest.approx(per_sample or [None] * len(samples), abs=1e-6)
    assert (run / "model" / "config.json").exists() and (run / "checkpoint" / "latest.pt").exists()


@pytest.mark.parametrize("script, kind", script_runs.CASES)
def test_every_script_can_start_every_task_by_its_name_alone(script, kind):
    module = importlib.import_module(script)
    typed = ["--policy-type", kind] if "policy_type" in script_runs.fields(script) else []
    for task, defaults in TASKS.items():
        args, record = module.parse_args(["--task", task, *typed], kind)
        assert record == {}
        assert args.model == (defaults.seq2seq_model if kind == "seq2seq" else defaults.causal_model)
        assert list(args.metrics) == [n for n in defaults.metrics if n != "perplexity" or kind == "causal"]
        assert (args.prompt_length, args.response_length) == (defaults.prompt_length, defaults.response_length)


# What cannot be loaded


def refused(script, argv, cwd, **options):
    """The one line with which the script refuses its command line; it leaves no run behind."""
    result = script_runs.run(script, argv, cwd, **options)
    assert result.code == 2, result.stdout + result.stderr
    assert not (cwd / "runs").exists()
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: "), result.stderr
    assert result.seconds < 10
    return lines[0]


@pytest.mark.parametrize("script, task", [("ppo_seq2seq", "cnn_dm"), ("ppo_causal", "crd3"), ("supervised", "totto")])
def test_missing_data_is_named(script, task, tmp_path):
    assert "--data nowhere" in refused(script, ["--task", task, "--data", "nowhere", "--model", "scratch"], tmp_path)
    (tmp_path / "empty").mkdir()
    line = refused(script, ["--task", task, "--data", "empty", "--model", "scratch"], tmp_path)
    assert "empty: the split 'train' is missing" in line


CNN_DM = ("ppo_seq2seq", ["--task", "cnn_dm"], "cnn_dm: dataset abisee/cnn_dailymail")
DIALOG = ("ppo_causal", ["--task", "daily_dialog"], "daily_dialog: dataset li2017dailydialog/daily_dialog")
STORIES = ("supervised", ["--task", "narrative_qa"], "narrative_qa: https://storage.googleapis.com/unifiedqa")


@pytest.mark.parametrize(
    "hub, case",
    [("offline", CNN_DM), ("offline", DIALOG), ("offline", STORIES), ("refuses", DIALOG), ("never answers", CNN_DM)],
)
def test_hub_out_of_reach(hub, case, tmp_path, hub_at):
    """The models are the default ones, which are not to be had either: the data is what is named."""
    script, argv, named = case
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = {"refuses": script_runs.free_port(), "never answers": silent.getsockname()[1]}
        hub_at(f"http://127.0.0.1:{ports[hub]}" if hub in ports else None)
        line = refused(script, argv, tmp_path)
    assert named in line and "--data FOLDER" in line


def test_model_out_of_reach(tmp_path, hub_at):
    """The data is there, the model is not: no retries either."""
    hub_at(f"http://127.0.0.1:{script_runs.free_port()}")
    argv = ["--task", "cnn_dm", "--data", data_folder("cnn_dm"), "--model", "t5-base"]
    assert "--model t5-base" in refused("ppo_seq2seq", argv, tmp_path)


@pytest.fixture
def without_references(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"id": f"{split}-{i}", "prompt": f"Say when it was, number {i}:"} for i in range(8)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_reward_that_compares_needs_references(without_references, tmp_path):
    argv = script_runs.flags("ppo_seq2seq", task=without_references, metrics="dates", model=start_model(True), **SMALL)
    events = tmp_path / "events.json"
    for reward in ("rouge1", "meteor", "bertscore"):
        line = refused("ppo_seq2seq", [*argv, "--reward", reward], tmp_path, events_file=str(events))
        assert repr(reward) in line and "references" in line and "'train-0'" in line
        assert "load_policy" not in json.loads(events.read_text())
    argv[argv.index("dates")] = "rouge"
    line = refused("ppo_seq2seq", [*argv, "--reward", "dates"], tmp_path)
    assert "'rouge'" in line and "references" in line and "'val" in line
    argv = script_runs.flags("supervised", task=without_references, metrics="dates", model=start_model(True), **SMALL)
    assert "references" in refused("supervised", argv, tmp_path)


def test_a_task_without_references_trains_on_another_reward(without_references, tmp_path):
    argv = script_runs.flags(
        "ppo_seq2seq", task=without_references, reward="dates", metrics="dates", model=start_model(True), **SMALL
    )
    script_runs.run_ok("ppo_seq2seq", [*argv, "--response-length", "12", "--run-dir", "run"], tmp_path)
    assert len(script_runs.rows(tmp_path / "run" / "metrics.jsonl")) == 2
    assert all(p["references"] == [] for p in script_runs.rows(tmp_path / "run" / "predictions" / "test_2.jsonl"))
