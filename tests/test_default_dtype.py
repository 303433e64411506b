"""torch.set_default_dtype is for what users make: no table, scale or step of ours follows it."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compare import assert_same_bits, normal
from torch import Tensor, nn

from qlora_ref import AdamW, codebooks, optim, quantize
from qlora_ref.integrations.bitsandbytes import codebook_makers
from qlora_ref.linear import Embedding4bit, Linear4bit
from qlora_ref.places import layer_for

WITH_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("qlora_kernels") is None,
    reason="needs triton and the package installed",
)
MAKERS: dict[str, Callable[[], Tensor]] = {
    **{name: partial(codebooks.resolve_codebook, name) for name in codebooks.CODEBOOKS},
    "dynamic": codebooks.dynamic_codebook,
    "dynamic, unsigned": partial(codebooks.dynamic_codebook, signed=False),
    "nf8": partial(codebooks.normal_float_codebook, 8),
    "levels": partial(codebooks.as_codebook, [-1, 0, 0.3]),
    "bitsandbytes' dynamic": codebook_makers.create_dynamic_map,
    "bitsandbytes' dynamic, unsigned": partial(codebook_makers.create_dynamic_map, signed=False),
    "bitsandbytes' fp8": codebook_makers.create_fp8_map,
    "bitsandbytes' linear": codebook_makers.create_linear_map,
    "bitsandbytes' normal": codebook_makers.create_normal_map,
}


@pytest.fixture(params=[torch.float64, torch.float16, torch.bfloat16], ids=str)
def default(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], Any]:
    """Calls a function under another default dtype than float32."""

    def under(function: Callable[[], Any]) -> Any:
        optim._codebook.cache_clear()  # or tables would be those of another default
        torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_dtype(torch.float32)
            optim._codebook.cache_clear()

    return under


@pytest.mark.parametrize("name", MAKERS)
def test_tables_have_the_same_float32_bits(name: str, default: Any) -> None:
    def make() -> Tensor:
        made: Any = MAKERS[name]()
        return made if isinstance(made, Tensor) else made[1]

    found = default(make)
    assert found.dtype == torch.float32
    assert_same_bits(found, make())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", codebooks.CODEBOOKS)
def test_weights_have_the_same_codes_and_scales(
    name: str, double_quant: bool, default: Any
) -> None:
    weight = normal(33, 130)
    make = partial(quantize, weight, name, 64, double_quant)
    assert default(make) == make()
    search = partial(quantize, weight, name, 64, double_quant, scale_search=True)
    assert default(search) == search()


def stepped(state_bits: int, start: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    param = nn.Parameter(start.clone())
    optimizer = AdamW([param], lr=0.02, state_bits=state_bits)
    for gradient in gradients:
        param.grad = gradient
        optimizer.step()
    state = optimizer.state[param].values()
    return [param.detach(), *(value for value in state if isinstance(value, Tensor))]


@pytest.mark.parametrize("state_bits", [32, 8])
def test_adamw_takes_the_same_steps(state_bits: int, default: Any) -> None:
    start, *gradients = [normal(25, 24, seed=seed) for seed in range(4)]
    steps = partial(stepped, state_bits, start, gradients)
    for found, expected in zip(default(steps), steps()):
        assert_same_bits(found, expected)


def test_layers_are_those_of_their_dense_layers(default: Any) -> None:
    linear, embedding = nn.Linear(64, 32), nn.Embedding(9, 64)
    for make in (
        partial(Linear4bit.from_linear, linear),
        partial(Embedding4bit.from_embedding, embedding),
        lambda: Linear4bit.from_linear(linear).with_weight(linear.weight.detach(), None, True)[0],
    ):
        assert default(make).quantized_weight == make().quantized_weight
    for dense in (linear, embedding):
        assert default(partial(layer_for, dense)).weight_shape == dense.weight.shape


@WITH_TRITON
@pytest.mark.parametrize("make", [codebooks.nf4_codebook, codebooks.dynamic_codebook])
def test_tables_of_kernels_have_the_same_bits(make: Callable[[], Tensor], default: Any) -> None:
    from qlora_kernels.nearest import nearest_table, step_table

    def tables() -> list[Tensor]:
        codebook = make()
        return [*nearest_table(codebook).tensors(), step_table(codebook)[0]]

    for found, expected in zip(default(tables), tables()):
        assert_same_bits(found, expected)


@WITH_TRITON
def test_parts_of_a_sum_are_float32(default: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_kernels import matmul_4bit

    added: list[tuple[Any, ...]] = []
    monkeypatch.setattr(matmul_4bit, "_matmul_tiled", defaultdict(lambda: lambda *x, **y: None))
    monkeypatch.setattr(
        matmul_4bit, "_add_parts", defaultdict(lambda: lambda *x, **y: added.append(x))
    )
    y, two_parts = torch.empty(3, 5, dtype=torch.bfloat16), (1, 1, 2)
    default(partial(matmul_4bit._launch_tiled, two_parts, (), None, y, (3, 5, 64), {}))
    assert (added[0][0].dtype, added[0][0].shape) == (torch.float32, (2, 3, 5))
