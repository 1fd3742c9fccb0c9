"""What an iteration of each script costs beside the model passes that its algorithm cannot avoid.

    OMP_NUM_THREADS=1 python benchmarks/throughput.py --shape causal-base --scripts ppo_causal nlpo_causal a2c
    python benchmarks/throughput.py --shape seq2seq-small --scaling processes batch length
    python benchmarks/throughput.py --gpu

In turns, in one process: an iteration of the real script (its main, run by runpy on a model of random weights and a
task of prompts of exactly the given length, whose responses cannot end early), then the bare floor: as many cached
decode steps, one forward pass each of policy, reference and value model, and the forward, backward and AdamW steps of
the update, at the same shapes and in the same dtype, without masks, sampling, texts, losses of PPO, clipping or logs.
Medians of the iterations after the first, by the clock and by the process's CPU time, which other work on the machine
disturbs less; evaluations and checkpoints are left out. NLPO's floor has the masking model's decode steps as well;
A2C's is one step per batch. Peak memory is that of processes of their own, one for the script and one for the floor.
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
PARTS = ("sample", "forward", "score", "update", "iteration")
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}  # bf16, dense


class Done(BaseException):
    """Ends the script after the last iteration that is wanted, before it saves anything."""


def shape_of(name, options):
    """The shape of that name, changed as the options want it."""
    shape = dict(zip(COLUMNS, SHAPES[name], strict=True), name=name)
    for column in ("batch_size", "response_length", "update_epochs", "minibatch"):
        shape[column] = getattr(options, column) or shape[column]
    shape["batch_size"] *= options.batch_times
    return shape


def is_causal(shape):
    return shape["name"].startswith("causal")


def make_config(shape):
    return (transformers.GPT2Config if is_causal(shape) else transformers.T5Config)(**shape["config"])


def make_inputs(folder, shape):
    """A model folder with random weights and a tokenizer of the words w0, w1, ...; and a task of such words."""
    torch.manual_seed(0)
    config = make_config(shape)
    causal = is_causal(shape)
    model = (transformers.GPT2LMHeadModel if causal else transformers.T5ForConditionalGeneration)(config)
    model.save_pretrained(folder / "model")
    words = ["<pad>", "</s>", *(f"w{i}" for i in range(config.vocab_size - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not causal:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder / "model")
    (folder / "task").mkdir()
    rng = random.Random(0)
    for split, count in (("train", 256), ("validation", 1), ("test", 1)):
        with open(folder / "task" / f"{split}.jsonl", "w") as file:
            for _ in range(count):
                prompt, reference = (
                    " ".join(rng.choices(words[2:], k=length))
                    for length in (shape["prompt_length"] - (not causal), shape["response_length"])
                )
                file.write(json.dumps(dict(prompt=prompt, references=[reference])) + "\n")


def script_flags(script, folder, shape, options):
    flags = dict(
        task=folder / "task",
        model=folder / "model",
        run_dir=tempfile.mkdtemp(dir=folder),
        reward="rouge1",
        metrics="rouge1",
        prompt_length=shape["prompt_length"],
        response_length=shape["response_length"],
        min_response_length=shape["response_length"],
        batch_size=shape["batch_size"],
        micro_batch_size=options.micro_batch_size,
        num_iterations=10**6,
        eval_every=10**6,
        save_every=10**6,
        eval_samples=1,
        dtype=options.dtype,
    )
    if script != "a2c":
        flags |= dict(update_epochs=shape["update_epochs"], num_minibatches=shape["batch_size"] // shape["minibatch"])
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return words + ["--compile"] * options.compile + ["--no-cuda"] * (not torch.cuda.is_available())


def run_script(script, folder, shape, options, iterations, between):
    """Runs the script's main; calls `between` after each iteration. Returns {part: [(seconds, CPU seconds), ...]}."""
    path = str(Path(options.folder).resolve() / f"{script}.py")
    clock, stamps, times = time.perf_counter, [], {part: [] for part in PARTS}

    def stamped():
        now = clock()
        if sys._getframe(1).f_code.co_name == "seconds":
            stamps.append((now, time.process_time()))
        return now

    class Progress(tqdm.tqdm):
        """The script's progress bar, which is told of every iteration."""

        def update(self, n=1):
            if len(stamps) != 6:  # not the loop's
                return
            start, sample, forward, score, update, end = stamps
            spans = ((start, sample), (sample, forward), (forward, score), (score, update), (start, end))
            for part, (a, b) in zip(PARTS, spans, strict=True):
                times[part].append((b[0] - a[0], b[1] - a[1]))
            between()
            stamps.clear()
            if len(times["iteration"]) == iterations:
                raise Done

    argv, path_before, original = sys.argv, list(sys.path), tqdm.tqdm
    sys.argv = [path, *script_flags(script, folder, shape, options)]
    sys.path.insert(0, str(Path(path).parent))
    time.perf_counter, tqdm.tqdm = stamped, Progress
    try:
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(path, run_name="__main__")
    except Done:
        pass
    finally:
        time.perf_counter, tqdm.tqdm, sys.argv, sys.path[:] = clock, original, argv, path_before
    return times


