"""What the operations compute, written as scalar loops, and how results are compared.

Nothing here comes from the package: each definition follows the rule in the contract (ops.py) one
value at a time, in numpy.float32 scalars, which round every product and sum as IEEE 754 says.
They are slow and plain on purpose. The tests hold every backend against them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Result = TypeVar("Result")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Blocks of the 8-bit scales and optimizer moments.
NESTED_BLOCK_SIZE = 256

# "At most twice the error of the same formula in plain torch", both against float64. Two orders of
# one float32 sum differ by less than that; a product in a narrower format differs by thousands.
ERROR_RATIO = 2.0

# The CUDA kernel for many tokens rounds levels, scales and their products to the narrow dtype:
# three roundings of a weight, where the formula in torch has one. Its mean square error is 1.5 to
# 1.8 times torch's, so that the root is far from twice; but where a sum is of few terms, the
# largest of a few errors may have all three roundings on one side. Scales of twice the precision
# would spare one of them, for 0.6 instructions a weight, of which the ceilings leave half.
TENSOR_CORE_ERROR_RATIO = 3.0

# Torch's sum can be exact by luck, above all when it is short: one rounding of the sum of the
# terms' magnitudes is allowed on top.
FLOAT32_ROUNDING = 2.0**-24

F32 = np.float32


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded N(0, 1) values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    """Seeded uint8 values: any packed pair of codes, or any 8-bit code."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


# Quantising and restoring.


def define_thresholds(levels: Sequence[np.float32]) -> tuple[list[np.float32], list[np.float32]]:
    """The distinct levels in ascending order, and the float32 midpoints between them."""
    ordered = sorted(set(levels))
    return ordered, [(low + high) / F32(2) for low, high in itertools.pairwise(ordered)]


def define_codes(x: Tensor, codebook: Tensor, block_size: int) -> tuple[list[int], Tensor]:
    """The code of each value and the absmax of each block: rules 1 to 3, one value at a time."""
    values = x.detach().cpu().float().flatten().numpy()
    levels = list(codebook.cpu().numpy())
    ordered, thresholds = define_thresholds(levels)
    lowest_code = [levels.index(level) for level in ordered]
    bounds = [float(threshold) for threshold in thresholds]  # widened exactly: faster to compare
    codes, scales = [], []
    for start in range(0, len(values), block_size):
        block = values[start : start + block_size]
        absmax = largest_magnitude(block)
        scales.append(absmax)
        for value in block:
            normalised = float(normalise(value, absmax))
            # A NaN exceeds no threshold; a value on a threshold does not exceed it.
            codes.append(lowest_code[sum(normalised > bound for bound in bounds)])
    return codes, torch.tensor(np.array(scales, dtype=F32))


def largest_magnitude(block: Sequence[np.float32]) -> np.float32:
    if any(np.isnan(value) for value in block):
        return F32(math.nan)
    return max(abs(value) for value in block)


def normalise(value: np.float32, absmax: np.float32) -> np.float32:
    """value * (1 / absmax), or value / absmax where the reciprocal overflows; 0 in a zero block."""
    if absmax == 0:
        return F32(0)
    with np.errstate(all="ignore"):
        reciprocal = F32(1) / absmax
        return value / absmax if np.isinf(reciprocal) else value * reciprocal


def values_on_the_edge(codebook: Tensor, absmaxes: Sequence[float], block_size: int) -> Tensor:
    """Blocks (absmaxes, block_size) of threshold * absmax and its two float32 neighbours.

    Here a quotient x / absmax often falls on the other side than the product x * (1 / absmax).
    """
    _, thresholds = define_thresholds(list(codebook.numpy()))
    blocks = np.zeros((len(absmaxes), block_size), dtype=F32)
    for block, absmax in zip(blocks, absmaxes, strict=True):
        edges = np.array(thresholds, dtype=F32) * F32(absmax)
        near = [edges, np.nextafter(edges, F32(-math.inf)), np.nextafter(edges, F32(math.inf))]
        block[0], block[1 : 1 + 3 * len(edges)] = absmax, np.concatenate(near)
    return torch.from_numpy(blocks)


