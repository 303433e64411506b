"""Odd arguments of the C++ backend: the reference's answer, or an error before C is called.

A kernel believes what it is told of addresses and sizes, so that a wrong one would end the process.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_same_bits, normal, random_bytes
from native_program import DYNAMIC, DYNAMIC_UNSIGNED, NF4
from torch import Tensor

from qlora_ref import AdamW, ops
from qlora_ref.dispatch import force_backend, force_isa

N = 1031  # prime: nothing is a multiple of anything
BLOCKS = -(-N // 64)
ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 2}

PACKED, CODES, SCALES = random_bytes(N // 2 + 1), random_bytes(N), normal(BLOCKS, seed=1).abs()


def step(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    ops.adamw_step([param], [grad], [m], [v], **(ADAMW | options))
    return [param, m, v]


def step_8bit(param: Tensor, grad: Tensor, *state: Tensor) -> list[Tensor]:
    lists = [[tensor] for tensor in (param, grad, *state)]
    ops.adamw_step(*lists, DYNAMIC, DYNAMIC_UNSIGNED, **ADAMW)
    return [param, *state]


# Each operation as a function of its tensors, with tensors for it.
FEW = -(-N // 256)
CASES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "quantize_4bit": (ops.quantize_4bit, [normal(N), NF4]),
    "dequantize_4bit": (
        lambda *tensors: ops.dequantize_4bit(*tensors, 64, (N,), torch.bfloat16),
        [PACKED, SCALES, NF4],
    ),
    "quantize_8bit": (ops.quantize_8bit, [normal(N), DYNAMIC]),
    "dequantize_8bit": (
        lambda *tensors: ops.dequantize_8bit(*tensors, 64, torch.float16),
        [CODES, SCALES, DYNAMIC],
    ),
    "matmul_4bit": (
        lambda *tensors: ops.matmul_4bit(*tensors, 64, (1, N)),
        # Small whole numbers, whose sums are exact in any order.
        [normal(N).round(), PACKED, torch.arange(1.0, BLOCKS + 1), torch.arange(16) - 8.0],
    ),
    "adamw_step": (step, [normal(N, seed=seed).abs() for seed in range(4)]),
    "adamw_step 8-bit": (
        step_8bit,
        [
            *(normal(N), normal(N, seed=1), random_bytes(N), random_bytes(N, seed=1)),
            *(normal(FEW, seed=2).abs(), normal(FEW, seed=3).abs()),
        ],
    ),
}
IN_PLACE = [name for name in CASES if name.startswith("adamw")]


@pytest.fixture(autouse=True)
def forced(isa: str) -> Iterator[None]:
    with force_backend("cpu"), force_isa(isa):
        yield


def results_of(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    results = function(*tensors)
    return [results] if isinstance(results, Tensor) else list(results)


def assert_as_the_reference(name: str, spread: Callable[[Tensor], Tensor]) -> None:
    """`spread` lays a tensor out anew; results must be those of usual tensors on the reference."""
    function, tensors = CASES[name]
    actual = results_of(function, [spread(tensor.clone()) for tensor in tensors])
    with force_isa(None), force_backend("reference"):
        expected = results_of(function, [tensor.clone() for tensor in tensors])
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


# Where tensors lie.


def every_second(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1).reshape(-1)[::2]


def one_element_on(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:1], tensor])[1:]


def one_byte_on(tensor: Tensor) -> Tensor:
    # Torch refuses such views, numpy and torch.frombuffer make them.
    memory = bytearray(b"\0") + bytearray(tensor.numpy().tobytes())
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spread", [one_element_on, one_byte_on])
def test_tensors_may_begin_anywhere(name: str, spread: Callable[[Tensor], Tensor]) -> None:
    assert_as_the_reference(name, spread)


@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_PLACE])
def test_inputs_need_not_be_contiguous(name: str) -> None:
    assert_as_the_reference(name, every_second)


def test_a_view_that_negates_lazily_is_negated() -> None:
    x = normal(N)
    for actual, expected in zip(
        ops.quantize_4bit(torch._neg_view(x), NF4), ops.quantize_4bit(-x, NF4), strict=True
    ):
        assert_same_bits(actual, expected)
    weight = (random_bytes(32), torch.ones(1), NF4, 64, (8, 8))
    negated = ops.matmul_4bit(torch._neg_view(x[:8]), *weight)
    assert_same_bits(negated, ops.matmul_4bit(-x[:8], *weight))


def test_zeros_without_memory_are_zeros() -> None:
    weight = (random_bytes(32), torch.ones(1), NF4, 64, (8, 8))
    zeros = torch._efficientzerotensor((1, 8))  # what autograd makes of gradients that are zero
    assert_same_bits(ops.matmul_4bit(zeros, *weight), torch.zeros(1, 8))


@pytest.mark.parametrize("lazy", [torch._neg_view, lambda t: torch._efficientzerotensor(t.shape)])
@pytest.mark.parametrize("number", [2, 3])  # of scales and codebook
def test_a_weight_must_hold_its_values(number: int, lazy: Callable[[Tensor], Tensor]) -> None:
    arguments: list[Any] = [normal(8), random_bytes(32), torch.ones(1), NF4, 64, (8, 8)]
    arguments[number] = lazy(arguments[number])
    with pytest.raises(ValueError, match="holds its values"):
        ops.matmul_4bit(*arguments)


@pytest.mark.parametrize("number", range(4))
def test_what_changes_in_place_must_be_contiguous(number: int) -> None:
    for spread in (every_second, lambda tensor: tensor[:1].expand(N)):
        tensors = [normal(N).abs() for _ in range(4)]
        tensors[number] = spread(tensors[number])
        if number == 1:  # the gradient is only read
            step(*tensors)
        else:
            with pytest.raises(ValueError, match="in place and must be contiguous"):
                step(*tensors)


def test_the_gradient_may_be_the_parameter() -> None:
    param, m, v = normal(N), normal(N, seed=1), normal(N, seed=2).abs()
    expected = step(param.clone(), param.clone(), m.clone(), v.clone())
    for one, other in zip(step(param, param, m, v), expected, strict=True):
        assert_same_bits(one, other)


@pytest.fixture
def read_only(tmp_path: Path) -> Tensor:
    """normal(N) in memory that cannot be written: torch's own x.add_(1) ends the process."""
    path = tmp_path / "values"
    path.write_bytes(normal(N).numpy().tobytes())
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return torch.from_numpy(np.frombuffer(memory, dtype=np.float32))


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_inputs_may_lie_in_read_only_memory(read_only: Tensor) -> None:
    # A kernel that wrote to its input, if only what was there, would end the process.
    x = read_only
    assert_same_bits(ops.quantize_4bit(x, NF4)[0], ops.quantize_4bit(normal(N), NF4)[0])
    moments = [normal(N, seed=seed).abs() for seed in (1, 2)]
    step(normal(N), x, *moments)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("number", [0, 2, 3])
