"""GRPO, Dr. GRPO and RLOO for language models, encoder-decoder and decoder-only, in one file.

A response is an episode: the prompt is the observation, every token an action, the episode ends with EOS. Each
iteration samples `--group-size` responses to each of its prompts, scores the texts, and takes a penalty kl_coef * (log
pi - log pi_ref) of every token from the score. There is no critic: what is to be expected of a prompt is what the other
responses of its group got, and how much better a response is than that is the advantage of each of its tokens. Clipped
policy-gradient steps on whole groups follow, as in PPO; kl_coef adapts so that the KL stays near a target.

    GRPO      Shao et al. 2024, https://arxiv.org/abs/2402.03300: less the group's mean, over its deviation
    Dr. GRPO  Liu et al. 2025, https://arxiv.org/abs/2503.20783: less the group's mean
    RLOO      Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740: less the mean of the others
    for LMs   Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; RL4LMs, Ramamurthy et al. 2022,
              https://arxiv.org/abs/2210.01241, whose tasks, rewards, settings and KL controller these are

On a laptop without a network, and on four GPUs:

    python supervised.py --task numbers --run-dir runs/sft
    python grpo.py --task numbers --model runs/sft/model

    torchrun --nproc_per_node 4 grpo.py --task cnn_dm --reward rouge1 --model t5-base --dtype bfloat16

Unlike the papers: the KL penalty is a part of the reward (`--kl-in-loss` puts it into the loss, as GRPO has it); the
loss is a mean over the tokens of a minibatch, so that no response counts less for being long; rollouts do not depend on
the number of processes (but for float32 rounding, which training amplifies), and a resumed run goes on to the bit.
Left out on purpose: dropout, learning-rate warm-up, LoRA, an inference engine for sampling, rewards of single steps.
"""

import concurrent.futures
import copy
import fcntl
import functools
import inspect
import json
import math
import os
import shutil
import signal
import sys
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
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, StaticCache
from transformers.generation import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper
from transformers.modeling_outputs import BaseModelOutput

import datapools
from datapools import UsageError
from rewards import is_best, make_metrics, make_rewards, measure, score_texts