class Floor:
    """The passes of an iteration, and nothing else."""

    def __init__(self, script, shape, options):
        config, self.shape, self.causal = make_config(shape), shape, is_causal(shape)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model_class = transformers.GPT2LMHeadModel if self.causal else transformers.T5ForConditionalGeneration
        self.policy, self.reference = (model_class(config).eval().to(self.device) for _ in range(2))
        self.reference.requires_grad_(False)
        self.backbone = transformers.AutoModel.from_config(config).eval().to(self.device)
        self.head = torch.nn.Linear(self.backbone.config.hidden_size, 1, bias=False).to(self.device)
        parameters = [*self.policy.parameters(), *self.backbone.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        self.decoders = [self.policy] + [self.reference] * script.startswith("nlpo")
        B, Q, T = shape["batch_size"], shape["prompt_length"], shape["response_length"]
        self.queries = torch.randint(2, config.vocab_size, (B, Q), device=self.device)
        self.responses = torch.randint(2, config.vocab_size, (B, T), device=self.device)
        self.epochs, self.minibatch = (1, B) if script == "a2c" else (shape["update_epochs"], shape["minibatch"])
        self.micro, self.sample_rows = options.micro_batch_size, 32
        self.autocast = dict(device_type=self.device.type, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16")

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
                self.values(rows)

    def update(self):
        for _ in range(self.epochs):
            for minibatch in torch.arange(len(self.queries)).split(self.minibatch):
                for rows in minibatch.split(self.micro):
                    with torch.autocast(**self.autocast):
                        logits, values = self.logits(self.policy, rows), self.values(rows)
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), self.responses[rows].flatten())
                    (loss + values.float().mean()).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    def __call__(self):
        """{part: (seconds, CPU seconds)} of one iteration."""
        stamps = [self.now()]
        for part in (self.sample, self.forward, self.update):
            part()
            stamps.append(self.now())
        start, sample, forward, update = stamps
        spans = ((start, sample), (sample, forward), (forward, forward), (forward, update), (start, update))
        return {part: (b[0] - a[0], b[1] - a[1]) for part, (a, b) in zip(PARTS, spans, strict=True)}

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def peak_memory():
    """GiB, of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def work(options):
    """What a process of its own does: measures and prints one line of JSON."""
    shape = shape_of(options.shape[0], options)
    script, folder = options.scripts[0], Path(options.worker_folder)
    if options.threads:
        torch.set_num_threads(options.threads)
    result = {}
    floor_times = {part: [] for part in PARTS}
    floor = Floor(script, shape, options) if options.worker in ("turns", "floor") else None

    def between():
        for part, span in floor().items() if floor else ():
            floor_times[part].append(span)

    if options.worker == "floor":
        for _ in range(options.iterations):
            between()
    else:
        result["script"] = run_script(script, folder, shape, options, options.iterations, between)
    result |= dict(floor=floor_times, memory=peak_memory())
    if floor and torch.cuda.is_available():
        with FlopCounterMode(display=False) as counter:
            floor.update()
        result["flops"] = counter.get_total_flops()
        result["device"] = torch.cuda.get_device_name()
    print("RESULT " + json.dumps(result), flush=True)


def measure(options, worker, script, shape, folder, processes=1, batch_times=1, response_length=None, iterations=None):
    """Runs `work` in a process of its own, or in several that share the batch; returns what the first one says."""
    command = [sys.executable, __file__, "--worker", worker, "--worker-folder", str(folder), "--shape", shape]
    command += ["--scripts", script, "--iterations", str(iterations or options.iterations), "--dtype", options.dtype]
    command += ["--micro-batch-size", str(options.micro_batch_size), "--batch-times", str(batch_times)]
    command += ["--folder", options.folder, "--threads", str(options.threads or 0)]
    command += ["--batch-size", str(options.batch_size), "--update-epochs", str(options.update_epochs)]
    command += ["--minibatch", str(options.minibatch)]
    command += ["--response-length", str(response_length or options.response_length)] + ["--compile"] * options.compile
    env = dict(os.environ)
    if options.threads:
        env["OMP_NUM_THREADS"] = str(options.threads)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(processes):
        if processes > 1:
            env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        children.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    out, err = children[0].communicate()
    for child in children[1:]:  # they wait for an iteration that the first one does not begin
        child.kill()
        child.communicate()
    lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{' '.join(command)}\n{err[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def median(spans, which):
    """Of the wall (0) or CPU (1) seconds, the first left out as a warm-up where there are more."""
    return statistics.median(span[which] for span in (spans[1:] or spans))


def report(options, script, name, folder):
    shape = shape_of(name, options)
    result = measure(options, "turns", script, name, folder)
    tokens = shape["batch_size"] * shape["response_length"]
    print(f"\n{script} at {name}: {tokens} tokens, medians of {max(options.iterations - 1, 1)} iterations in turns")
    print("part        script s   floor s  ratio   script CPU s floor CPU s  ratio")
    for part in PARTS:
        row = [median(result[side][part], which) for which in (0, 1) for side in ("script", "floor")]
        wall, cpu = (f"{a / b:6.3f}" if b > 1e-4 else "     -" for a, b in (row[:2], row[2:]))
        print(f"{part:<10} {row[0]:9.3f} {row[1]:9.3f} {wall}   {row[2]:12.3f} {row[3]:11.3f} {cpu}")
    seconds = [median(result[side]["iteration"], 0) for side in ("script", "floor")]
    print(f"tokens/s   {tokens / seconds[0]:9.1f} {tokens / seconds[1]:9.1f}", end="   ")
    pairs = zip(result["script"]["iteration"][1:], result["floor"]["iteration"][1:], strict=True)
    print("CPU ratio of each turn: " + " ".join(f"{a[1] / b[1]:.2f}" for a, b in pairs))
    if not options.no_memory:
        memory = [measure(options, side, script, name, folder, iterations=2)["memory"] for side in ("script", "floor")]
        print(f"peak GiB   {memory[0]:9.2f} {memory[1]:9.2f} {memory[0] / memory[1]:6.2f}")
    if "flops" in result:
        update = median(result["script"]["update"], 0)
        share = [median(result["script"][part], 0) / seconds[0] for part in PARTS[:4]]
        print("share of time: " + ", ".join(f"{p} {s:.0%}" for p, s in zip(PARTS[:4], share, strict=True)))
        peak = next((peak for card, peak in PEAK_FLOPS.items() if card in result["device"]), None)
        mfu = f", {result['flops'] / update / peak:.1%} of {result['device']}'s bf16 peak" if peak else ""
        print(f"update: {result['flops'] / update / 1e12:.1f} TFLOP/s{mfu}")
    sys.stdout.flush()


def report_scaling(options, script, name, folder):
    """Two processes against one; a batch 8 times as large; sampling against response length: those that are wanted."""
    shape = shape_of(name, options)
    tokens = shape["batch_size"] * shape["response_length"]
    options.threads = options.threads or 1
    print(f"\n{script} at {name}")
    if "processes" in options.scaling:
        one, two = (measure(options, "script", script, name, folder, processes=n)["script"] for n in (1, 2))
        for part in PARTS:
            seconds = [median(result[part], 0) for result in (one, two)]
            print(f"{part:<10} 1 process {seconds[0]:8.3f} s, 2 {seconds[1]:8.3f} s: {seconds[0] / seconds[1]:.2f}x")
    if "batch" in options.scaling:
        small, large = (measure(options, "script", script, name, folder, batch_times=n) for n in (1, 8))
        cpu = [median(r["script"]["iteration"], 1) / n / tokens * 1000 for r, n in ((small, 1), (large, 8))]
        print(f"CPU ms per token: {cpu[0]:.3f}; of 8 times the batch {cpu[1]:.3f}: {cpu[1] / cpu[0]:.2f}x")
        memory = small["memory"], large["memory"]
        print(f"peak GiB: {memory[0]:.3f}; with 8 times the batch {memory[1]:.3f}: {memory[1] / memory[0]:.3f}x")
    for times in (1, 2, 4) if "length" in options.scaling else ():
        length = shape["response_length"] * times // 4
        result = measure(options, "script", script, name, folder, response_length=length)["script"]["sample"]
        print(f"sampling {length} tokens: {median(result, 1) / length * 1000:.2f} CPU ms per step")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES)[:4])
    parser.add_argument("--scripts", nargs="+", help="default: PPO, NLPO and A2C for the shape's kind of model")
    parser.add_argument("--iterations", type=int, default=6, help="the first of them is a warm-up")
    parser.add_argument("--threads", type=int, default=0, help="of each process; 0: PyTorch's choice")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="run the scripts with --compile")
    parser.add_argument("--micro-batch-size", type=int, default=16)
    for name in ("batch-size", "response-length", "update-epochs", "minibatch"):
        parser.add_argument(f"--{name}", type=int, default=0, help="0: the shape's")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure peak memory")
    parser.add_argument(
        "--scaling",
        nargs="+",
        choices=("processes", "batch", "length"),
        help="instead: 2 processes against 1, 8 times the batch, sampling against response length",
    )
    parser.add_argument("--gpu", action="store_true", help="PPO and NLPO in bf16 with and without compile")
    parser.add_argument("--folder", default=str(Path(__file__).resolve().parent.parent), help="where the scripts are")
    for name in ("worker", "worker-folder"):  # what `measure` says to `work`
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--batch-times", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    if options.gpu:
        if not torch.cuda.is_available():
            raise SystemExit("--gpu: there is no GPU")
        options.shape, options.dtype, options.micro_batch_size = ["seq2seq-gpu", "causal-gpu"], "bfloat16", 32
    for name in options.shape:
        kind = "causal" if name.startswith("causal") else "seq2seq"
        scripts = options.scripts or [f"ppo_{kind}", f"nlpo_{kind}"] + ["a2c"] * (not options.gpu)
        with tempfile.TemporaryDirectory() as folder:
            make_inputs(Path(folder), shape_of(name, options))
            for script in scripts:
                if script != "a2c" and not script.endswith(kind):
                    continue
                for compiled in (False, True) if options.gpu else (options.compile,):
                    options.compile = compiled
                    if options.gpu:
                        print(f"\n{'with' if compiled else 'without'} --compile", end="")
                    (report_scaling if options.scaling else report)(options, script, name, Path(folder))


if __name__ == "__main__":
    main()
