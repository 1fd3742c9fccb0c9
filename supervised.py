"""Supervised fine-tuning of an encoder-decoder or decoder-only language model, in one file.

Maximum likelihood of the references given their prompts: the warm start that RL continues from, and the baseline that
it is measured against. Every (prompt, reference) pair of the training split is one example; the loss is the mean over
the response tokens of a whole batch. The run folder's `model/` is what the RL scripts take by `--model`. Where there is
no model to start from, `--model scratch` makes a small T5 or GPT-2 and trains a tokenizer on the task's own texts.

On a laptop without a network, and on four GPUs:

    python supervised.py --task numbers --run-dir runs/sft
    torchrun --nproc_per_node 4 supervised.py --task cnn_dm --model t5-base --dtype bfloat16

Unlike RL4LMs, which hands this to a general trainer: the same loop, data, evaluation, run folder and exact resuming as
the RL scripts; only the response is learned, not the prompt; EOS is taught where a reference ends, not where it is cut.
Left out on purpose: dropout, learning-rate warm-up, LoRA, packing of several texts into one row.
"""

import fcntl
import functools
import inspect
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: spinning ones starve a neighbour process
os.environ["MPLBACKEND"] = "agg"  # curves are drawn without a display

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
)
from transformers.generation import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper
from transformers.modeling_outputs import BaseModelOutput

import datapools
from datapools import UsageError
from rewards import is_best, make_metrics, measure

# RL4LMs trains T5 at 1e-5 to 1e-4 for 2 to 5 epochs and GPT-2 at 1e-5 for 10 to 20, on batches of 8 to 64; `numbers`
# and `dates` are set for the small scratch model, and stop where RL still has something to do.
TASK_COLUMNS = "batch_size num_epochs learning_rate".split()
TASK_DEFAULTS = {
    "numbers dates":                (32, 8, 1e-3),
    "imdb imdb_seq2seq":            (32, 10, 1e-5),
    "commongen totto":              (32, 4, 1e-4),
    "narrative_qa":                 (32, 4, 1e-4),
    "cnn_dm xsum":                  (32, 2, 1e-4),
    "wmt16 wmt14_en_de wmt16_news": (64, 2, 1e-4),
    "iwslt2017":                    (64, 5, 1e-4),
    "crd3":                         (16, 10, 1e-5),
    "daily_dialog":                 (16, 20, 1e-5),
}  # fmt: skip
SHOWN = ("objective/score", "objective/kl", "losses/nll", "time/tokens_per_second")
LOGS = ("metrics.jsonl", "eval.jsonl")
# the last word of every counter: what its random numbers are for (datapools.prompt_order has one too)
TOKENS, MINIBATCHES = range(2)
EVALUATION_STREAM = 2**63 - 1  # no iteration has this number
signature = functools.cache(inspect.signature)  # of a forward: looking it up takes as long as a layer of a small model


