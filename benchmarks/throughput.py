"""What an iteration of a script costs: against the model passes that its algorithm cannot avoid, and another checkout.

    OMP_NUM_THREADS=1 python benchmarks/throughput.py --shape causal-small seq2seq-small --scripts ppo nlpo a2c grpo
    OMP_NUM_THREADS=1 python benchmarks/throughput.py --shape causal-small --scripts ppo --against ../old
    OMP_NUM_THREADS=1 python benchmarks/throughput.py --shape causal-base --scripts ppo --processes 2

Each side is a process of its own (that of several processes: as many), and they take turns, an iteration each: the
script's main, on a model of random weights and a task of prompts of exactly the given length, whose responses cannot
end early; the same script of the other folder; and the bare floor: as many cached decode steps, one forward pass each
of policy, reference and value model, and the forward, backward and AdamW steps of the update, in the same shapes and
dtype, without masks, drawing, texts, the algorithm's losses, clipping or logs. NLPO's floor has the masking model's
decode steps as well, A2C's is one step per batch, GRPO's has no value model. The first iteration of each is a warm-up;
evaluations and checkpoints are left out. CPU seconds are those of all threads of the process, which other work on the
machine disturbs less than the clock; ratios are those of the iterations of one turn.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import runpy
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
import tqdm
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

HERE = Path(__file__).resolve().parent.parent
GPT2 = dict(n_positions=1024)
T5 = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
GPT2_SMALL = dict(GPT2, bos_token_id=1, eos_token_id=1, n_embd=256, n_layer=4, n_head=4, vocab_size=4096)
T5_SMALL = dict(T5, d_model=256, d_kv=64, d_ff=1024, num_layers=4, num_heads=4, vocab_size=4096)
T5_BASE = dict(T5, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
T5_PAPER = dict(T5, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128)
# what model, and how much: sequences, prompt and response tokens, epochs, sequences in a minibatch
COLUMNS = ("config", "batch_size", "prompt_length", "response_length", "update_epochs", "minibatch")
SHAPES = {
    "causal-small": (GPT2_SMALL, 10, 64, 48, 5, 2),
    "causal-base": (GPT2, 16, 64, 48, 2, 4),
    "seq2seq-small": (T5_SMALL, 10, 128, 32, 5, 2),
    "seq2seq-paper": (T5_PAPER, 16, 512, 100, 1, 4),
    "causal-gpu": (GPT2, 128, 64, 48, 2, 32),
    "seq2seq-gpu": (T5_BASE, 64, 512, 100, 2, 16),
    # to see in a minute whether this file works
    "causal-tiny": (dict(GPT2_SMALL, n_embd=64, n_layer=1), 8, 16, 8, 1, 2),
    "seq2seq-tiny": (dict(T5_SMALL, d_model=64, d_ff=128, num_layers=1), 8, 16, 8, 1, 2),
}
PARTS = ("sample", "forward", "update", "iteration")  # forward: log-probs and values, and the rewards beside them


def make_config(shape):
    return (transformers.GPT2Config if shape["causal"] else transformers.T5Config)(**shape["config"])


def make_model(shape):
    return (transformers.GPT2LMHeadModel if shape["causal"] else transformers.T5ForConditionalGeneration)(
        make_config(shape)
    )


def make_inputs(folder, shape):
    """A model folder with random weights and a tokenizer of the words w0, w1, ...; and a task of such words."""
    torch.manual_seed(0)
    make_model(shape).save_pretrained(folder / "model")
    words = ["<pad>", "</s>", *(f"w{i}" for i in range(make_config(shape).vocab_size - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not shape["causal"]:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    (folder / "task").mkdir()
    rng = random.Random(0)
    for split, count in (("train", 256), ("validation", 1), ("test", 1)):
        with open(folder / "task" / f"{split}.jsonl", "w") as file:
            for _ in range(count):
                lengths = shape["prompt_length"] - (not shape["causal"]), shape["response_length"]
                prompt, reference = (" ".join(rng.choices(words[2:], k=length)) for length in lengths)
                file.write(json.dumps(dict(prompt=prompt, references=[reference])) + "\n")


def run_script(path, script, folder, shape, options, turn):
    """Runs the script's main, and calls `turn` with (seconds, CPU seconds) at the bounds of each iteration's parts."""
    flags = dict(task=folder / "task", model=folder / "model", run_dir=tempfile.mkdtemp(dir=folder))
    flags |= dict(reward="rouge1", metrics="rouge1", eval_samples=1, dtype=options["dtype"])
    flags |= dict.fromkeys(("num_iterations", "eval_every", "save_every"), 10**6)
    flags |= {name: shape[name] for name in ("batch_size", "prompt_length", "response_length")}
    flags |= dict(min_response_length=shape["response_length"], micro_batch_size=options["micro_batch_size"])
    if script not in ("a2c", "trpo"):
        flags |= dict(update_epochs=shape["update_epochs"], num_minibatches=shape["batch_size"] // shape["minibatch"])
    if script == "grpo":
        flags["group_size"] = 2
    if "RANK" in os.environ:  # torchrun's processes agree on one
        flags["run_dir"] = folder / f"run_{os.environ['MASTER_PORT']}"
    clock, stamps = time.perf_counter, []

    def stamped():
        now = clock()
        if sys._getframe(1).f_code.co_name == "seconds":
            stamps.append((now, time.process_time()))
        return now

    class Progress(tqdm.tqdm):
        """The script's progress bar, which is told of every iteration."""

        def update(self, n=1):
            if len(stamps) == 6:  # the loop's: start, sample, forward and score in either order, update, log
                turn([stamps[i] for i in (0, 1, 3, 4, 5)])
                stamps.clear()

    sys.argv = [str(path), *(word for name, x in flags.items() for word in (f"--{name.replace('_', '-')}", str(x)))]
    sys.path.insert(0, str(path.parent))
    time.perf_counter, tqdm.tqdm = stamped, Progress
    runpy.run_path(str(path), run_name="__main__")


