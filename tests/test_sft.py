"""TRL's SFTTrainer on a model that is quantised as it loads, with a paged 8-bit optimizer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_ref import AdamW
from qlora_ref.integrations import peft as qlora_peft
from qlora_ref.integrations.peft import LoraLinear4bit
from qlora_ref.integrations.transformers import QLoRAConfig

TINY_LLAMA = Path(__file__).parent / "data" / "tiny_llama"
PAGED = (AdamW, {"lr": 1e-2, "state_bits": 8, "paged": True})

pytestmark = pytest.mark.slow  # TRL brings packages that nothing else here needs


def trainer(folder: Path) -> Any:
    trl = pytest.importorskip("trl", reason="TRL is missing: pip install -c constraints.txt .[trl]")
    import datasets
    import peft
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        TINY_LLAMA, quantization_config=QLoRAConfig("nf4"), dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA)
    rows = [{"text": f"LOVE, n. A temporary insanity, number {i}."} for i in range(16)]
    arguments = trl.SFTConfig(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        max_length=64,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    return trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=512, target_modules="all-linear", task_type="CAUSAL_LM"),
        optimizer_cls_and_kwargs=PAGED,
    )


def losses_of(run: Any) -> list[float]:
    return [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]


def test_it_trains_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    qlora_peft.enable()
    run = trainer(tmp_path)
    assert sum(isinstance(m, LoraLinear4bit) for m in run.model.modules()) > 0
    run.train()
    losses = losses_of(run)
    assert len(losses) == 4 and losses[-1] < losses[0] - 1
    report = run.optimizer.optimizer.paging_report()
    assert report is not None and report.state_bytes > 0
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    states = again.optimizer.optimizer.state.values()
    assert {state["step"] for state in states} == {4}
    # SFTTrainer holds adapters in bfloat16, and PEFT reads them back as float32: not the same bits.
    # A step from a state of zeros would be another one altogether: 0.1 and more in the loss.
    assert losses_of(again)[-2:] == pytest.approx(losses[2:], abs=0.01)