@dataclass
class Args:
    __pydantic_config__ = {"allow_inf_nan": False}

    # --- what is learned
    task: str = "cnn_dm"  # a task of datapools.py, or one's own data: a file or folder of `prompt` and `references`
    policy_type: Literal["seq2seq", "causal"] = "seq2seq"  # which default or scratch model; another tells by itself
    model: str = "t5-base"  # the model to start from: a hub name, a folder of `save_pretrained`, or `scratch`
    metrics: tuple[str, ...] = ("rouge",)  # metrics or rewards of rewards.py, evaluate:NAME, path/to/file.py:function
    metric_kwargs: dict[str, str] = field(default_factory=dict)  # KEY VALUE ...; NAME.KEY addresses one of several
    data: str | None = None  # a folder with {train,validation,test}.jsonl in the hub's columns, read instead of the hub
    task_kwargs: dict[str, str] = field(default_factory=dict)  # options of the task's loader as KEY VALUE ...
    chat: bool = False  # prompts go through the tokenizer's chat template, as the user's message
    prompt_length: PositiveInt = 512  # prompt tokens at most
    languages: tuple[str, str] | None = None  # source and target as the tokenizer names them (mBART: en_XX de_DE)
    truncation_side: Literal["left", "right"] = "left"  # the end of a longer prompt that is cut off
    response_length: PositiveInt = 100  # response tokens at most; what is cut of a longer reference is not learned
    min_response_length: NonNegativeInt = 0  # no EOS before this many tokens in evaluation

    # --- maximum likelihood
    num_epochs: NonNegativeInt = 2  # passes over the training pairs; 0: evaluate the model, and end
    batch_size: PositiveInt = 32  # sequences per optimizer step over all processes
    learning_rate: PositiveFloat = 1e-4  # Adam's
    anneal_lr: bool = False  # let the learning rate fall linearly to 0 over the run (RL4LMs: constant)
    max_grad_norm: PositiveFloat = 1.0  # gradients are scaled to at most this norm

    # --- evaluation, checkpoints, logs
    eval_every: PositiveInt = 500  # iterations between evaluations on val (val and test also before and after training)
    eval_samples: NonNegativeInt = 1000  # evaluate on the first so many samples of a split; 0: on all
    decoding: dict[str, str] = field(default_factory=dict)  # KEY VALUE ...: do_sample, temperature, num_beams ...
    keep_best: str | None = None  # a metric: best/ keeps the model that is best by it on val, if better than the start
    save_every: PositiveInt = 500  # iterations between checkpoints
    run_dir: str | None = None  # the folder of this run; default runs/{task}__{script}__{seed}__{time}
    resume: bool = False  # go on from the checkpoint in --run-dir with its settings, or start there if it has none
    track: bool = False  # send metrics to wandb too (WANDB_MODE=offline, WANDB_PROJECT as ever)

    # --- the machine
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1  # of everything that is drawn: a scratch model, pairs, tokens
    micro_batch_size: PositiveInt = 16  # sequences a pass: memory (8 bytes x tokens x vocabulary of each), not results
    sample_batch_size: PositiveInt = 32  # sequences decoded at once by one process in evaluation; likewise
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 autocasts the passes, but for heads and losses
    gradient_checkpointing: bool = False  # keep a layer's input alone, and compute the rest again for its gradient
    fsdp: bool = False  # shard model and optimizer over torchrun's processes, for models beyond one GPU (FSDP2)

    # --- `--model scratch`: a small T5 or GPT-2, and a byte-level BPE of the task's own texts
    scratch_vocab_size: Annotated[int, Field(ge=260)] = 1000  # tokens at most (the 256 bytes included)
    scratch_width: PositiveInt = 128  # width of the residual stream; the feed-forward is 4 times as wide
    scratch_layers: PositiveInt = 2  # layers; of a T5 in the encoder and in the decoder each
    scratch_heads: PositiveInt = 4  # attention heads; must divide the width


