"""python -m loadtest.peft_batch MODEL ADAPTERS COUNT NEW_TOKENS: PEFT's tokens per second."""

import sys
import time
from pathlib import Path

import torch
import typer
from peft import PeftModel
from transformers import AutoModelForCausalLM

_PROMPT_TOKENS = 32


def main(model_folder: Path, adapters: Path, count: int, num_tokens: int) -> float:
    """Of a mixed batch, a sequence for each of `count` adapters, after a short one to warm up."""
    folders = sorted(adapters.glob("t*"))[:count]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    model.eval()
    prompt = torch.randint(10, base.config.vocab_size, (count, _PROMPT_TOKENS))
    seconds = 0.0
    for new_tokens in (2, num_tokens):
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                adapter_names=[folder.name for folder in folders],
            )
        seconds = time.perf_counter() - start
    return count * num_tokens / seconds


if __name__ == "__main__":
    model_folder, adapters = map(Path, sys.argv[1:3])
    typer.echo(main(model_folder, adapters, *map(int, sys.argv[3:])))
