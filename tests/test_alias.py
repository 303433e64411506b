"""Our modules under bitsandbytes' names, beside the installed bitsandbytes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from compare import normal
from torch import Tensor, nn

from qlora_ref.integrations import bitsandbytes as ours
from qlora_ref.integrations.bitsandbytes import functional as F
from qlora_ref.integrations.bitsandbytes import operators

bnb = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is missing: pip install bitsandbytes==0.50.2"
)

parametrize = pytest.importorskip(
    "bitsandbytes.nn.parametrize",
    reason="bitsandbytes has no nn.parametrize: pip install bitsandbytes==0.50.2",
)


def arguments(function: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_the_rest_takes_the_same_arguments() -> None:
    pairs = [(ours.matmul_4bit, bnb.matmul_4bit)]
    for name in ("replace_parameter_4bit", "replace_parameter_4bit_prequantized"):
        pairs.append((getattr(ours.nn.parametrize, name), getattr(parametrize, name)))
    for name in ("__init__", "as_dict", "from_dict", "to"):
        pairs.append((getattr(F.QuantState, name), getattr(bnb.functional.QuantState, name)))
    mine, theirs = ours.nn.Params4bit.from_prequantized, bnb.nn.Params4bit.from_prequantized
    for first, second in [*pairs, (mine, theirs)]:
        assert arguments(first) == arguments(second)


# Values.


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocksize", [None, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_codes_scales_and_restored_values_are_the_same_bits(
    dtype: torch.dtype, blocksize: int | None, storage: torch.dtype
) -> None:
    x = normal(64, 128).to(dtype)
    packed, state = F.quantize_nf4(x, blocksize=blocksize, quant_storage=storage)
    theirs, their_state = bnb.functional.quantize_nf4(x, blocksize=blocksize, quant_storage=storage)
    assert (packed.dtype, packed.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(packed.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(state.absmax, their_state.absmax)
    restored = F.dequantize_4bit(packed, state)
    assert torch.equal(restored, bnb.functional.dequantize_4bit(theirs, their_state))


def test_codes_of_one_library_are_restored_by_the_other() -> None:
    x = normal(64, 128)
    theirs, their_state = bnb.functional.quantize_fp4(x, compress_statistics=True)
    tensors = their_state.as_dict(packed=True)
    state = F.QuantState.from_dict(dict(tensors), "cpu")
    mine = state.as_dict(packed=True)
    assert mine.keys() == tensors.keys()
    assert not [key for key in mine if not torch.equal(mine[key], tensors[key])]
    expected = bnb.functional.dequantize_4bit(theirs, their_state)
    torch.testing.assert_close(F.dequantize_4bit(theirs, state), expected, rtol=2**-22, atol=0)


def test_a_state_lists_its_parts_as_the_other_does() -> None:
    x = normal(64, 128)
    for nested in (False, True):
        _, state = F.quantize_4bit(x, compress_statistics=nested)
        _, theirs = bnb.functional.quantize_4bit(x, compress_statistics=nested)
        assert state.as_dict().keys() == theirs.as_dict().keys()
        for key, value in state.as_dict().items():
            if not isinstance(value, Tensor) and key != "nested_offset":  # a mean: see numerics
                assert value == theirs.as_dict()[key]
        for index in (1, 2, 3, 5):
            assert state[index] == theirs[index]
        assert (state[4] is None) == (theirs[4] is None) == (not nested)
        assert state == F.QuantState.from_dict(state.as_dict(packed=True), "cpu")
        assert state == F.QuantState.from_dict(state.as_dict(), "cpu")
        key = f"bitsandbytes__{state.quant_type}"
        assert torch.equal(getattr(state, key), state.as_dict(packed=True)[f"quant_state.{key}"])


@pytest.mark.parametrize(
    "name, options",
    [
        ("create_dynamic_map", {}),
        ("create_dynamic_map", {"signed": False}),
        ("create_dynamic_map", {"max_exponent_bits": 3, "total_bits": 4}),
        ("create_fp8_map", {}),
        ("create_fp8_map", {"exponent_bits": 4, "precision_bits": 3}),
        ("create_fp8_map", {"signed": False, "exponent_bits": 4, "precision_bits": 4}),
        ("create_linear_map", {}),
        ("create_linear_map", {"signed": False}),
        ("create_linear_map", {"add_zero": False}),
        ("create_linear_map", {"total_bits": 4}),
        ("create_normal_map", {}),
        ("create_normal_map", {"use_extra_value": False}),
    ],
)
def test_tables_are_the_same(name: str, options: dict[str, Any]) -> None:
    mine, theirs = getattr(F, name)(**options), getattr(bnb.functional, name)(**options)
    assert mine.shape == theirs.shape
    # They round in another order, and linspace may miss 0 by a unit in the last place of 1.
    torch.testing.assert_close(mine, theirs, rtol=2**-22, atol=2**-24)


@pytest.mark.parametrize("name", ["nf4", "fp4", "af4"])
def test_4_bit_tables_are_the_same(name: str) -> None:
    expected = bnb.functional.get_4bit_type(name, device="cpu")
    torch.testing.assert_close(F.get_4bit_type(name), expected, rtol=2**-22, atol=0)


def test_int4_is_a_table_too() -> None:
    assert torch.equal(F.get_4bit_type("int4").abs().max(), torch.tensor(1.0))


@pytest.mark.parametrize("nested", [False, True])
def test_8_bits_restore_to_the_nearest_level(nested: bool) -> None:
    x = normal(40, 100)
    code = F.create_dynamic_map()
    codes, state = F.quantize_blockwise(x, blocksize=256, nested=nested)
    theirs, their_state = bnb.functional.quantize_blockwise(x, blocksize=256, nested=nested)
    assert (codes.dtype, codes.shape) == (theirs.dtype, theirs.shape)
    assert state.absmax.dtype == their_state.absmax.dtype
    restored = F.dequantize_blockwise(codes, state)
    assert restored.dtype == x.dtype
    if not nested:
        blocks = nn.functional.pad(x.flatten(), (0, -x.numel() % 256)).view(-1, 256)
        scaled = blocks / blocks.abs().amax(1, keepdim=True)
        nearest = (scaled.unsqueeze(-1).double() - code.double()).abs().amin(-1)
        levels = (code[codes.int()].flatten() - scaled.flatten()[: x.numel()]).double().abs()
        # The quantiser multiplies by a rounded reciprocal: 1.5 units off, on either side.
        assert (levels - nearest.flatten()[: x.numel()]).max() <= 3 * 2.0**-24


def test_fewer_than_256_levels_will_do() -> None:
    code, x = torch.tensor([-1.0, 0.0, 0.5, 1.0]), torch.tensor([[0.1, 2.0, 1.2, -2.0]])
    codes, state = F.quantize_blockwise(x, code=code, blocksize=64)
    assert codes.tolist() == [[1, 3, 2, 0]]
    assert F.dequantize_blockwise(codes, state).tolist() == [[0.0, 2.0, 1.0, -2.0]]


def test_outputs_are_written_where_the_caller_says() -> None:
    x = normal(64, 64)
    absmax, out = torch.empty(64), torch.empty(2048, 1, dtype=torch.uint8)
    packed, state = F.quantize_4bit(x, absmax=absmax, out=out, quant_type="nf4")
    assert packed is out and state.absmax is absmax
    restored = torch.full_like(x, torch.nan)
    assert F.dequantize_4bit(out, absmax=absmax, out=restored, quant_type="nf4") is restored
    assert torch.equal(restored, F.dequantize_4bit(packed, state))
    codes, eight = F.quantize_blockwise(x)
    assert F.dequantize_blockwise(codes, eight, out=restored) is restored
    assert torch.equal(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())


@pytest.mark.parametrize("nested", [False, True])
def test_products_and_gradients_are_those_of_the_restored_weight(nested: bool) -> None:
    weight, x, bias = normal(48, 64), normal(3, 5, 64), normal(48)
    packed, state = F.quantize_nf4(weight, compress_statistics=nested)
    dense = F.dequantize_4bit(packed, state)
    inputs = [t.clone().requires_grad_() for t in (x, bias)]
    y = ours.matmul_4bit(inputs[0], packed.t(), state, bias=inputs[1])
    expected = nn.functional.linear(x.double(), dense.double(), bias.double())
    # Sums of 64 float32 products, at most 64 roundings of half a unit of sums below 64.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=64 * 64 * 2.0**-25)
    y.sum().backward()
    expected = dense.double().sum(0).expand_as(x)
    torch.testing.assert_close(inputs[0].grad.double(), expected, rtol=0, atol=64 * 64 * 2.0**-25)
    assert torch.equal(inputs[1].grad, torch.full((48,), 15.0))
    turned = ours.matmul_4bit(y.detach(), packed, state)
    assert turned.shape == x.shape  # (K, N) codes for an input of K values


def test_what_belongs_to_int8_says_so() -> None:
    calls = [ours.matmul, ours.MatmulLtState, F.int8_double_quant, F.int8_vectorwise_quant]
    calls += [ours.nn.Linear8bitLt, ours.nn.Int8Params, ours.nn.Embedding8bit]
    for call in calls:
        with pytest.raises(NotImplementedError, match="4"):
            call(torch.zeros(4, 4))
    assert not isinstance(nn.Linear(2, 2), ours.nn.Linear8bitLt)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda x: F.quantize_4bit(x, quant_type="nf5"), NotImplementedError, "nf5"),
        (lambda x: F.quantize_4bit(x * torch.nan), ValueError, "finite"),
        (lambda x: F.quantize_4bit(x, blocksize=3), ValueError, "block_size"),
        (lambda x: F.dequantize_4bit(x), ValueError, "absmax and out"),
        (lambda x: F.dequantize_blockwise(x.byte()), ValueError, "absmax"),
        (lambda x: F.gemv_4bit(x, x), ValueError, "state"),
        (lambda x: ours.matmul_4bit(x, x, None), ValueError, "quant_state"),
        (lambda x: ours.optim.AdamW([x], amsgrad=True), NotImplementedError, "amsgrad"),
        (lambda x: F.QuantState.from_dict({"absmax": x}, "cpu"), ValueError, "quant_state"),
    ],
)
def test_bad_input_is_refused(call: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        call(normal(8, 8))


# Operators.


def operator_calls() -> dict[str, tuple[Any, ...]]:
    weight, x = normal(48, 64), normal(2, 64)
    packed, state = F.quantize_nf4(weight)
    _, nested = F.quantize_nf4(weight, compress_statistics=True)
    codes, eight = F.quantize_blockwise(x, blocksize=64)
    shape = (48, 64)
    second = nested.state2
    more = (None, nested.absmax, second.code, nested.offset)
    p, g, first, square = (normal(4, 64, seed=n) for n in range(4))
    square = square.abs()
    first8, state8 = F.quantize_blockwise(first, blocksize=256)
    unsigned = F.create_dynamic_map(signed=False)
    square8, square_state8 = F.quantize_blockwise(square, unsigned, blocksize=256)
    numbers = (0.9, 0.999, 0.0, 0.0, 1e-8)
    return {
        "optimizer_update_32bit": (
            *("adam", g, p, first, square, None, 0.0, 0.0, *numbers, 0.1, 1, 0.01, 1.0),
        ),
        "optimizer_update_8bit_blockwise": (
            *("adam", g, p, first8, square8, *numbers, 1, 0.01, state8.code, unsigned),
            *(state8.absmax, square_state8.absmax, 0.1, 1.0),
        ),
        "quantize_4bit": (weight, 64, "nf4", torch.uint8),
        "dequantize_4bit": (packed, state.absmax, 64, "nf4", shape, torch.float32),
        "quantize_blockwise": (x, eight.code, 64),
        "dequantize_blockwise": (codes, eight.absmax, eight.code, 64, torch.float32),
        "gemv_4bit": (x[:1], packed, shape, state.absmax, state.code, 64),
        "gemm_4bit": (x, packed, shape, second.absmax, 64, "nf4", *more),
    }


def schemas(namespace: str) -> dict[str, str]:
    found = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{namespace}::")]
    texts = [str(schema).partition("::")[2] for schema in found]
    return {text.partition("(")[0]: text for text in texts}


def test_every_operator_is_there_with_the_same_schema() -> None:
    mine, theirs = schemas("qlora_ref_bitsandbytes"), schemas("bitsandbytes")
    assert mine == theirs and len(mine) == 19
    tested = {*operator_calls(), *(f"{name}.out" for name in WITH_OUT)}
    assert tested == {name for name in theirs if not name.startswith("int8")}


# The fourth check of opcheck, compiling it, takes seconds for each.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("name", operator_calls())
def test_operators_pass_the_check(name: str) -> None:
    operator = getattr(torch.ops.qlora_ref_bitsandbytes, name).default
    torch.library.opcheck(operator, operator_calls()[name], test_utils=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", operator_calls())
def test_operators_pass_the_whole_check(name: str) -> None:
    operator = getattr(torch.ops.qlora_ref_bitsandbytes, name).default
    torch.library.opcheck(operator, operator_calls()[name])


WITH_OUT = ["dequantize_4bit", "dequantize_blockwise", "gemv_4bit"]


@pytest.mark.parametrize("name", WITH_OUT)
def test_operators_write_into_an_output(name: str) -> None:
    operator, arguments = getattr(torch.ops.qlora_ref_bitsandbytes, name), operator_calls()[name]
    expected = operator(*arguments)
    out = torch.full_like(expected, torch.nan)
    operator.out(*arguments, out)
    assert torch.equal(out, expected)
    torch.library.opcheck(operator.out, (*arguments, out), test_utils=QUICK)
    with pytest.raises(ValueError, match="out must be"):
        operator.out(*arguments, out[..., :-1])


@pytest.mark.parametrize(
    "name, count", [("int8_linear_matmul", 2), ("int8_vectorwise_quant", 1), ("int8_scaled_mm", 4)]
)
def test_operators_of_int8_say_that_they_are_not_available(name: str, count: int) -> None:
    with pytest.raises(NotImplementedError, match=f"{name} belongs to LLM.int8"):
        getattr(torch.ops.qlora_ref_bitsandbytes, name)(*([torch.zeros(4, 4)] * count))


@pytest.mark.parametrize("name", ["quantize_4bit", "dequantize_4bit", "dequantize_blockwise"])
def test_operators_give_the_same_bits(name: str) -> None:
    mine = getattr(torch.ops.qlora_ref_bitsandbytes, name)(*operator_calls()[name])
    theirs = getattr(torch.ops.bitsandbytes, name)(*operator_calls()[name])
    for first, second in zip(*(r if isinstance(r, tuple) else (r,) for r in (mine, theirs))):
        assert torch.equal(first, second)


def test_products_of_operators_are_those_of_the_restored_weight() -> None:
    calls = operator_calls()
    dense = torch.ops.qlora_ref_bitsandbytes.dequantize_4bit(*calls["dequantize_4bit"])
    x = calls["gemm_4bit"][0]
    for name, rows in (("gemv_4bit", x[:1]), ("gemm_4bit", x)):
        y = getattr(torch.ops.qlora_ref_bitsandbytes, name)(*calls[name])
        # gemm's scales went through 8 bits: 1 % of a scale, of sums of a few units.
        torch.testing.assert_close(y, rows @ dense.t(), rtol=0.02, atol=0.2)


def test_defining_a_namespace_twice_does_nothing() -> None:
    operators.define(operators.NAMESPACE)
