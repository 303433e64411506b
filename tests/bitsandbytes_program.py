"""transformers with the installed bitsandbytes, in a process of its own: `ask` it for

    ("quantize", DENSE, SAVED, {"bnb_4bit_quant_type": "nf4"})
    ("logits", SAVED, OUTPUT)      for tokens 0 to 15, in training mode: in evaluation mode the
                                   library rearranges weights
    ("adapt", DENSE, ADAPTER, SAVED, OUTPUT)    the same in float32 with PEFT's adapter on NF4,
                                                which is saved anew

All tests share one process, which takes longer to start than to answer.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import IO, Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

# At once: tests hide it from their own process.
INSTALLED = importlib.util.find_spec("bitsandbytes") is not None


def ask(*job: Any) -> None:
    """Have it do a job; skips where bitsandbytes is missing."""
    if not INSTALLED:
        pytest.skip("bitsandbytes is missing: pip install bitsandbytes==0.50.2")
    process, errors = _process()
    print(json.dumps(job, default=str), file=process.stdin, flush=True)
    if process.stdout.readline() != "done\n":
        process.wait()
        errors.seek(0)
        _process.cache_clear()
        raise AssertionError(errors.read()[-3000:])


@functools.cache
def _process() -> tuple[Any, IO[str]]:
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},  # bitsandbytes looks for kernels on the hub
    )
    return process, errors


# In that process, which ends when its input does.


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


def adapt(dense: str, adapter: str, saved: str, output: str) -> None:
    import peft

    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, quantization_config=config
    )
    model = peft.PeftModel.from_pretrained(base, adapter).train()
    found = model(torch.arange(16)[None]).logits
    save_file({"logits": found.detach().contiguous()}, output)
    model.save_pretrained(saved)


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, *job = json.loads(line)
        {"quantize": quantize, "logits": logits, "adapt": adapt}[name](*job)
        print("done", file=answers, flush=True)
