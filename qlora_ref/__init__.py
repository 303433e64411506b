"""QLoRA from scratch: fine-tune a model whose frozen weights are held in 4 bits.

Where to start reading: codebooks.py, packing.py, reference/dequantize_4bit.py, ops.py, dispatch.py,
linear.py, lora.py, finetune.py.
"""

from qlora_ref import codebooks, ops
from qlora_ref.convert import ConversionReport, convert_model
from qlora_ref.dispatch import explain, force_backend
from qlora_ref.linear import Embedding4bit, Linear4bit
from qlora_ref.lora import LoRA, LoraReport, add_lora, merge_lora
from qlora_ref.optim import AdamW
from qlora_ref.quantized import QuantizationError, QuantizedTensor, quantize
from qlora_ref.stand_in import as_bitsandbytes
from qlora_ref.version import __version__

__all__ = [
    "AdamW",
    "ConversionReport",
    "Embedding4bit",
    "Linear4bit",
    "LoRA",
    "LoraReport",
    "QuantizationError",
    "QuantizedTensor",
    "__version__",
    "add_lora",
    "as_bitsandbytes",
    "codebooks",
    "convert_model",
    "explain",
    "force_backend",
    "merge_lora",
    "ops",
    "quantize",
]
