"""Linear4bit and its checkpoints against the installed bitsandbytes, in both directions.

Their layers stay in train mode, with rows of whole blocks: see the last tests for what happens in
`eval()`, and test_bitsandbytes_values.py for rows that blocks cross.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compare import (
    DTYPES,
    ERROR_RATIO,
    FLOAT32_ROUNDING,
    assert_error_at_most_twice_torch,
    assert_same_bits,
    define_matmul,
    normal,
)
from safetensors.torch import load_file, save_file
from test_matmul_4bit import error_ratio
from torch import Tensor, nn

from qlora_ref.linear import Linear4bit

bnb = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is missing: pip install bitsandbytes==0.50.2"
)
F = bnb.functional

OPERATION = "matmul_4bit"
LONG_ON_SIMULATED_GPUS = True

KINDS = ("nf4", "fp4")
STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)

# Only on CPUs with AVX512-BF16 does `eval()` change anything in their layers.
HAS_VECTOR_CODE = bool(F.has_avx512bf16())

# What an output in bfloat16 precision is off by, relative, and one in float32 is not.
BFLOAT16_ERROR = 2.0**-10


def their_layer(
    rows: int = 96,
    columns: int = 128,
    kind: str = "nf4",
    nested: bool = False,
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype = torch.uint8,
    block_size: int = 64,
    bias: bool = True,
    seed: int = 0,
) -> nn.Module:
    options = {"compress_statistics": nested, "quant_type": kind, "quant_storage": storage}
    layer = bnb.nn.Linear4bit(columns, rows, bias=bias, compute_dtype=dtype, **options)
    weight = normal(rows, columns, seed=seed, dtype=dtype)
    layer.weight = bnb.nn.Params4bit(weight, blocksize=block_size, module=layer, **options)
    if bias:
        layer.bias.data = normal(rows, seed=seed + 1, dtype=dtype)
    return layer.to("cpu")  # quantises


def our_layer(theirs: nn.Module) -> Linear4bit:
    """Our layer, loaded from the state dict of theirs."""
    has_bias = theirs.bias is not None
    dtype = theirs.weight.quant_state.dtype
    layer = Linear4bit(theirs.in_features, theirs.out_features, bias=has_bias, dtype=dtype)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    return layer


def their_weight(layer: nn.Module) -> Tensor:
    # Without AVX-512 it restores FP4's code 8, a zero, as -0: -0 + 0 is 0.
    return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state) + 0.0


def state_of(tensors: dict[str, Tensor], key: str) -> dict:
    return json.loads(bytes(tensors[key].tolist()))


# Checkpoints.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_their_state_dict_loads_to_the_same_values_bit_for_bit(
    kind: str, nested: bool, storage: torch.dtype, dtype: torch.dtype
) -> None:
    theirs = their_layer(kind=kind, nested=nested, storage=storage, dtype=dtype)
    layer = our_layer(theirs)
    assert_same_bits(layer.dequantize(), their_weight(theirs))
    assert_same_bits(layer.bias, theirs.bias)
    assert layer.weight.dtype == torch.uint8 and layer.codebook_name == kind


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saving_their_state_dict_again_writes_the_same_file(kind: str, nested: bool) -> None:
    before = their_layer(kind=kind, nested=nested).state_dict()
    after = our_layer(their_layer(kind=kind, nested=nested)).state_dict()
    state_key = f"weight.quant_state.bitsandbytes__{kind}"
    assert before.keys() == after.keys()
    assert state_of(before, state_key) == state_of(after, state_key)
    for key in before.keys() - {state_key, "weight.quant_map"}:
        assert_same_bits(after[key], before[key])
    assert torch.equal(after["weight.quant_map"], before["weight.quant_map"])  # but for -0


@pytest.mark.parametrize("block_size", [32, 128, 1024, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_their_block_size_is_read_from_the_state_dict(block_size: int, nested: bool) -> None:
    theirs = their_layer(5, block_size, nested=nested, block_size=block_size)
    layer = our_layer(theirs)
    assert layer.block_size == block_size
    assert_same_bits(layer.quantized_weight.absmax, their_scales(theirs))
    if block_size < 4096:  # from 2048 on they compile, for seconds
        assert_same_bits(layer.dequantize(), their_weight(theirs))


def their_scales(layer: nn.Module) -> Tensor:
    state = layer.weight.quant_state
    if not state.nested:
        return state.absmax
    return F.dequantize_blockwise(state.absmax, state.state2) + state.offset


def read_by_bitsandbytes(tensors: dict[str, Tensor]) -> nn.Module:
    """The way transformers loads a quantised weight."""
    stats = {key: part for key, part in tensors.items() if key.startswith("weight.")}
    return bnb.nn.Params4bit.from_prequantized(
        data=tensors["weight"], quantized_stats=stats, device="cpu"
    )


def dense_layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(128, 96, dtype=dtype)
    linear.weight.data = normal(96, 128, seed=4, dtype=dtype)
    return linear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_reads_our_file_to_the_same_values_bit_for_bit(
    kind: str, nested: bool, block_size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    layer = Linear4bit.from_linear(dense_layer(dtype), kind, block_size, nested)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    weight = read_by_bitsandbytes(load_file(tmp_path / "layer.safetensors"))
    assert weight.quant_state.nested == nested and weight.blocksize == block_size
    assert_same_bits(F.dequantize_4bit(weight.data, weight.quant_state), layer.dequantize())
    x = normal(3, 128, dtype=dtype)
    product = bnb.matmul_4bit(x, weight, weight.quant_state)
    exact = define_matmul(x, layer.dequantize(), None, False)
    assert_error_at_most_twice_torch(product, x @ layer.dequantize().T, exact)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("codebook", ["nf3", "int4", "fp4_ocp", [-1.0, 0.0, 0.3, 1.0]], ids=str)
def test_codebooks_that_bitsandbytes_lacks_are_refused_by_it_and_not_misread(
    codebook: str | list, nested: bool
) -> None:
    tensors = Linear4bit.from_linear(dense_layer(), codebook, double_quant=nested).state_dict()
    with pytest.raises(ValueError, match="qlora_ref__"):
        read_by_bitsandbytes(tensors)
    again = Linear4bit(128, 96)
    again.load_state_dict(tensors)
    original = Linear4bit.from_linear(dense_layer(), codebook, double_quant=nested)
    assert_same_bits(again.dequantize(), original.dequantize())


def test_stored_quant_map_is_ignored_there_and_refused_here_when_it_is_not_the_named_one() -> None:
    theirs = their_layer()
    tensors = theirs.state_dict()
    tensors["weight.quant_map"] = tensors["weight.quant_map"] * 0.5
    weight = read_by_bitsandbytes(dict(tensors))
    assert_same_bits(F.dequantize_4bit(weight.data, weight.quant_state), their_weight(theirs))
    with pytest.raises(RuntimeError, match="quant_map does not hold the levels of nf4"):
        Linear4bit(128, 96).load_state_dict(tensors)


@pytest.mark.parametrize("nested", [False, True])
def test_their_layer_cannot_load_its_own_state_dict_and_ours_can(nested: bool) -> None:
    theirs, other = their_layer(nested=nested), their_layer(nested=nested, seed=8)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(theirs.state_dict())
    # Not strict, it takes the codes and keeps the scales that it had.
    other.load_state_dict(theirs.state_dict(), strict=False)
    assert torch.equal(other.weight.data, theirs.weight.data)
    assert not torch.equal(their_weight(other), their_weight(theirs))
    layer = our_layer(theirs)
    again = our_layer(their_layer(nested=nested, seed=8))
    again.load_state_dict(layer.state_dict())
    assert_same_bits(again.dequantize(), their_weight(theirs))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_half_corrupts_bytes_stored_as_floats_there_and_packed_bytes_survive_here(
    storage: torch.dtype,
) -> None:
    theirs = their_layer(storage=storage)
    expected, packed = their_weight(theirs), theirs.weight.data.view(torch.uint8).clone()
    layer = our_layer(theirs).half()
    assert torch.equal(layer.weight.flatten(), packed.flatten())
    assert_same_bits(layer.dequantize(torch.float32), expected)
    theirs.half()
    their_packed = theirs.weight.data.view(torch.uint8).flatten()
    survives = storage in (torch.uint8, torch.float16)
    assert torch.equal(their_packed, packed.flatten()) == survives


# Outputs and gradients.

# Of a few numbers theirs may be right by luck: no product here has so few.
SHAPES = [(1, 96, 128), (7, 33, 64), (16, 128, 256), (8, 24, 512), (3, 50, 1024)]


def run(layer: nn.Module, x: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of input and bias."""
    x = x.to(layer.weight.device, copy=True).requires_grad_()
    y = layer(x)
    y.backward(output_grad.to(y.device))
    return y.detach().cpu(), x.grad.cpu(), layer.bias.grad.cpu()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_have_at_most_twice_the_error_of_theirs(
    dtype: torch.dtype, shape: tuple, kind: str, nested: bool, device: str
) -> None:
    count, rows, columns = shape
    theirs = their_layer(rows, columns, kind, nested, dtype).train()
    x, grad = (normal(count, size, seed=size + 9, dtype=dtype) for size in (columns, rows))
    weight = their_weight(theirs)
    exact = (
        define_matmul(x, weight, theirs.bias, False),
        define_matmul(grad, weight, None, True),
        grad.double().sum(dim=0),
    )
    mine = run(our_layer(theirs).to(device), x, grad)
    ratios = (ERROR_RATIO, error_ratio(dtype, count, transposed=True), ERROR_RATIO)
    for actual, expected, truth, ratio in zip(mine, run(theirs, x, grad), exact, ratios):
        # The exact product has the weight as it is rounded already: that error is ours alone here.
        assert_error_at_most_twice_torch(actual, expected, truth, ratio, ratio)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_outputs_and_gradients_differ_from_theirs_by_the_order_of_sums_only(
    shape: tuple, kind: str, nested: bool, device: str
) -> None:
    count, rows, columns = shape
    theirs = their_layer(rows, columns, kind, nested).train()
    x, grad = normal(count, columns, seed=2), normal(count, rows, seed=3)
    magnitudes = their_weight(theirs).abs()
    # Any order of a sum of n products and a bias makes at most n + 1 roundings, each of at most
    # half a unit of the sum of the magnitudes; two orders may be apart by two such errors.
    allowed = (
        2 * (columns + 1) * FLOAT32_ROUNDING * (x.abs() @ magnitudes.T + theirs.bias.abs()),
        2 * (rows + 1) * FLOAT32_ROUNDING * (grad.abs() @ magnitudes),
        2 * count * FLOAT32_ROUNDING * grad.abs().sum(dim=0),
    )
    mine = run(our_layer(theirs).to(device), x, grad)
    for actual, expected, limit in zip(mine, run(theirs, x, grad), allowed):
        assert ((actual - expected).abs() <= limit).all()