def test_what_changes_in_place_must_not_be_read_only(number: int, read_only: Tensor) -> None:
    tensors = [normal(N, seed=seed).abs() for seed in range(4)]
    tensors[number] = read_only
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match="read-only memory"):
        step(*tensors)
    for tensor, old in zip(tensors, before, strict=True):
        assert_same_bits(tensor, old)
    param = torch.nn.Parameter(read_only)
    param.grad = torch.ones(N)
    with pytest.raises(ValueError, match="read-only memory"):
        AdamW([param]).step()


def test_what_changes_in_place_must_have_memory() -> None:
    param, *others = (normal(N, seed=seed).abs() for seed in range(4))
    param.untyped_storage().resize_(0)  # as programs do that gather parameters when they need them
    with pytest.raises(ValueError, match="no memory: its storage was freed"):
        step(param, *others)


def test_what_changes_in_place_must_not_overlap() -> None:
    memory = normal(4 * N).abs()
    parts = list(memory.split(N))
    step(*parts)  # side by side
    for number in (0, 2):  # moments that reach into the parameter, and into each other
        overlapping = [*parts[:3], memory[number * N + 1 : (number + 1) * N + 1]]
        with pytest.raises(ValueError, match="changed in place share memory"):
            step(*overlapping)
    with pytest.raises(ValueError, match="changed in place share memory"):
        step(parts[0], parts[1], parts[2], parts[2])
    with pytest.raises(ValueError, match="gradient shares memory"):
        step(parts[0], memory[1 : N + 1], parts[2], parts[3])
    both, others, *moments = ([tensor, tensor.clone()] for tensor in parts)
    with pytest.raises(ValueError, match="gradient shares memory"):  # though it may be its own one
        ops.adamw_step(both, [others[0], both[0]], *moments, **ADAMW)
    params = [torch.nn.Parameter(part) for part in (memory[:N], memory[N - 1 : 2 * N])]
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="changed in place share memory"):
        AdamW(params).step()


