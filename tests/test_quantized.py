"""QuantizedTensor: expected values come from a loop over the definition or from a closed form."""

import copy
import dataclasses
import math
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import (
    DTYPES,
    assert_same_bits,
    define_dequantize,
    normal,
    with_threads,
)
from torch import Tensor

from qlora_ref.codebooks import CODEBOOKS, dynamic_codebook
from qlora_ref.quantized import QuantizedTensor, quantize

SHAPES = ((), (0,), (1,), (7,), (0, 4), (3, 5), (4, 64), (3, 100), (2, 3, 11))
# One block, a short block, odd counts, several blocks a row, several rows a block; with blocks of
# 2 there are more than 256 scales, so more than one nested block.
MATRICES = ((1, 1), (5, 7), (8, 64), (3, 200), (100, 10), (41, 33))


def definition(tensor: QuantizedTensor, absmax: Tensor) -> Tensor:
    layout = (tensor.codebook, tensor.block_size, tensor.shape, tensor.dtype)
    return define_dequantize(tensor.packed, absmax, *layout)


def double_quantised_by_loop(absmax: np.ndarray) -> tuple[np.float32, list[int], list[np.float32]]:
    """Offset, nested codes and restored scales, one scale at a time (numerics.md, rule 6)."""
    offset = np.float32(math.fsum(absmax.tolist()) / len(absmax))
    levels = dynamic_codebook().numpy()
    codes, restored = [], []
    for start in range(0, len(absmax), 256):
        centred = absmax[start : start + 256] - offset
        largest = np.abs(centred).max()
        for value in centred:
            normalised = value * (np.float32(1) / largest)
            distances = np.abs(levels.astype(np.float64) - np.float64(normalised))
            codes.append(int(distances.argmin()))  # the first of equals: the lower level
            restored.append(np.float32(levels[codes[-1]] * largest) + offset)
    return offset, codes, restored


def with_bit_flipped(part: Tensor) -> Tensor:
    flipped = part.clone()
    flipped.view(-1).view(torch.uint8)[-1] ^= 1
    return flipped


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_level_times_scale_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for name, block_size in product(CODEBOOKS, (2, 64, 100)):
        tensor = quantize(normal(*shape, dtype=dtype), name, block_size)
        assert tensor.dtype == dtype
        assert_same_bits(tensor.dequantize(), definition(tensor, tensor.scales))


@pytest.mark.parametrize("count", [1, 65, 64 * 256, 64 * 256 + 1, 64 * 700 + 13])
def test_double_quantised_scales_follow_the_rule_bit_for_bit(count: int) -> None:
    x = normal(count) * (1 + 9 * torch.linspace(0, 1, count))  # scales of many sizes
    plain, double = quantize(x), quantize(x, double_quant=True)
    if count <= 64:  # a single scale is its own mean
        offset, codes, restored = plain.scales[0].item(), [127], [plain.scales[0].item()]
    else:
        offset, codes, restored = double_quantised_by_loop(plain.scales.numpy())
    assert double.offset is not None and double.offset.item() == offset
    assert double.scales.tolist() == codes
    assert double.absmax.tolist() == [float(scale) for scale in restored]
    assert torch.equal(double.packed, plain.packed)  # codes are made with the exact scales


def test_a_double_quantised_tensor_is_restored_with_its_decoded_scales() -> None:
    tensor = quantize(normal(37, 70), block_size=2, double_quant=True, codebook="fp4")
    _, _, restored = double_quantised_by_loop(
        quantize(normal(37, 70), block_size=2, codebook="fp4").scales.numpy()
    )
    assert_same_bits(tensor.dequantize(), definition(tensor, torch.tensor(np.array(restored))))


def test_equal_scales_survive_double_quantisation_exactly() -> None:
    x = torch.full((1000,), 0.1)
    tensor = quantize(x, double_quant=True)
    assert torch.equal(tensor.absmax, torch.full((16,), 0.1))
    assert torch.equal(tensor.dequantize(), x)


def test_the_offset_is_the_exact_mean_rounded_once_for_scales_of_every_size() -> None:
    # From 1e-30 to 1e30: a sum in float32 would lose the small ones.
    exponents = torch.linspace(-30, 30, 2 * 5001, dtype=torch.float64)
    x = (10**exponents).float()
    tensor = quantize(x, block_size=2, double_quant=True)
    absmax = x.view(-1, 2).amax(dim=1).tolist()
    assert tensor.offset is not None
    assert tensor.offset.item() == float(np.float32(math.fsum(absmax) / len(absmax)))


def test_the_offset_does_not_depend_on_the_number_of_threads() -> None:
    # 2^17 scales: above torch's grain of 2^15 elements, sums are split between threads.
    x = normal(2**19)
    tensors = with_threads((1, 2, 5), lambda: quantize(x, block_size=4, double_quant=True))
    assert tensors[0] == tensors[1] == tensors[2]