# How their layers change in `eval()`, on some CPUs.


def relative_error(y: Tensor, exact: Tensor) -> float:
    return ((y.detach().cpu().double() - exact).norm() / exact.norm()).item()


def test_evaluating_in_float32_drops_to_bfloat16_there_and_not_here(device: str) -> None:
    theirs = their_layer()
    x = normal(5, 128, seed=9)
    exact = define_matmul(x, their_weight(theirs), theirs.bias, False)
    layer = our_layer(theirs).to(device)
    trained, evaluated = layer.train()(x.to(device)), layer.eval()(x.to(device))
    assert_same_bits(evaluated, trained)
    assert relative_error(evaluated, exact) < BFLOAT16_ERROR / 1000
    assert relative_error(theirs.train()(x), exact) < BFLOAT16_ERROR / 1000
    assert (relative_error(theirs.eval()(x), exact) > BFLOAT16_ERROR) == HAS_VECTOR_CODE


# PyTorch's own remark that their kernel has no gradient.
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
def test_training_after_an_evaluation_loses_the_gradient_there_and_not_here(device: str) -> None:
    theirs = their_layer(bias=False)
    layer, weight = our_layer(theirs).to(device), their_weight(theirs)
    x = normal(5, 128, seed=9)
    gradients = []
    for module, where in ((theirs, "cpu"), (layer, device)):
        packed = module.weight.detach().clone()
        module.eval()(x.to(where))
        repacked = packed.shape != module.weight.shape or not torch.equal(packed, module.weight)
        assert repacked == (HAS_VECTOR_CODE and module is theirs)
        leaf = x.to(where, copy=True).requires_grad_()
        module.train()(leaf).sum().backward()
        gradients.append(leaf.grad)
    assert (gradients[0] is None) == HAS_VECTOR_CODE
    exact = define_matmul(torch.ones(5, 96), weight, None, True)
    assert_error_at_most_twice_torch(gradients[1].cpu(), torch.ones(5, 96) @ weight, exact)


def test_file_saved_after_an_evaluation_there_is_refused_here_and_not_misread() -> None:
    theirs = their_layer()
    expected = their_weight(theirs)
    theirs.eval()(normal(5, 128))
    tensors = theirs.state_dict()
    assert (tensors["weight.absmax"].dtype == torch.bfloat16) == HAS_VECTOR_CODE
    layer = Linear4bit(128, 96)
    if HAS_VECTOR_CODE:
        with pytest.raises(RuntimeError, match="absmax"):
            layer.load_state_dict(tensors)
    else:
        layer.load_state_dict(tensors)
        assert_same_bits(layer.dequantize(), expected)