# Sizes.


@pytest.mark.parametrize("block_size", [N + 1, 2**31, 2**31 + 2, 2**62, 2**63 - 2])
def test_a_block_may_be_larger_than_the_tensor(block_size: int) -> None:
    x, one_block = normal(N), N + 1
    packed, absmax = ops.quantize_4bit(x, NF4, block_size)
    expected = ops.quantize_4bit(x, NF4, one_block)
    assert_same_bits(packed, expected[0])
    assert_same_bits(absmax, expected[1])
    assert_same_bits(
        ops.dequantize_4bit(packed, absmax, NF4, block_size, (N,)),
        ops.dequantize_4bit(packed, absmax, NF4, one_block, (N,)),
    )
    codes, absmax = ops.quantize_8bit(x, DYNAMIC, block_size)
    assert_same_bits(codes, ops.quantize_8bit(x, DYNAMIC, one_block)[0])
    assert_same_bits(
        ops.dequantize_8bit(codes, absmax, DYNAMIC, block_size),
        ops.dequantize_8bit(codes, absmax, DYNAMIC, one_block),
    )
    for transposed in (False, True):
        for tokens in (1, 40):
            y = [
                ops.matmul_4bit(
                    x[: 8 * tokens].view(tokens, 8),
                    packed[:32],
                    absmax,
                    NF4,
                    size,
                    (8, 8),
                    None,
                    transposed,
                )
                for size in (block_size, one_block)
            ]
            assert_same_bits(*y)


@pytest.mark.parametrize("block_size", [-2, 0, 1, 63, 2**63, 2**70])
def test_other_block_sizes_are_refused(block_size: int) -> None:
    calls = [
        lambda: ops.quantize_4bit(normal(N), NF4, block_size),
        lambda: ops.dequantize_4bit(PACKED, SCALES, NF4, block_size, (N,)),
        lambda: ops.quantize_8bit(normal(N), DYNAMIC, block_size),
        lambda: ops.dequantize_8bit(CODES, SCALES, DYNAMIC, block_size),
        lambda: ops.matmul_4bit(normal(N), PACKED, SCALES, NF4, block_size, (1, N)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="block_size must be (even and at least 2|below)"):
            call()


@pytest.mark.parametrize(
    "shape,error",
    [
        ((-1, 0), ValueError),
        ((0, -1), ValueError),
        ((-8, -8), ValueError),
        ((8, 8.0), TypeError),
        ((2**63, 0), ValueError),
        (("8", 8), TypeError),
    ],
    ids=str,
)
def test_shapes_that_no_tensor_has_are_refused(shape: tuple, error: type) -> None:
    empty = shape.count(0) > 0
    packed, absmax = random_bytes(0 if empty else 32), torch.ones(0 if empty else 1)
    with pytest.raises(error, match="shape must"):
        ops.dequantize_4bit(packed, absmax, NF4, 64, shape)
    with pytest.raises(error, match="shape must"):
        ops.matmul_4bit(normal(8), packed, absmax, NF4, 64, shape)


def test_a_size_that_overflows_64_bits_is_no_small_one() -> None:
    with pytest.raises(ValueError, match="packed must hold two codes a byte"):
        ops.dequantize_4bit(PACKED, SCALES, NF4, 64, (2**32, 2**32))  # 2^64 is 0 in 64 bits


@pytest.mark.parametrize("name", CASES)
def test_nothing_gives_nothing(name: str) -> None:
    function, tensors = CASES[name]
    if name == "dequantize_4bit":
        assert ops.dequantize_4bit(PACKED[:0], SCALES[:0], NF4, 64, (3, 0)).shape == (3, 0)
        return
    if name == "matmul_4bit":
        assert function(tensors[0].expand(2, 0, N), *tensors[1:]).shape == (2, 0, 1)
        return
    empty = [tensor[:0] if len(tensor) not in (16, 256) else tensor for tensor in tensors]
    assert all(result.numel() == 0 for result in results_of(function, empty))


# Kinds.

NOT_TENSORS = [None, 1.0, [1.0], np.ones(N, dtype=np.float32)]


@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_PLACE])
@pytest.mark.parametrize("wrong", NOT_TENSORS, ids=lambda value: type(value).__name__)
def test_what_is_no_tensor_is_refused(name: str, wrong: object) -> None:
    function, tensors = CASES[name]
    for number in range(len(tensors)):
        with pytest.raises(TypeError, match="must be a tensor, got"):
            function(*tensors[:number], wrong, *tensors[number + 1 :])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64], ids=str)
