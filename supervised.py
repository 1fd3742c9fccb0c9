"""Supervised fine-tuning of an encoder-decoder or decoder-only language model, in one file.

Maximum likelihood of the references given their prompts: the warm start that RL continues from, and the baseline that
it is measured against. Every (prompt, reference) pair of the training split is one example; the loss is the mean over
the response tokens of a whole batch, whatever the number of processes and micro-batches. The run folder's `model/` is
what the RL scripts take by `--model`.

On a laptop without a network, and on four GPUs:

    python supervised.py --task numbers --run-dir runs/sft
    torchrun --nproc_per_node 4 supervised.py --task cnn_dm --model t5-base --dtype bfloat16

Unlike RL4LMs, which hands this to a general trainer: the same loop, data, evaluation, run folder and exact resuming as
the RL scripts.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: spinning ones starve a neighbour process

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
import tyro
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.activations import ACT2FN, GELUTanh
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from datapools import (
    UsageError,
    describe_lengths,
    encode_prompts,
    get_task,
    load_task,
    offline_if_unreachable,
    pad,
    parse_kwargs,
    prompt_order,
)
from rewards import check_metric, describe_error, make_metric, measure

# GPT-2's GELU as one kernel: the same function, where transformers spells it out in eight
ACT2FN["gelu_new"] = GELUTanh

# RL4LMs trains T5 at 1e-5 to 1e-4 for 2 to 5 epochs and GPT-2 at 1e-5 for 10 to 20, on batches of 8 to 64; `numbers`
# and `dates` are set for the small scratch model, and stop where RL still has something to do.
TASK_COLUMNS = ("batch_size", "num_epochs", "learning_rate")
TASK_DEFAULTS = {
    "numbers":      (32, 8, 1e-3),
    "dates":        (32, 8, 1e-3),
    "imdb":         (32, 10, 1e-5),
    "imdb_seq2seq": (32, 10, 1e-5),
    "commongen":    (32, 4, 1e-4),
    "cnn_dm":       (32, 2, 1e-4),
    "xsum":         (32, 2, 1e-4),
    "totto":        (32, 4, 1e-4),
    "narrative_qa": (32, 4, 1e-4),
    "wmt16":        (64, 2, 1e-4),
    "wmt14_en_de":  (64, 2, 1e-4),
    "wmt16_news":   (64, 2, 1e-4),
    "iwslt2017":    (64, 5, 1e-4),
    "crd3":         (16, 10, 1e-5),
    "daily_dialog": (16, 20, 1e-5),
}  # fmt: skip

# The least and the greatest value of each numeric flag, both allowed.
LIMITS = {
    "num_epochs": (1, math.inf), "batch_size": (1, math.inf), "micro_batch_size": (1, math.inf),
    "eval_batch_size": (1, math.inf), "learning_rate": (1e-12, 1.0),
    "max_grad_norm": (1e-9, math.inf), "prompt_length": (1, math.inf), "response_length": (1, math.inf),
    "min_response_length": (0, math.inf), "eval_every": (1, math.inf), "save_every": (1, math.inf),
    "eval_samples": (0, math.inf), "scratch_vocab_size": (260, math.inf), "scratch_width": (8, math.inf),
    "scratch_layers": (1, math.inf), "scratch_heads": (1, math.inf), "seed": (0, 2**63 - 1),
}  # fmt: skip


@dataclass
class Args:
    # --- what is learned
    task: str = "cnn_dm"
    """a task of datapools.py, or a folder or .jsonl file with `prompt` and `references`; other defaults follow it"""
    policy_type: Literal["seq2seq", "causal"] = "seq2seq"
    """encoder-decoder or decoder-only: which default model, or which scratch model; another model tells by itself"""
    model: str = "t5-base"
    """the model to start from: a hub name, a folder of `save_pretrained`, or `scratch` for a small new one"""
    metrics: tuple[str, ...] = ("rouge",)
    """metrics of rewards.py for evaluation, evaluate:NAME, or path/to/file.py:function"""
    metric_kwargs: dict[str, str] = field(default_factory=dict)
    """options of the metrics as KEY VALUE ..., JSON values; NAME.KEY addresses one of several metrics"""
    data: str | None = None
    """a folder with {train,validation,test}.jsonl in the columns of the task's hub dataset, read instead of the hub"""
    task_kwargs: dict[str, str] = field(default_factory=dict)
    """options of the task's loader as KEY VALUE ..., JSON values"""
    prompt_length: int = 512
    """prompt tokens at most; longer prompts are truncated on the task's side"""
    response_length: int = 100
    """response tokens at most"""
    min_response_length: int = 0
    """EOS cannot be decoded before this many tokens, in training and in evaluation"""

    # --- maximum likelihood
    num_epochs: int = 2
    """passes over the training split"""
    batch_size: int = 32
    """sequences per optimizer step over all processes"""
    learning_rate: float = 1e-4
    """AdamW's learning rate"""
    anneal_lr: bool = False
    """let the learning rate fall linearly to 0 over the run (RL4LMs: constant)"""
    max_grad_norm: float = 1.0
    """gradients are scaled to at most this norm"""

    # --- evaluation, checkpoints, logs
    eval_every: int = 500
    """iterations between evaluations on val (val and test are evaluated before and after training too)"""
    eval_samples: int = 1000
    """evaluate on the first so many samples of a split; 0: on all"""
    save_every: int = 500
    """iterations between checkpoints"""
    run_dir: str | None = None
    """the folder of this run; default runs/{task}__{script}__{seed}__{time}"""
    resume: bool = False
    """go on from the checkpoint in --run-dir, or start there if it has none"""
    allow_changes: bool = False
    """let --resume go on although settings that change the maths differ from the run's own"""
    track: bool = False
    """send metrics to wandb too (WANDB_MODE=offline keeps them on disk)"""
    wandb_project: str = "minimal-rl4lms"
    """wandb's project"""

    # --- the machine
    seed: int = 1
    """seed of everything: model, prompts, tokens, minibatches"""
    micro_batch_size: int = 16
    """sequences per forward and backward pass of one process; changes memory and speed, not results"""
    eval_batch_size: int = 32
    """sequences decoded at once by one process in evaluation"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 autocasts the models' passes; weights, losses and optimizer stay float32"""
    fsdp: bool = False
    """shard model and optimizer over the processes, for models beyond one GPU (FSDP2)"""
    compile: bool = False
    """torch.compile the passes of the update"""
    cuda: bool = True
    """use a GPU if there is one"""

    # --- `--model scratch`: a small T5 or GPT-2 and a byte-level BPE trained on the task's own texts
    scratch_vocab_size: int = 1000
    """tokens of the vocabulary at most (the 256 bytes included)"""
    scratch_width: int = 128
    """width of the residual stream; the feed-forward is 4 times as wide"""
    scratch_layers: int = 2
    """layers; of a T5 in the encoder and in the decoder each"""
    scratch_heads: int = 4
    """attention heads; must divide the width"""


