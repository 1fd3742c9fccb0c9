"""Runs numbered steps of a script's main loop on tensors of a test's own: the script's lines, not a copy of them."""

import importlib
import inspect
import re
import textwrap
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F


def run_steps(script, first, last, **variables):
    """Executes the steps `# first.` to `# last.` of the script with these variables; returns all variables after."""
    module = importlib.import_module(script)
    lines = inspect.getsource(module).splitlines(keepends=True)
    markers = {int(m[1]): i for i, line in enumerate(lines) if (m := re.match(r" {8}# (\d)\. ", line))}
    assert list(markers) == list(range(1, 10)), f"{script}: steps {list(markers)}"
    source = "\n" * markers[first] + textwrap.dedent("".join(lines[markers[first] : markers[last + 1]]))
    names = vars(module) | variables
    exec(compile(source, module.__file__, "exec"), names)
    return names


class Table(nn.Module):
    """A language model whose next token depends on the last one alone, by a linear layer on its one-hot vector.

    Without a layer it is the backbone of a value model: its hidden states are the one-hot vectors.
    """

    def __init__(self, vocab, seq2seq, linear=None):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=seq2seq, decoder_start_token_id=0)
        self.vocab = vocab
        self.linear = linear

    def forward(self, input_ids, decoder_input_ids=None, logits_to_keep=None, **kwargs):
        states = decoder_input_ids if self.config.is_encoder_decoder else input_ids
        hidden = F.one_hot(states, self.vocab).float()
        if self.linear is None:
            return SimpleNamespace(last_hidden_state=hidden)
        logits = self.linear(hidden)
        return SimpleNamespace(logits=logits if logits_to_keep is None else logits[:, -logits_to_keep:])


def table_problem(script, seq2seq, problem, weights, **settings):
    """The variables that steps 5 and 6 find: a rollout of stored tokens, and models of a layer each."""
    module = importlib.import_module(script)
    vocab, lengths = problem["vocab"], torch.tensor(problem["lengths"])
    B, T = len(lengths), int(lengths.max())
    mask = torch.arange(T) < lengths.unsqueeze(1)

    def padded(numbers, dtype=torch.float32):
        return torch.zeros(B, T, dtype=dtype).masked_scatter(mask, torch.tensor(numbers, dtype=dtype))

    linear, value_model = nn.Linear(vocab, vocab), module.ValueModel.__new__(module.ValueModel)
    nn.Module.__init__(value_model)
    value_model.backbone, value_model.head = Table(vocab, seq2seq), nn.Linear(vocab, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(weights["policy_weight"]))
        linear.bias.copy_(torch.tensor(weights["policy_bias"]))
        value_model.head.weight.copy_(torch.tensor(weights["value_weight"]))
    behaviour = dict(temperature=1.0, min_response_length=0, eos=torch.tensor([1]))
    policy = Table(vocab, seq2seq, linear)
    # prompts of different lengths that end with token 0, on which the first token of a response depends
    query_lengths = torch.arange(B) % 3 + 1
    query_mask = torch.arange(3) < query_lengths.unsqueeze(1)
    query_mask = query_mask if seq2seq else query_mask.flip(1)
    fixed = dict(seed=1, batch_size=B, micro_batch_size=3, num_minibatches=1, value_warmup_iterations=0)
    fixed |= dict(clip_coef_high=None)
    batch = dict(queries=torch.zeros(B, 3, dtype=torch.long), query_mask=query_mask)
    batch |= dict(responses=padded(problem["actions"], torch.long), mask=mask)
    return dict(
        args=SimpleNamespace(**fixed | settings), iteration=1, rank=0, world_size=1, device=torch.device("cpu"), B=B,
        autocast=dict(device_type="cpu", dtype=torch.bfloat16, enabled=False), batch=batch, mask=mask, T=T,
        token_rewards=padded(problem["rewards"]), policy=policy, value_model=value_model, behaviour=behaviour,
        padded=padded, linear=linear,
    )  # fmt: skip