class Floor:
    """The passes of an iteration, and nothing else."""

    def __init__(self, script, shape, options):
        config, self.causal = make_config(shape), shape["causal"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy, self.reference = (make_model(shape).eval().to(self.device) for _ in range(2))
        self.reference.requires_grad_(False)
        self.backbone = transformers.AutoModel.from_config(config).eval().to(self.device)
        self.head = torch.nn.Linear(self.backbone.config.hidden_size, 1, bias=False).to(self.device)
        self.critic = script != "grpo"
        learning = [self.policy] + [self.backbone, self.head] * self.critic
        self.optimizer = torch.optim.AdamW([p for m in learning for p in m.parameters()], lr=1e-6, fused=True)
        self.decoders = [self.policy] + [self.reference] * script.startswith("nlpo")
        B, Q, T = shape["batch_size"], shape["prompt_length"], shape["response_length"]
        self.queries = torch.randint(2, config.vocab_size, (B, Q), device=self.device)
        self.responses = torch.randint(2, config.vocab_size, (B, T), device=self.device)
        self.epochs, self.minibatch = (1, B) if script == "a2c" else (shape["update_epochs"], shape["minibatch"])
        self.micro, self.sample_rows = options["micro_batch_size"], 32
        self.autocast = dict(device_type=self.device.type, dtype=torch.bfloat16, enabled=options["dtype"] == "bfloat16")

    @torch.no_grad()
    def sample(self):
        for model in self.decoders:
            for rows in torch.arange(len(self.queries)).split(self.sample_rows):
                with torch.autocast(**self.autocast):
                    self.decode(model, self.queries[rows], self.responses[rows])

    def decode(self, model, queries, responses):
        if self.causal:
            cache = DynamicCache(config=model.config)
            for t in range(responses.shape[1]):
                tokens = responses[:, t - 1 : t] if t else queries
                model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return
        cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        encoded = model.get_encoder()(input_ids=queries)
        for t in range(responses.shape[1]):
            model(
                encoder_outputs=encoded,
                decoder_input_ids=responses[:, max(t - 1, 0) : max(t, 1)],
                past_key_values=cache,
                use_cache=True,
            )

    def inputs(self, rows):
        if self.causal:
            return dict(input_ids=torch.cat([self.queries[rows], self.responses[rows, :-1]], 1), use_cache=False)
        return dict(input_ids=self.queries[rows], decoder_input_ids=self.responses[rows], use_cache=False)

    def logits(self, model, rows):
        keep = dict(logits_to_keep=self.responses.shape[1]) if self.causal else {}
        return model(**self.inputs(rows), **keep).logits

    def values(self, rows):
        return self.head(self.backbone(**self.inputs(rows)).last_hidden_state[:, -self.responses.shape[1] :])

    @torch.no_grad()
    def forward(self):
        for rows in torch.arange(len(self.queries)).split(self.micro):
            with torch.autocast(**self.autocast):
                self.logits(self.policy, rows)
                self.logits(self.reference, rows)
                if self.critic:
                    self.values(rows)

    def update(self):
        for _ in range(self.epochs):
            for minibatch in torch.arange(len(self.queries)).split(self.minibatch):
                for rows in minibatch.split(self.micro):
                    with torch.autocast(**self.autocast):
                        logits = self.logits(self.policy, rows)
                        loss = F.cross_entropy(logits.flatten(0, 1).float(), self.responses[rows].flatten())
                        if self.critic:
                            loss = loss + self.values(rows).float().mean()
                    loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    def bound(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def work(side, script, folder, shape, options):
    """What a process of its own does: an iteration, a line of JSON about it, and on when it is told."""
    floor, told = Floor(script, shape, options) if side == "floor" else None, sys.stdout

    def turn(bounds):
        start, sample, forward, update, end = bounds
        spans = ((start, sample), (sample, forward), (forward, update), (start, end))
        result = {part: (b[0] - a[0], b[1] - a[1]) for part, (a, b) in zip(PARTS, spans, strict=True)}
        if torch.cuda.is_available():
            result["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        else:
            result["GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result), file=told, flush=True)
        sys.stdin.readline()

    if not floor:
        with contextlib.redirect_stdout(sys.stderr):
            run_script(Path(side), script, Path(folder), shape, options, turn)
    while True:
        bounds = [floor.bound()]
        for part in (floor.sample, floor.forward, floor.update):
            part()
            bounds.append(floor.bound())
        turn([*bounds, bounds[-1]])


class Side:
    """The process, or processes, of one side."""

    def __init__(self, processes, *job):
        env = dict(os.environ)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.children, self.errors = [], tempfile.TemporaryFile("w+")
        for rank in range(processes):
            if processes > 1:
                env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
                env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            command = [sys.executable, __file__, "--worker", json.dumps(job)]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)
            self.children.append(subprocess.Popen(command, env=env, **pipes))
        self.warm_up, self.turns = self.read(), []

    def read(self):
        line = self.children[0].stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(self.errors.read()[-3000:])
        return json.loads(line)

    def turn(self):
        for child in self.children:
            child.stdin.write("\n")
            child.stdin.flush()
        self.turns.append(self.read())

    def end(self):
        for child in self.children:
            child.kill()
            child.communicate()

    def median(self, part, which):
        """Of the wall (0) or CPU (1) seconds."""
        return statistics.median(turn[part][which] for turn in self.turns)


def report(script, shape, options):
    tokens = shape["batch_size"] * shape["response_length"]
    print(f"\n{script} at {shape['name']}, {options['dtype']}: {tokens} tokens, {options['turns']} turns", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), shape)
        job = script, folder, shape, options
        paths = dict(script=HERE) | {path: Path(path).resolve() for path in options["against"]}
        sides = {name: Side(1, str(path / f"{script}.py"), *job) for name, path in paths.items()}
        sides["floor"] = Side(1, "floor", *job)
        if options["processes"] > 1:
            sides[f"{options['processes']} processes"] = Side(options["processes"], str(HERE / f"{script}.py"), *job)
        for i in range(options["turns"]):
            for side in [*sides.values()][:: 1 if i % 2 else -1]:
                side.turn()
        for side in sides.values():
            side.end()
    for name, side in sides.items():
        seconds = side.median("iteration", 0)
        figures = ", ".join(f"{part} {side.median(part, 1):.3f}" for part in PARTS)
        print(f"{name}: CPU s {figures}; {seconds:.3f} s, {tokens / seconds:.0f} tokens/s", end="; ")
        print(f"{max(turn['GiB'] for turn in side.turns):.2f} GiB")
    for name, side in list(sides.items())[1:]:
        which = int(" processes" not in name)  # of several processes, by the clock
        print(f"script / {name}, {('wall', 'CPU')[which]} s: min, median, max of the turns")
        for part in PARTS:
            pairs = zip(sides["script"].turns, side.turns, strict=True)
            ratios = sorted(a[part][which] / b[part][which] for a, b in pairs)
            print(f"  {part:<10} {ratios[0]:.3f} {statistics.median(ratios):.3f} {ratios[-1]:.3f}", flush=True)
    if torch.cuda.is_available():
        with FlopCounterMode(display=False) as counter:
            Floor(script, shape, options).update()
        speed = counter.get_total_flops() / sides["script"].median("update", 0) / 1e12
        print(f"update: {speed:.1f} TFLOP/s on {torch.cuda.get_device_name()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES)[:4])
    parser.add_argument("--scripts", nargs="+", choices=("ppo", "nlpo", "a2c", "grpo"), default=["ppo", "nlpo"])
    parser.add_argument("--turns", type=int, default=5, help="iterations of each side after its warm-up")
    parser.add_argument("--against", nargs="+", default=[], help="folders with other versions of the scripts")
    parser.add_argument("--vocab-size", type=int, help="default: the shape's")
    parser.add_argument("--processes", type=int, default=1, help="a side of so many that share the batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--micro-batch-size", type=int, default=16)
    for name in COLUMNS[1:]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: the shape's")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if options["worker"]:
        work(*options["worker"])
    for name in options["shape"]:
        shape = dict(zip(COLUMNS, SHAPES[name], strict=True), name=name, causal=name.startswith("causal"))
        shape |= {column: options[column] for column in COLUMNS[1:] if options[column]}
        if options["vocab_size"]:
            shape["config"] = shape["config"] | dict(vocab_size=options["vocab_size"])
        for script in options["scripts"]:
            kind = "causal" if shape["causal"] else "seq2seq"
            report(f"{script}_{kind}" if script in ("ppo", "nlpo") else script, shape, options)


if __name__ == "__main__":
    main()