def main():
    # ------------------------------------------------------- set-up: what is wrong is said before a model is loaded
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter gets its number
    signals = note_signals()
    policy_type = datapools.typed(sys.argv[1:], "--policy-type", Args.policy_type)
    args, record = parse_args(sys.argv[1:], policy_type)
    task, device = datapools.get_task(args.task), local_device()
    train, val, test = datapools.load_splits(args.task, args.data, args.task_kwargs, args.chat)
    # a new model's tokenizer is made by one process for all; else metrics start their workers before they join
    start, joined = args, None
    if args.model == "scratch":
        joined, folder = join_processes(device), tempfile.TemporaryDirectory(prefix="scratch_")
        make_scratch_model(args, train, folder.name)
        start = replace(args, model=folder.name)
    config = datapools.language_model_config(start)
    seq2seq = config.is_encoder_decoder
    args.policy_type = "seq2seq" if seq2seq else "causal"
    tokenizer = datapools.load_tokenizer(start.model, args.languages)
    lengths = datapools.describe_lengths(tokenizer, train, args.prompt_length, args.response_length)
    making = dict(tokenizer=tokenizer, device=str(device), separator=" " if seq2seq else "")
    metrics = make_metrics(args.metrics, args.metric_kwargs, task.metric_kwargs, [*val[:500], *test[:500]], **making)
    decoding = datapools.decoding_options(task, args.decoding)
    policy = load_policy(start, config, tokenizer, decoding)
    pairs = Pairs(train)
    if len(pairs) == 0:
        raise UsageError(f"--task {args.task}: its training samples have no references to learn from")
    start_weights = checksum(policy)
    if record.get("start_weights", start_weights) != start_weights:
        raise UsageError(f"--model {args.model}: has changed since this run began; --resume needs it as it was")
    rank, world_size = joined or join_processes(device)
    wandb_id = record.get("wandb_id", os.urandom(4).hex())
    record = dict(script=Path(__file__).stem, start_weights=start_weights, wandb_id=wandb_id, world_size=world_size)
    run_dir = open_run_dir(args, record, rank)
    checkpoint = load_checkpoint(run_dir, rank) if args.resume else {}
    # B sequences of a batch in this process, Q prompt tokens, T response tokens, V vocabulary
    val, test = val[: args.eval_samples or None], test[: args.eval_samples or None]
    pad_id, eos = policy.generation_config.pad_token_id, torch.tensor(policy.generation_config.eos_token_id).to(device)
    eos_id = eos[0].item() if tokenizer.eos_token_id is None else tokenizer.eos_token_id  # of several, the tokenizer's
    behaviour = dict(temperature=1.0, min_response_length=args.min_response_length, eos=eos)
    behaviour |= dict(forced_bos=policy.generation_config.forced_bos_token_id)
    autocast = dict(device_type=device.type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")
    num_iterations = args.num_epochs * math.ceil(len(pairs) / args.batch_size)
    iteration = checkpoint.get("iteration", 0)
    if checkpoint:
        policy.load_state_dict(checkpoint["policy"])
    prepare_model(policy, device, args.fsdp, args.gradient_checkpointing)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=args.learning_rate, fused=True)
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"])
    # a loss that saw the answer, as of BERT, is not that of sampling either; there are no values to compare
    queries, query_mask = datapools.trial_prompts(tokenizer, train, args, pad_id, device, seq2seq)
    check_fit(policy, lambda mb: mb.responses * 0.0, queries, query_mask, behaviour, pad_id, args)
    announce(run_dir, policy, f"{len(pairs):,} training pairs; {lengths}", device, args, record, rank)
    evaluation = (policy, tokenizer, metrics, decoding, behaviour, args, device, run_dir)
    if iteration == 0:
        evaluate("val", val, 0, *evaluation)
        evaluate("test", test, 0, *evaluation)
    else:
        # a kill may have come between a checkpoint and its model
        save_model(run_dir, policy, tokenizer, rank, rank == 0 and is_best(run_dir, args.keep_best, iteration))

    progress = tqdm(total=num_iterations, initial=iteration, disable=rank > 0 or None)
    while iteration < num_iterations:
        iteration += 1
        started = seconds(device)
        left = 1 - (iteration - 1) / num_iterations if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = args.learning_rate * left

        # 1. a batch; this process has the pairs rank, rank + world_size, ... of it
        positions = [(iteration - 1) * args.batch_size + i for i in range(rank, args.batch_size, world_size)]
        samples, references = pairs.take(datapools.prompt_order(positions, len(pairs), args.seed))
        _, queries, query_mask = datapools.encode_batch(tokenizer, samples, args, pad_id, device, seq2seq)  # (B, Q)
        targets = encode_references(tokenizer, references, args.response_length, seq2seq, eos_id, args.languages)
        responses, mask = datapools.pad(targets, pad_id, device)  # (B, T)
        batch = dict(queries=queries, query_mask=query_mask, responses=responses, mask=mask)

        # 2. loss and update: a mean over the tokens of the whole batch, whose parts and processes are added up
        num_tokens, nll = total(mask.sum()), torch.zeros((), dtype=torch.float64, device=device)
        for _, mb in micro_batches(batch, args.micro_batch_size):
            with torch.autocast(**autocast):
                logits = response_logits(policy, mb).float()  # (b, T, V)
            loss = -(token_logprobs(logits, mb.responses) * mb.mask).sum() / num_tokens  # not of padding
            loss.backward()
            nll += loss.detach()
        grad_norm = sum_and_clip_gradients(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        # 3. log: every figure is over all processes
        ended = seconds(device)
        row = {
            "iteration": iteration,
            "losses/nll": total(nll),
            "losses/grad_norm": grad_norm.item(),
            "losses/learning_rate": optimizer.param_groups[0]["lr"],
            "time/iteration_seconds": ended - started,
            "time/tokens_per_second": num_tokens / (ended - started),
        }
        log_row(row, run_dir, progress, args, rank)

        # 4. evaluate, save
        done, stopping = iteration == num_iterations, total(bool(signals)) > 0
        if done or iteration % args.eval_every == 0:
            evaluate("val", val, iteration, *evaluation)
        if done:
            evaluate("test", test, iteration, *evaluation)
        best = total(rank == 0 and is_best(run_dir, args.keep_best, iteration)) > 0
        if done or stopping or best or iteration % args.save_every == 0:
            state = dict(policy=policy.state_dict(), iteration=iteration, optimizer=optimizer.state_dict())
            save_checkpoint(run_dir, gathered(state, rank), rank)
            save_model(run_dir, policy, tokenizer, rank, best)
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


# ------------------------------------------------------------------------------------------------ maximum likelihood
class Pairs:
    """(prompt, reference) of every reference of a split, each read when it is asked for; numbers alone are kept."""

    def __init__(self, samples):
        self.samples = samples
        counts = np.fromiter((len(sample.references) for sample in samples), np.int64, len(samples))
        self.sample_of = np.repeat(np.arange(len(samples)), counts)
        self.first = counts.cumsum() - counts

    def __len__(self):
        return len(self.sample_of)

    def take(self, indices):
        """Samples, and a reference of each; of one that begins with its prompt (IMDB's) what follows it."""
        owners = self.sample_of[indices]
        samples, numbers = self.samples.take(owners), np.asarray(indices) - self.first[owners]
        references = [sample.references[number] for sample, number in zip(samples, numbers, strict=True)]
        beginnings = [sample.prompt if isinstance(sample.prompt, str) else "" for sample in samples]
        return samples, [r.removeprefix(beginning) for r, beginning in zip(references, beginnings, strict=True)]


def encode_references(tokenizer, texts, max_length, seq2seq, eos_id, languages):
    """Token ids of each response: EOS where it ends, none where it is cut; in between as the decoder was trained, which
    may read <s> first (BART), or the target language."""
    plain = not seq2seq or languages
    before = [datapools.language_id(tokenizer, languages[1])] if seq2seq and languages else []
    rows = tokenizer(text_target=list(texts), add_special_tokens=not plain, verbose=False).input_ids
    rows = [[*before, *(row[:-1] if row and row[-1] == eos_id else row), eos_id] for row in rows]
    return [row[:max_length] for row in rows]


def make_scratch_model(args, samples, folder):
    """Fills this process's folder with a small T5 or GPT-2 of random weights and its tokenizer, which rank 0 makes for
    all; the same seed and texts give the same."""
    files, folder = [None], Path(folder)
    if int(os.environ.get("RANK", 0)) == 0:
        trained = train_tokenizer(samples, args.scratch_vocab_size, args.policy_type == "seq2seq")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="<pad>", eos_token="</s>")
        torch.manual_seed(args.seed)
        tokens = dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
        if args.policy_type == "seq2seq":
            sizes = dict(d_model=args.scratch_width, num_layers=args.scratch_layers, num_heads=args.scratch_heads)
            sizes |= dict(d_kv=args.scratch_width // args.scratch_heads, d_ff=4 * args.scratch_width)
            config = transformers.T5Config(**tokens, **sizes, decoder_start_token_id=0)
            model = transformers.T5ForConditionalGeneration(config)
        else:
            sizes = dict(n_embd=args.scratch_width, n_layer=args.scratch_layers, n_head=args.scratch_heads)
            positions = args.prompt_length + args.response_length
            config = transformers.GPT2Config(**tokens, **sizes, n_positions=positions, bos_token_id=1)
            model = transformers.GPT2LMHeadModel(config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        files = [{file.name: file.read_bytes() for file in folder.iterdir()}]
    if dist.is_initialized():
        dist.broadcast_object_list(files)
    for name, content in files[0].items():
        (folder / name).write_bytes(content)


def train_tokenizer(samples, vocab_size, ends_with_eos):
    """A byte-level BPE (as GPT-2's) of the texts of at most 20,000 samples, evenly spread; the same for the same."""
    places = np.unique(np.linspace(0, len(samples) - 1, 20_000).astype(int)).tolist()

    def texts():
        for start in range(0, len(places), 256):
            for sample in samples.take(places[start : start + 256]):
                yield sample.prompt if isinstance(sample.prompt, str) else json.dumps(sample.prompt, ensure_ascii=False)
                yield from sample.references

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    options = dict(special_tokens=["<pad>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options)
    tokenizer.train_from_iterator(texts(), trainer)
    if ends_with_eos:  # T5's encoder input ends with EOS
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


# ------------------------------------------------------------------------------------------------ the policy
def load_policy(args, config, tokenizer, decoding):
    """The policy, with the generation config that evaluation decodes by; without dropout, log-probs are a function of
    the weights."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    policy = datapools.load_weights(auto_class, "--model", args.model)
    pad_id, embeddings = tokenizer.pad_token_id, policy.get_input_embeddings().weight.shape[0]
    eos = datapools.eos_ids(tokenizer, policy.generation_config, embeddings)
    # any padding token will do, since masks come from lengths, as long as it has an embedding
    pad_id = eos[0] if pad_id is None or pad_id >= embeddings else pad_id
    # of the folder's own generation config nothing stays: decoding is what the task and the flags say
    lengths = dict(min_new_tokens=args.min_response_length or None, max_new_tokens=args.response_length)
    tokens = dict(eos_token_id=eos, pad_token_id=pad_id, bos_token_id=tokenizer.bos_token_id)
    if config.is_encoder_decoder:
        tokens |= dict(decoder_start_token_id=decoder_start(policy.config, policy.generation_config))
        tokens |= dict(forced_bos_token_id=args.languages and datapools.language_id(tokenizer, args.languages[1]))
        policy.config.decoder_start_token_id = tokens["decoder_start_token_id"]
    policy.generation_config = GenerationConfig(**tokens, **lengths, **decoding)
    return policy


def decoder_start(config, generation_config):
    """The id that the decoder reads first: the config's, or BOS where it names none (T5Gemma)."""
    places = (config, generation_config, config.get_text_config(decoder=True))
    ids = [getattr(place, f"{name}_token_id", None) for name in ("decoder_start", "bos") for place in places]
    if all(token_id is None for token_id in ids):
        raise UsageError("--model: its config.json needs a decoder_start_token_id, the id that the decoder reads first")
    return next(token_id for token_id in ids if token_id is not None)


def prompt_and_response(query_mask, length):
    """mask and position_ids (B, Q + length): a prompt starts at position 0, however much padding is before it."""
    mask = F.pad(query_mask, (0, length), value=True).long()
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


def response_pass(model, mb, **options):
    """One teacher-forced pass of a language model or backbone over prompts and responses."""
    if model.config.is_encoder_decoder:
        start = torch.full_like(mb.responses[:, :1], model.config.decoder_start_token_id)
        inputs = dict(input_ids=mb.queries, attention_mask=mb.query_mask.long())
        inputs |= dict(decoder_input_ids=torch.cat([start, mb.responses[:, :-1]], 1))
        inputs |= dict(decoder_attention_mask=torch.ones_like(mb.responses))  # or T5Gemma masks ids that are padding's
        return forward(model, **inputs, use_cache=False, **options)
    mask, position_ids = prompt_and_response(mb.query_mask, mb.responses.shape[1] - 1)
    input_ids = torch.cat([mb.queries, mb.responses[:, :-1]], 1)
    inputs = dict(input_ids=input_ids, attention_mask=mask, position_ids=position_ids) | options
    return forward(model, **inputs, use_cache=False)


def response_logits(policy, mb, **options):
    """Logits (B, T, V) of all response tokens in one pass, and of no prompt token."""
    logits = response_pass(policy, mb, logits_to_keep=mb.responses.shape[1], **options).logits
    return logits[:, logits.shape[1] - mb.responses.shape[1] :]  # of all, from 0: a slice's gradient is a copy


def forward(model, **inputs):
    """The model's outputs; of the inputs it is given those that it takes (BLOOM and MPT find positions themselves)."""
    names = signature(type(model).forward).parameters
    return model(**{name: value for name, value in inputs.items() if name in names or "kwargs" in names})


def behaviour_logits(logits, first_position, temperature, min_response_length, eos, forced_bos=None):
    """Logits of the distribution that is sampled, and therefore scored: tempered, EOS banned while it is too early, and
    the first token given where a translation model wants its target language.

    logits (B, n, V) at the response positions first_position .. first_position + n, in any dtype -> float32.
    """
    logits = logits.float() if temperature == 1.0 else logits.float() / temperature
    if first_position < min_response_length:
        logits[:, : min_response_length - first_position, eos] = -math.inf  # in place: a copy would be (B, n, V)
    if first_position == 0 and forced_bos is not None:
        logits[:, 0, torch.arange(logits.shape[-1]) != forced_bos] = -math.inf
    return logits


def token_logprobs(logits, responses):
    """log pi(a_t | s_t) of the sampled tokens: logits (B, T, V), responses (B, T) -> (B, T)."""
    # one sequence at a time, as whose gradients come, what they were made of goes
    return torch.stack([-F.cross_entropy(*row, reduction="none") for row in zip(logits, responses, strict=True)])


def micro_batches(batch, size):
    """Cuts a batch {name: (B, ...)} into parts of `size` rows of like lengths, each to its longest prompt and response.

    Yields the rows (size,) and their tensors as a namespace.
    """
    query_mask, lengths = batch["query_mask"].cpu(), batch["mask"].sum(1).cpu()  # asked once for all parts
    for rows in lengths.argsort().split(size):
        columns = query_mask[rows].any(0).nonzero()  # (Q', 1): a prompt's padding is before it or behind it
        prompts, responses = slice(columns[0, 0], columns[-1, 0] + 1), slice(lengths[rows].max())
        cuts = {"queries": prompts, "query_mask": prompts}
        yield rows, SimpleNamespace(**{name: x[rows][:, cuts.get(name, responses)] for name, x in batch.items()})


# ------------------------------------------------------------------------------------------------ sampling
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


@torch.no_grad()
def sample_responses(policy, queries, query_mask, uniform, behaviour, pad_id, warpers=()):
    """Samples with a KV cache, one forward pass per token, until every row has ended; uniform (B, T) fixes the draws.

    Returns responses, padded behind EOS; mask; and sampler_logprobs of the drawn tokens: (B, T) each, 0 on padding.
    """
    responses = torch.full(uniform.shape, pad_id, device=queries.device)
    mask = torch.zeros_like(responses, dtype=torch.bool)
    logprobs = torch.zeros(uniform.shape, device=queries.device)
    running = torch.ones_like(mask[:, 0])  # (B,)
    state, inputs = start_decoding(policy, queries, query_mask, uniform.shape[1])
    ask_every = 16 if queries.is_cuda else 1  # asking a GPU whether all rows have ended waits for it
    for t in range(uniform.shape[1]):
        logits = behaviour_logits(decode_step(policy, state, inputs), t, **behaviour).squeeze(1)  # (B, V)
        logits = LogitsProcessorList(warpers)(None, logits)
        tokens = draw(logits, uniform[:, t])
        mask[:, t] = running
        responses[:, t] = tokens.where(running, pad_id)
        logprobs[:, t] = token_logprobs(logits.unsqueeze(0), tokens.unsqueeze(0)).squeeze(0) * running
        inputs = responses[:, t : t + 1]
        running = running & ~torch.isin(tokens, behaviour["eos"])
        if (t + 1) % ask_every == 0:
            # the holders of a sharded policy take every step together, as each needs all parts
            if not (total(running.sum()) if isinstance(policy, FSDPModule) else running.any()):
                break
    return responses, mask, logprobs


class FixedCache(StaticCache):
    """Keys and values of a fixed size: what grows is copied at every token. Both are of one dtype, that of the values:
    under autocast rotary positions leave keys in float32, which attention would round as it does the values."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


def start_decoding(policy, queries, query_mask, length):
    """What decode_step needs for up to `length` tokens, and its first input: the start token, or the prompts."""
    if policy.config.is_encoder_decoder:
        start = torch.full_like(queries[:, :1], policy.config.decoder_start_token_id)
        return dict(input_ids=queries, attention_mask=query_mask.long(), past_key_values=None), start
    mask, position_ids = prompt_and_response(query_mask, length)
    static = policy._can_compile_fullgraph and not policy._is_stateful  # what can have a FixedCache
    cache = dict(past_key_values=FixedCache(policy.config, max_cache_len=mask.shape[1])) if static else {}
    return dict(mask=mask, position_ids=position_ids, cache=cache, static=static, seen=0), queries


def decode_step(policy, state, inputs):
    """Logits (B, 1, V) of the next response token; inputs (B, n) are the tokens that the cache has not seen."""
    if policy.config.is_encoder_decoder:
        outputs = forward(policy, decoder_input_ids=inputs, use_cache=True, **state)
        state.pop("input_ids", None)  # the encoder runs once
        encoded = BaseModelOutput(last_hidden_state=outputs.encoder_last_hidden_state)
        state |= dict(encoder_outputs=encoded, past_key_values=outputs.get("past_key_values"))
        return outputs.logits[:, -1:]
    seen, now = state["seen"], state["seen"] + inputs.shape[1]
    recurrent = seen and "past_key_values" not in state["cache"]  # Mamba and RWKV read the mask of what is new
    columns = slice(None) if state["static"] else slice(seen if recurrent else 0, now)
    read = dict(attention_mask=state["mask"][:, columns], position_ids=state["position_ids"][:, seen:now])
    outputs = forward(policy, input_ids=inputs, **read, **state["cache"], use_cache=True, logits_to_keep=1)
    names = ("past_key_values", "cache_params", "state")
    state |= dict(cache={name: outputs[name] for name in names if outputs.get(name) is not None}, seen=now)
    return outputs.logits[:, -1:]


def check_fit(policy, value_model, queries, query_mask, behaviour, pad_id, args):
    """UsageError unless sampling with a cache, one pass, and one pass of each row alone give the same, tried on a few
    prompts (B, Q): a model whose cache, positions or attention do not fit is refused by what it does, not by name."""
    critic = f" with --value-model {args.value_model}" if getattr(args, "value_model", None) else ""
    kind = f"--model {args.model}{critic}: {policy.config.model_type} does not fit this script"
    uniform = torch.full((len(queries), 4), 0.5, device=queries.device)
    try:
        with torch.no_grad():
            responses, mask, sampled = sample_responses(policy, queries, query_mask, uniform, behaviour, pad_id)
            batch = dict(queries=queries, query_mask=query_mask, responses=responses, mask=mask)
            figures = torch.zeros(2, *mask.shape, 2, device=mask.device)
            own = {} if policy.config.is_encoder_decoder else dict(position_ids=None)  # those the model itself finds
            for where, size, options in ((0, len(mask), {}), (1, 1, own)):  # all rows in one pass, and each alone
                for rows, mb in micro_batches(batch, size):
                    logits = behaviour_logits(response_logits(policy, mb, **options), 0, **behaviour)
                    part = torch.stack([token_logprobs(logits, mb.responses), value_model(mb)], -1)
                    figures[where, rows, : part.shape[1]] = part
            beam_search(policy, queries, query_mask, max_new_tokens=2, min_new_tokens=None)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{kind}: {type(error).__name__}: {error}") from None
    together, alone = figures[:, mask]  # (tokens, 2) each: log-probs and values
    errors = (sampled[mask] - together[:, 0]).abs().max(), (alone - together).abs().max()
    if not max(errors) <= 1e-3:
        raise UsageError(
            f"{kind}: log-probs of sampling with a cache and of one pass differ by {errors[0]:.2g} nats, those of a "
            f"padded row and of the row alone, or the values, by {errors[1]:.2g}; rounding gives less than 0.001"
        )


# ------------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def decode_split(policy, tokenizer, samples, decoding, behaviour, args, device):
    """The responses to all samples, of which each process decodes its share."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    seq2seq = policy.config.is_encoder_decoder
    rounds = math.ceil(len(samples) / world_size)  # equal for all: the last may come to a sample that another has too
    own, texts = torch.arange(rank, rounds * world_size, world_size) % len(samples), []
    pad_id, eos = policy.generation_config.pad_token_id, behaviour["eos"]
    for indices in tqdm(own.split(args.sample_batch_size), "evaluation", leave=False, disable=rank > 0 or None):
        shown = samples.take(indices)
        prompt_ids, queries, query_mask = datapools.encode_batch(tokenizer, shown, args, pad_id, device, seq2seq)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            if decoding.get("do_sample"):
                # every evaluation draws the same numbers, so that two policies do not differ by luck
                uniform = uniforms(args.seed, EVALUATION_STREAM, indices, args.response_length).to(device)
                behaviour = behaviour | dict(temperature=decoding.get("temperature", 1.0))
                warpers = [TopKLogitsWarper(decoding["top_k"])] if decoding.get("top_k") else []
                warpers += [TopPLogitsWarper(decoding["top_p"])] if decoding.get("top_p") else []
                responses, *_ = sample_responses(policy, queries, query_mask, uniform, behaviour, pad_id, warpers)
            else:
                responses = beam_search(policy, queries, query_mask)
        texts += datapools.decode_responses(tokenizer, prompt_ids, datapools.until_eos(responses, eos), seq2seq)
    parts = [texts] * world_size
    if dist.is_initialized():
        dist.all_gather_object(parts, texts)  # sample i is of process i % world_size
    return [text for turn in zip(*parts, strict=True) for text in turn][: len(samples)]


def beam_search(policy, queries, query_mask, **options):
    """The responses (B, <=T) that transformers' own search finds, as the policy's generation config says."""
    sharded = isinstance(policy, FSDPModule)
    if sharded:
        policy.unshard()  # its embeddings, as generate calls parts of the model by themselves
    output = policy.generate(input_ids=queries, attention_mask=query_mask.long(), synced_gpus=sharded, **options)
    return output[:, 1 if policy.config.is_encoder_decoder else queries.shape[1] :]  # without start token or prompt


def evaluate(split, samples, iteration, policy, tokenizer, metrics, decoding, behaviour, args, device, run_dir):
    """Decodes a split, measures, and leaves eval.jsonl, predictions/{split}_{iteration}.jsonl and a table."""
    generations = decode_split(policy, tokenizer, samples, decoding, behaviour, args, device)
    figures, predictions = measure(metrics, samples, generations, policy, tokenizer)
    if args.keep_best not in (None, *figures):
        raise UsageError(f"--keep-best {args.keep_best}: not measured; --metrics gives {', '.join(figures)}")
    if int(os.environ.get("RANK", 0)) > 0:
        return
    (run_dir / "predictions").mkdir(exist_ok=True)
    lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions]
    (run_dir / "predictions" / f"{split}_{iteration}.jsonl").write_text("".join(lines), encoding="utf-8")
    write_row(run_dir / "eval.jsonl", {"iteration": iteration, "split": split} | figures, args, prefix=f"eval/{split}/")
    tqdm.write(f"--- {split} after {iteration} iterations: {len(samples)} samples")
    for name, value in figures.items():
        tqdm.write(f"    {name:<32} {value if value is None else round(value, 4)}")
    for prediction in predictions[:2]:
        tqdm.write("\n".join(f"    {name:<12} {value!r:.200}" for name, value in list(prediction.items())[1:]))


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
        (args.min_response_length > args.response_length, f"--min-response-length {args.min_response_length}: at most "
            f"--response-length {args.response_length}"),
        (args.scratch_width % args.scratch_heads, f"--scratch-heads {args.scratch_heads}: must divide --scratch-width "
            f"{args.scratch_width}"),
        (args.fsdp and "WORLD_SIZE" not in os.environ, "--fsdp: shards over processes; start the script by torchrun"),
        (args.fsdp and "perplexity" in args.metrics, "--metrics perplexity: needs the whole model; not with --fsdp"),
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