# ------------------------------------------------------------------------------------------------ command line


def fail(message: str, code: int = 2):
    """Ends all processes with one line from rank 0; code 2: the command is wrong, 1: the run cannot go on."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def flag_value(argv, name, default):
    """What `--name VALUE` or `--name=VALUE` gives, read ahead of the other flags, whose defaults depend on it."""
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") == f"--{name}":
            default = value if equals else argv[i + 1] if i + 1 < len(argv) else default
    return default


def parse_args(argv, policy_type: Literal["seq2seq", "causal"]) -> Args:
    """Args from the command line; what is not typed comes from the task, then from Args itself. `--help` shows it."""
    name = flag_value(argv, "task", Args.task)
    task = get_task(name)
    defaults = dict(
        task=name,
        model=task.seq2seq_model if policy_type == "seq2seq" else task.causal_model,
        # perplexity of the references is defined for decoder-only models
        metrics=tuple(m for m in task.metrics if m != "perplexity" or policy_type == "causal"),
        prompt_length=task.prompt_length,
        response_length=task.response_length,
        min_response_length=task.min_response_length,
    )
    defaults |= dict(zip(TASK_COLUMNS, TASK_DEFAULTS.get(name, ()), strict=False))
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            args = tyro.cli(Args, description=__doc__, default=Args(**defaults), args=argv)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro draws a box: keep its text, without frame, title and the help of each suggestion, as one line
        lines = [line.strip("│ ") for line in message.getvalue().splitlines() if line.startswith("│")]
        fail(" ".join(line for line in lines if not line.startswith(("─", "For full", "Argument helptext"))))
    return args


def check_args(args, world_size):
    """Raises UsageError for what can be seen to be wrong before anything is loaded."""
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name, None)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            bound = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be {bound}")
    if args.batch_size % world_size:
        raise UsageError(f"--batch-size {args.batch_size}: must be a multiple of {world_size} processes")
    if args.min_response_length > args.response_length:
        raise UsageError(
            f"--min-response-length {args.min_response_length}: at most --response-length {args.response_length}"
        )
    for name in set(args.metrics):
        if args.metrics.count(name) > 1:
            raise UsageError(f"--metrics {name}: named twice")
    if args.scratch_width % args.scratch_heads:
        raise UsageError(f"--scratch-heads {args.scratch_heads}: must divide --scratch-width {args.scratch_width}")
    if args.fsdp and "WORLD_SIZE" not in os.environ:
        raise UsageError("--fsdp: shards over the processes of torchrun; start the script by torchrun")
    if args.fsdp and "perplexity" in args.metrics:
        raise UsageError("--metrics perplexity: needs the whole model in one process; name --metrics without it")
    if args.resume and not args.run_dir:
        raise UsageError("--resume: say which run by --run-dir")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise UsageError("--track: wandb is not installed; pip install wandb")
    if args.run_dir and Path(args.run_dir).exists() and not Path(args.run_dir).is_dir():
        raise UsageError(f"--run-dir {args.run_dir}: not a folder")
    if args.run_dir and Path(args.run_dir).exists() and not args.resume and any(Path(args.run_dir).iterdir()):
        raise UsageError(f"--run-dir {args.run_dir}: exists; go on with it by --resume, or name another folder")
    if args.data and not Path(args.data).exists():
        raise UsageError(f"--data {args.data}: no such folder")


# ------------------------------------------------------------------------------------------------ processes


def local_device(use_cuda):
    """This process's own GPU, the LOCAL_RANK-th, or the CPU."""
    if use_cuda and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def distributed_setup(device):
    """Joins torchrun's process group if there is one. Returns rank and world size."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        # rank 0 computes the metrics of an evaluation while the others wait: hours for a learned metric, not minutes
        options = dict(backend="nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
        # torchrun --max-restarts keeps its store: without a prefix, new processes would meet the addresses of dead ones
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(store=store, rank=rank, world_size=world_size, **options)
        sys.excepthook = explain_lost_process
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def explain_lost_process(kind, error, trace):
    """The excepthook of a distributed run: one line where another process' end has broken a collective operation."""
    if issubclass(kind, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
        print("error: another process of this run has ended; go on by --resume with its --run-dir", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def all_reduce_sum(tensor):
    """The sum of `tensor` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def reduce_sums(sums, device):
    """{name: its sum over all processes} as floats, by one all-reduce and one transfer."""
    stacked = torch.stack([torch.as_tensor(value, dtype=torch.float64).to(device) for value in sums.values()])
    return dict(zip(sums, all_reduce_sum(stacked).tolist(), strict=True))


def shard(model, device):
    """Shards a policy or ValueModel by FSDP2: each process keeps a part of every weight, of its gradient and of its
    optimizer state, and a layer's weights are gathered when it runs."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = getattr(model, "backbone", model)._no_split_modules
    for module in [m for m in model.modules() if type(m).__name__ in layers]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def accumulating(module, more_to_come):
    """A context for a backward pass: with more of the same minibatch to come, gradients are not yet averaged."""
    for part in (module, *module.children()):
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(not more_to_come)
    if more_to_come and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def clip_gradients(module, max_norm):
    """Scales the gradients to a norm of at most max_norm. Returns the norm that they had."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gather_objects(thing):
    """[thing of rank 0, thing of rank 1, ...] on every process."""
    things = [thing]
    if dist.is_initialized():
        things = [None] * dist.get_world_size()
        dist.all_gather_object(things, thing)
    return things


def stop_together(error: str | None, code: int = 1):
    """Ends the run on all processes if any of them has an error; the last checkpoint stays as it is."""
    errors = [e for e in gather_objects(error) if e]
    if errors:
        fail(errors[0], code)


def install_signal_handlers():
    """A list in which SIGTERM and SIGINT are noted for the loop to see; a second one ends the process at once."""
    signals = []

    def note(number, frame):
        # torchrun passes on what the terminal has sent already: only a later signal is a second one
        if signals and time.monotonic() - signals[0][1] > 1:
            os._exit(128 + number)
        signals.append((number, time.monotonic()))

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return signals


def seconds(device):
    """Wall clock in seconds, after the device has finished what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ------------------------------------------------------------------------------------------------ files of a run


def open_run_dir(run_dir, config, args, rank):
    """Makes or reopens the run folder. Returns its lock (rank 0) and the checkpoint to go on from, or None.

    The lock is the kernel's: it goes with the process, however that ends.
    """
    lock, checkpoint, error = None, None, None
    try:
        if rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = open(run_dir / ".lock", "w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        checkpoint = load_checkpoint(run_dir) if args.resume else None
        if checkpoint and not args.allow_changes:
            check_same_run(json.loads(checkpoint["config"]), config)
    except BlockingIOError:
        error = f"--run-dir {run_dir}: another run is writing there; wait for it, or name another folder"
    except OSError as os_error:
        error = f"--run-dir {run_dir}: cannot be used: {os_error}"
    except UsageError as usage_error:
        error = str(usage_error)
    stop_together(error, code=2)
    if rank == 0:
        (run_dir / "config.json").write_text(json.dumps(config, indent=1))
        for name in ("metrics.jsonl", "eval.jsonl"):  # what a killed run wrote after its checkpoint will come again
            with open(run_dir / name, "a") as file:
                file.truncate(checkpoint[name] if checkpoint else 0)
    return lock, checkpoint


def check_same_run(saved, config):
    """Raises UsageError that names the settings in which the run to go on with differs, where they change the maths."""
    free = {
        "run_dir", "resume", "allow_changes", "track", "wandb_project", "metrics", "metric_kwargs", "cuda",
        "eval_every", "eval_samples", "save_every", "micro_batch_size", "sample_batch_size", "eval_batch_size",
        "world_size", "compile", "fsdp",
    }  # fmt: skip
    names = [name for name in config if name not in free and json.loads(json.dumps(config[name])) != saved.get(name)]
    if names:
        differing = ", ".join(f"{name} {saved.get(name)} -> {config[name]}" for name in names)
        raise UsageError(f"--resume: differs from the run: {differing}; if that is meant, add --allow-changes")


def save_model(run_dir, policy, tokenizer):
    """Leaves model/ for from_pretrained, written aside and renamed. To be called on all processes; rank 0 writes."""
    weights = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if int(os.environ.get("RANK", 0)) > 0:
        return
    aside, old = run_dir / "model.tmp", run_dir / "model.old"
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    # tied weights are gathered once under each of their names
    names = dict(policy.named_parameters(remove_duplicate=False)).keys() - dict(policy.named_parameters()).keys()
    policy.save_pretrained(aside, state_dict={name: w for name, w in weights.items() if name not in names})
    tokenizer.save_pretrained(aside)
    if (run_dir / "model").exists():
        (run_dir / "model").rename(old)
    aside.rename(run_dir / "model")
    shutil.rmtree(old, ignore_errors=True)


def append_jsonl(path, row):
    """One more line of JSON in a file."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def save_checkpoint(run_dir, state):
    """Writes checkpoint/iteration_N.pt aside, renames it, then names it with its checksum in checkpoint/latest.json.

    A crash at any moment leaves latest.json with a whole file; the one before is kept too, in case a disk garbles it.
    Returns what went wrong, or None.
    """
    latest = run_dir / "checkpoint" / "latest.json"
    latest.parent.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "eval.jsonl"):  # resuming cuts what is written after this
        state[name] = (run_dir / name).stat().st_size
    file = latest.with_name(f"iteration_{state['iteration']}.pt")
    aside = file.with_suffix(".tmp")
    buffer = io.BytesIO()  # torch's writer to a file hides why the file could not be written
    torch.save(state, buffer)
    known = [{"file": file.name, "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest()}]
    if latest.exists():
        known += [entry for entry in json.loads(latest.read_text()) if entry["file"] != file.name][:1]
    try:
        with open(aside, "wb") as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
        aside.write_text(json.dumps(known, indent=1))
        os.replace(aside, latest)
    except OSError as error:
        aside.unlink(missing_ok=True)
        return f"checkpoint {file} cannot be written, the one before it is whole: {error}"
    for old in latest.parent.glob("iteration_*"):
        if old.name not in [entry["file"] for entry in known]:
            old.unlink()


def load_checkpoint(run_dir):
    """The state that was saved last, or None. UsageError if a file is not what was written."""
    latest = run_dir / "checkpoint" / "latest.json"
    if not latest.exists():
        return None
    try:
        known = [(entry["file"], entry["sha256"]) for entry in json.loads(latest.read_text())]
        file, checksum = latest.parent / known[0][0], known[0][1]
    except (ValueError, TypeError, KeyError, IndexError):
        raise UsageError(f"{latest}: damaged; without it, --resume starts the run anew") from None
    if not file.exists() or hashlib.file_digest(open(file, "rb"), "sha256").hexdigest() != checksum:
        way_out = f"; to go on from {known[1][0]}, remove the first entry of {latest}" if len(known) > 1 else ""
        raise UsageError(f"{file}: damaged, its checksum is not the one that was written{way_out}")
    return torch.load(file, map_location="cpu", weights_only=True)


def plot_curves(run_dir):
    """Draws curves.png: score, KL and losses from metrics.jsonl, and each metric on val from eval.jsonl."""
    rows = [json.loads(line) for line in open(run_dir / "metrics.jsonl")]
    evals = [json.loads(line) for line in open(run_dir / "eval.jsonl")]
    val = [row for row in evals if row["split"] == "val"]
    panels = {name: [(r["iteration"], r[name]) for r in rows if name in r] for name in CURVES}
    for name in [n for n in (val[0] if val else {}) if n not in ("iteration", "split")][:4]:
        panels[f"eval/val/{name}"] = [(r["iteration"], r[name]) for r in val]
    panels = {name: points for name, points in panels.items() if points}
    columns = 4
    figure = Figure(figsize=(4 * columns, 3 * math.ceil(len(panels) / columns)), layout="tight")
    for i, (name, points) in enumerate(panels.items()):
        axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, i + 1)
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None, markersize=3)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("iteration", fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(run_dir / "curves.png", dpi=100)


# the last word of every counter: what its random numbers are for (datapools.prompt_order has one too)
TOKENS, MINIBATCHES = range(2)
EVALUATION_STREAM = 2**63  # no iteration has this number

CURVES = ["losses/nll", "losses/grad_norm", "losses/learning_rate"]


# ------------------------------------------------------------------------------------------------ text and tokens


# any one of these tells transformers what the tokenizer is; without one it makes up an empty one
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json")


def train_tokenizer(texts, vocab_size, ends_with_eos):
    """A byte-level BPE (as GPT-2's) of `texts`; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if ends_with_eos:  # T5's encoder input ends with EOS
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


# ------------------------------------------------------------------------------------------------ random numbers


def uniforms(seed, stream, indices, length):
    """(len(indices), length) float64 uniform in [0, 1): the numbers at (seed, stream, index, position).

    Counter-based (Philox, Salmon et al. 2011), so that they do not depend on who asks for them, when, or with whom:
    a rollout is the same for any number of processes, and a resumed run needs no generator state.
    """
    philox = (np.random.Philox(key=[seed, stream], counter=[0, 0, index, TOKENS]) for index in indices)
    return torch.from_numpy(np.stack([np.random.Generator(generator).random(length) for generator in philox]))


def draw(logits, uniform):
    """One token per row by the inverse CDF. logits (B, V), uniform (B,) -> (B,) int64; never one of probability 0."""
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
    tokens = torch.searchsorted(cdf, (uniform * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1)


# ------------------------------------------------------------------------------------------------ the model


def build_scratch_model(args, texts):
    """A small T5 or GPT-2 with random weights and its tokenizer; the same seed and texts give the same."""
    seq2seq = args.policy_type == "seq2seq"
    tokenizer = train_tokenizer(texts, args.scratch_vocab_size, ends_with_eos=seq2seq)
    torch.manual_seed(args.seed)
    if seq2seq:
        config = transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=args.scratch_width,
            d_kv=args.scratch_width // args.scratch_heads,
            d_ff=4 * args.scratch_width,
            num_layers=args.scratch_layers,
            num_heads=args.scratch_heads,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
        return transformers.T5ForConditionalGeneration(config), tokenizer
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=args.prompt_length + args.response_length,
        n_embd=args.scratch_width,
        n_layer=args.scratch_layers,
        n_head=args.scratch_heads,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.GPT2LMHeadModel(config), tokenizer


def load_config(args):
    """The model's config, and UsageError if it is none or too short; None for scratch. Sets args.policy_type by it."""
    if args.model == "scratch":
        return None
    if not Path(args.model).exists():
        offline_if_unreachable()
    try:
        config = AutoConfig.from_pretrained(args.model)
        AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"--model {args.model}: neither a model folder nor to be had from the hub: {reason}") from None
    if Path(args.model).is_dir() and not any(Path(args.model, name).exists() for name in TOKENIZER_FILES):
        raise UsageError(f"--model {args.model}: has no tokenizer; save_pretrained that of the model there too")
    args.policy_type = "seq2seq" if config.is_encoder_decoder else "causal"
    known = dict(seq2seq=MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, causal=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if config.model_type not in known[args.policy_type]:
        raise UsageError(f"--model {args.model}: {config.model_type} is no language model that could be trained here")
    limit = getattr(config, "max_position_embeddings", math.inf)  # T5's positions are relative: no limit
    wanted = {"--prompt-length": args.prompt_length, "--response-length": args.response_length}
    if args.policy_type == "causal":
        wanted = {"--prompt-length + --response-length": args.prompt_length + args.response_length}
    for name, length in wanted.items():
        if length > limit:
            raise UsageError(f"{name} = {length}: {args.model} has {limit} positions")
    return config


def load_model(args, texts):
    """Policy and tokenizer. Dropout stays off throughout, so that log-probs are a function of the weights."""
    if args.model == "scratch":
        policy, tokenizer = build_scratch_model(args, texts)
    else:
        auto_model = AutoModelForSeq2SeqLM if args.policy_type == "seq2seq" else AutoModelForCausalLM
        try:
            policy = auto_model.from_pretrained(args.model, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise UsageError(f"--model {args.model}: cannot be loaded: {error}") from None
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token_id is None:  # GPT-2 has none; any token will do, since masks come from lengths
        tokenizer.pad_token = tokenizer.eos_token
    return policy.eval(), tokenizer


def prompt_and_response(query_mask, length):
    """mask and position_ids (B, Q + length): a prompt starts at position 0, however much padding is before it."""
    mask = F.pad(query_mask, (0, length), value=True)
    return mask, (mask.long().cumsum(1) - 1).clamp(min=0)


def start_decoding(policy, queries, query_mask, length):
    """What decode_step needs, and its first input: the decoder's start token (B, 1)."""
    if policy.config.is_encoder_decoder:
        cache = EncoderDecoderCache(DynamicCache(config=policy.config), DynamicCache(config=policy.config))
        start = queries.new_full((len(queries), 1), policy.config.decoder_start_token_id)
        return dict(input_ids=queries, attention_mask=query_mask, past_key_values=cache), start
    mask, position_ids = prompt_and_response(query_mask, length)
    return dict(mask=mask, position_ids=position_ids, cache=DynamicCache(config=policy.config)), queries


def decode_step(policy, state, inputs):
    """Logits (B, V) of the next response token; inputs (B, n) are the tokens that the cache has not seen."""
    if policy.config.is_encoder_decoder:
        outputs = policy(decoder_input_ids=inputs, use_cache=True, **state)
        state.pop("input_ids", None)  # the encoder runs once
        state["encoder_outputs"] = (outputs.encoder_last_hidden_state,)
        return outputs.logits[:, -1]
    seen = state["cache"].get_seq_length()
    now = seen + inputs.shape[1]
    outputs = policy(
        input_ids=inputs,
        attention_mask=state["mask"][:, :now],
        position_ids=state["position_ids"][:, seen:now],
        past_key_values=state["cache"],
        use_cache=True,
        logits_to_keep=1,
    )
    return outputs.logits[:, -1]


def decoder_inputs(responses, config):
    """What the decoder reads (B, T) to give the responses (B, T): its start token, then all but the last token."""
    return torch.cat([responses.new_full((len(responses), 1), config.decoder_start_token_id), responses[:, :-1]], 1)


def response_logits(policy, queries, query_mask, responses):
    """Logits (B, T, V) of all response tokens in one teacher-forced pass."""
    if policy.config.is_encoder_decoder:
        inputs = dict(input_ids=queries, decoder_input_ids=decoder_inputs(responses, policy.config))
        return policy(**inputs, attention_mask=query_mask, use_cache=False).logits
    T = responses.shape[1]
    mask, position_ids = prompt_and_response(query_mask, T - 1)
    inputs = dict(input_ids=torch.cat([queries, responses[:, :-1]], 1), attention_mask=mask, position_ids=position_ids)
    return policy(**inputs, use_cache=False, logits_to_keep=T).logits


def behaviour_logits(logits, first_position, temperature, min_response_length, eos_id):
    """Logits of the distribution that is sampled, and therefore scored: tempered, EOS banned while it is too early.

    logits (B, n, V) at the response positions first_position .. first_position + n, in any dtype -> float32.
    """
    logits = logits.float() if temperature == 1.0 else logits.float() / temperature
    if first_position < min_response_length:
        logits[:, : min_response_length - first_position, eos_id] = -math.inf  # in place: a copy would be (B, n, V)
    return logits


def token_logprobs(logits, responses):
    """log pi(a_t | s_t) of the sampled tokens: logits (B, T, V), responses (B, T) -> (B, T)."""
    return -F.cross_entropy(logits.flatten(0, 1), responses.flatten(), reduction="none").view_as(responses)


def fingerprint(model):
    """A checksum of the weights: what tells the model of another run."""
    checksum = hashlib.sha256()
    for weight in model.parameters():
        checksum.update(weight.detach().cpu().numpy().data)
    return checksum.hexdigest()


def all_ended(finished, policy):
    """Whether sampling is over; the holders of a sharded policy take every step together, as each needs all parts."""
    ended = finished.all()
    if isinstance(policy, FSDPModule):
        ended = ended.int()
        dist.all_reduce(ended, dist.ReduceOp.MIN)
    return ended


def keep_top_k(logits, k):
    """Logits (B, V) with all but the k greatest of each row at -inf."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -math.inf)


def kept_probability(logits, restricted):
    """The probability (B,) that logits (B, V) give to the tokens that are left in `restricted`."""
    if restricted is logits:
        return logits.new_ones(len(logits))
    return logits.softmax(-1).masked_fill(restricted == -math.inf, 0.0).sum(-1)


@torch.no_grad()
def sample_responses(policy, queries, query_mask, uniform, behaviour, top_k, pad_id):
    """Samples with a KV cache, one forward pass per token, until every row has ended.

    uniform (B, T) fixes the draws. Returns responses (B, <=T), padded behind EOS, and kept_mass (B, <=T): the
    probability that top-k leaves (1 without it).
    """
    uniform = uniform.to(queries.device)
    state, inputs = start_decoding(policy, queries, query_mask, uniform.shape[1])
    finished = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    responses, kept_mass = [], []
    # asking a GPU whether all rows have ended waits for it: there, ask now and then
    ask_every = 16 if queries.is_cuda else 1
    for t in range(uniform.shape[1]):
        logits = decode_step(policy, state, inputs).unsqueeze(1)  # (B, 1, V)
        logits = behaviour_logits(logits, t, **behaviour).squeeze(1)
        restricted = keep_top_k(logits, top_k) if top_k else logits
        tokens = draw(restricted, uniform[:, t]).masked_fill(finished, pad_id)  # (B,)
        responses.append(tokens)
        kept_mass.append(kept_probability(logits, restricted))
        inputs = tokens.unsqueeze(1)
        finished = finished | (tokens == behaviour["eos_id"])
        if (t + 1) % ask_every == 0 and all_ended(finished, policy):
            break
    return torch.stack(responses, 1), torch.stack(kept_mass, 1)


# ------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def beam_search(policy, queries, query_mask, decoding, lengths, eos_id, pad_id):
    """The best of num_beams responses, (B, <=T) padded behind EOS; the search is transformers' own."""
    sharded = isinstance(policy, FSDPModule)
    if sharded:
        policy.unshard()  # its embeddings, as generate runs the encoder by itself
    output = policy.generate(
        input_ids=queries,
        attention_mask=query_mask.long(),
        do_sample=False,
        num_beams=decoding.get("num_beams", 1),
        length_penalty=decoding.get("length_penalty", 1.0),
        min_new_tokens=lengths[0],
        max_new_tokens=lengths[1],
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        synced_gpus=sharded,
    )
    # without the decoder's start token, or the prompt
    return output[:, 1 if policy.config.is_encoder_decoder else queries.shape[1] :]


def decode_split(policy, tokenizer, samples, task, args, device):
    """Responses to this process' share of the samples, by the task's way of decoding: {index: text}."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rounds = math.ceil(len(samples) / world_size)  # equal for all: the last may come to a sample that another has too
    own, texts = [(rank + world_size * i) % len(samples) for i in range(rounds)], {}
    decoding, eos_id, pad_id = task.generation, tokenizer.eos_token_id, tokenizer.pad_token_id
    least = args.min_response_length
    behaviour = dict(temperature=decoding.get("temperature", 1.0), min_response_length=least, eos_id=eos_id)
    for start in tqdm(range(0, len(own), args.eval_batch_size), "evaluation", leave=False, disable=rank > 0 or None):
        indices = own[start : start + args.eval_batch_size]
        prompts = [samples[i].prompt for i in indices]
        rows = encode_prompts(tokenizer, prompts, args.prompt_length, task.truncation_side)
        queries, query_mask = pad(rows, pad_id, device, left=args.policy_type == "causal")
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            if decoding.get("do_sample"):
                # every evaluation draws the same numbers, so that two policies do not differ by luck
                uniform = uniforms(args.seed, EVALUATION_STREAM, indices, args.response_length)
                responses, _ = sample_responses(
                    policy, queries, query_mask, uniform, behaviour, decoding.get("top_k", 0), pad_id
                )
            else:
                lengths = least, args.response_length
                responses = beam_search(policy, queries, query_mask, decoding, lengths, eos_id, pad_id)
        texts |= dict(zip(indices, tokenizer.batch_decode(responses, skip_special_tokens=True), strict=True))
    return texts


def evaluate(policy, samples, split, iteration, tokenizer, metrics, task, args, device, run_dir, executor):
    """Decodes a split, computes the metrics on rank 0, and leaves them in eval.jsonl and predictions/."""
    texts = {}
    for part in gather_objects(decode_split(policy, tokenizer, samples, task, args, device)):
        texts |= part
    generations = [texts[i] for i in range(len(samples))]
    row, error = {"iteration": iteration, "split": split}, None
    predictions = [
        {"id": s.id, "prompt": s.prompt, "generation": g, "references": s.references}
        for s, g in zip(samples, generations, strict=True)
    ]
    for name, metric in metrics.items() if int(os.environ.get("RANK", 0)) == 0 else ():
        future = executor.submit(measure, name, metric, samples, generations, policy, tokenizer)
        if future.exception():
            error = f"iteration {iteration}: metric {name} failed: {describe_error(future.exception())}"
            break
        for figure, (per_sample, value) in future.result().items():
            row[figure] = value
            for prediction, own_value in zip(predictions, per_sample or [], strict=per_sample is not None):
                prediction[figure] = own_value
    stop_together(error)
    if int(os.environ.get("RANK", 0)) == 0:
        (run_dir / "predictions").mkdir(exist_ok=True)
        lines = [json.dumps(p, ensure_ascii=False) + "\n" for p in predictions]
        (run_dir / "predictions" / f"{split}_{iteration}.jsonl").write_text("".join(lines))
        append_jsonl(run_dir / "eval.jsonl", row)
        if args.track:
            import wandb

            wandb.log({f"eval/{split}/{name}": row[name] for name in list(row)[2:]}, step=iteration)
        tqdm.write(f"--- {split} after {iteration} iterations: {len(samples)} samples")
        tqdm.write("\n".join(f"    {name:<32} {row[name]:.4f}" for name in list(row)[2:]))
        for prediction in predictions[:2]:
            tqdm.write(
                f"    prompt      {prediction['prompt']!r:.200}\n    generation  {prediction['generation']!r:.200}"
            )
    return row


# ------------------------------------------------------------------------------------------------ maximum likelihood


def training_pairs(samples):
    """(prompt, response) of every reference; one that begins with the prompt (IMDB's) gives what follows it."""
    return [(s.prompt, r.removeprefix(s.prompt)) for s in samples for r in s.references]


def encode_responses(tokenizer, texts, max_length, seq2seq):
    """Token ids of each response, EOS at the end, and in between as the decoder was trained (BART's begin with <s>)."""
    eos_id = tokenizer.eos_token_id
    rows = tokenizer(text_target=list(texts), add_special_tokens=seq2seq).input_ids
    return [[*(row[:-1] if row and row[-1] == eos_id else row)[: max_length - 1], eos_id] for row in rows]


class Likelihood(nn.Module):
    """The policy under a forward that gives log-probs, so that DistributedDataParallel sees its gradients."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, queries, query_mask, responses):
        """logprobs (B, T) float32."""
        return token_logprobs(response_logits(self.policy, queries, query_mask, responses).float(), responses)


if __name__ == "__main__":
    # ---------------------------------------------------------------- set-up; what is wrong is said before models load
    signals = install_signal_handlers()
    transformers.utils.logging.disable_progress_bar()
    try:
        args = parse_args(sys.argv[1:], flag_value(sys.argv, "policy-type", Args.policy_type))
        task = get_task(args.task)
        check_args(args, int(os.environ.get("WORLD_SIZE", 1)))
        task_kwargs = parse_kwargs(args.task_kwargs, ["task"], {})["task"]
        train, val, test = (load_task(args.task, split, args.data, **task_kwargs) for split in ("train", "val", "test"))
        load_config(args)
        pairs = training_pairs(train)
        if not pairs:
            raise UsageError(f"--task {args.task}: its training samples have no references to learn from")
        for name in args.metrics:
            check_metric(name, val)
        # before the process group and CUDA start, since some metrics start worker processes
        device = local_device(args.cuda)
        options = parse_kwargs(args.metric_kwargs, args.metrics, task.metric_kwargs)
        metrics = {name: make_metric(name, device=str(device), **options[name]) for name in args.metrics}
        policy, tokenizer = load_model(args, [text for s in train for text in (s.prompt, *s.references)])
    except UsageError as error:
        fail(str(error))
    val, test = val[: args.eval_samples or None], test[: args.eval_samples or None]
    rank, world_size = distributed_setup(device)

    pad_id = tokenizer.pad_token_id
    start_model = dict(start_model=fingerprint(policy))
    if args.fsdp:
        shard(policy, device)
    policy.to(device)
    learner = Likelihood(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    if args.compile:
        learner.compile(dynamic=True)
    num_iterations = args.num_epochs * math.ceil(len(pairs) / args.batch_size)

    # ---------------------------------------------------------------- the run folder, and the checkpoint to go on from
    run_name = f"{Path(args.task).stem}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d_%H%M%S}"
    run_dir = Path(args.run_dir or f"runs/{gather_objects(run_name)[0]}")
    config = asdict(args) | start_model | {"world_size": world_size}
    lock, checkpoint = open_run_dir(run_dir, config, args, rank)
    iteration = 0
    whole = StateDictOptions(full_state_dict=True, cpu_offload=args.fsdp)  # checkpoints do not know of processes
    if checkpoint:
        saved = dict(model_state_dict=checkpoint["model"], optim_state_dict=checkpoint["optimizer"])
        set_state_dict(learner, optimizer, **saved, options=whole)
        iteration = checkpoint["iteration"]
    trained = learner
    if dist.is_initialized() and not args.fsdp:
        trained = DistributedDataParallel(learner, forward_sync_buffers=False, gradient_as_bucket_view=True)
    executor = concurrent.futures.ThreadPoolExecutor(1)  # computes metrics
    if rank == 0:
        print(f"{run_dir}: {sum(p.numel() for p in policy.parameters()):,} parameters, {len(pairs)} training pairs")
        print(describe_lengths(tokenizer, train[:2000], args.prompt_length, args.response_length))
        if args.track:
            import wandb

            wandb.init(project=args.wandb_project, name=run_dir.name, id=run_dir.name, resume="allow", config=config)
    evaluation = (tokenizer, metrics, task, args, device, run_dir, executor)
    if iteration == 0:
        evaluate(policy, val, "val", 0, *evaluation)
        evaluate(policy, test, "test", 0, *evaluation)

    # B sequences of a batch in this process, Q prompt tokens, T response tokens, V vocabulary
    autocast = dict(device_type=device.type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")
    progress = tqdm(total=num_iterations, initial=iteration, disable=rank > 0 or None, desc=run_dir.name)
    while iteration < num_iterations:
        iteration += 1
        started = seconds(device)
        if args.anneal_lr:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - (iteration - 1) / num_iterations)

        # 1. a batch; this process has the pairs rank, rank + world_size, ... of it
        positions = [(iteration - 1) * args.batch_size + i for i in range(rank, args.batch_size, world_size)]
        batch = [pairs[i] for i in prompt_order(positions, len(pairs), args.seed)]
        prompts = encode_prompts(tokenizer, [p for p, _ in batch], args.prompt_length, task.truncation_side)
        seq2seq = args.policy_type == "seq2seq"
        targets = encode_responses(tokenizer, [r for _, r in batch], args.response_length, seq2seq)
        num_tokens = all_reduce_sum(torch.tensor(sum(map(len, targets)), device=device))

        # 2. loss and update
        nll = torch.zeros((), dtype=torch.float64, device=device)
        by_length = sorted(range(len(batch)), key=lambda i: len(targets[i]))
        micro_rows = [by_length[i : i + args.micro_batch_size] for i in range(0, len(batch), args.micro_batch_size)]
        for rows in micro_rows:
            queries, query_mask = pad([prompts[i] for i in rows], pad_id, device, left=not seq2seq)
            responses, response_mask = pad([targets[i] for i in rows], pad_id, device)  # (B, T)
            with accumulating(trained, rows is not micro_rows[-1]):
                with torch.autocast(**autocast):
                    logprobs = trained(queries, query_mask, responses)  # (B, T)
                # a mean over the tokens of the whole batch; the processes' gradients will be averaged
                loss = -(logprobs * response_mask).sum() / num_tokens
                (loss * world_size).backward()
            nll += loss.detach()
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        # 3. log: every figure is over all processes
        ended_at = seconds(device)
        row = {
            "iteration": iteration,
            "losses/nll": all_reduce_sum(nll).item(),
            "losses/grad_norm": grad_norm.item(),
            "losses/learning_rate": optimizer.param_groups[0]["lr"],
            "time/iteration_seconds": ended_at - started,
            "time/tokens_per_second": num_tokens.item() / (ended_at - started),
        }
        broken = ", ".join(name for name, value in row.items() if not math.isfinite(value))
        stop_together(broken and f"iteration {iteration}: not finite: {broken}; the last checkpoint is whole")
        if rank == 0:
            append_jsonl(run_dir / "metrics.jsonl", row)
            figures = {"nll": row["losses/nll"], "tokens/s": row["time/tokens_per_second"]}
            progress.set_postfix({name: f"{value:.3g}" for name, value in figures.items()})
            progress.update()
            if args.track:
                wandb.log(row, step=iteration)

        # 4. evaluate, save
        done, stopping = iteration == num_iterations, any(gather_objects(bool(signals)))
        if done or iteration % args.eval_every == 0:
            evaluate(policy, val, "val", iteration, *evaluation)
        if done or stopping or iteration % args.save_every == 0:
            model_state, optimizer_state = get_state_dict(learner, optimizer, options=whole)
            state = dict(iteration=iteration, config=json.dumps(config))
            state |= dict(model=model_state, optimizer=optimizer_state)
            error = save_checkpoint(run_dir, state) if rank == 0 else None
            stop_together(error and f"iteration {iteration}: {error}")
            if rank == 0:
                plot_curves(run_dir)
        if stopping:
            break

    progress.close()
    if iteration == num_iterations:
        evaluate(policy, test, "test", iteration, *evaluation)
    save_model(run_dir, policy, tokenizer)
    if rank == 0:
        plot_curves(run_dir)
        go_on = f"; go on with --run-dir {run_dir} --resume" if iteration < num_iterations else ""
        print(f"{run_dir}: {iteration} of {num_iterations} iterations done{go_on}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    if signals and signals[0][0] == signal.SIGINT:
        raise SystemExit(130)