@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 64 * 256, 64 * 256 + 1, 99_999])
def test_nbytes_counts_codes_and_scales(n: int) -> None:
    blocks = math.ceil(n / 64)
    plain, double = quantize(torch.ones(n)), quantize(torch.ones(n), double_quant=True)
    assert plain.nbytes == math.ceil(n / 2) + 4 * blocks
    assert double.nbytes == math.ceil(n / 2) + blocks + 4 * math.ceil(blocks / 256) + 4
    for tensor in (plain, double):
        assert tensor.bits_per_parameter == (8 * tensor.nbytes / n if n else 0)


def test_bits_per_parameter_are_those_of_the_paper() -> None:
    x = torch.ones(2**20)
    assert quantize(x).bits_per_parameter == 4 + 32 / 64
    offset_bits = 32 / 2**20  # one float32 for the whole tensor, which the paper leaves out
    expected = 4 + 8 / 64 + 32 / (64 * 256) + offset_bits
    assert quantize(x, double_quant=True).bits_per_parameter == expected
    assert expected == pytest.approx(4.127, abs=1e-4)


def test_the_error_on_normal_weights_is_the_exact_one_and_double_quantisation_adds_little() -> None:
    x = normal(2**20)
    plain, double = quantize(x).error(x).mse, quantize(x, double_quant=True).error(x).mse
    # Exact by integration over the block maximum (science.md 2.2). 4.2e-6 is the standard error
    # with 2^24 samples, 4 times that with 2^20; five of them.
    assert plain == pytest.approx(8.46005e-3, abs=5 * 4 * 4.2e-6)
    assert plain < double <= 1.002 * plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_worked_out_in_float64(dtype: torch.dtype) -> None:
    x = normal(13, 77, dtype=dtype)
    error = quantize(x).error(x)
    original = x.double().numpy()
    # The float32 reconstruction counts, not the one rounded to the dtype of x.
    difference = quantize(x).dequantize(torch.float32).double().numpy() - original
    signal, noise = (original**2).sum(), (difference**2).sum()
    # Sums of 1001 float64 squares in another order differ by less than 1001 * 2^-53.
    assert error.mse == pytest.approx((difference**2).mean(), rel=1e-12)
    assert error.max == np.abs(difference).max()
    assert error.snr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-12)


def test_the_error_of_a_tensor_of_levels_is_zero_and_its_snr_infinite() -> None:
    x = CODEBOOKS["nf4"]()
    error = quantize(x).error(x)
    assert (error.mse, error.max, error.snr_db) == (0.0, 0.0, math.inf)
    assert quantize(x[:0]).error(x[:0]).mse == 0.0
    with pytest.raises(ValueError, match=r"\(16,\), got \(2, 8\)"):
        quantize(x).error(x.view(2, 8))


def test_repr_tells_what_is_in_it() -> None:
    text = repr(quantize(torch.ones(10, 64), "fp4", 32, double_quant=True))
    for part in ("(10, 64)", "torch.float32", "'fp4'", "block_size=32", "double-quantised", "cpu"):
        assert part in text
    # 320 bytes of codes, 20 codes of scales, a nested scale and an offset: 348.
    assert "348 bytes, 4.350 bits per parameter" in text
    assert "float32 scales" in repr(quantize(torch.ones(3)))


def test_tensors_are_equal_when_all_their_bits_are() -> None:
    x = normal(9, 71)
    assert quantize(x, double_quant=True) == quantize(x.clone(), double_quant=True)
    assert quantize(x) != quantize(x, double_quant=True)
    assert quantize(x) != quantize(x.view(71, 9))
    assert quantize(x) != quantize(x).to(torch.bfloat16)
    assert quantize(x) != "quantize(x)"


@pytest.mark.parametrize(
    "part", ["packed", "scales", "codebook", "nested_absmax", "nested_codebook", "offset"]
)
def test_tensors_that_differ_in_one_bit_are_not_equal(part: str) -> None:
    tensor = quantize(normal(9, 71), double_quant=True)
    other = dataclasses.replace(tensor, **{part: with_bit_flipped(getattr(tensor, part))})
    assert tensor != other and not tensor == other


def test_hash_is_refused_since_equality_looks_at_values() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(quantize(torch.ones(4)))


def test_to_a_dtype_changes_what_is_restored_and_no_code() -> None:
    tensor = quantize(normal(5, 64), double_quant=True)
    half = tensor.to(torch.float16)
    assert torch.equal(half.dequantize(), tensor.dequantize().half())
    assert half.to(torch.float32) == tensor
    with pytest.raises(TypeError, match="float64"):
        tensor.to(torch.float64)


@pytest.mark.parametrize("double_quant", [False, True])
def test_to_a_device_moves_every_part(double_quant: bool) -> None:
    moved = quantize(normal(5, 64), double_quant=double_quant).to("meta")
    parts = [getattr(moved, field.name) for field in dataclasses.fields(moved)]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    assert len(tensors) == (6 if double_quant else 3)
    assert {part.device.type for part in [*tensors, moved.dequantize()]} == {"meta"}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_pickle_deepcopy_and_files_keep_every_bit(
    shape: tuple[int, ...], double_quant: bool, tmp_path: Path
) -> None:
    file = tmp_path / "weight.safetensors"
    for codebook, dtype in product([*CODEBOOKS, (-1.0, -0.25, 0.0, 0.5, 1.0)], DTYPES):
        x = normal(*shape, dtype=dtype)
        tensor = quantize(x, codebook, block_size=2, double_quant=double_quant)
        tensor.save(file)
        copies = pickle.loads(pickle.dumps(tensor)), copy.deepcopy(tensor)
        for other in (*copies, QuantizedTensor.load(file)):
            assert other == tensor
    assert list(tmp_path.iterdir()) == [file]


