"""Sampling alone: CPU milliseconds of a decode step, ppo_causal.py of this checkout and of another in turns.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py --against ../old

Models have random weights, EOS is banned, and both sides draw the same tokens: the last columns say how far apart the
log-probs of these are, and how many tokens are the same.
"""

import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # layers, width, vocabulary, rows, prompt tokens, new tokens
    "GPT-2, 4 layers of 256": (4, 256, 1_000, 32, 16, 200),
    "GPT-2, 4 layers of 256, long": (4, 256, 1_000, 32, 64, 512),
    "GPT-2, 2 layers of 768, long prompt": (2, 768, 50_257, 32, 400, 30),
    "GPT-2, 12 layers of 64, one row": (12, 64, 1_000, 1, 16, 100),
    "Llama, 4 layers of 256, 2 heads of keys": (4, 256, 1_000, 32, 64, 200),
}


@dataclass
class Args:
    against: Path  # another checkout
    turns: int = 3  # of which the fastest counts


def script_of(folder, name):
    spec = importlib.util.spec_from_file_location(name, folder / "ppo_causal.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def model_of(kind, layers, width, vocabulary):
    sizes = dict(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64)
    if kind == "Llama":
        return AutoModelForCausalLM.from_config(
            LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=width * 2)
        )
    return AutoModelForCausalLM.from_config(GPT2Config(**sizes))


def main():
    args = tyro.cli(Args, description=__doc__)
    sys.path.insert(0, str(ROOT))
    scripts = script_of(ROOT, "here"), script_of(args.against.resolve(), "there")
    print("| shape | rows, prompt, new tokens | here, ms | there, ms | ratio | difference, nats | same tokens |")
    print("|---|---|---|---|---|---|---|")
    for shape, (layers, width, vocabulary, rows, prompt, new) in SHAPES.items():
        torch.manual_seed(0)
        policy = model_of(shape.partition(",")[0], layers, width, vocabulary).eval()
        queries = torch.randint(1, vocabulary, (rows, prompt))
        query_mask = torch.ones_like(queries, dtype=torch.bool)
        query_mask[0, : prompt // 3] = rows == 1  # one prompt is shorter
        behaviour = dict(temperature=1.0, min_response_length=new, eos=torch.tensor([0]))
        uniform = torch.rand(rows, new, dtype=torch.float64)
        times, drawn = [[], []], [None, None]
        for _ in range(args.turns):
            for side, script in enumerate(scripts):
                started = time.process_time()
                drawn[side] = script.sample_responses(policy, queries, query_mask, uniform, behaviour, 0)
                times[side].append((time.process_time() - started) / new * 1000)
        here, there = map(min, times)
        (tokens, _, logprobs), (other_tokens, _, other_logprobs) = drawn
        same, apart = (tokens == other_tokens).float().mean(), (logprobs - other_logprobs).abs().max()
        cells = f"{here:.2f} | {there:.2f} | {here / there:.2f} | {apart:.0e} | {same:.3f}"
        print(f"| {shape} | {rows}, {prompt}, {new} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
