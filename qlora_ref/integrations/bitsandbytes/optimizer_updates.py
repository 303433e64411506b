"""One step of an optimizer on tensors, as bitsandbytes.functional offers it, on our rules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qlora_ref import ops
from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE
from qlora_ref.optimizer_rules import RULES

_ONE_STATE = ("momentum", "rmsprop", "adagrad", "lion", "lars")


@torch.no_grad()
def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """Step `p` and its float32 states in place; the gradient is multiplied by `gnorm_scale` first.

    optimizer_name  adam (decoupled decay), momentum, rmsprop, adagrad, lion, lamb, lars, ademamix,
                    whose state1 (2, *shape) holds the fast and the slow mean
    max_unorm       of lamb and lars; 0: steps of any length. `unorm_vec` is not written.
    Raises ValueError for other names and for states that do not fit, NotImplementedError for
    skip_zeros and for max_unorm of another optimizer.
    """
    if max_unorm > 0 and optimizer_name not in ("lamb", "lars"):
        raise NotImplementedError("max_unorm is available for lamb and lars")
    moments = _moments(optimizer_name, p, state1, state2, skip_zeros)
    grad = _scaled(g, gnorm_scale)
    if optimizer_name == "adam":
        numbers: dict[str, Any] = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
        numbers |= {"weight_decay": weight_decay, "step": step}
        first, second = moments
        ops.adamw_step([p], [grad], [first], [second], **numbers)
        return
    options = _options((beta1, beta2, beta3), alpha, eps, lr, weight_decay, max_unorm)
    _apply(optimizer_name, p, grad, moments, options, step)


@torch.no_grad()
def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """Step `p` and its states of 8 bits in place: codes of the levels qmap, a scale for 256 each.

    As `optimizer_update_32bit`; of ademamix state1 and absmax1 hold two moments.
    """
    codes = _moments(optimizer_name, p, state1, state2, skip_zeros)
    grad = _scaled(g, gnorm_scale)
    scales: list[Any] = [*(absmax1 if len(codes) == 3 else [absmax1]), absmax2][: len(codes)]
    tables: list[Any] = [*([qmap1] * max(1, len(codes) - 1)), qmap2][: len(codes)]
    if optimizer_name == "adam":
        numbers: dict[str, Any] = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
        numbers |= {"weight_decay": weight_decay, "step": step}
        listed: list[Any] = [[tensor] for tensor in (*codes, *scales)]
        ops.adamw_step([p], [grad], *listed, *tables, **numbers)
        return
    moments = [ops.dequantize_8bit(*part) for part in zip(codes, scales, tables)]
    options = _options((beta1, beta2, beta3), alpha, eps, lr, weight_decay, 0.0)
    _apply(optimizer_name, p, grad, moments, options, step)
    for code, scale, table, moment in zip(codes, scales, tables, moments):
        new, absmax = ops.quantize_8bit(moment, table, DYNAMIC_BLOCK_SIZE, check_finite=False)
        code.copy_(new.view_as(code))
        scale.copy_(absmax.view_as(scale))


def _moments(
    name: str, p: Tensor, state1: Tensor, state2: Tensor | None, skip_zeros: bool
) -> list[Tensor]:
    if name not in (*RULES, "adam"):
        raise ValueError(f"optimizer_name must be adam or one of {sorted(RULES)}, got {name!r}")
    if skip_zeros:
        raise NotImplementedError("skip_zeros is not available: every value is stepped")
    first = list(state1) if name == "ademamix" else [state1]
    moments = first if name in _ONE_STATE or state2 is None else [*first, state2]
    wanted = 1 if name in _ONE_STATE else 3 if name == "ademamix" else 2
    if len(moments) != wanted or any(moment.shape != p.shape for moment in moments):
        found = [tuple(t.shape) for t in (state1, state2) if t is not None]
        raise ValueError(
            f"{name} has {wanted} moments of the parameter's shape {tuple(p.shape)}, got {found}"
        )
    return moments


def _scaled(g: Tensor, factor: float) -> Tensor:
    return g if factor == 1 else (g.float() * factor).to(g.dtype)


def _options(
    betas: tuple[float, ...],
    alpha: float,
    eps: float,
    lr: float,
    weight_decay: float,
    max_unorm: float,
) -> dict[str, Any]:
    options: dict[str, Any] = {"betas": betas, "alpha": alpha, "eps": eps, "lr": lr}
    options |= {"weight_decay": weight_decay, "max_unorm": max_unorm or math.inf}
    return {**options, "t_alpha": None, "t_beta3": None}


def _apply(
    name: str, p: Tensor, g: Tensor, moments: list[Tensor], options: dict[str, Any], step: int
) -> None:
    values = p.float()  # the parameter itself, if that is what it is
    RULES[name].update(values, g.float().clone(), moments, options, step)
    if values is not p:
        p.copy_(values)
