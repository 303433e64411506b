"""matmul_4bit against float64: forward, gradients of every order, and what PyTorch does with it.

Weights are random bytes with random scales, restored by the scalar definition in compare.py: no
quantiser is involved. Gradients and torch.func are in the second half.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from compare import (
    DTYPES,
    ERROR_RATIO,
    TENSOR_CORE_ERROR_RATIO,
    Weight,
    assert_error_at_most_twice_torch,
    assert_same_bits,
    define_matmul,
    normal,
    random_weight,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from qlora_ref import codebooks
from qlora_ref.dispatch import forced_backend
from qlora_ref.matmul_plan import FEW_TOKENS
from qlora_ref.ops import matmul_4bit

OPERATION = "matmul_4bit"

# The compiled loss is one fused sum, the eager one a tree: 120 terms in another order differ by no
# more than 16 roundings.
FUSED_SUM = 16 * 2.0**-24

# (shape of x without K, N, K, block size): one block, K that no block divides, blocks over several
# rows, several blocks a row, odd counts, more tokens than few, single columns, nothing (of one
# number torch may be right by luck, so that no size has one).
SIZES = (
    ((1,), 16, 64, 64),
    ((5,), 7, 30, 32),
    ((3,), 16, 100, 64),
    ((17,), 33, 65, 64),
    ((4,), 64, 16, 256),
    ((2,), 1, 1, 2),
    ((2,), 3, 5, 4096),
    ((8,), 48, 512, 64),
    ((3,), 20, 192, 8),  # several blocks in a vector of codes
    ((3,), 20, 192, 16),
    ((), 24, 96, 64),
    ((2, 3), 24, 96, 64),
    ((3, 13), 24, 96, 64),
    ((0,), 24, 96, 64),
    ((2, 0, 3), 8, 16, 2),
    ((3,), 0, 16, 64),
    ((3,), 16, 0, 64),
)


def error_ratio(dtype: torch.dtype, tokens: int, transposed: bool) -> float:
    """How much of torch's error the forced backend may have."""
    is_for_many = transposed or tokens > FEW_TOKENS
    on_tensor_cores = forced_backend() == "cuda" and dtype != torch.float32 and is_for_many
    return TENSOR_CORE_ERROR_RATIO if on_tensor_cores else ERROR_RATIO


def assert_is_accurate(x: Tensor, weight: Weight, bias, transposed: bool, device: str) -> None:
    dense = weight.dense(x.dtype)
    on_device = None if bias is None else bias.to(device)
    product = matmul_4bit(
        x.to(device), bias=on_device, transposed=transposed, **weight.arguments(device)
    )
    by_torch = linear(x, dense.t() if transposed else dense, bias)
    assert product.device.type == device
    # The rounding of the weight to a narrow dtype is an error too: some kernels do without it.
    exact = define_matmul(x, weight.dense(), bias, transposed)
    ratio = error_ratio(x.dtype, x.shape[:-1].numel(), transposed)
    assert_error_at_most_twice_torch(product, by_torch, exact, ratio)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["float32 scales", "nested scales"])
@pytest.mark.parametrize("kind", ["plain", "bias", "transposed"])
def test_error_is_at_most_twice_that_of_torch(
    kind: str, nested: bool, dtype: torch.dtype, size: tuple, device: str
) -> None:
    batch, rows, columns, block_size = size
    weight = random_weight(rows, columns, block_size, nested)
    x = normal(*batch, rows if kind == "transposed" else columns, seed=5, dtype=dtype)
    bias = normal(rows, seed=6, dtype=dtype) if kind == "bias" else None
    assert_is_accurate(x, weight, bias, kind == "transposed", device)


@pytest.mark.parametrize("columns", [250, 416])  # blocks cross rows, nested ones do
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nested_scales_are_right_beyond_256_blocks(
    dtype: torch.dtype, columns: int, device: str
) -> None:
    weight = random_weight(38, columns, 32, nested=True)
    assert len(weight.nested["nested_absmax"]) == 2
    assert_is_accurate(normal(3, columns, seed=5, dtype=dtype), weight, None, False, device)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_vectors_return_the_restored_weight_bit_for_bit(
    dtype: torch.dtype, nested: bool, transposed: bool, device: str
) -> None:
    # One product with 1 and zeros: a sum without rounding, whatever its order.
    weight = random_weight(7, 90, 32, nested)
    dense = weight.dense(dtype)
    x = torch.eye(7 if transposed else 90, dtype=dtype, device=device)
    product = matmul_4bit(x, transposed=transposed, **weight.arguments(device)).cpu()
    assert torch.equal(product, dense if transposed else dense.t())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sums_of_narrow_products_are_float32(dtype: torch.dtype, device: str) -> None:
    packed = torch.full((2048,), 0xFF).to(torch.uint8)
    weight = Weight(packed, torch.ones(64), codebooks.nf4_codebook(), 64, (1, 4096))
    x = torch.ones(1, 4096, dtype=dtype, device=device)
    # Neither bfloat16 nor float16 counts to 4096 in ones: they stop at 256 and 2048.
    assert matmul_4bit(x, **weight.arguments(device)).tolist() == [[4096.0]]


