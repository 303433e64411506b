"""The Trainer's names for bitsandbytes' optimizers, such as `optim="paged_adamw_32bit"`.

Without this switch, our optimizer goes in as an argument:
`Trainer(..., optimizer_cls_and_kwargs=(qlora_ref.AdamW, {"lr": 1e-4, "paged": True}))`, and the
same for TRL's SFTTrainer.
"""

from __future__ import annotations

from typing import Any

from transformers import trainer_optimizer

from qlora_ref.optim import AdamW

_HANDLERS = trainer_optimizer._OPTIMIZER_HANDLERS
_THEIRS = dict(_HANDLERS)


def use_for_optimizer_names(enabled: bool = True) -> None:
    """Let the Adam names of bitsandbytes give our AdamW, for the whole process.

    adamw_bnb_8bit, adamw_8bit, paged_adamw_32bit and paged_adamw_8bit. Its other optimizers raise
    NotImplementedError when the Trainer asks for one. `enabled=False` undoes it.
    """
    for name in trainer_optimizer._BITSANDBYTES_OPTIMIZERS:
        _HANDLERS[name] = _ours if enabled else _THEIRS[name]


def _ours(context: Any) -> tuple[type[AdamW], dict[str, Any]]:
    name = str(context.args.optim.value)
    if "adamw" not in name:
        raise NotImplementedError(
            f"optim={name!r} is not available: adamw_8bit and paged_adamw_32bit are"
        )
    options = {"state_bits": 8 if "8bit" in name else 32, "paged": "paged" in name}
    return AdamW, {**context.optimizer_kwargs, **context.adam_kwargs, **options}
