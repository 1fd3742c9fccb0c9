"""Reward models for --reward: a score learned from preferences, or a classifier learned from labels, in one file.

From pairs (rows of `prompt`, `chosen`, `rejected`) a scalar reward r(prompt, text) is learned by the loss of Bradley
and Terry, -log sigmoid(r(chosen) - r(rejected)); from labelled texts (rows of `prompt`, `label`) a classifier, by cross
entropy. The backbone is any model with a sequence classifier in transformers: a decoder-only LM, whose last token then
gives the score, or an encoder such as BERT. The texts are encoded as `--reward reward_model` and `--reward classifier`
encode them, which take the run folder's `model/`.

    Bradley-Terry  Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; Stiennon et al. 2020,
                   https://arxiv.org/abs/2009.01325

On a laptop without a network, and on four GPUs:

    python supervised.py --task numbers --policy-type causal --run-dir runs/sft
    python reward_model.py --task numbers --model runs/sft/model --run-dir runs/rm
    python ppo_causal.py --task numbers --model runs/sft/model --reward reward_model \
        --reward-kwargs model runs/rm/model --metrics increasing_numbers reward_model \
        --metric-kwargs reward_model.model runs/rm/model --run-dir runs/ppo

    torchrun --nproc_per_node 4 reward_model.py --task preferences.jsonl --model gpt2 --dtype bfloat16

Unlike RL4LMs, which has no trainer for them: its intent classifier was made elsewhere.
Left out on purpose: dropout, margins and ties between pairs, several labels of one text, LoRA.
"""

import fcntl
import functools
import inspect
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: spinning ones starve a neighbour process
os.environ["MPLBACKEND"] = "agg"  # curves are drawn without a display

import datasets
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

import datapools
from datapools import UsageError
from rewards import as_text, encode_texts, increasing_numbers, judged_text, max_tokens

# `numbers` are pairs of synthetic texts for the small model of supervised.py; else, one pass at 1e-5 (InstructGPT).
TASK_COLUMNS = "batch_size num_epochs learning_rate".split()
TASK_DEFAULTS = {"numbers": (32, 3, 5e-4)}
SHOWN = ("objective/score", "objective/kl", "losses/nll", "time/tokens_per_second")
LOGS = ("metrics.jsonl", "eval.jsonl")


@dataclass
class Args:
    __pydantic_config__ = {"allow_inf_nan": False}

    # --- what is learned
    task: str = "numbers"  # a file or folder of `prompt`, `chosen`, `rejected`, or of `prompt`, `label`; or `numbers`
    model: str = "gpt2"  # the backbone to start from: a hub name, or a folder of `save_pretrained`
    task_kwargs: dict[str, str] = field(default_factory=dict)  # options of the task's loader as KEY VALUE ...
    separator: str = " "  # what joins prompt and text where no space does: as RL's texts will be joined
    max_length: PositiveInt = 1024  # tokens of prompt and text at most; longer ones lose their beginning

    # --- maximum likelihood
    num_epochs: NonNegativeInt = 1  # passes over the training split; 0: evaluate the model, and end
    batch_size: PositiveInt = 64  # pairs, or labelled texts, per optimizer step over all processes
    learning_rate: PositiveFloat = 1e-5  # Adam's
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 over the run
    max_grad_norm: PositiveFloat = 1.0  # gradients are scaled to at most this norm

    # --- evaluation, checkpoints, logs
    eval_every: PositiveInt = 200  # iterations between evaluations on val (val and test also before and after training)
    eval_samples: NonNegativeInt = 1000  # evaluate on the first so many samples of a split; 0: on all
    save_every: PositiveInt = 200  # iterations between checkpoints
    run_dir: str | None = None  # the folder of this run; default runs/{task}__{script}__{seed}__{time}
    resume: bool = False  # go on from the checkpoint in --run-dir with its settings, or start there if it has none
    track: bool = False  # send metrics to wandb too (WANDB_MODE=offline, WANDB_PROJECT as ever)

    # --- the machine
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1  # of everything that is drawn: the new head, the order of samples
    micro_batch_size: PositiveInt = 16  # pairs or texts per pass of one process; memory and speed, not results
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 autocasts the passes, but for the head and losses
    gradient_checkpointing: bool = False  # keep a layer's input alone, and compute the rest again for its gradient
    fsdp: bool = False  # shard model and optimizer over torchrun's processes, for models beyond one GPU (FSDP2)