# RL4LMs has no GRPO. The KL columns are those of its PPO; a batch has 8 prompts or more in groups of 8; learning rates
# are PPO's here times 2, since minibatches of 32 sequences are four times as large. `numbers` and `dates` are set for
# the small model of supervised.py. Where a row ends early, Args goes on.
TASK_COLUMNS = "batch_size num_minibatches update_epochs num_iterations learning_rate kl_coef target_kl".split()
TASK_COLUMNS += ["clip_coef_high"]
TASK_DEFAULTS = {
    "numbers dates":                          (64, 4, 2, 40, 1e-3, 0.001, 2.0, 0.4),
    "imdb imdb_seq2seq":                      (64, 2, 5, 50, 5e-6, 0.1, 0.1),
    "commongen":                              (128, 4, 5, 200, 6e-6, 0.001, 2.0),
    "cnn_dm xsum":                            (64, 2, 5, 100, 1.4e-5, 0.001, 0.2),
    "totto":                                  (64, 2, 5, 100, 1e-5, 0.001, 2.0),
    "narrative_qa":                           (64, 2, 5, 100, 1e-5, 0.001, 1.0),
    "wmt16 wmt14_en_de wmt16_news iwslt2017": (64, 2, 5, 50, 8e-6, 0.001, 0.2),
    "crd3 daily_dialog":                      (64, 2, 5, 50, 4e-6, 0.2, 0.5),
}  # fmt: skip
UPDATE_FIGURES = ("losses/policy", "losses/approx_kl", "losses/clipfrac", "losses/ratio")
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
    policy_type: Literal["seq2seq", "causal"] = "seq2seq"  # which default model; another tells by itself
    model: str = "t5-base"  # the policy to start from: a hub name, or a folder of `save_pretrained`
    reward: tuple[str, ...] = ("rouge1",)  # one or more rewards of rewards.py, or path/to/file.py:function
    reward_weights: tuple[float, ...] | None = None  # a weight for each reward; default: the task's, else 1 each
    reward_kwargs: dict[str, str] = field(default_factory=dict)  # KEY VALUE ...; NAME.KEY addresses one of several
    metrics: tuple[str, ...] = ("rouge",)  # metrics or rewards of rewards.py, evaluate:NAME, path/to/file.py:function
    metric_kwargs: dict[str, str] = field(default_factory=dict)  # options of the metrics, as --reward-kwargs
    data: str | None = None  # a folder with {train,validation,test}.jsonl in the hub's columns, read instead of the hub
    task_kwargs: dict[str, str] = field(default_factory=dict)  # options of the task's loader as KEY VALUE ...
    chat: bool = False  # prompts go through the tokenizer's chat template, as the user's message
    prompt_length: PositiveInt = 512  # prompt tokens at most
    languages: tuple[str, str] | None = None  # source and target as the tokenizer names them (mBART: en_XX de_DE)
    truncation_side: Literal["left", "right"] = "left"  # the end of a longer prompt that is cut off
    response_length: PositiveInt = 100  # response tokens at most
    min_response_length: NonNegativeInt = 0  # no EOS before this many tokens, in training and in evaluation

    # --- GRPO
    num_iterations: NonNegativeInt = 100  # iterations of sampling and updating; 0: evaluate the model, and end
    batch_size: PositiveInt = 64  # sequences per iteration over all processes
    group_size: Annotated[int, Field(ge=2)] = 8  # responses to each of batch_size / group_size prompts
    baseline: Literal["grpo", "dr_grpo", "rloo"] = "grpo"  # what the advantage is of, see group_advantages
    num_minibatches: PositiveInt = 8  # optimizer steps per epoch, on batch_size / num_minibatches sequences each
    update_epochs: PositiveInt = 5  # passes over each batch (RL4LMs: 5)
    learning_rate: PositiveFloat = 2e-6  # Adam's
    anneal_lr: bool = False  # let the learning rate fall linearly to 0 over the run (RL4LMs: constant)
    clip_coef: PositiveFloat = 0.2  # the ratio is clipped to 1 +- this (RL4LMs: 0.2)
    clip_coef_high: PositiveFloat | None = None  # its upper side to 1 + this (DAPO, https://arxiv.org/abs/2503.14476)
    ent_coef: NonNegativeFloat = 0.0  # weight of the entropy bonus, in nats (RL4LMs: 0)
    max_grad_norm: PositiveFloat = 0.5  # gradients are scaled to at most this norm
    early_stop_kl: PositiveFloat | None = None  # end the epochs at 1.5 times this approximate KL, in nats per token
    kl_in_loss: bool = False  # the penalty is kl_coef * k3 of the new policy in the loss, not a part of the reward
    kl_coef: NonNegativeFloat = 0.001  # weight of the KL penalty against the start model, at first
    target_kl: PositiveFloat | None = 0.2  # the controller steers the mean KL to this, in nats per token; None: off
    eos_penalty: float | None = None  # the score of a response without EOS (None: that of its text)
    temperature: PositiveFloat = 1.0  # of the rollouts, part of the policy that is scored
    top_k: NonNegativeInt = 0  # sample rollouts among the k likeliest; biased, the log-probs do not see it; 0: off

    # --- evaluation, checkpoints, logs
    eval_every: PositiveInt = 10  # iterations between evaluations on val (val and test also before and after training)
    eval_samples: NonNegativeInt = 1000  # evaluate on the first so many samples of a split; 0: on all
    decoding: dict[str, str] = field(default_factory=dict)  # KEY VALUE ...: do_sample, temperature, num_beams ...
    keep_best: str | None = None  # a metric: best/ keeps the model that is best by it on val, if better than the start
    save_every: PositiveInt = 10  # iterations between checkpoints
    run_dir: str | None = None  # the folder of this run; default runs/{task}__{script}__{seed}__{time}
    resume: bool = False  # go on from the checkpoint in --run-dir with its settings, or start there if it has none
    track: bool = False  # send metrics to wandb too (WANDB_MODE=offline, WANDB_PROJECT as ever)

    # --- the machine
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1  # of everything that is drawn: prompts, tokens, minibatches
    micro_batch_size: PositiveInt = 16  # sequences a pass: memory (8 bytes x tokens x vocabulary of each), not results
    sample_batch_size: PositiveInt = 32  # sequences sampled at once by one process; likewise
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 autocasts the passes, but for heads and losses
    gradient_checkpointing: bool = False  # keep a layer's input alone, and compute the rest again for its gradient
    fsdp: bool = False  # shard models and optimizer over torchrun's processes, for models beyond one GPU (FSDP2)


