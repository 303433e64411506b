"""Put 4-bit weights into any model, and say for every module what was done and why.

Read next: lora.py, finetune.py.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ref.calibration import Batch, input_moments
from qlora_ref.checks import FLOAT_DTYPES, check_block_size
from qlora_ref.codebooks import resolve_codebook
from qlora_ref.linear import Linear4bit, dense_parameters, is_conv1d
from qlora_ref.lora import is_output_head, replace_module
from qlora_ref.module4bit import Module4bit
from qlora_ref.parameter4bit import is_expert_tensor
from qlora_ref.places import described, find, install, own_bytes
from qlora_ref.pretrained import let_transformers_save
from qlora_ref.quantized import quantize

LINEAR, EXPERTS = "linear layer", "experts in one tensor"  # why something was converted


@dataclass(frozen=True)
class Decision:
    """What became of one module that holds parameters, or of one tensor of experts, and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    converted: bool
    reason: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_model` did: a `Decision` for everything that holds parameters."""

    decisions: list[Decision]

    @property
    def converted(self) -> list[str]:
        """Names of the layers and of the tensors of experts that are now in 4 bits."""
        return [decision.name for decision in self.decisions if decision.converted]

    @property
    def kept(self) -> dict[str, str]:
        """Names of the modules that were left as they are, with the reason."""
        return {d.name: d.reason for d in self.decisions if not d.converted}

    def __str__(self) -> str:
        before = sum(d.bytes_before for d in self.decisions if d.converted)
        after = sum(d.bytes_after for d in self.decisions if d.converted)
        experts = sum(d.reason == EXPERTS for d in self.decisions)
        what = f"{len(self.converted) - experts} layers"
        what += f" and {experts} tensors of experts" if experts else ""
        lines = [f"{what} to 4 bits: {before:,} to {after:,} bytes"]
        reasons = Counter((d.kind, d.reason) for d in self.decisions if not d.converted)
        lines += [f"kept {count} {kind}: {why}" for (kind, why), count in reasons.items()]
        return "\n".join(lines)


def convert_model(
    model: nn.Module,
    codebook: str | Tensor | Sequence[float] = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    skip: Sequence[str] = (),
    scale_search: bool = False,
    calibration: Sequence[Batch] | None = None,
) -> ConversionReport:
    """Put the weights of a model's linear layers and experts into 4 bits, in place, one at a time.

    Converted are nn.Linear and GPT-2's Conv1D, to Linear4bit, and tensors of three dimensions in a
    module of experts (parameter4bit.py). Kept, whatever `skip` says, are the output head
    (lm_head), weights that are tied to another module, modules that transformers keeps in float32,
    subclasses of nn.Linear (whose owners may read the weight), and everything else.

    skip     names of modules or of tensors of experts to keep as well: a full name, the end of one
             ("q_proj"), or a pattern with * and ?; what lies below a skipped module is kept too
    codebook, block_size, double_quant, compute_dtype, scale_search: as for `Linear4bit`
    calibration  what the model is called with, batch by batch: tensors of token ids, or keyword
             arguments. Then the codes of linear layers are those with a small error of the layers'
             outputs on this text (gptq.py), not those that are nearest; experts keep the nearest.
    returns  ConversionReport; print it, or read `.kept` for what was not converted

    A model of transformers can be saved with `save_pretrained`, as with `checkpoint.save_model`.
    Everything is checked before the first layer is touched. Raises ValueError if there is nothing
    to convert, if an entry of `skip` matches nothing, or if a weight is not finite (by name).
    """
    check_block_size(block_size)
    resolve_codebook(codebook, block_size)
    if isinstance(skip, str):
        raise TypeError(f"skip must be a list of names, got the string {skip!r}: write [{skip!r}]")
    reasons = reasons_to_keep(model, skip)
    names = [name for name, reason in reasons.items() if reason is None]
    if not names:
        raise ValueError(_nothing_message(model, reasons))
    for name in names:
        _check_finite(name, _weight_of(model, name))
    before = {name: described(model, name) for name in reasons}
    let_transformers_save(model, compute_dtype)
    options = {
        "codebook": codebook,
        "block_size": block_size,
        "double_quant": double_quant,
        "scale_search": scale_search,
    }
    linear = [name for name in names if isinstance(find(model, name), nn.Module)]
    if calibration is not None and linear:
        for moments in input_moments(model, linear, calibration):
            for name, hessian in moments.items():
                _convert(model, name, {**options, "hessian": hessian}, compute_dtype)
        names = [name for name in names if name not in linear]
    for name in names:
        _convert(model, name, options, compute_dtype)
    return ConversionReport([_decision(model, n, reasons[n], before[n]) for n in reasons])


def _decision(
    model: nn.Module, name: str, reason: str | None, before: tuple[str, tuple[int, ...], int]
) -> Decision:
    kind, shape, size = before
    if reason is not None:
        return Decision(name, kind, shape, False, reason, size, size)
    after = find(model, name)
    what = LINEAR if isinstance(after, Linear4bit) else EXPERTS
    return Decision(name, kind, shape, True, what, size, own_bytes(after))


def _convert(
    model: nn.Module, name: str, options: dict[str, Any], compute_dtype: torch.dtype | None
) -> None:
    """Convert what has this name. Nothing refers to the dense weight then."""
    dense = find(model, name)
    if isinstance(dense, nn.Module):
        layer = Linear4bit.from_linear(dense, compute_dtype=compute_dtype, **options)
        replace_module(model, name, layer)
    else:
        install(model, name, quantize(dense.detach(), **options))


def reasons_to_keep(model: nn.Module, skip: Sequence[str]) -> dict[str, str | None]:
    """For all that holds parameters of its own: why it is kept, or None to convert it.

    Tensors of experts have entries of their own; a module has one if anything else is in it.
    """
    names = []
    for name, module in model.named_modules():
        own = [leaf for leaf, _ in module.named_parameters(recurse=False)]
        experts = [leaf for leaf in own if is_expert_tensor(module, leaf)]
        names += [name] if len(own) > len(experts) else []
        names += [f"{name}.{leaf}".removeprefix(".") for leaf in experts]
    everything = [*names, *(name for name, _ in model.named_modules())]
    for pattern in skip:
        if not any(_matches(name, pattern) for name in everything):
            raise ValueError(f"skip={pattern!r} matches no module of the model; correct or drop it")
    owners: Counter[int] = Counter()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] += 1
    tied = {key for key, count in owners.items() if count > 1}
    return {name: _reason_to_keep(model, name, skip, tied) for name in names}


def _reason_to_keep(model: nn.Module, name: str, skip: Sequence[str], tied: set[int]) -> str | None:
    found = find(model, name)
    pattern = next((p for p in skip if _matches_or_lies_below(name, p)), None)
    if pattern is not None:
        return f"skip={pattern!r}"
    if isinstance(found, Module4bit):
        return "in 4 bits already"
    parameters = [found] if isinstance(found, Tensor) else found.parameters(recurse=False)
    if isinstance(found, nn.Module):
        if type(found) is not nn.Linear and not is_conv1d(found):
            return _why_not_linear(found)
        if is_output_head(model, name):
            return "output head"
    if any(id(parameter) in tied for parameter in parameters):
        return "tied to another module"
    if any(_matches_or_lies_below(name, p) for p in _kept_in_float32(model)):
        return "the model keeps it in float32"
    weight = _weight_of(model, name)
    if weight.dtype not in FLOAT_DTYPES:
        return f"weight is {weight.dtype}"
    return "the model itself; use Linear4bit.from_linear" if name == "" else None


def _why_not_linear(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "a subclass of nn.Linear"
    if any(parameter.dim() >= 3 for parameter in module.parameters(recurse=False)):
        return "not a linear layer: a parameter of 3 or more dimensions"
    return "not a linear layer"


def _kept_in_float32(model: nn.Module) -> list[str]:
    names: list[str] = []
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names += getattr(model, attribute, None) or []
    return names


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _matches_or_lies_below(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(_matches(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _check_finite(name: str, weight: Tensor) -> None:
    if weight.is_meta:
        return  # no values, good or bad: a model that is only asked for its sizes
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{name}.weight holds values that are not finite; nothing was converted. "
            f"Mend the weights, or keep the layer with skip=[{name!r}]"
        )


def _nothing_message(model: nn.Module, reasons: dict[str, str | None]) -> str:
    seen = {f"{name or 'the model'}: {reason}" for name, reason in reasons.items()}
    listed = "; ".join(sorted(seen)[:5]) or "it has no parameters"
    return f"nothing to convert in a {type(model).__name__}: no nn.Linear is left ({listed})"


def _weight_of(model: nn.Module, name: str) -> Tensor:
    found = find(model, name)
    return found if isinstance(found, Tensor) else dense_parameters(found)[0]