def main():
    # ------------------------------------------------------- set-up: what is wrong is said before a model is loaded
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter gets its number
    signals = note_signals()
    args, record = parse_args(sys.argv[1:], "causal")
    device = local_device()
    if args.task == "numbers":
        train, val, test = (number_pairs(split) for split in datapools.SPLITS)
    else:
        train, val, test = datapools.load_splits(args.task, None, args.task_kwargs)
    labels = find_labels(args.task, train)  # None: pairs
    datapools.model_config(args.model)  # says what is wrong with a folder or name
    tokenizer = datapools.load_tokenizer(args.model)
    for sample in [*train[:1000], *val[:1000], *test[:1000]]:
        texts_of(sample, labels, tokenizer, args.separator)
    model = Scorer(args, tokenizer, labels)
    # the tokenizer cuts and pads as the rewards will, by what model/ tells them
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    tokenizer.model_max_length = min(max_tokens(tokenizer, model.backbone.config), args.max_length)
    start_weights = checksum(model)
    if record.get("start_weights", start_weights) != start_weights:
        raise UsageError(f"--model {args.model}: has changed since this run began; --resume needs it as it was")
    rank, world_size = join_processes(device)
    wandb_id = record.get("wandb_id", os.urandom(4).hex())
    record = dict(script=Path(__file__).stem, start_weights=start_weights, wandb_id=wandb_id, world_size=world_size)
    run_dir = open_run_dir(args, record, rank)
    checkpoint = load_checkpoint(run_dir, rank) if args.resume else {}
    val, test = val[: args.eval_samples or None], test[: args.eval_samples or None]
    autocast = dict(device_type=device.type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")
    num_iterations = args.num_epochs * math.ceil(len(train) / args.batch_size)
    iteration = checkpoint.get("iteration", 0)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    prepare_model(model, device, args.fsdp, args.gradient_checkpointing)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate, fused=True)
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"])
    what = "pairs" if labels is None else f"texts with the labels {', '.join(map(str, labels))}"
    announce(run_dir, model, f"{len(train):,} training {what}", device, args, record, rank)
    evaluation = (model, tokenizer, labels, args, autocast, device, run_dir)
    if iteration == 0:
        evaluate_scores("val", val, 0, *evaluation)
        evaluate_scores("test", test, 0, *evaluation)
    else:
        save_model(run_dir, model.backbone, tokenizer, rank)  # a kill may have come between a checkpoint and its model

    progress = tqdm(total=num_iterations, initial=iteration, disable=rank > 0 or None)
    while iteration < num_iterations:
        iteration += 1
        started = seconds(device)
        left = 1 - (iteration - 1) / num_iterations if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = args.learning_rate * left

        # 1. a batch; this process has the samples rank, rank + world_size, ... of it
        positions = [(iteration - 1) * args.batch_size + i for i in range(rank, args.batch_size, world_size)]
        samples = train.take(datapools.prompt_order(positions, len(train), args.seed))
        texts = [texts_of(sample, labels, tokenizer, args.separator) for sample in samples]
        by_length = sorted(range(len(samples)), key=lambda i: max(map(len, texts[i])))

        # 2. loss and update: a mean over the whole batch, whose parts and processes are added up
        sums, num_tokens = torch.zeros(3, dtype=torch.float64, device=device), 0
        for start in range(0, len(samples), args.micro_batch_size):
            rows = by_length[start : start + args.micro_batch_size]
            encoded = encode(tokenizer, [texts[i] for i in rows], labels is None, device)
            with torch.autocast(**autocast):
                scores = model(encoded)  # (n, labels): a pair has two rows, the chosen texts first
            answers = None if labels is None else label_ids([samples[i] for i in rows], labels, device)
            nll, margin = preference(scores) if labels is None else label_likelihood(scores, answers)  # (b,) each
            (nll.sum() / args.batch_size).backward()
            with torch.no_grad():
                sums += torch.stack([nll.sum(), margin.sum(), (margin > 0).sum()])
            num_tokens += encoded["attention_mask"].sum().item()
        grad_norm = sum_and_clip_gradients(model, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        # 3. log: every figure is over all processes
        ended, figures = seconds(device), [total(x) / args.batch_size for x in sums]
        row = {
            "iteration": iteration,
            **dict(zip(("losses/nll", "objective/margin", "objective/accuracy"), figures, strict=True)),
            "losses/grad_norm": grad_norm.item(),
            "losses/learning_rate": optimizer.param_groups[0]["lr"],
            "time/iteration_seconds": ended - started,
            "time/tokens_per_second": total(num_tokens) / (ended - started),
        }
        log_row(row, run_dir, progress, args, rank)

        # 4. evaluate, save
        done, stopping = iteration == num_iterations, total(bool(signals)) > 0
        if done or iteration % args.eval_every == 0:
            evaluate_scores("val", val, iteration, *evaluation)
        if done:
            evaluate_scores("test", test, iteration, *evaluation)
        if done or stopping or iteration % args.save_every == 0:
            state = dict(model=model.state_dict(), iteration=iteration, optimizer=optimizer.state_dict())
            save_checkpoint(run_dir, gathered(state, rank), rank)
            save_model(run_dir, model.backbone, tokenizer, rank)
        if stopping:
            break
    progress.close()
    if rank == 0 and iteration:
        plot_curves(run_dir)
        go_on = f"; go on with --run-dir {run_dir} --resume" if iteration < num_iterations else ""
        print(f"{run_dir}: {iteration} of {num_iterations} iterations done{go_on}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 130 if signals and signals[0][0] == signal.SIGINT else 0


# ------------------------------------------------------------------------------------------------ the losses
def preference(scores):
    """-log P(chosen wins) by Bradley and Terry, and the margin r(chosen) - r(rejected): (2b, 1) -> (b,) each."""
    chosen, rejected = scores.squeeze(-1).chunk(2)
    return -F.logsigmoid(chosen - rejected), (chosen - rejected).detach()


def label_likelihood(scores, answers):
    """-log P(label), and the margin of its logit over the best of the others: (b, labels), (b,) -> (b,) each."""
    right = scores.gather(1, answers.unsqueeze(1)).squeeze(1)
    best_other = scores.scatter(1, answers.unsqueeze(1), -math.inf).amax(1)
    return F.cross_entropy(scores, answers, reduction="none"), (right - best_other).detach()


# ------------------------------------------------------------------------------------------------ the data
def number_pairs(split):
    """Pairs of synthetic counts that rise and fall back more or less often; the one that rises for longer, as
    increasing_numbers has it, is chosen."""
    rng, gold, rows = random.Random(f"pairs {split}"), increasing_numbers(), []

    def count():
        falls, number = rng.choice((0.0, 0.05, 0.1, 0.2, 0.5)), rng.randint(0, 100)
        numbers = [number]
        for _ in range(rng.randint(3, 17)):
            number = rng.randint(0, number) if rng.random() < falls else number + rng.randint(1, 9)
            numbers.append(number)
        return " ".join(map(str, numbers))

    while len(rows) < (4000 if split == "train" else 200):
        texts = count(), count()
        rejected, chosen = sorted(zip(gold(texts, texts, texts, texts), texts, strict=True))
        if rejected[0] < chosen[0]:
            rows.append(dict(chosen=chosen[1], rejected=rejected[1]))
    rows = datasets.Dataset.from_list(rows)
    return datapools.Split(rows, lambda row, n: datapools.Sample(f"{split}_{n}", "Count upwards:", [], row))


def find_labels(task, samples):
    """All labels of a training split in order, or None where the samples are pairs; UsageError if they are neither."""
    meta = samples[0].meta
    if {"chosen", "rejected"} <= meta.keys():
        return None
    if "label" not in meta:
        there = ", ".join(meta) or "none"
        raise UsageError(f"--task {task}: its rows need chosen and rejected, or label, beside the prompt; has {there}")
    found = [sample.meta.get("label") for sample in samples]
    if not all(isinstance(label, int | str) for label in found) or len({type(label) for label in found}) > 1:
        raise UsageError(f"--task {task}: labels must be all texts or all whole numbers; found {found[:5]}")
    found = set(found)
    if len(found) < 2:
        raise UsageError(f"--task {task}: all its training texts have one label, {found.pop()!r}: nothing to learn")
    return sorted(found)


def texts_of(sample, labels, tokenizer, separator):
    """What is scored, as the rewards make it: (chosen, rejected), or (text,); UsageError if a row lacks it."""
    if labels is not None:
        if sample.meta.get("label") not in labels:
            label, known = sample.meta.get("label"), ", ".join(map(str, labels))
            raise UsageError(f"sample {sample.id}: its label is {label!r}; those of the training split are {known}")
        return (as_text(sample.prompt),)
    texts = sample.meta.get("chosen"), sample.meta.get("rejected")
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"sample {sample.id}: chosen and rejected must be texts, not {texts!s:.200}")
    return tuple(judged_text(tokenizer, sample.prompt, text, separator) for text in texts)


def label_ids(samples, labels, device):
    """The number of each sample's label: (b,)."""
    return torch.tensor([labels.index(sample.meta["label"]) for sample in samples], device=device)


def encode(tokenizer, texts, pairs, device):
    """Named tensors (n, L) of the texts: of pairs, all that are chosen first; a chat template has special tokens."""
    special = not pairs or tokenizer.chat_template is None
    flat = [text for column in zip(*texts, strict=True) for text in column]
    encoded = encode_texts(tokenizer, tokenizer.model_max_length, device, flat, special=special)
    tokenizer("")  # forgets how it has cut and padded: model/ would keep that
    return encoded


# ------------------------------------------------------------------------------------------------ the model
class Scorer(nn.Module):
    """A sequence classifier of transformers: one output for preferences, else one for each label."""

    def __init__(self, args, tokenizer, labels):
        super().__init__()
        torch.manual_seed(args.seed)  # of the new head
        names = dict(enumerate(map(str, labels or ("score",))))
        options = dict(num_labels=len(names), id2label=names, label2id={name: i for i, name in names.items()})
        try:
            self.backbone, info = AutoModelForSequenceClassification.from_pretrained(
                args.model, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except datapools.LOADING_ERRORS as error:
            raise UsageError(f"--model {args.model}: cannot be loaded as a classifier: {error!r:.300}") from None
        inside = f"{self.backbone.base_model_prefix}."  # heads and poolers are new; the layers are not
        missing = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
        missing = sorted(name for name in missing if name.startswith(inside) and "pooler" not in name)
        if missing:
            raise UsageError(f"--model {args.model}: its files lack weights or have other shapes: {missing[:3]}")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise UsageError(f"--model {args.model}: its tokenizer has no token for padding, and none for the end")
        self.backbone.config.pad_token_id = tokenizer.pad_token_id  # the last token before it gives a decoder's score
        self.backbone.eval()

    def get_output_embeddings(self):
        """The head, which prepare_model keeps in float32."""
        names = ("score", "classifier", "classification_head")
        return next(getattr(self.backbone, name) for name in names if hasattr(self.backbone, name))

    def forward(self, encoded):
        """Logits (n, labels) in float32, by the same call as the rewards'."""
        accepted = inspect.signature(self.backbone.forward).parameters
        return self.backbone(**{name: x for name, x in encoded.items() if name in accepted}).logits.float()


# ------------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def score_split(model, tokenizer, labels, samples, args, autocast, device):
    """The logits of all samples, a list for each of its texts, of which each process computes its share."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rounds = math.ceil(len(samples) / world_size)  # equal for all: the last may come to a sample that another has too
    own, scores = torch.arange(rank, rounds * world_size, world_size) % len(samples), []
    for indices in own.split(args.micro_batch_size):
        texts = [texts_of(sample, labels, tokenizer, args.separator) for sample in samples.take(indices)]
        with torch.autocast(**autocast):
            logits = model(encode(tokenizer, texts, labels is None, device))
        scores.extend(logits.view(-1, len(indices), logits.shape[-1]).transpose(0, 1).cpu())  # of (texts, labels)
    parts = [scores] * world_size
    if dist.is_initialized():
        dist.all_gather_object(parts, scores)
    return torch.stack([score for turn in zip(*parts, strict=True) for score in turn][: len(samples)])


def evaluate_scores(split, samples, iteration, model, tokenizer, labels, args, autocast, device, run_dir):
    """Scores a split, and leaves accuracy, margin and nll in eval.jsonl, predictions/{split}_{iteration}.jsonl."""
    scores = score_split(model, tokenizer, labels, samples, args, autocast, device)  # (N, texts, labels)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    if labels is None:
        nll, margin = preference(scores.transpose(0, 1).flatten(0, 1))
        columns = dict(chosen_score=scores[:, 0, 0], rejected_score=scores[:, 1, 0])
    else:
        nll, margin = label_likelihood(scores[:, 0], label_ids(samples, labels, "cpu"))
        columns = dict(logits=scores[:, 0])
    figures = dict(accuracy=(margin > 0).float().mean().item(), margin=margin.mean().item(), nll=nll.mean().item())
    predictions = [
        {"id": sample.id, "prompt": sample.prompt}
        | {name: sample.meta[name] for name in ("chosen", "rejected", "label") if name in sample.meta}
        | {name: column[i].tolist() for name, column in columns.items()}
        for i, sample in enumerate(samples)
    ]
    (run_dir / "predictions").mkdir(exist_ok=True)
    lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions]
    (run_dir / "predictions" / f"{split}_{iteration}.jsonl").write_text("".join(lines), encoding="utf-8")
    write_row(run_dir / "eval.jsonl", {"iteration": iteration, "split": split} | figures, args, f"eval/{split}/")
    table = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
    tqdm.write(f"--- {split} after {iteration} iterations: {len(samples)} samples  {table}")
    for prediction in predictions[:2]:
        tqdm.write("\n".join(f"    {name:<14} {value!r:.200}" for name, value in list(prediction.items())[1:]))


# ------------------------------------------------------------------------------------------------ command line
def fail(message, code=2):
    """Ends the process with one line from rank 0; code 2: the command is wrong, 1: the run cannot go on."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def parse_args(argv, policy_type):
    """Args from the command line, and the record of the run that --resume goes on with ({} for a new one).

    What is not typed comes from the run to resume, else from the task, then from Args itself; `--help` shows it.
    """
    name, run_dir = datapools.typed(argv, "--task", Args.task), datapools.typed(argv, "--run-dir", "")
    file = Path(run_dir, "config.json")
    record = json.loads(file.read_text()) if "--resume" in argv and run_dir and file.exists() else {}
    task = datapools.get_task(record.get("task", name))
    row = next((row for tasks, row in TASK_DEFAULTS.items() if name in tasks.split()), ())
    defaults = task.flags(policy_type) | dict(zip(TASK_COLUMNS, row, strict=False), task=name)
    args = datapools.parse_flags(Args, argv, defaults, record, __doc__)
    check_args(args)
    return args, record


def check_args(args):
    """Raises UsageError for settings that do not fit each other."""
    processes, folder = int(os.environ.get("WORLD_SIZE", 1)), Path(args.run_dir or "")
    given = args.run_dir is not None
    begun = folder.is_dir() and any(file.name not in ("config.json", ".lock") for file in folder.iterdir())
    wrong = [
        (args.batch_size % processes, f"--batch-size {args.batch_size}: must be a multiple of {processes} processes"),
        (args.fsdp and "WORLD_SIZE" not in os.environ, "--fsdp: shards over processes; start the script by torchrun"),
        (args.resume and not given, "--resume: say which run by --run-dir"),
        (given and folder.exists() and not folder.is_dir(), f"--run-dir {folder}: not a folder"),
        (given and not args.resume and begun, f"--run-dir {folder}: exists; go on by --resume, or name another"),
    ]  # fmt: skip
    for applies, message in wrong:
        if applies:
            raise UsageError(message)
    if args.track:
        datapools.check_wandb()


# ------------------------------------------------------------------------------------------------ files of a run
def open_run_dir(args, record, rank):
    """Makes or reopens the run folder, which no two runs share, and writes config.json. Rank 0 does, for all."""
    outcome = [None]
    if rank == 0:
        now = datetime.now().strftime("%Y%m%d_%H%M%S_%f")
        run_dir = Path(args.run_dir or f"runs/{Path(args.task).stem}__{Path(__file__).stem}__{args.seed}__{now}")
        try:
            run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)
            # the kernel's lock goes with the process, however that ends
            fcntl.flock(os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
            (run_dir / "config.json").write_text(json.dumps(asdict(args) | record, indent=1))
            outcome = [run_dir]
        except OSError as error:
            outcome = [UsageError(f"--run-dir {run_dir}: not to be written, or another run is writing there: {error}")]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UsageError):
        raise outcome[0]
    return outcome[0]


def save_checkpoint(run_dir, state, rank):
    """Writes checkpoint/latest.pt aside, then renames: a crash at any moment leaves it whole, a bad disk previous.pt.

    The logs are in it, since what a run writes after its checkpoint will come again when it is resumed.
    """
    if rank > 0:
        return
    folder = run_dir / "checkpoint"
    folder.mkdir(exist_ok=True)
    latest, previous, aside = folder / "latest.pt", folder / "previous.pt", folder / "aside.tmp"
    state["logs"] = {name: (run_dir / name).read_text() for name in LOGS if (run_dir / name).exists()}
    try:
        with open(aside, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        while error.__context__:  # torch.save hides what the system said behind errors of its own
            error = error.__context__
        fail(f"{latest} cannot be written, the one before it is whole: {error}", code=1)
    if latest.exists():
        os.replace(latest, previous)
    os.replace(aside, latest)


def load_checkpoint(run_dir, rank):
    """The state that was saved last, {} if none was. The logs become what they were then."""
    file = next((f for f in (run_dir / "checkpoint" / n for n in ("latest.pt", "previous.pt")) if f.exists()), None)
    try:
        state = file and torch.load(file, map_location="cpu", weights_only=True)
    except datapools.LOADING_ERRORS as error:
        raise UsageError(f"{file}: damaged or unreadable; remove it to go on from the one before: {error}") from None
    for name in LOGS if rank == 0 else ():
        (run_dir / name).write_text(state["logs"].get(name, "") if state else "")
    return state or {}


def load_optimizer(optimizer, state):
    """Loads a whole state, of which each process takes its parts if the parameters are sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, slots in state["state"].items():
        p = parameters[index]
        for name, tensor in slots.items():
            if isinstance(p, DTensor) and tensor.ndim:
                slots[name] = distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements)
    optimizer.load_state_dict(state)


def save_model(run_dir, policy, tokenizer, rank, best=False):
    """Leaves model/ for from_pretrained, written aside and renamed; its generation config decodes as evaluation did."""
    weights = gathered(policy.state_dict(), rank)
    if rank > 0:
        return
    aside = run_dir / "model.tmp"
    # tied weights are gathered once under each of their names
    names = dict(policy.named_parameters(remove_duplicate=False)).keys() - dict(policy.named_parameters()).keys()
    for place in ("model", "best") if best else ("model",):
        shutil.rmtree(aside, ignore_errors=True)
        policy.save_pretrained(aside, state_dict={name: w for name, w in weights.items() if name not in names})
        tokenizer.save_pretrained(aside)
        shutil.rmtree(run_dir / place, ignore_errors=True)  # a kill just here: --resume writes it again
        aside.rename(run_dir / place)


def write_row(file, row, args, prefix=""):
    """One more row in a .jsonl file, and the same in wandb."""
    with open(file, "a") as lines:
        lines.write(json.dumps(row) + "\n")
    if args.track:
        import wandb

        wandb.log({prefix + name: value for name, value in row.items() if name != "split"}, step=row["iteration"])


def log_row(row, run_dir, progress, args, rank):
    """An iteration's figures into metrics.jsonl, and onto the terminal or, a line each, into its file."""
    broken = ", ".join(name for name, value in row.items() if not math.isfinite(value))
    if broken:
        fail(f"iteration {row['iteration']}: not finite: {broken}; the last checkpoint is whole", code=1)
    if rank == 0:
        write_row(run_dir / "metrics.jsonl", row, args)
        shown = "  ".join(f"{name.partition('/')[2]} {row[name]:.4g}" for name in SHOWN if name in row)
        progress.set_postfix_str(shown)
        progress.update()
        if progress.disable:
            print(f"iteration {row['iteration']}/{progress.total}  {shown}", flush=True)


def plot_curves(run_dir):
    """Draws curves.png: objective, rewards, losses and rollouts of metrics.jsonl, and all metrics on val."""
    import pandas as pd

    rows, evals = (pd.read_json(run_dir / name, lines=True).set_index("iteration") for name in LOGS)
    curves = rows.filter(regex="^(objective|reward|losses|rollout)/")
    curves = curves.join(evals[evals["split"] == "val"].drop(columns="split").add_prefix("eval/val/"), how="outer")
    options = dict(subplots=True, layout=(-1, 4), figsize=(20, 0.8 * len(curves.columns)), grid=True, sharex=False)
    axes = curves.interpolate(limit_area="inside").plot(**options)
    axes[0, 0].figure.savefig(run_dir / "curves.png", bbox_inches="tight")


def announce(run_dir, policy, lengths, device, args, record, rank):
    """The first lines of a run, and its place in wandb."""
    if rank > 0:
        return
    size, processes = sum(p.numel() for p in policy.parameters()), record["world_size"]
    where = f"{device.type}, {args.dtype}, {processes} process{'es' if processes > 1 else ''}"
    print(f"{Path(__file__).stem}: {args.model}, {size:,} parameters, on {where}\n{run_dir}: {lengths}", flush=True)
    if torch.cuda.device_count() > processes:
        print(f"{torch.cuda.device_count() - processes} GPUs are idle; torchrun --nproc_per_node N uses N of them")
    if args.track:
        import wandb

        wandb.init(name=run_dir.name, id=record["wandb_id"], resume="allow", config=asdict(args) | record)


# ------------------------------------------------------------------------------------------------ processes
def local_device():
    """This process's own GPU, the LOCAL_RANK-th, or the CPU."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def join_processes(device):
    """Joins torchrun's process group if there is one. Returns rank and world size."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        # rank 0 computes the metrics of a corpus while the others wait
        options = dict(backend="nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
        # torchrun --max-restarts keeps its store: without a prefix, new processes would meet the addresses of dead ones
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(store=store, rank=rank, world_size=world_size, **options)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def prepare_model(model, device, fsdp, recompute):
    """Puts a model onto the device, with --fsdp sharded: each process keeps a part of every weight, gradient and
    optimizer state, a layer's weights are gathered when it runs, and gradients are summed over the processes."""
    if hasattr(model, "get_output_embeddings"):
        # the head stays in float32: GPT-2's logits lie near -100, where bfloat16 has steps of half a nat
        head = model.get_output_embeddings()
        project = torch.autocast(device.type, enabled=False)(head.forward)
        head.forward = lambda hidden: project(hidden.float())
    names = getattr(model, "backbone", model)._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for layer in layers if recompute else ():
        options = dict(use_reentrant=False, preserve_rng_state=False)  # there is no dropout
        layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, **options)
    if fsdp:
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for module in [*reversed(layers), model]:  # what is within another before it (Mamba names both)
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.to(device)


def sum_and_clip_gradients(model, max_norm):
    """Adds up the gradients of all processes, and scales them to a norm of at most max_norm. Returns what it was."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:  # an expert that had no token here may have had one elsewhere; what is never used stays at 0
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if dist.is_initialized() and not isinstance(model, FSDPModule):
        flat = all_reduce_sum(torch.cat([p.grad.flatten() for p in parameters]))  # one buffer, as in CleanRL
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(part.view_as(p))
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def all_reduce_sum(tensor):
    """The sum of `tensor` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def total(x):
    """The sum over all processes, of a number or a tensor with one, as a float."""
    x = torch.as_tensor(x, dtype=torch.float64)
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return all_reduce_sum(x.cuda() if on_gpu else x.clone()).item()


def gathered(state, rank):
    """The state with all sharded tensors whole and on the CPU, for rank 0; to be called on all processes."""
    place = "cpu" if rank == 0 else "meta"  # others take part, and keep nothing
    return torch.utils._pytree.tree_map(lambda x: x.full_tensor().to(place) if isinstance(x, DTensor) else x, state)


def checksum(model):
    """Of the bits of all weights, exact on any machine: what tells the start model of another run."""
    return sum(p.detach().view(torch.int32).sum(dtype=torch.int64).item() for p in model.parameters())


def note_signals():
    """A list in which SIGTERM and SIGINT are noted for the loop to see; a second one ends the process at once."""
    signals = []

    def note(number, frame):
        # torchrun passes on what the terminal has sent already: only a later signal is a second one
        if signals and time.monotonic() - signals[0][1] > 1:
            os._exit(128 + number)
        if not signals and int(os.environ.get("RANK", 0)) == 0:
            os.write(2, b"\nstopping after this iteration, with a checkpoint; again to end now\n")
        signals.append((number, time.monotonic()))

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return signals


def seconds(device):
    """Wall clock in seconds, after the device has finished what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        fail(error)
