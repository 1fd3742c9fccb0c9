"""A2C for language models, encoder-decoder and decoder-only, in one file.

A response is an episode: the prompt is the observation, every token an action, the episode ends with EOS. Each
iteration samples one response to each of `--batch-size` prompts, scores the texts, pays the score at the last token
and a penalty kl_coef * (log pi - log pi_ref) at every token, estimates advantages with GAE, and takes one step along
the policy gradient of the whole batch: no ratio, no clipping, no second pass over the data.

    A2C       the synchronous form of A3C, Mnih et al. 2016, https://arxiv.org/abs/1602.01783
    GAE       Schulman et al. 2016, https://arxiv.org/abs/1506.02438
    for LMs   Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; RL4LMs, Ramamurthy et al. 2022,
              https://arxiv.org/abs/2210.01241, whose tasks, rewards, defaults and KL controller these are

On a laptop without a network, and on four GPUs:

    python supervised.py --task numbers --run-dir runs/sft
    python a2c.py --task numbers --model runs/sft/model

    torchrun --nproc_per_node 4 a2c.py --task cnn_dm --reward rouge1 --model t5-base --dtype bfloat16

Unlike RL4LMs: one teacher-forced pass scores a whole response (there, every token is a training row that runs prompt
and prefix again, and 480 tokens need more than 16 GB); the gradient is accumulated over micro-batches, so that memory
does not grow with the batch; the log-probs are those of the distribution that was sampled; episodes are never cut; a
run is the same whatever the number of processes, and a resumed one goes on to the bit.
"""

import concurrent.futures
import contextlib
import copy
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
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
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
from rewards import check_metric, check_reward, describe_error, make_metric, make_reward, measure, score_texts

# GPT-2's GELU as one kernel: the same function, where transformers spells it out in eight
ACT2FN["gelu_new"] = GELUTanh

# What RL4LMs' configurations say of each task: batch_size is its tokens per iteration over the response length, the KL
# columns are its own. It publishes no learning rates for A2C: these are PPO's times 3, since one step stands in for
# dozens. `numbers` and `dates` are set for the small scratch model.
TASK_COLUMNS = ("batch_size", "num_iterations", "learning_rate", "kl_coef", "target_kl")
TASK_DEFAULTS = {
    "numbers":      (64, 150, 5e-4, 0.01, 2.0),
    "dates":        (64, 150, 5e-4, 0.01, 2.0),
    "imdb":         (32, 50, 7.5e-6, 0.1, 0.1),
    "imdb_seq2seq": (32, 50, 7.5e-6, 0.1, 0.1),
    "commongen":    (128, 200, 1e-5, 0.001, 2.0),
    "cnn_dm":       (48, 100, 2e-5, 0.001, 0.2),
    "xsum":         (48, 100, 2e-5, 0.001, 0.2),
    "totto":        (48, 100, 1.5e-5, 0.001, 2.0),
    "narrative_qa": (48, 100, 1.5e-5, 0.001, 1.0),
    "wmt16":        (40, 50, 1.2e-5, 0.001, 0.2),
    "wmt14_en_de":  (40, 50, 1.2e-5, 0.001, 0.2),
    "wmt16_news":   (40, 50, 1.2e-5, 0.001, 0.2),
    "iwslt2017":    (40, 50, 1.2e-5, 0.001, 0.2),
    "crd3":         (64, 50, 6e-6, 0.2, 0.5),
    "daily_dialog": (64, 50, 6e-6, 0.2, 0.5),
}  # fmt: skip