def test_other_dtypes_are_refused(name: str, dtype: torch.dtype) -> None:
    function, tensors = CASES[name]
    for number, tensor in enumerate(tensors):
        with pytest.raises(TypeError, match=f"got {dtype}"):
            function(*tensors[:number], tensor.to(dtype), *tensors[number + 1 :])


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match="x must be dense, got torch.sparse_coo"):
        ops.quantize_4bit(normal(N).to_sparse(), NF4)


@pytest.mark.parametrize(
    "number,error",
    [(0, ValueError), (-1, ValueError), (2**63, ValueError), (1.0, TypeError), ("1", TypeError)],
)
def test_other_steps_are_refused(number: object, error: type) -> None:
    with pytest.raises(error, match="step"):
        step(*[normal(N).abs() for _ in range(4)], step=number)


# More than 2^31 values, of which the last block tells whether an offset has overflowed.


@pytest.mark.slow
def test_more_values_than_an_int_can_count() -> None:
    n, tail = 2**31 + 64, normal(64, dtype=torch.bfloat16)

    def many() -> Tensor:  # each time anew: less than 7 GB at a time
        x = torch.zeros(n, dtype=torch.bfloat16)
        x[-64:] = tail
        return x

    expected = ops.quantize_4bit(tail, NF4)
    packed, absmax = ops.quantize_4bit(many(), NF4)
    assert_same_bits(packed[-32:], expected[0])
    assert_same_bits(absmax[-1:], expected[1])
    restored = ops.dequantize_4bit(*expected, NF4, 64, (64,), torch.float32)
    y = ops.dequantize_4bit(packed, absmax, NF4, 64, (n,), torch.bfloat16)
    assert_same_bits(y[-64:], restored.bfloat16())
    del y
    for tokens in (1, 20):
        columns = torch.eye(tokens, 64)  # the first token picks the first column
        product = ops.matmul_4bit(columns, packed, absmax, NF4, 64, (n // 64, 64))
        assert_same_bits(product[0, -1:], restored[:1])
        del product
    del packed, absmax

    expected = ops.quantize_8bit(tail, DYNAMIC)
    codes, absmax = ops.quantize_8bit(many(), DYNAMIC)
    assert_same_bits(codes[-64:], expected[0])
    y = ops.dequantize_8bit(codes, absmax, DYNAMIC, dtype=torch.bfloat16)
    assert_same_bits(y[-64:], ops.dequantize_8bit(*expected, DYNAMIC, dtype=torch.bfloat16))
