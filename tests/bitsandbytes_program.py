"""transformers with the installed bitsandbytes, in a process of its own.

    python bitsandbytes_program.py quantize DENSE SAVED '{"bnb_4bit_quant_type": "nf4", ...}'
    python bitsandbytes_program.py logits SAVED OUTPUT

The second writes the logits for tokens 0 to 15 in training mode: in evaluation mode the library
rearranges its weights.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from safetensors.torch import save_file


def main(command: str, source: str, target: str, options: str = "{}") -> None:
    arguments = {}
    if command == "quantize":
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, **json.loads(options))
        arguments["quantization_config"] = config
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, **arguments
    )
    if command == "quantize":
        model.save_pretrained(target)
    else:
        logits = model.train()(torch.arange(16)[None]).logits.detach().contiguous()
        save_file({"logits": logits}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