@pytest.mark.parametrize("name", codebooks.CODEBOOKS)
def test_any_codebook_is_read(name: str, device: str) -> None:
    weight = random_weight(6, 64, 64)
    weight.codebook = codebooks.CODEBOOKS[name]()
    product = matmul_4bit(torch.eye(64, device=device), **weight.arguments(device)).cpu()
    assert torch.equal(product, weight.dense().t())


def test_reads_tensors_that_are_not_contiguous(device: str) -> None:
    weight = random_weight(16, 40, 32)
    arguments, x = weight.arguments(device), normal(40, 9, seed=5).to(device)
    plain = matmul_4bit(x.t().contiguous(), **arguments)
    arguments["packed"] = arguments["packed"].view(2, -1).t().contiguous().t()
    arguments["absmax"] = arguments["absmax"].repeat_interleave(2)[::2]
    assert not (arguments["packed"].is_contiguous() or arguments["absmax"].is_contiguous())
    assert_same_bits(matmul_4bit(x.t(), **arguments), plain)


# Gradients.


def leaves(dtype: torch.dtype, device: str, columns: int = 60) -> tuple[Tensor, Tensor]:
    x = normal(2, 5, columns, seed=7, dtype=dtype).to(device).requires_grad_()
    return x, normal(12, seed=8, dtype=dtype).to(device).requires_grad_()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_dense_product(
    dtype: torch.dtype, nested: bool, device: str
) -> None:
    weight = random_weight(12, 60, 32, nested)
    dense, (x, bias) = weight.dense(dtype), leaves(dtype, device)
    cotangent = normal(2, 5, 12, seed=9, dtype=dtype)
    product = matmul_4bit(x, bias=bias, **weight.arguments(device))
    x_gradient, bias_gradient = torch.autograd.grad(product, (x, bias), cotangent.to(device))
    exact = define_matmul(cotangent, dense, None, transposed=True)
    assert_error_at_most_twice_torch(x_gradient, cotangent @ dense, exact)
    exact_bias = cotangent.double().sum((0, 1))
    assert_error_at_most_twice_torch(bias_gradient, cotangent.sum((0, 1)), exact_bias)


def test_gradient_of_the_transposed_product_is_the_plain_product(device: str) -> None:
    weight, cotangent = random_weight(12, 60, 32), normal(4, 60, seed=9)
    x = normal(4, 12, seed=7).to(device).requires_grad_()
    product = matmul_4bit(x, transposed=True, **weight.arguments(device))
    (gradient,) = torch.autograd.grad(product, x, cotangent.to(device))
    exact = define_matmul(cotangent, weight.dense(), None, transposed=False)
    assert_error_at_most_twice_torch(gradient, cotangent @ weight.dense().t(), exact)


@pytest.mark.parametrize("batch", [(), (0,)], ids=["one row", "no rows"])
def test_gradients_of_one_row_and_of_none(batch: tuple, device: str) -> None:
    weight, cotangent = random_weight(12, 60, 32), normal(*batch, 12, seed=9)
    x = normal(*batch, 60, seed=7).to(device).requires_grad_()
    bias = torch.zeros(12, device=device, requires_grad=True)
    matmul_4bit(x, bias=bias, **weight.arguments(device)).backward(cotangent.to(device))
    exact = define_matmul(cotangent, weight.dense(), None, transposed=True)
    assert_error_at_most_twice_torch(x.grad, cotangent @ weight.dense(), exact)
    assert_same_bits(bias.grad, cotangent.reshape(-1, 12).sum(0))


def test_gradient_of_the_bias_alone(device: str) -> None:
    weight, (x, bias) = random_weight(12, 60, 32), leaves(torch.float32, device)
    product = matmul_4bit(x.detach(), bias=bias, **weight.arguments(device))
    product.sum().backward()
    assert bias.grad.tolist() == [10.0] * 12


