"""Let `save_pretrained` of transformers write a model whose layers we put into 4 bits."""

from __future__ import annotations

import torch
from torch import nn


def let_transformers_save(model: nn.Module, compute_dtype: torch.dtype | None = None) -> None:
    """Have config.json say what is in 4 bits at the time a model, or a part of it, is saved.

    Else transformers would write the codes as if they were dense weights, which nothing can read.
    Does nothing to modules that are not of transformers, or that have a quantiser already, nor
    under transformers before 5: there, checkpoint.save_model is what saves.
    """
    pretrained = [module for module in model.modules() if _is_pretrained(module)]
    if not pretrained:
        return
    try:
        from qlora_ref.integrations.transformers import QLoRAConfig, QLoRAQuantizer
    except ImportError:
        return
    for module in pretrained:
        if getattr(module, "hf_quantizer", None) is None:
            quantizer = QLoRAQuantizer(QLoRAConfig(compute_dtype=compute_dtype))
            # Not `is_quantized` as well: float(), half() and training go on as for dense models.
            module.hf_quantizer = quantizer  # type: ignore[assignment]


def _is_pretrained(module: nn.Module) -> bool:
    # By name, since transformers need not be installed.
    kinds = {(kind.__module__, kind.__name__) for kind in type(module).__mro__}
    return ("transformers.modeling_utils", "PreTrainedModel") in kinds
