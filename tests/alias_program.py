"""A program that knows bitsandbytes, transformers and PEFT, and has never heard of us.

    python alias_program.py DENSE FOLDER

quantises, saves, loads, trains an adapter, merges it, and prints what it sees as JSON.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from bitsandbytes.nn.modules import Params4bit

TOKENS = torch.arange(16)[None]


def load(folder: str | Path, **arguments: object) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, **arguments
    )


def main(dense: str, folder: str) -> None:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = load(dense, quantization_config=config)
    quantised = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    model.save_pretrained(folder)
    same = torch.equal(load(folder).train()(TOKENS).logits, model.train()(TOKENS).logits)
    seen = train_and_merge(load(folder), folder)
    child = "import bitsandbytes; print(bitsandbytes.__file__)"
    found = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    seen |= {
        "files": [bnb.__file__, found.stdout.strip()],
        "version": [bnb.__version__, importlib.metadata.version("bitsandbytes")],
        "found": importlib.util.find_spec("bitsandbytes") is not None,
        "layers": len(quantised),
        "params": all(isinstance(m.weight, Params4bit) for m in quantised),
        "parameters": load(folder).num_parameters(),
        "reloaded": same,
        "operators": str(torch.ops.bitsandbytes.gemm_4bit.default._schema).split("(")[0],
    }
    print(json.dumps(seen))


def train_and_merge(model: Any, folder: str) -> dict[str, Any]:
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]} for _ in range(4)]
    arguments = transformers.TrainingArguments(
        folder + "/run",
        max_steps=6,
        optim="paged_adamw_8bit",
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    merged = model.merge_and_unload()
    return {
        "losses": losses,
        "optimizer": type(trainer.optimizer.optimizer).__module__,
        "merged": sum(isinstance(m, bnb.nn.Linear4bit) for m in merged.modules()),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
