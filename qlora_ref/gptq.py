"""Codes that keep the outputs of a layer, not its weights: error feedback (GPTQ) on any codebook.

A layer sees inputs x with second moments H = mean(x x^T). Quantised to Q, its outputs are off by

    E = mean |W x - Q x|^2 = trace((W - Q) H (W - Q)^T)

Rounding each weight to its nearest level ignores that errors of different columns add up in the
output. Here the columns are rounded one after the other, and what each one is off by is made up
for by the columns that are still to come. Storage and readers stay as they are.

Source: Frantar et al., GPTQ (arXiv 2210.17323), section 3.3; the sweeps afterwards are coordinate
descent on the same E, as in Behdin et al., QuantEase (arXiv 2309.01885).
Read next: calibration.py, where H comes from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_ref.codebooks import decision_thresholds
from qlora_ref.reference.blockwise import scale_blocks

# Columns whose errors reach the rest of the matrix in one product.
_BATCH = 128
# Rows whose scales are fitted together: a few hundred MB for the largest layers.
_ROWS = 16
# How strongly a fitted scale is drawn to the one that it replaces; for blocks of zeros it decides.
_RIDGE = 1e-6


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * 1 in float64: no input is taken for absent or for certain.

    Raises ValueError for an H that is not square, symmetric and finite.
    """
    hessian = hessian.double()
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian must have shape (K, K), got {tuple(hessian.shape)}")
    if not torch.isfinite(hessian).all() or not torch.allclose(hessian, hessian.t()):
        raise ValueError("hessian must be finite and symmetric: mean(x x^T) of a layer's inputs")
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    return hessian + (damping * mean if mean > 0 else 1.0) * identity


def feed_back_errors(
    weight: Tensor, hessian: Tensor, scales: Tensor, codebook: Tensor, block_size: int
) -> Tensor:
    """Codes by error feedback: columns in order of falling H[j, j], each rounded to its levels.

        U = the upper Cholesky factor of H^-1, in that order
        column j:  e = (w_j - q_j) / U[j, j];   w_k -= e U[j, k]  for every k after j

    weight   float (N, K)
    hessian  float64 (K, K)                 damped
    scales   float32 (ceil(N K / block_size),)
    returns  uint8 (N K,)
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    columns = weight.double().t()[order]  # a row of this is a column of the weight
    rounding = _Rounding(codebook)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(columns), _BATCH):
        batch, rows = columns[start : start + _BATCH], factor[start : start + _BATCH]
        errors = torch.empty_like(batch)
        for i, column in enumerate(order[start : start + _BATCH].tolist()):
            scale = _column_scales(scales, weight.shape, column, block_size)
            codes[:, column], rounded = rounding(batch[i], scale)
            errors[i] = (batch[i] - rounded) / rows[i, start + i]
            batch[i:] -= torch.outer(rows[i, start + i : start + len(batch)], errors[i])
        rest = start + len(batch)
        columns[rest:] -= rows[:, rest:].t() @ errors
    return codes.flatten()


def descend(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scales: Tensor,
    codebook: Tensor,
    block_size: int,
) -> Tensor:
    """One sweep of coordinate descent: each column takes its best codes, the others held fixed.

        R = H (W - Q)^T;   column j:  q_j = level nearest to  q_j + R[j] / H[j, j];   R follows

    codes    uint8 (N K,)      what the sweep starts from; E does not rise
    returns  uint8 (N K,)      as in `feed_back_errors`
    """
    codes = codes.view(weight.shape).clone()
    restored = restore(codes, scales, codebook, block_size)
    residual = hessian @ (weight.double() - restored).t()  # (K, N)
    rounding = _Rounding(codebook)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    for batch in order.split(_BATCH):
        near, moved = residual[batch], torch.empty_like(residual[: len(batch)])
        for i, column in enumerate(batch.tolist()):
            scale = _column_scales(scales, weight.shape, column, block_size)
            old = restored[:, column]
            best = old + near[i] / hessian[column, column]
            codes[:, column], new = rounding(best, scale)
            moved[i] = old - new
            near += torch.outer(hessian[batch, column], moved[i])
        residual += hessian[:, batch] @ moved
    return codes.flatten()


def fit_scales(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scales: Tensor,
    codebook: Tensor,
    block_size: int,
) -> Tensor:
    """The scales with the least E under given codes: least squares, all blocks of a row at once.

    With the levels L[b] of a row's block b in its place of K, and zeros elsewhere, q = sum s_b L[b]
    and s solves  A s = y,  A[b, c] = L[b] H L[c]^T,  y[b] = w H L[b]^T.

    returns  float32 (ceil(N K / block_size),)    the same scales where blocks cross rows
    """
    (rows, width), blocks = weight.shape, weight.shape[1] // block_size
    if width % block_size:
        return scales
    levels = codebook.double()[codes.view(rows, blocks, block_size).int()]
    old, fitted = scales.double().view(rows, blocks), []
    grouped = hessian.view(blocks, block_size, width)
    for part, w, before in zip(levels.split(_ROWS), weight.split(_ROWS), old.split(_ROWS)):
        target = ((w.double() @ hessian).view(part.shape) * part).sum(dim=2)
        spread = torch.einsum("rbk,bkc->rbc", part, grouped).view(*part.shape[:2], *part.shape[1:])
        matrix = torch.einsum("rbck,rck->rbc", spread, part)
        ridge = _RIDGE * matrix.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).clamp(min=1e-300)
        matrix += torch.diag_embed(ridge.expand_as(before))
        solved = torch.linalg.solve(matrix, target + ridge * before)
        fitted.append(torch.where(solved * before > 0, solved, before))  # no scale changes its sign
    return torch.cat(fitted).float().flatten()


def output_error(weight: Tensor, hessian: Tensor, restored: Tensor) -> float:
    """E = trace((W - Q) H (W - Q)^T), in float64: the mean squared error of a layer's outputs."""
    difference = weight.double() - restored.double()
    return ((difference @ hessian.double()) * difference).sum().item()


def restore(codes: Tensor, scales: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    """The float32 values of codes (N, K), not packed, in float64."""
    values = scale_blocks(codebook[codes.flatten().int()], scales, block_size)
    return values.view(codes.shape).double()


class _Rounding:
    """The nearest level under a scale each: its code, and its value in float64."""

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook
        self.thresholds, self.codes = decision_thresholds(codebook)

    def __call__(self, x: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        normalised = torch.where(scales == 0, 0.0, x / scales)
        codes = self.codes[torch.bucketize(normalised, self.thresholds)]
        return codes, (self.codebook[codes.int()] * scales).double()


def _column_scales(scales: Tensor, shape: torch.Size, column: int, block_size: int) -> Tensor:
    """The scale of each value in a column of a matrix whose blocks run along its rows."""
    starts = torch.arange(shape[0], device=scales.device) * shape[1]
    return scales[(starts + column) // block_size]
