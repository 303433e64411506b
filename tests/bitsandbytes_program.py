"""transformers with the installed bitsandbytes, in a process of its own.

    python bitsandbytes_program.py '[["quantize", DENSE, SAVED, {"bnb_4bit_quant_type": "nf4"}],
                                     ["logits", SAVED, OUTPUT], ...]'

Logits are for tokens 0 to 15, in training mode: in evaluation mode the library rearranges weights.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from safetensors.torch import save_file


def load(folder: str, **arguments: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, **arguments
    )


def quantize(dense: str, saved: str, options: dict[str, Any]) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    load(dense, quantization_config=config).save_pretrained(saved)


def logits(saved: str, output: str) -> None:
    found = load(saved).train()(torch.arange(16)[None]).logits
    save_file({"logits": found.detach().contiguous()}, output)


if __name__ == "__main__":
    for name, *job in json.loads(sys.argv[1]):
        {"quantize": quantize, "logits": logits}[name](*job)