# The least and the greatest value of each numeric flag, both allowed.
LIMITS = {
    "num_iterations": (1, math.inf), "batch_size": (1, math.inf), "micro_batch_size": (1, math.inf),
    "sample_batch_size": (1, math.inf), "eval_batch_size": (1, math.inf), "learning_rate": (1e-12, 1.0),
    "gamma": (0.0, 1.0), "gae_lambda": (0.0, 1.0), "ent_coef": (0.0, math.inf), "vf_coef": (0.0, math.inf),
    "kl_coef": (0.0, math.inf), "target_kl": (1e-9, math.inf), "temperature": (1e-3, math.inf),
    "top_k": (0, math.inf),
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
    """the policy to start from: a hub name, a folder of `save_pretrained`, or `scratch` for a small new one"""
    reward: tuple[str, ...] = ("rouge1",)
    """one or more rewards of rewards.py, or path/to/file.py:function"""
    reward_weights: tuple[float, ...] | None = None
    """a weight for each reward; default: the task's for its own rewards, else 1 each"""
    reward_kwargs: dict[str, str] = field(default_factory=dict)
    """options of the rewards as KEY VALUE ..., JSON values; NAME.KEY addresses one of several rewards"""
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

    # --- A2C
    num_iterations: int = 100
    """iterations of sampling and updating"""
    batch_size: int = 64
    """sequences per iteration over all processes"""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """RMSprop (alpha 0.99, eps 1e-5) or Adam, both RL4LMs'"""
    learning_rate: float = 1e-5
    """the optimizer's learning rate"""
    anneal_lr: bool = False
    """let the learning rate fall linearly to 0 over the run (RL4LMs: constant)"""
    gamma: float = 0.99
    """discount per token (RL4LMs: 0.99)"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation (RL4LMs: 0.95)"""
    norm_adv: bool = True
    """whiten the advantages over each minibatch"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, in nats (RL4LMs: 0)"""
    vf_coef: float = 0.5
    """weight of the value loss (RL4LMs: 0.5)"""
    max_grad_norm: float = 0.5
    """gradients are scaled to at most this norm (RL4LMs: 0.5)"""
    kl_coef: float = 0.001
    """weight of the KL penalty against the start model, at first"""
    target_kl: float | None = 0.2
    """the controller steers the mean KL per token, in nats, to this; None: kl_coef stays"""
    temperature: float = 1.0
    """sampling temperature of rollouts, part of the policy that is scored"""
    top_k: int = 0
    """sample rollouts among the k likeliest tokens; as in RL4LMs the log-probs do not see it, so it biases; 0: off"""

    # --- evaluation, checkpoints, logs
    eval_every: int = 10
    """iterations between evaluations on val (val and test are evaluated before and after training too)"""
    eval_samples: int = 1000
    """evaluate on the first so many samples of a split; 0: on all"""
    save_every: int = 10
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
    sample_batch_size: int = 32
    """sequences sampled at once by one process; likewise"""
    eval_batch_size: int = 32
    """sequences decoded at once by one process in evaluation"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 autocasts the models' passes; weights, losses and optimizer stay float32"""
    fsdp: bool = False
    """shard policy, value model, reference and optimizer over the processes, for models beyond one GPU (FSDP2)"""
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
        reward=tuple(task.reward),
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
    if args.reward_weights is None:
        own_reward = args.reward == tuple(task.reward)
        args.reward_weights = tuple(task.reward_weights) if own_reward else (1.0,) * len(args.reward)
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
    if not args.reward:
        raise UsageError("--reward: name at least one")
    for flag, names in (("reward", args.reward), ("metrics", args.metrics)):
        for name in set(names):
            if names.count(name) > 1:
                raise UsageError(f"--{flag} {name}: named twice")
    if len(args.reward_weights) != len(args.reward):
        raise UsageError(f"--reward-weights has {len(args.reward_weights)} values for {len(args.reward)} rewards")
    for weight in args.reward_weights:
        if not math.isfinite(weight):
            raise UsageError(f"--reward-weights {weight}: must be finite")
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


TOKENS = 0  # the last word of every counter: what its random numbers are for (datapools.prompt_order has one too)
EVALUATION_STREAM = 2**63  # no iteration has this number

CURVES = [
    "objective/score", "objective/kl", "objective/kl_coef", "objective/entropy", "rollout/response_length",
    "losses/policy", "losses/value", "losses/explained_variance",
]  # fmt: skip


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


def response_hidden(backbone, queries, query_mask, responses):
    """Last hidden states (B, T, D) of the states that the response tokens are sampled in."""
    if backbone.config.is_encoder_decoder:
        inputs = dict(input_ids=queries, decoder_input_ids=decoder_inputs(responses, backbone.config))
        return backbone(**inputs, attention_mask=query_mask, use_cache=False).last_hidden_state
    T = responses.shape[1]
    mask, position_ids = prompt_and_response(query_mask, T - 1)
    inputs = dict(input_ids=torch.cat([queries, responses[:, :-1]], 1), attention_mask=mask, position_ids=position_ids)
    return backbone(**inputs, use_cache=False).last_hidden_state[:, -T:]


def value_backbone(policy):
    """A copy of the policy without its language-model head."""
    backbone = AutoModel.from_config(policy.config, dtype=torch.float32).eval()
    missing, _ = backbone.load_state_dict(policy.base_model.state_dict(), strict=False)
    assert not missing, f"weights that the policy lacks: {missing}"
    return backbone


class ValueModel(nn.Module):
    """V(s_t): a backbone of its own and a linear head without bias, as in RL4LMs."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, 1, bias=False)

    def forward(self, queries, query_mask, responses):
        """values (B, T) float32."""
        return self.head(response_hidden(self.backbone, queries, query_mask, responses)).squeeze(-1).float()


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


def token_entropy(logits):
    """Entropy in nats of each distribution: (B, T, V) -> (B, T); banned tokens count 0, also in the gradient."""
    entropy = []
    for row in logits.unbind():  # one sequence at a time: what that takes stays in the processor's cache
        logprobs = row.log_softmax(-1)
        entropy.append(-(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1))
    return torch.stack(entropy)


class Agent(nn.Module):
    """Policy and value model under one forward, so that DistributedDataParallel sees both."""

    def __init__(self, policy, value_model, behaviour):
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.behaviour = behaviour  # keyword arguments of behaviour_logits

    def forward(self, queries, query_mask, responses, with_entropy):
        """logprobs, entropy (or None) and values, each (B, T) float32."""
        logits = behaviour_logits(response_logits(self.policy, queries, query_mask, responses), 0, **self.behaviour)
        entropy = token_entropy(logits) if with_entropy else None
        return token_logprobs(logits, responses), entropy, self.value_model(queries, query_mask, responses)


def make_optimizer(agent, name, learning_rate):
    """RMSprop as stable-baselines3's A2C has it, or Adam, for policy and value model."""
    if name == "adam":
        return torch.optim.Adam(agent.parameters(), lr=learning_rate, fused=True)
    return torch.optim.RMSprop(agent.parameters(), lr=learning_rate, alpha=0.99, eps=1e-5)


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


# ------------------------------------------------------------------------------------------------ A2C


def gae(rewards, values, mask, gamma, gae_lambda):
    """Advantages (B, T), https://arxiv.org/abs/1506.02438 (16); every sequence ends, so what follows it is worth 0."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * gae_lambda * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages


def next_kl_coef(kl_coef, kl, target_kl):
    """RL4LMs' controller, after Ziegler et al. 2019: proportional, at most 2% a step."""
    return kl_coef * (1 + 0.1 * float(np.clip((kl - target_kl) / target_kl, -0.2, 0.2)))


def micro_batch(rows, queries, query_mask, query_lengths, responses, response_lengths, left):
    """The rows' queries, query_mask and responses, cut to the longest prompt and response among them."""
    Q, T = query_lengths[rows].max(), response_lengths[rows].max()
    prompt = slice(-Q, None) if left else slice(0, Q)  # prompts are padded on the left for a causal policy
    return queries[rows, prompt], query_mask[rows, prompt], responses[rows, :T]


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
        for name in args.reward:
            check_reward(name, train)
        for name in args.metrics:
            check_metric(name, val)
        # before the process group and CUDA start, since some rewards start worker processes
        device = local_device(args.cuda)
        options = parse_kwargs(args.reward_kwargs, args.reward, task.reward_kwargs)
        reward_functions = {name: make_reward(name, device=str(device), **options[name]) for name in args.reward}
        options = parse_kwargs(args.metric_kwargs, args.metrics, task.metric_kwargs)
        metrics = {name: make_metric(name, device=str(device), **options[name]) for name in args.metrics}
        policy, tokenizer = load_model(args, [text for s in train for text in (s.prompt, *s.references)])
    except UsageError as error:
        fail(str(error))
    for reward_function in reward_functions.values():
        if hasattr(reward_function, "prepare"):
            reward_function.prepare([s.references for s in train])
    val, test = val[: args.eval_samples or None], test[: args.eval_samples or None]
    rank, world_size = distributed_setup(device)

    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    start_model = dict(start_model=fingerprint(policy))
    reference = copy.deepcopy(policy).requires_grad_(False)
    torch.manual_seed(args.seed)  # of the value head
    value_model = ValueModel(value_backbone(policy))
    for model in (policy, reference, value_model):
        if args.fsdp:
            shard(model, device)
        model.to(device)
    behaviour = dict(temperature=args.temperature, min_response_length=args.min_response_length, eos_id=eos_id)
    agent = Agent(policy, value_model, behaviour)
    optimizer = make_optimizer(agent, args.optimizer, args.learning_rate)
    if args.compile:
        agent.compile(dynamic=True)

    # ---------------------------------------------------------------- the run folder, and the checkpoint to go on from
    run_name = f"{Path(args.task).stem}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d_%H%M%S}"
    run_dir = Path(args.run_dir or f"runs/{gather_objects(run_name)[0]}")
    config = asdict(args) | start_model | {"world_size": world_size}
    lock, checkpoint = open_run_dir(run_dir, config, args, rank)
    iteration, kl_coef = 0, args.kl_coef
    whole = StateDictOptions(full_state_dict=True, cpu_offload=args.fsdp)  # checkpoints do not know of processes
    if checkpoint:
        saved = dict(model_state_dict=checkpoint["model"], optim_state_dict=checkpoint["optimizer"])
        set_state_dict(agent, optimizer, **saved, options=whole)
        iteration, kl_coef = checkpoint["iteration"], checkpoint["kl_coef"]
    trained = agent
    if dist.is_initialized() and not args.fsdp:
        trained = DistributedDataParallel(agent, forward_sync_buffers=False, gradient_as_bucket_view=True)
    executor = concurrent.futures.ThreadPoolExecutor(1)  # computes rewards while the models work
    if rank == 0:
        print(f"{run_dir}: {sum(p.numel() for p in policy.parameters()):,} parameters, {len(train)} training prompts")
        print(describe_lengths(tokenizer, train[:2000], args.prompt_length, args.response_length))
        if args.track:
            import wandb

            wandb.init(project=args.wandb_project, name=run_dir.name, id=run_dir.name, resume="allow", config=config)
    evaluation = (tokenizer, metrics, task, args, device, run_dir, executor)
    if iteration == 0:
        evaluate(policy, val, "val", 0, *evaluation)
        evaluate(policy, test, "test", 0, *evaluation)

    # B sequences of an iteration in this process, Q prompt tokens, T response tokens, V vocabulary
    B, left = args.batch_size // world_size, args.policy_type == "causal"  # which side prompts are padded on
    autocast = dict(device_type=device.type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")
    progress = tqdm(total=args.num_iterations, initial=iteration, disable=rank > 0 or None, desc=run_dir.name)
    while iteration < args.num_iterations:
        iteration += 1
        started = seconds(device)
        if args.anneal_lr:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - (iteration - 1) / args.num_iterations)

        # 1. sample responses; this process has the samples rank, rank + world_size, ... of the batch
        own = range(rank, args.batch_size, world_size)
        positions = [(iteration - 1) * args.batch_size + i for i in own]
        samples = [train[i] for i in prompt_order(positions, len(train), args.seed)]
        prompt_ids = encode_prompts(tokenizer, [s.prompt for s in samples], args.prompt_length, task.truncation_side)
        query_lengths = torch.tensor([len(ids) for ids in prompt_ids])  # (B,) on the CPU, as response_lengths
        queries, query_mask = pad(prompt_ids, pad_id, device, left)  # (B, Q)
        uniform = uniforms(args.seed, iteration, own, args.response_length)  # (B, T)
        responses = torch.full((B, args.response_length), pad_id, device=device)  # (B, T)
        kept_mass = torch.zeros(B, args.response_length, device=device)  # (B, T)
        for rows in torch.arange(B).split(args.sample_batch_size):
            with torch.autocast(**autocast):
                sampled, mass = sample_responses(
                    policy, queries[rows], query_mask[rows], uniform[rows], behaviour, args.top_k, pad_id
                )
            responses[rows, : sampled.shape[1]], kept_mass[rows, : sampled.shape[1]] = sampled, mass
        ended = (responses == eos_id).cpu()
        # a response ends with its first EOS, or else where it can't be longer
        response_lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, args.response_length)  # (B,)
        response_mask = (torch.arange(args.response_length) < response_lengths.unsqueeze(1)).to(device)  # (B, T)
        sample_ended = seconds(device)

        # 2. score the texts, in the background
        generations = tokenizer.batch_decode(responses, skip_special_tokens=True)
        texts = (samples, generations, response_lengths, args.response_length)
        scoring = executor.submit(score_texts, reward_functions, args.reward_weights, *texts)

        # 3. log-probs under the policy and the reference, and values: one pass each
        logprobs, ref_logprobs, entropy, values = torch.zeros(4, B, args.response_length, device=device)  # (B, T) each
        for rows in response_lengths.argsort().split(args.micro_batch_size):
            inputs = micro_batch(rows, queries, query_mask, query_lengths, responses, response_lengths, left)
            T = inputs[2].shape[1]
            with torch.no_grad(), torch.autocast(**autocast):
                logprobs[rows, :T], entropy[rows, :T], values[rows, :T] = agent(*inputs, with_entropy=True)
                ref_logits = behaviour_logits(response_logits(reference, *inputs), 0, **behaviour)
                ref_logprobs[rows, :T] = token_logprobs(ref_logits, inputs[2])
        for tensor in (logprobs, ref_logprobs, entropy, values):
            tensor.masked_fill_(~response_mask, 0.0)
        forward_ended = seconds(device)

        # 4. per-token rewards: the KL penalty at every token, the score at the last
        error = scoring.exception()
        stop_together(error and f"iteration {iteration}: a reward failed: {describe_error(error)}")
        token_scores, reward_means = scoring.result()
        kl = logprobs - ref_logprobs  # (B, T)
        rewards = token_scores.to(device) - kl_coef * kl  # (B, T)
        score_ended = seconds(device)

        # 5. advantages
        advantages = gae(rewards, values, response_mask, args.gamma, args.gae_lambda)  # (B, T), 0 on padding
        returns = advantages + values

        # 6. update
        update_sums = torch.zeros(2, dtype=torch.float64, device=device)
        # tokens, and first and second moment of the advantages, over all processes
        moments = torch.stack([response_mask, advantages, advantages.double() ** 2]).sum((1, 2))  # (3,) float64
        num_tokens, adv_sum, adv_squares = all_reduce_sum(moments)
        adv_mean = adv_sum / num_tokens
        adv_std = ((adv_squares - num_tokens * adv_mean**2) / (num_tokens - 1).clamp(min=1)).clamp(min=0).sqrt()
        micro_rows = response_lengths.argsort().split(args.micro_batch_size)
        for i, rows in enumerate(micro_rows):
            inputs = micro_batch(rows, queries, query_mask, query_lengths, responses, response_lengths, left)
            T = inputs[2].shape[1]
            mask, mb_advantages = response_mask[rows, :T], advantages[rows, :T]
            if args.norm_adv:
                mb_advantages = (mb_advantages - adv_mean) / (adv_std + 1e-8)
            with accumulating(trained, i < len(micro_rows) - 1):
                with torch.autocast(**autocast):
                    new_logprobs, new_entropy, new_values = trained(*inputs, with_entropy=args.ent_coef > 0)
                pg_loss = -mb_advantages * new_logprobs.masked_fill(~mask, 0.0)
                v_loss = (new_values - returns[rows, :T]) ** 2
                loss = pg_loss + args.vf_coef * v_loss
                if args.ent_coef > 0:
                    loss = loss - args.ent_coef * new_entropy
                # a mean over the tokens of the whole batch; the processes' gradients will be averaged
                ((loss * mask).sum() / num_tokens * world_size).backward()
            update_sums += (torch.stack([pg_loss, v_loss]).detach() * mask).sum((1, 2))
        grad_norm = clip_gradients(agent, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        update_ended = seconds(device)

        # 7. KL controller, on the mean KL per token over all processes
        returned, residual = returns.double()[response_mask], (returns - values).double()[response_mask]
        sums = dict(
            sequences=B,
            tokens=response_mask.sum(),
            score=token_scores.sum(),
            ended=ended.any(1).sum(),
            kl=kl.sum(),
            entropy=entropy.sum(),
            kept_mass=(kept_mass * response_mask).sum(),
            returns=returned.sum(),
            squared_returns=(returned**2).sum(),
            residual=residual.sum(),
            squared_residual=(residual**2).sum(),
        )
        sums |= {f"reward/{name}": mean * B for name, mean in reward_means.items()}
        sums |= dict(zip(("policy", "value"), update_sums, strict=True))
        sums = reduce_sums(sums, device)
        sequences, tokens = sums["sequences"], sums["tokens"]
        mean_kl, penalty = sums["kl"] / tokens, kl_coef
        if args.target_kl is not None:
            kl_coef = next_kl_coef(kl_coef, mean_kl, args.target_kl)

        # 8. log: every figure is over all processes
        variance = sums["squared_returns"] / tokens - (sums["returns"] / tokens) ** 2
        unexplained = sums["squared_residual"] / tokens - (sums["residual"] / tokens) ** 2
        log_ended = seconds(device)
        row = {
            "iteration": iteration,
            "objective/score": sums["score"] / sequences,
            "objective/kl": mean_kl,
            "objective/kl_coef": penalty,
            "objective/entropy": sums["entropy"] / tokens,
            "objective/rlhf_reward": (sums["score"] - penalty * sums["kl"]) / sequences,
            "losses/policy": sums["policy"] / tokens,
            "losses/value": sums["value"] / tokens,
            "losses/explained_variance": 1 - unexplained / max(variance, 1e-12),
            "losses/grad_norm": grad_norm.item(),
            "losses/learning_rate": optimizer.param_groups[0]["lr"],
            "rollout/response_length": tokens / sequences,
            "rollout/eos_fraction": sums["ended"] / sequences,
            "rollout/top_k_mass": sums["kept_mass"] / tokens,
            "time/sample_seconds": sample_ended - started,
            "time/forward_seconds": forward_ended - sample_ended,
            "time/score_seconds": score_ended - forward_ended,  # waited for after the forward passes
            "time/update_seconds": update_ended - score_ended,
            "time/iteration_seconds": log_ended - started,
            "time/tokens_per_second": tokens / (log_ended - started),
        }
        if len(reward_functions) > 1:
            row |= {name: total / sequences for name, total in sums.items() if name.startswith("reward/")}
        broken = ", ".join(name for name, value in row.items() if not math.isfinite(value))
        stop_together(broken and f"iteration {iteration}: not finite: {broken}; the last checkpoint is whole")
        if rank == 0:
            append_jsonl(run_dir / "metrics.jsonl", row)
            figures = {"score": row["objective/score"], "kl": mean_kl, "tokens/s": row["time/tokens_per_second"]}
            progress.set_postfix({name: f"{value:.3g}" for name, value in figures.items()})
            progress.update()
            if args.track:
                wandb.log(row, step=iteration)

        # 9. evaluate, save
        done, stopping = iteration == args.num_iterations, any(gather_objects(bool(signals)))
        if done or iteration % args.eval_every == 0:
            evaluate(policy, val, "val", iteration, *evaluation)
        if done or stopping or iteration % args.save_every == 0:
            model_state, optimizer_state = get_state_dict(agent, optimizer, options=whole)
            state = dict(iteration=iteration, kl_coef=kl_coef, config=json.dumps(config))
            state |= dict(model=model_state, optimizer=optimizer_state)
            error = save_checkpoint(run_dir, state) if rank == 0 else None
            stop_together(error and f"iteration {iteration}: {error}")
            if rank == 0:
                plot_curves(run_dir)
        if stopping:
            break

    progress.close()
    if iteration == args.num_iterations:
        evaluate(policy, test, "test", iteration, *evaluation)
    save_model(run_dir, policy, tokenizer)
    if rank == 0:
        plot_curves(run_dir)
        go_on = f"; go on with --run-dir {run_dir} --resume" if iteration < args.num_iterations else ""
        print(f"{run_dir}: {iteration} of {args.num_iterations} iterations done{go_on}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    if signals and signals[0][0] == signal.SIGINT:
        raise SystemExit(130)