def test_a_deepcopy_shares_no_storage() -> None:
    tensor = quantize(normal(4, 64), double_quant=True)
    other = copy.deepcopy(tensor)
    other.packed.zero_()
    assert other != tensor == quantize(normal(4, 64), double_quant=True)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", MATRICES)
def test_rows_are_the_indexed_rows_of_the_restored_matrix(
    shape: tuple[int, int], double_quant: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    for block_size, dtype in product((2, 64, 100, 1024), DTYPES):
        tensor = quantize(normal(*shape, dtype=dtype), "fp4", block_size, double_quant)
        dense = tensor.dequantize()
        for size in ((), (0,), (9,), (2, 3)):
            indices = torch.randint(shape[0], size, generator=generator)
            for kind in (torch.int64, torch.int32):
                rows = tensor.rows(indices.to(kind))
                assert rows.shape == (*size, shape[1])
                assert_same_bits(rows, dense[indices])
        half = tensor.dequantize(torch.float16)
        assert torch.equal(tensor.rows(indices, torch.float16), half[indices])


@pytest.mark.parametrize("index", [-1, 5, -6, 2**31])
def test_rows_refuses_an_index_that_is_not_in_the_matrix(index: int) -> None:
    with pytest.raises(IndexError):
        quantize(normal(5, 64)).rows(torch.tensor([0, index]))


MISFITS: list[tuple[str, Any, type[Exception], str]] = [
    ("packed", torch.zeros(31, dtype=torch.uint8), ValueError, "32 bytes, got 31"),
    ("packed", torch.zeros(32, dtype=torch.int8), TypeError, "packed must be torch.uint8"),
    ("scales", torch.zeros(3, dtype=torch.uint8), ValueError, r"need 2, got shape \(3,\)"),
    ("scales", torch.zeros(2), TypeError, "absmax .* must be torch.uint8, got torch.float32"),
    ("codebook", torch.zeros(15), ValueError, r"codebook must have shape \(16,\)"),
    ("codebook", torch.zeros(16).double(), TypeError, "codebook must be torch.float32"),
    ("block_size", 33, ValueError, "even"),
    ("block_size", 0, ValueError, "at least 2"),
    ("block_size", 32.0, TypeError, "block_size must be an int"),
    ("shape", (8, 9), ValueError, "72 values need 36"),
    ("dtype", torch.float64, TypeError, "float64"),
    ("nested_absmax", None, ValueError, "go together"),
    ("nested_absmax", torch.zeros(2), ValueError, "nested_absmax must hold"),
    ("nested_absmax", torch.zeros(1).half(), TypeError, "nested_absmax must be torch.float32"),
    ("nested_codebook", None, ValueError, "go together"),
    ("nested_codebook", torch.zeros(16), ValueError, r"nested_codebook must have shape \(256,\)"),
    ("offset", None, ValueError, "go together"),
    ("offset", torch.zeros(2), ValueError, "offset must be one number"),
    ("offset", torch.tensor(0), TypeError, "offset must be torch.float32"),
]


@pytest.mark.parametrize(("field", "value", "error", "message"), MISFITS)
def test_parts_that_do_not_fit_together_are_refused(
    field: str, value: Any, error: type[Exception], message: str
) -> None:
    tensor = quantize(normal(8, 8), block_size=32, double_quant=True)
    with pytest.raises(error, match=message):
        dataclasses.replace(tensor, **{field: value})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_value_that_is_not_finite_is_named(bad: float, dtype: torch.dtype) -> None:
    x = torch.ones(3, 50, dtype=dtype)
    x[1, 7] = x[2, 1] = bad
    with pytest.raises(ValueError, match=rf"x\[1, 7\] is {bad}"):
        quantize(x, double_quant=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_without_the_check_other_blocks_are_not_touched(bad: float) -> None:
    x = normal(4, 64)
    clean = quantize(x).dequantize()
    x[2, 5] = bad
    restored = quantize(x, check_finite=False).dequantize()
    others = [0, 1, 3]
    assert torch.equal(restored[others], clean[others])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(4, dtype=torch.float64)}, TypeError, r"float64.*\.float\(\)"),
        ({"x": torch.ones(4, dtype=torch.int32)}, TypeError, "int32"),
        ({"x": [1.0, 2.0]}, TypeError, "x must be a tensor, got list"),
        ({"codebook": "nf5"}, ValueError, "'nf5'.*nf4"),
        ({"codebook": [0.0, 0.5]}, ValueError, "must be 1"),
        ({"block_size": 63}, ValueError, "even"),
        ({"block_size": True}, TypeError, "int"),
    ],
)
def test_quantize_refuses_what_it_cannot_do(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize(**{"x": torch.ones(4), **arguments})