def main():
    # ------------------------------------------------------- set-up: what is wrong is said before a model is loaded
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter gets its number
    signals = note_signals()
    policy_type = datapools.typed(sys.argv[1:], "--policy-type", Args.policy_type)
    args, record = parse_args(sys.argv[1:], policy_type)
    task, device = datapools.get_task(args.task), local_device()
    train, val, test = datapools.load_splits(args.task, args.data, args.task_kwargs, args.chat)
    config = datapools.language_model_config(args)
    seq2seq = config.is_encoder_decoder
    args.policy_type = "seq2seq" if seq2seq else "causal"
    tokenizer = datapools.load_tokenizer(args.model, args.languages)
    lengths = datapools.describe_lengths(tokenizer, train, args.prompt_length, args.response_length)
    making = dict(tokenizer=tokenizer, device=str(device), separator=" " if seq2seq else "")
    reward_functions = make_rewards(args.reward, args.reward_kwargs, task.reward_kwargs, train, **making)
    metrics = make_metrics(args.metrics, args.metric_kwargs, task.metric_kwargs, [*val[:500], *test[:500]], **making)
    decoding = datapools.decoding_options(task, args.decoding)
    policy = load_policy(args, config, tokenizer, decoding)
    reference = copy.deepcopy(policy).requires_grad_(False)
    start_weights = checksum(policy)
    if record.get("start_weights", start_weights) != start_weights:
        raise UsageError(f"--model {args.model}: has changed since this run began; --resume needs it as it was")
    rank, world_size = join_processes(device)
    wandb_id = record.get("wandb_id", os.urandom(4).hex())
    record = dict(script=Path(__file__).stem, start_weights=start_weights, wandb_id=wandb_id, world_size=world_size)
    run_dir = open_run_dir(args, record, rank)
    checkpoint = load_checkpoint(run_dir, rank) if args.resume else {}
    # B sequences of an iteration in this process, Q prompt tokens, T response tokens, V vocabulary
    B, T = args.batch_size // world_size, args.response_length
    val, test = val[: args.eval_samples or None], test[: args.eval_samples or None]
    pad_id, eos = policy.generation_config.pad_token_id, torch.tensor(policy.generation_config.eos_token_id).to(device)
    behaviour = dict(temperature=args.temperature, min_response_length=args.min_response_length, eos=eos)
    behaviour |= dict(forced_bos=policy.generation_config.forced_bos_token_id)
    autocast = dict(device_type=device.type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")
    iteration = checkpoint.get("iteration", 0)
    kl_coef = checkpoint.get("kl_coef", {}).get(args.kl_coef, args.kl_coef)  # a changed --kl-coef begins anew
    if checkpoint:
        policy.load_state_dict(checkpoint["policy"])
    for model in (policy, reference):
        prepare_model(model, device, args.fsdp, args.gradient_checkpointing)
    # RL4LMs' AdamW decays weights by 1e-6 times the learning rate, which float32 rounds to nothing: this is the same
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.learning_rate, fused=True)
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"])
    queries, query_mask = datapools.trial_prompts(tokenizer, train, args, pad_id, device, seq2seq)
    check_fit(policy, lambda mb: mb.responses * 0.0, queries, query_mask, behaviour, pad_id, args)
    thread = concurrent.futures.ThreadPoolExecutor(1)
    announce(run_dir, policy, lengths, device, args, record, rank)
    evaluation = (policy, tokenizer, metrics, decoding, behaviour, args, device, run_dir)
    if iteration == 0:
        evaluate("val", val, 0, *evaluation)
        evaluate("test", test, 0, *evaluation)
    else:
        # a kill may have come between a checkpoint and its model
        save_model(run_dir, policy, tokenizer, rank, rank == 0 and is_best(run_dir, args.keep_best, iteration))

    progress = tqdm(total=args.num_iterations, initial=iteration, disable=rank > 0 or None)
    while iteration < args.num_iterations:
        iteration += 1
        started = seconds(device)
        left = 1 - (iteration - 1) / args.num_iterations if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = args.learning_rate * left

        # 1. sample responses; this process has the groups rank, rank + world_size, ... of the batch
        groups = range(rank, args.batch_size // args.group_size, world_size)
        own = [group * args.group_size + i for group in groups for i in range(args.group_size)]
        positions = [((iteration - 1) * args.batch_size + i) // args.group_size for i in own]
        samples = train.take(datapools.prompt_order(positions, len(train), args.seed))
        # lists of ids; the same padded, (B, Q); True where they are
        prompt_ids, queries, query_mask = datapools.encode_batch(tokenizer, samples, args, pad_id, device, seq2seq)
        uniform = uniforms(args.seed, iteration, own, T).to(device)  # (B, T)
        warpers = [TopKLogitsWarper(args.top_k)] if args.top_k else []
        with torch.autocast(**autocast):
            parts = [
                sample_responses(policy, queries[rows], query_mask[rows], uniform[rows], behaviour, pad_id, warpers)
                for rows in torch.arange(B).split(args.sample_batch_size)
            ]
        responses, mask, sampler_logprobs = map(torch.cat, zip(*parts, strict=True))  # (B, T); mask: EOS included
        token_ids = datapools.until_eos(responses, eos)  # the same as lists, without padding
        generations = datapools.decode_responses(tokenizer, prompt_ids, token_ids, seq2seq)
        finished = (torch.isin(responses, eos) & mask).any(1)  # (B,)
        batch = dict(queries=queries, query_mask=query_mask, responses=responses, mask=mask)
        sample_ended = seconds(device)

        # 2. score the texts, while a thread makes the passes of step 3
        passes = thread.submit(rollout_passes, policy, reference, batch, behaviour, autocast, args)
        scores, means = score_texts(reward_functions, args.reward_weights, samples, generations, token_ids, iteration)
        # a sample's score at its last token, or those of a reward of tokens at each
        scores = F.pad(scores, (0, T - scores.shape[1])).to(device)  # (B, T)
        if args.eos_penalty is not None:  # in place of the score of its text
            scores = torch.where(finished.unsqueeze(1), scores, F.one_hot(mask.sum(1) - 1, T) * args.eos_penalty)
        score_ended = seconds(device)

        # 3. log-probs under the policy and the reference, and entropy: one pass each
        logprobs, ref_logprobs, entropy = passes.result()  # (B, T) each, 0 on padding
        sampler_error = total(((sampler_logprobs - logprobs) * mask).abs().sum()) / total(mask.sum())
        if iteration == 1 and args.dtype == "float32" and not args.top_k and not sampler_error <= 1e-3:
            fail(f"{policy.config.model_type} is sampled and scored differently: the tokens' log-probs differ by "
                 f"{sampler_error:.2g} nats on average, and rounding gives less than 0.001", code=1)  # fmt: skip
        forward_ended = seconds(device)

        # 4. per-token rewards: the KL penalty at every token, the score at the last
        kl = logprobs - ref_logprobs  # (B, T)
        token_rewards = scores if args.kl_in_loss else scores - kl_coef * kl  # (B, T)

        # 5. advantages: those of the response, at each of its tokens
        advantages = group_advantages(token_rewards.sum(1), args.group_size, args.baseline)  # (B,)
        advantages = advantages.unsqueeze(1) * mask  # (B, T)

        # 6. update
        batch |= dict(logprobs=logprobs, ref_logprobs=ref_logprobs, advantages=advantages)
        update_sums = torch.zeros(len(UPDATE_FIGURES) + 1, dtype=torch.float64, device=device)  # the last: tokens
        grad_norms = []
        of_groups = replace(args, batch_size=args.batch_size // args.group_size)  # a group is never split
        for mb_groups in minibatch_rows(of_groups, iteration, rank, world_size):  # of all epochs
            mb_rows = torch.arange(B).view(-1, args.group_size)[mb_groups].flatten()
            minibatch = {name: tensor[mb_rows] for name, tensor in batch.items()}
            mb_tokens = all_reduce_sum(minibatch["mask"].sum())
            mb_kl = torch.zeros((), dtype=torch.float64, device=device)
            for _, mb in micro_batches(minibatch, args.micro_batch_size):
                with torch.autocast(**autocast):
                    logits = behaviour_logits(response_logits(policy, mb), 0, **behaviour).unbind()  # b of (T, V)
                new_logprobs = token_logprobs(logits, mb.responses)  # (b, T)
                log_ratio = (new_logprobs - mb.logprobs) * mb.mask
                ratio = log_ratio.exp()
                clipped = ratio.clamp(1 - args.clip_coef, 1 + (args.clip_coef_high or args.clip_coef))
                pg_loss = -torch.min(mb.advantages * ratio, mb.advantages * clipped)
                loss = pg_loss
                if args.kl_in_loss:
                    ref_ratio = (mb.ref_logprobs - new_logprobs) * mb.mask
                    loss = loss + kl_coef * (ref_ratio.exp() - 1 - ref_ratio)
                if args.ent_coef:
                    loss = loss - args.ent_coef * token_entropy(logits)
                del logits  # the gradient needs them no more
                # a mean over the tokens of the whole minibatch, whose parts and processes are added up
                ((loss * mb.mask).sum() / mb_tokens).backward()
                with torch.no_grad():
                    approx_kl = ratio - 1 - log_ratio  # k3 of http://joschu.net/blog/kl-approx.html
                    clipfrac = (ratio != clipped).float()
                    figures = torch.stack([pg_loss, approx_kl, clipfrac, ratio, mb.mask])  # UPDATE_FIGURES
                    update_sums += (figures * mb.mask).sum((1, 2))
                    mb_kl += (approx_kl * mb.mask).sum()
            if args.early_stop_kl and total(mb_kl) / mb_tokens > 1.5 * args.early_stop_kl:
                optimizer.zero_grad()  # before the step: its gradients are thrown away
                break
            grad_norms.append(sum_and_clip_gradients(policy, args.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()
        update_ended = seconds(device)

        # 7. KL controller, on the mean KL per token over all processes
        tokens, mean_kl, penalty = total(mask.sum()), total(kl.sum()) / total(mask.sum()), kl_coef
        if args.target_kl is not None:
            kl_coef = next_kl_coef(kl_coef, mean_kl, args.target_kl)

        # 8. log: every figure is over all processes, those of the update over all its minibatches
        score, sums = total(scores.sum()) / args.batch_size, all_reduce_sum(update_sums).tolist()
        lowest, highest = scores.sum(1).view(-1, args.group_size).aminmax(dim=1)  # of each group
        log_ended = seconds(device)
        row = {
            "iteration": iteration,
            "objective/score": score,
            "objective/kl": mean_kl,
            "objective/kl_coef": penalty,
            "objective/entropy": total(entropy.sum()) / tokens,
            "objective/rlhf_reward": score - penalty * mean_kl * tokens / args.batch_size,
            **{f"reward/{name}": total(mean * B) / args.batch_size for name, mean in means.items()},
            **dict(zip(UPDATE_FIGURES, (x / sums[-1] for x in sums[:-1]), strict=True)),
            "losses/grad_norm": torch.tensor(grad_norms).mean().item() if grad_norms else 0.0,
            "losses/optimizer_steps": len(grad_norms),
            "losses/learning_rate": optimizer.param_groups[0]["lr"],
            "rollout/response_length": tokens / args.batch_size,
            "rollout/eos_fraction": total(finished.sum()) / args.batch_size,
            "rollout/sampler_error": sampler_error,
            "rollout/equal_groups": total((lowest == highest).sum()) * args.group_size / args.batch_size,
            "time/sample_seconds": sample_ended - started,
            "time/score_seconds": score_ended - sample_ended,
            "time/forward_seconds": forward_ended - score_ended,  # waited for after the rewards
            "time/update_seconds": update_ended - forward_ended,
            "time/iteration_seconds": log_ended - started,
            "time/tokens_per_second": tokens / (log_ended - started),
        }
        log_row(row, run_dir, progress, args, rank)

        # 9. evaluate, save
        done, stopping = iteration == args.num_iterations, total(bool(signals)) > 0
        if done or iteration % args.eval_every == 0:
            evaluate("val", val, iteration, *evaluation)
        if done:
            evaluate("test", test, iteration, *evaluation)
        best = total(rank == 0 and is_best(run_dir, args.keep_best, iteration)) > 0
        if done or stopping or best or iteration % args.save_every == 0:
            state = dict(policy=policy.state_dict())
            state |= dict(iteration=iteration, kl_coef={args.kl_coef: kl_coef}, optimizer=optimizer.state_dict())
            save_checkpoint(run_dir, gathered(state, rank), rank)
            save_model(run_dir, policy, tokenizer, rank, best)
        if stopping:
            break
    progress.close()
    if rank == 0 and iteration:
        plot_curves(run_dir)
        go_on = f"; go on with --run-dir {run_dir} --resume" if iteration < args.num_iterations else ""
        print(f"{run_dir}: {iteration} of {args.num_iterations} iterations done{go_on}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 130 if signals and signals[0][0] == signal.SIGINT else 0


# ------------------------------------------------------------------------------------------------ GRPO
def group_advantages(rewards, group_size, baseline):
    """Advantages (B,) of responses whose groups stand behind each other, from their rewards (B,).

    grpo: what a response is above its group's mean, in deviations of the group; so much for an easy prompt, whose
    responses are nearly all right, as for one that divides them. dr_grpo: not divided. rloo: above the mean of the
    others, which has not seen the response and leaves the gradient unbiased; G / (G - 1) times dr_grpo.
    """
    rewards = rewards.double().view(-1, group_size)  # in float32, equal rewards would have a deviation by rounding
    above_mean = rewards - rewards.mean(1, keepdim=True)
    if baseline == "grpo":
        above_mean = above_mean / (rewards.std(1, keepdim=True) + 1e-4)  # of equal rewards 0
    if baseline == "rloo":
        above_mean = above_mean * group_size / (group_size - 1)
    return above_mean.flatten().float()


def next_kl_coef(kl_coef, kl, target_kl):
    """RL4LMs' controller, after Ziegler et al. 2019: proportional, at most 2% a step."""
    return kl_coef * (1 + 0.1 * float(np.clip((kl - target_kl) / target_kl, -0.2, 0.2)))


def minibatch_rows(args, iteration, rank, world_size):
    """Yields, epoch by epoch, the rows of this process' rollout in each minibatch: (minibatch_size / world_size,).

    The batch is seen as num_minibatches x minibatch_size, sample i at row i // minibatch_size, and each column is
    shuffled on its own. Process `rank` holds the columns rank, rank + world_size, ..., so every minibatch has the same
    sequences for any number of processes and none has to travel.
    """
    shape = (args.num_minibatches, args.batch_size // args.num_minibatches)
    for epoch in range(args.update_epochs):
        philox = np.random.Philox(key=[args.seed, iteration], counter=[0, 0, epoch, MINIBATCHES])
        shuffled = np.random.Generator(philox).random(shape).argsort(0)  # rows of the matrix, column by column
        own = torch.from_numpy(shuffled[:, rank::world_size])
        yield from own * own.shape[1] + torch.arange(own.shape[1])


# ------------------------------------------------------------------------------------------------ policy and value
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


def token_entropy(logits):
    """Entropy in nats of each distribution: (B, T, V) -> (B, T); banned tokens count 0, also in the gradient."""

    def entropy(logits):  # of one sequence, which stays in the processor's cache: (T, V) -> (T,)
        logprobs = logits.log_softmax(-1)
        return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)

    # computed again for the gradient, which would otherwise keep four copies of the logits; nothing in it is drawn
    again = functools.partial(torch.utils.checkpoint.checkpoint, entropy, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([again(row) for row in logits])


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


@torch.no_grad()
def rollout_passes(policy, reference, batch, behaviour, autocast, args):
    """logprobs, ref_logprobs, entropy of the whole batch: (B, T) float32 each, 0 on padding."""
    figures = torch.zeros(3, *batch["responses"].shape, device=batch["responses"].device)
    for rows, mb in micro_batches(batch, args.micro_batch_size):
        with torch.autocast(**autocast):
            logits = behaviour_logits(response_logits(policy, mb), 0, **behaviour)
            logprobs, entropy = token_logprobs(logits, mb.responses), token_entropy(logits)
            logits = behaviour_logits(response_logits(reference, mb), 0, **behaviour)
            part = torch.stack([logprobs, token_logprobs(logits, mb.responses), entropy])
        figures[:, rows, : part.shape[2]] = part.masked_fill(~mb.mask, 0.0)
    return figures


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
    if args.reward_weights is None:
        args.reward_weights = task.reward_weights if args.reward == task.reward else (1.0,) * len(args.reward)
    check_args(args)
    return args, record


def check_args(args):
    """Raises UsageError for settings that do not fit each other."""
    processes, folder = int(os.environ.get("WORLD_SIZE", 1)), Path(args.run_dir or "")
    whole, given = args.group_size * args.num_minibatches * processes, args.run_dir is not None
    begun = folder.is_dir() and any(file.name not in ("config.json", ".lock") for file in folder.iterdir())
    wrong = [
        (args.batch_size % whole, f"--batch-size {args.batch_size}: must be a multiple of --group-size "
            f"{args.group_size} times --num-minibatches {args.num_minibatches} times {processes} processes = {whole}"),
        (args.min_response_length > args.response_length, f"--min-response-length {args.min_response_length}: at most "
            f"--response-length {args.response_length}"),
        (len(args.reward_weights) != len(args.reward), f"--reward-weights: {len(args.reward_weights)} values for "
            f"{len(args.reward)} rewards"),
        (args.fsdp and "WORLD_SIZE" not in os.environ, "--fsdp: shards over processes; start the script by torchrun"),
        (args.fsdp and "perplexity" in args.metrics, "--metrics perplexity: needs the whole model; not with --fsdp"),
        (not args.reward, "--reward: name at least one"),
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
