"""The operations as PyTorch operators: what autograd, torch.compile and torch.func know of them.

Each schema becomes `torch.ops.qlora_ref.<name>`. Its implementation asks dispatch.py for a
backend. Fake implementations tell torch.compile the shapes; `matmul_4bit` has a gradient, which
is the same operator with the weight transposed, so that it has gradients of every order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_ref import dispatch

_SCHEMAS = {
    "quantize_4bit": (
        "(Tensor x, Tensor codebook, int block_size, bool check_finite) -> (Tensor, Tensor)"
    ),
    "dequantize_4bit": (
        "(Tensor packed, Tensor absmax, Tensor codebook, int block_size, SymInt[] shape, "
        "ScalarType dtype, Tensor? nested_absmax=None, Tensor? nested_codebook=None, "
        "Tensor? offset=None) -> Tensor"
    ),
    "quantize_8bit": (
        "(Tensor x, Tensor codebook, int block_size, bool check_finite) -> (Tensor, Tensor)"
    ),
    "dequantize_8bit": (
        "(Tensor codes, Tensor absmax, Tensor codebook, int block_size, ScalarType dtype) -> Tensor"
    ),
    "matmul_4bit": (
        "(Tensor x, Tensor packed, Tensor absmax, Tensor codebook, int block_size, SymInt[] shape, "
        "Tensor? bias, bool transposed, Tensor? nested_absmax, Tensor? nested_codebook, "
        "Tensor? offset) -> Tensor"
    ),
    "adamw_step": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] first_moments, "
        "Tensor(c!)[] second_moments, Tensor(d!)[] first_absmaxes, Tensor(e!)[] second_absmaxes, "
        "Tensor? first_codebook, Tensor? second_codebook, float lr, float beta1, float beta2, "
        "float eps, float weight_decay, int step) -> ()"
    ),
}


def _run(operation: str) -> Callable[..., Any]:
    def run(first: Any, *arguments: Any) -> Any:
        device = first.device if isinstance(first, Tensor) else first[0].device
        return dispatch.select(operation, device)(first, *arguments)

    return run


def _quantize(operation: str) -> Callable[..., tuple[Tensor, Tensor]]:
    run = _run(operation)

    def quantize(x: Tensor, codebook: Tensor, block_size: int, check_finite: bool) -> Any:
        codes, absmax = run(x, codebook, block_size)
        # A block with a value that is not finite has an absmax that is not, and so has the largest
        # one of them: one look at the scales is a look at everything.
        if check_finite and absmax.numel() > 0 and not math.isfinite(absmax.max().item()):
            raise ValueError(_non_finite_message(x))
        return codes, absmax

    return quantize


def _non_finite_message(x: Tensor) -> str:
    position = int((~torch.isfinite(x.flatten())).nonzero()[0])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), x.shape))
    return (
        f"x must be finite, but x{list(index)} is {x.flatten()[position].item()}; one such value "
        "spoils its whole block. Mend the tensor, or pass check_finite=False"
    )


def _update_in_place(operation: str) -> Callable[..., None]:
    run = _run(operation)

    def update(*arguments: Any) -> None:
        run(*arguments)
        # A kernel that writes through a pointer is not seen by autograd, which must know that what
        # it has saved of these tensors is out of date.
        params, _, *states = arguments[:6]
        torch.autograd.graph.increment_version([t for group in (params, *states) for t in group])

    return update


_IMPLEMENTATIONS = {
    "quantize_4bit": _quantize,
    "quantize_8bit": _quantize,
    "adamw_step": _update_in_place,
}
_library = torch.library.Library("qlora_ref", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _implement = _IMPLEMENTATIONS.get(_name, _run)
    _library.impl(_name, _implement(_name), "CompositeExplicitAutograd")

quantize_4bit = torch.ops.qlora_ref.quantize_4bit.default
dequantize_4bit = torch.ops.qlora_ref.dequantize_4bit.default
quantize_8bit = torch.ops.qlora_ref.quantize_8bit.default
dequantize_8bit = torch.ops.qlora_ref.dequantize_8bit.default
adamw_step = torch.ops.qlora_ref.adamw_step.default


@torch.library.register_fake("qlora_ref::quantize_4bit")
def _fake_quantize_4bit(
    x: Tensor, codebook: Tensor, block_size: int, check_finite: bool
) -> tuple[Tensor, Tensor]:
    packed = x.new_empty(((x.numel() + 1) // 2,), dtype=torch.uint8)
    return packed, _fake_absmax(x, block_size)


@torch.library.register_fake("qlora_ref::quantize_8bit")
def _fake_quantize_8bit(
    x: Tensor, codebook: Tensor, block_size: int, check_finite: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), _fake_absmax(x, block_size)


def _fake_absmax(x: Tensor, block_size: int) -> Tensor:
    return x.new_empty(((x.numel() + block_size - 1) // block_size,), dtype=torch.float32)


@torch.library.register_fake("qlora_ref::dequantize_4bit")
def _fake_dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
    *nested: Tensor | None,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("qlora_ref::dequantize_8bit")
def _fake_dequantize_8bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@torch.library.register_fake("qlora_ref::matmul_4bit")
def _fake_matmul_4bit(x: Tensor, *arguments: Any) -> Tensor:
    shape, transposed = arguments[4], arguments[6]
    return x.new_empty((*x.shape[:-1], shape[1] if transposed else shape[0]))


@torch.library.register_fake("qlora_ref::adamw_step")
def _fake_adamw_step(*arguments: Any) -> None:
    return None


def _save_for_matmul_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, block_size, shape, bias, transposed = inputs[:8]
    # Through save_for_backward, so that saved-tensor hooks (checkpointing, offloading) see all.
    ctx.save_for_backward(*tensors, *inputs[8:])
    ctx.block_size, ctx.shape, ctx.transposed = block_size, shape, transposed
    ctx.bias_dtype = None if bias is None else bias.dtype


def _matmul_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    *weight, nested_absmax, nested_codebook, offset = ctx.saved_tensors
    x_gradient = bias_gradient = None
    if ctx.needs_input_grad[0]:
        layout = (ctx.block_size, ctx.shape, None, not ctx.transposed)
        nested = (nested_absmax, nested_codebook, offset)
        x_gradient = matmul_4bit(gradient.contiguous(), *weight, *layout, *nested)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    return x_gradient, None, None, None, None, None, bias_gradient, *[None] * 4


torch.library.register_autograd(
    "qlora_ref::matmul_4bit", _matmul_gradient, setup_context=_save_for_matmul_gradient
)


_run_matmul = _run("matmul_4bit")


class _Matmul4bit(torch.autograd.Function):
    # torch.func refuses operators with a registered gradient and wants a Function; torch.compile
    # wants the operator. Both share one rule.
    setup_context = staticmethod(_save_for_matmul_gradient)
    backward = staticmethod(_matmul_gradient)

    @staticmethod
    def forward(*arguments: Any) -> Any:
        if _is_plain(arguments[0]):
            return _run_matmul(*arguments)
        return torch.ops.qlora_ref.matmul_4bit.default(*arguments)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
        for argument, dim in zip(arguments, in_dims[1:]):
            if isinstance(argument, Tensor) and dim is not None:
                raise ValueError("vmap over matmul_4bit works over x, not over the weight or bias")
        return matmul_4bit(x.movedim(in_dims[0], 0).contiguous(), *arguments), 0


def matmul_4bit(*arguments: Any) -> Tensor:
    """The differentiable operator; see ops.matmul_4bit."""
    if torch.compiler.is_compiling():
        return torch.ops.qlora_ref.matmul_4bit.default(*arguments)
    x, bias = arguments[0], arguments[6]
    needs_gradient = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not needs_gradient and _is_plain(x) and (bias is None or _is_plain(bias)):
        return _run_matmul(*arguments)
    product: Tensor = _Matmul4bit.apply(*arguments)
    return product


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _is_plain(x: Tensor) -> bool:
    """Whether nobody looks on who must see an operator: no subclass but Parameter, no meta
    tensor, mode, transform, lazy negation or lazy zeros (which the dispatcher carries out).

    The way through PyTorch's dispatcher to Python and back takes longer than a small product.
    """
    return (
        type(x) in _PLAIN_TYPES
        and not x.is_meta
        and not x.is_neg()
        and not x._is_zerotensor()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def has_memory(x: Tensor) -> bool:
    """Whether a tensor's values lie where its address says, in the memory of this process."""
    return not torch.compiler.is_compiling() and x.is_cpu and _is_plain(x)