def penalised(product, x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Gradients of |d sum(sin(product)) / d(x, bias)|^2, which need the second derivative."""
    first = torch.autograd.grad(product(x, bias).sin().sum(), (x, bias), create_graph=True)
    return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), (x, bias))


@pytest.mark.parametrize("nested", [False, True])
def test_second_derivatives_are_those_of_the_dense_product(nested: bool, device: str) -> None:
    weight = random_weight(12, 60, 32, nested)
    arguments, dense = weight.arguments(device), weight.dense()
    x, bias = leaves(torch.float32, device)
    measured = penalised(lambda x, b: matmul_4bit(x, bias=b, **arguments), x, bias)
    x, bias = leaves(torch.float32, "cpu")
    by_torch = penalised(lambda x, b: linear(x, dense, b), x, bias)
    doubles = [leaf.detach().double().requires_grad_() for leaf in (x, bias)]
    exact = penalised(lambda x, b: linear(x, dense.double(), b), *doubles)
    for triple in zip(measured, by_torch, exact, strict=True):
        assert_error_at_most_twice_torch(*triple)


# What PyTorch does with the operator.


def test_vmap_over_any_dimension_of_x_is_the_batched_product(device: str) -> None:
    weight, (x, bias) = random_weight(12, 60, 32), leaves(torch.float32, device)
    arguments, x = weight.arguments(device), x.detach()
    batched = matmul_4bit(x, bias=bias, **arguments)
    for dim in (0, 1):
        mapped = torch.func.vmap(lambda row: matmul_4bit(row, bias=bias, **arguments), dim, dim)(x)
        exact = define_matmul(x, weight.dense(), bias, transposed=False)
        assert_error_at_most_twice_torch(mapped, batched, exact)


def test_vmap_over_the_weight_is_refused(device: str) -> None:
    arguments = random_weight(12, 60, 32).arguments(device)
    scales = torch.stack([arguments.pop("absmax")] * 2)
    x = normal(3, 60).to(device)
    with pytest.raises(ValueError, match="works over x, not over the weight"):
        torch.func.vmap(lambda absmax: matmul_4bit(x, absmax=absmax, **arguments))(scales)


def test_jacobian_is_the_restored_weight(device: str) -> None:
    weight = random_weight(12, 60, 32)
    arguments, x = weight.arguments(device), normal(60, seed=7).to(device)
    jacobian = torch.func.jacrev(lambda row: matmul_4bit(row, **arguments))(x)
    assert torch.equal(jacobian.cpu(), weight.dense())


def test_per_sample_gradients_are_those_of_single_samples(device: str) -> None:
    weight = random_weight(12, 60, 32)
    arguments, x = weight.arguments(device), normal(4, 60, seed=7).to(device)

    def loss(row: Tensor) -> Tensor:
        return matmul_4bit(row, **arguments).sin().sum()

    def dense_gradients(x: Tensor) -> Tensor:
        dense = weight.dense().to(x.dtype)
        return (x @ dense.t()).cos() @ dense

    gradients = torch.func.vmap(torch.func.grad(loss))(x)
    cpu = x.cpu()
    assert_error_at_most_twice_torch(gradients, dense_gradients(cpu), dense_gradients(cpu.double()))


def test_saved_tensor_hooks_see_the_weight_and_replace_it(device: str) -> None:
    weight, (x, bias) = random_weight(12, 60, 32), leaves(torch.float32, device)
    arguments, seen = weight.arguments(device), []

    def pack(tensor: Tensor) -> tuple:
        seen.append(tensor.data_ptr())
        return tensor.device, tensor.detach().cpu().numpy().copy()

    with saved_tensors_hooks(pack, lambda saved: torch.from_numpy(saved[1]).to(saved[0])):
        product = matmul_4bit(x, bias=bias, **arguments)
    expected = torch.autograd.grad(matmul_4bit(x, bias=bias, **arguments).sum(), (x, bias))
    buffers = [arguments[name] for name in ("packed", "absmax", "codebook")]
    assert {buffer.data_ptr() for buffer in buffers} <= set(seen)
    for buffer in buffers:
        buffer.zero_()  # offloaded: the originals are not needed any more
    gradients = torch.autograd.grad(product.sum(), (x, bias))
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_same_bits(gradient, wanted)


def test_a_weight_changed_before_the_backward_pass_is_an_error(device: str) -> None:
    arguments, (x, _) = random_weight(12, 60, 32).arguments(device), leaves(torch.float32, device)
    product = matmul_4bit(x, **arguments)
    arguments["packed"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient(use_reentrant: bool, device: str) -> None:
    arguments = random_weight(60, 60, 32).arguments(device)

    def layers(x: Tensor) -> Tensor:
        return matmul_4bit(matmul_4bit(x, **arguments).tanh(), **arguments).tanh()

    gradients = []
    for run in (layers, lambda x: checkpoint(layers, x, use_reentrant=use_reentrant)):
        x = normal(5, 60, seed=7).to(device).requires_grad_()
        run(x).sum().backward()
        gradients.append(x.grad)
    assert_same_bits(*gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_neither_product_nor_gradient(dtype: torch.dtype, device: str) -> None:
    arguments, results = random_weight(12, 60, 32).arguments(device), []
    for enabled in (False, True):
        x, bias = leaves(dtype, device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            product = matmul_4bit(x, bias=bias, **arguments)
            results.append((product, *torch.autograd.grad(product.sum(), (x, bias))))
    for without, within in zip(*results, strict=True):
        assert_same_bits(within, without)


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_forward_and_backward_are_those_of_eager(device: str) -> None:
    weight, results = random_weight(12, 60, 32, nested=True), []
    arguments = weight.arguments(device)

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return matmul_4bit(x, bias=bias, **arguments).square().sum()

    for function in (loss, torch.compile(loss, fullgraph=True)):
        x, bias = leaves(torch.float32, device)
        value = function(x, bias)
        results.append((value, *torch.autograd.grad(value, (x, bias))))
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=FUSED_SUM)
    for compiled, eager in zip(results[1][1:], results[0][1:], strict=True):
        assert (compiled - eager).abs().max() <= FUSED_SUM * eager.abs().max()


@pytest.mark.parametrize("kind", ["plain", "bias", "transposed"])
@pytest.mark.parametrize("nested", [False, True])
def test_operator_passes_opcheck(nested: bool, kind: str, device: str) -> None:
    arguments, (x, bias) = (
        random_weight(12, 60, 32, nested).arguments(device),
        leaves(torch.float32, device),
    )
    names = ("packed", "absmax", "codebook", "block_size", "shape")
    nested_names = ("nested_absmax", "nested_codebook", "offset")
    transposed = kind == "transposed"
    if transposed:
        x = normal(5, 12).to(device).requires_grad_()
    torch.library.opcheck(
        torch.ops.qlora_ref.matmul_4bit.default,
        (x, *(arguments[name] for name in names), bias if kind == "bias" else None, transposed)
        + tuple(arguments.get(name) for name in nested_names),
    )


UINT8, DOUBLE, ONES = torch.uint8, torch.float64, torch.ones
NESTED = random_weight(12, 60, 32, nested=True).arguments("cpu")


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"x": ONES(3, 60, dtype=DOUBLE)}, TypeError, "x must be float32.*got torch.float64"),
        (
            {"x": ONES(3, 61)},
            ValueError,
            r"last dimension of x must be K = 60, got shape \(3, 61\)",
        ),
        ({"x": ONES(())}, ValueError, r"last dimension of x must be K = 60, got shape \(\)"),
        ({"transposed": True}, ValueError, "last dimension of x must be N = 12"),
        ({"shape": (720,)}, ValueError, r"shape must be \(N, K\), got \(720,\)"),
        ({"shape": (13, 60)}, ValueError, "780 values need 390 bytes, got 360"),
        ({"packed": ONES(360)}, TypeError, "packed must be torch.uint8"),
        ({"absmax": ONES(22)}, ValueError, "blocks of 32 need 23"),
        ({"absmax": ONES(23, dtype=UINT8)}, TypeError, "absmax must be torch.float32.*uint8"),
        ({"codebook": ONES(15)}, ValueError, r"codebook must have shape \(16,\)"),
        ({"block_size": 31}, ValueError, "block_size must be even"),
        ({"bias": ONES(60)}, ValueError, r"bias must have shape \(12,\), got \(60,\)"),
        ({"bias": ONES(12).half()}, TypeError, "bias must be torch.float32, got torch.float16"),
        ({"x": ONES(12), "bias": ONES(12), "transposed": True}, ValueError, "takes no bias"),
        (NESTED | {"offset": None}, ValueError, "nested_codebook and offset go together"),
        (NESTED | {"absmax": ONES(23)}, TypeError, "codes of nested scales.*must be torch.uint8"),
        (NESTED | {"nested_absmax": ONES(2)}, ValueError, "23 values in blocks of 256 need 1"),
        (NESTED | {"nested_absmax": ONES(1).half()}, TypeError, "nested_absmax must be torch.floa"),
        (NESTED | {"nested_codebook": ONES(16)}, ValueError, r"nested_codebook .* \(256,\)"),
        (NESTED | {"offset": ONES(2)}, ValueError, r"offset must be one number, got shape \(2,\)"),
        (NESTED | {"offset": 1.0}, TypeError, "offset must be a tensor, got float"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, error: type, message: str) -> None:
    arguments = {"x": ONES(3, 60)} | random_weight(12, 60, 32).arguments("cpu")
    with pytest.raises(error, match=message):
        matmul_4bit(**(arguments | changes))