def define_quantize(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`quantize_4bit`: two codes a byte, the even one high; an odd end is filled up with a zero."""
    codes, absmax = define_codes(x, codebook, block_size)
    if len(codes) % 2:
        codes.append(codebook.tolist().index(0.0))
    pairs = zip(codes[0::2], codes[1::2], strict=True)
    return torch.tensor([16 * high + low for high, low in pairs], dtype=torch.uint8), absmax


def define_quantize_8bit(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    codes, absmax = define_codes(x, codebook, block_size)
    return torch.tensor(codes, dtype=torch.uint8).reshape(x.shape), absmax


def nibbles(packed: Tensor, n: int) -> list[int]:
    """The first n codes in packed bytes."""
    return [code for byte in packed.flatten().tolist() for code in divmod(byte, 16)][:n]


def define_scaling(
    codes: Sequence[int], absmax: Tensor, codebook: Tensor, block_size: int
) -> np.ndarray:
    """codebook[code] * absmax of the block: one float32 product a value."""
    levels, scales = codebook.cpu().numpy(), absmax.cpu().numpy()
    with np.errstate(all="ignore"):
        values = [levels[code] * scales[i // block_size] for i, code in enumerate(codes)]
    return np.array(values, dtype=F32)


def define_dequantize(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    codes = nibbles(packed, math.prod(shape))
    return round_to(define_scaling(codes, absmax, codebook, block_size), dtype).reshape(shape)


def define_dequantize_8bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    values = define_scaling(codes.flatten().tolist(), absmax, codebook, block_size)
    return round_to(values, dtype).reshape(codes.shape)


def round_to(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Round float32 values to nearest even; subnormals are kept, overflow gives infinity."""
    if dtype == torch.float32:
        return torch.from_numpy(values)
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(values.astype(np.float16))
    # bfloat16 is the upper half of a float32. Adding 0x7fff, or 0x8000 to an odd upper half,
    # carries into it exactly when the lower half is above, or on, the middle.
    bits = values.view(np.uint32).astype(np.uint64)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    upper = np.where(np.isnan(values), 0x7FC0, upper)
    return torch.from_numpy(upper.astype(np.uint16)).view(torch.bfloat16)


# Products.


def define_nested_scales(
    codes: Tensor, nested_absmax: Tensor, nested_codebook: Tensor, offset: Tensor
) -> Tensor:
    """nested_codebook[code] * nested_absmax, rounded, + offset, rounded."""
    scaled = define_scaling(codes.tolist(), nested_absmax, nested_codebook, NESTED_BLOCK_SIZE)
    shift = F32(offset.item())
    return torch.tensor(np.array([value + shift for value in scaled], dtype=F32))


@dataclasses.dataclass
class Weight:
    """A quantised weight (N, K): arguments for matmul_4bit, and what they stand for."""

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    block_size: int
    shape: tuple[int, int]
    nested: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def arguments(self, device: str) -> dict:
        tensors = {"packed": self.packed, "absmax": self.absmax, "codebook": self.codebook}
        on_device = {name: tensor.to(device) for name, tensor in (tensors | self.nested).items()}
        return on_device | {"block_size": self.block_size, "shape": self.shape}

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the scalar definitions restore."""
        scales = self.absmax
        if self.nested:
            scales = define_nested_scales(self.absmax, *self.nested.values())
        layout = (self.codebook, self.block_size, self.shape)
        return define_dequantize(self.packed, scales, *layout, dtype)


def random_weight(rows: int, columns: int, block_size: int, nested: bool = False) -> Weight:
    """Random codes, levels and scales: no quantiser is involved."""
    n = rows * columns
    blocks, codebook = -(-n // block_size), normal(16, seed=1)
    layout = (random_bytes((n + 1) // 2), codebook, block_size, (rows, columns))
    if not nested:
        absmax = normal(blocks, seed=2)  # of either sign, as BOF4-S has them
        absmax += absmax.sign() / 10
        return Weight(layout[0], absmax, *layout[1:])
    nested_arguments = {
        "nested_absmax": normal(-(-blocks // NESTED_BLOCK_SIZE), seed=3).abs(),
        "nested_codebook": normal(256, seed=4),
        "offset": torch.tensor(1.3),
    }
    return Weight(layout[0], random_bytes(blocks, seed=5), *layout[1:], nested_arguments)


def define_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x W^T + bias, or x W, in float64."""
    matrix = weight.double().cpu()
    product = x.detach().double().cpu() @ (matrix if transposed else matrix.T)
    return product if bias is None else product + bias.detach().double().cpu()


def assert_error_at_most_twice_torch(
    actual: Tensor,
    by_torch: Tensor,
    exact: Tensor,
    ratio: float = ERROR_RATIO,
    root_ratio: float = ERROR_RATIO,
) -> None:
    """The largest and the mean square error against float64, beside those of plain torch.

    actual    the result under test
    by_torch  the same formula in plain torch, in the same dtype
    exact     float64
    ratio     another bound than twice, for the largest, and for the root of the mean square
    """
    assert actual.dtype == by_torch.dtype and actual.shape == by_torch.shape == exact.shape
    if exact.numel() == 0:
        return
    error = (actual.detach().double().cpu() - exact).abs()
    allowed = (by_torch.detach().double().cpu() - exact).abs()
    floor = FLOAT32_ROUNDING * exact.abs().max().item()
    bounds = ((ratio, torch.max), (root_ratio, lambda t: t.square().mean().sqrt()))
    for bound, measure in bounds:
        measured, limit = measure(error).item(), bound * measure(allowed).item() + floor
        assert measured <= limit, f"error {measured:.3g} exceeds {limit:.3g}"


# AdamW.


def define_adamw(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step with float32 moments; the scalars are worked out in double and rounded once."""
    decay, step_size = F32(1 - lr * weight_decay), F32(lr / (1 - beta1**step))
    root_correction = F32((1 - beta2**step) ** -0.5)
    keep_m, take_m, keep_v, take_v = F32(beta1), F32(1 - beta1), F32(beta2), F32(1 - beta2)
    values = [t.detach().cpu().float().flatten().numpy() for t in (param, grad, m, v)]
    results = []
    with np.errstate(all="ignore"):
        for p_i, g_i, m_i, v_i in zip(*values, strict=True):
            m_i = m_i * keep_m + g_i * take_m
            v_i = v_i * keep_v + g_i * g_i * take_v
            denominator = np.sqrt(v_i) * root_correction + F32(eps)
            results.append((p_i * decay - m_i / denominator * step_size, m_i, v_i))
    p32, m32, v32 = np.array(results, dtype=F32).reshape(-1, 3).T.copy()
    shape = param.shape
    new_m, new_v = torch.from_numpy(m32).reshape(shape), torch.from_numpy(v32).reshape(shape)
    return round_to(p32, param.dtype).reshape(shape), new_m, new_v


def define_adamw_8bit(
    param: Tensor,
    grad: Tensor,
    moments: Sequence[Tensor],
    absmaxes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    **options: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One step with 8-bit moments: restore, update, use, quantise anew."""
    restored = [
        define_dequantize_8bit(codes, absmax, codebook, NESTED_BLOCK_SIZE, torch.float32)
        for codes, absmax, codebook in zip(moments, absmaxes, codebooks, strict=True)
    ]
    new_param, *new_moments = define_adamw(param, grad, *restored, **options)
    quantised = [
        define_quantize_8bit(moment, codebook, NESTED_BLOCK_SIZE)
        for moment, codebook in zip(new_moments, codebooks, strict=True)
    ]
    return new_param, [codes for codes, _ in quantised], [absmax for _, absmax in quantised]


# Threads.


def with_threads(counts: Iterable[int], run: Callable[[], Result]) -> list[Result]:
    """What `run` returns under each of these numbers of torch's threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


# Equality.


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and bits: -0 differs from 0. Any NaN equals any NaN: they have no sign."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    different = (bits(actual) != bits(expected)).flatten()
    if different.any():
        first = int(different.nonzero()[0])
        values = actual.flatten()[first].item(), expected.flatten()[first].item()
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} differ, the first at {first}: "
            f"{values[0]!r} is not {values[1]!r}"
        )


def bits(x: Tensor) -> Tensor:
    """The bit patterns, as integers; every NaN gets the same one."""
    if not x.dtype.is_floating_point:
        return x
    x = torch.where(torch.isnan(x), torch.full_like(x, math.nan), x)
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)
