"""Linear4bit and Embedding4bit, held against torch's dense layers with the restored weight."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import (
    DTYPES,
    assert_error_at_most_twice_torch,
    assert_same_bits,
    define_matmul,
    normal,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from qlora_ref import torch_library
from qlora_ref.checkpoint import load_model_state, save_model
from qlora_ref.codebooks import CODEBOOKS
from qlora_ref.linear import Embedding4bit, Linear4bit
from qlora_ref.quantized import quantize

LEVELS = (-1.0, -0.5, 0.0, 0.25, 1.0)


def dense_linear(k: int, n: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    linear = nn.Linear(k, n, bias)
    linear.weight.data = normal(n, k, seed=seed)
    if bias:
        linear.bias.data = normal(n, seed=seed + 1)
    return linear


def assert_same_state(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(state) == list(expected)
    for key, part in state.items():
        assert_same_bits(part, expected[key])


def restored(layer: Linear4bit, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The dense layer that a Linear4bit stands for: its weight rounded once to dtype."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
    linear.weight.data = layer.dequantize(dtype)
    if layer.bias is not None:
        linear.bias.data = layer.bias.detach().to(dtype)
    return linear


def assert_as_exact_as_dense(layer: Linear4bit, x: Tensor, dtype: torch.dtype) -> None:
    dense = restored(layer, dtype)
    exact = define_matmul(x.to(dtype), dense.weight.detach(), dense.bias, transposed=False)
    assert_error_at_most_twice_torch(layer(x).to(dtype), dense(x.to(dtype)), exact)


def linear4bit(k: int = 96, n: int = 40, **options: Any) -> Linear4bit:
    return Linear4bit.from_linear(dense_linear(k, n), **options)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("codebook", [*CODEBOOKS, LEVELS])
def test_forward_is_as_exact_as_the_dense_layer_for_every_codebook(
    codebook: Any, double_quant: bool
) -> None:
    for dtype in DTYPES:
        layer = linear4bit(codebook=codebook, double_quant=double_quant)
        assert_as_exact_as_dense(layer, normal(2, 5, 96, seed=3, dtype=dtype), dtype)
        assert layer(normal(5, 96, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 100, 128, 256, 512, 1024, 2048, 4096])
def test_forward_is_as_exact_as_the_dense_layer_for_every_block_size(
    block_size: int, bias: bool
) -> None:
    for k, n in ((64, 128), (33, 7), (1, 1), (352, 30)):
        layer = Linear4bit.from_linear(dense_linear(k, n, bias), block_size=block_size)
        assert (layer.bias is None) == (not bias)
        for rows in ((3,), (), (0,), (2, 1)):
            assert_as_exact_as_dense(layer, normal(*rows, k, seed=4), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_compute_dtype_is_what_is_multiplied_and_x_gives_the_result_its_dtype(
    compute_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    layer = linear4bit(compute_dtype=compute_dtype)
    x = normal(7, 96, dtype=dtype)
    assert layer(x).dtype == dtype
    expected = linear4bit()(x.to(compute_dtype)).to(dtype)
    assert_same_bits(layer(x), expected)


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_unless_a_compute_dtype_is_given(
    dtype: torch.dtype, compute_dtype: torch.dtype | None
) -> None:
    layer, x = linear4bit(compute_dtype=compute_dtype), normal(7, 96)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        assert restored(layer)(x).dtype == dtype  # as nn.Linear
    expected = layer(x) if compute_dtype else layer(x.to(dtype))
    assert_same_bits(y, expected)


def test_float64_needs_a_compute_dtype() -> None:
    x = normal(3, 96).double()
    with pytest.raises(TypeError, match="float64"):
        linear4bit()(x)
    assert linear4bit(compute_dtype=torch.float32)(x).dtype == torch.float64


@pytest.mark.parametrize("shape", [(95,), (96, 1), ()])
def test_x_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="K = 96"):
        linear4bit()(torch.ones(shape))


def test_training_and_evaluation_give_the_same_bits_and_change_no_state() -> None:
    layer, x = linear4bit(), normal(5, 96, dtype=torch.bfloat16)
    before, attributes = copy.deepcopy(layer), set(vars(layer))
    training = layer.train()(x)
    with torch.no_grad():
        evaluation = layer.eval()(x)
    again = layer.train()(x)
    assert_same_bits(training, evaluation)
    assert_same_bits(training, again)
    assert_same_state(layer.state_dict(), before.state_dict())
    assert layer.bias.dtype == torch.float32 and set(vars(layer)) == attributes


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_x_and_bias_are_as_exact_as_the_dense_layer(dtype: torch.dtype) -> None:
    layer = linear4bit().to(dtype)
    dense = restored(layer, dtype)
    seed = normal(2, 5, 40, seed=8, dtype=dtype)
    gradients = []
    for module in (layer, dense):
        x = normal(2, 5, 96, dtype=dtype).requires_grad_()
        gradients.append(torch.autograd.grad(module(x), (x, module.bias), seed))
    exact = define_matmul(seed, dense.weight.detach(), None, transposed=True)
    assert_error_at_most_twice_torch(gradients[0][0], gradients[1][0], exact)
    exact = seed.double().sum((0, 1))
    assert_error_at_most_twice_torch(gradients[0][1], gradients[1][1], exact)


def test_only_the_bias_is_trained() -> None:
    layer = linear4bit()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    layer(normal(5, 96)).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((40,), 5.0))


def test_the_graph_keeps_the_codes_and_no_dense_weight() -> None:
    layer, x = linear4bit(), normal(5, 96, dtype=torch.bfloat16).requires_grad_()
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()  # as if it had been away

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert any(part.data_ptr() == layer.weight.data_ptr() for part in seen)
    assert all(part.numel() < layer.weight_shape.numel() for part in seen)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_same_bits(gradient, torch.autograd.grad(layer(x).sum(), x)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant: bool) -> None:
    model = nn.Sequential(linear4bit(96, 40), nn.GELU(), linear4bit(40, 8))
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        x = normal(5, 96).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        results.append((y, x.grad, model[0].bias.grad, model[2].bias.grad))
    for direct, checkpointed in zip(*results, strict=True):
        assert_same_bits(checkpointed, direct)


def test_a_meta_layer_has_shapes_and_its_results_too() -> None:
    for layer in (linear4bit().to("meta"), Linear4bit(96, 40, device="meta")):
        assert {part.device.type for part in (*layer.parameters(), *layer.buffers())} == {"meta"}
        assert layer(torch.empty(3, 96, device="meta")).shape == (3, 40)
        assert layer.weight.shape == (96 * 40 // 2, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_layer_holds_the_quantised_weights_of_a_new_dense_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    dense = nn.Linear(96, 40, dtype=dtype)
    torch.manual_seed(5)
    layer = Linear4bit(96, 40, codebook="fp4", block_size=32, double_quant=False, dtype=dtype)
    assert layer.quantized_weight == quantize(dense.weight.detach(), "fp4", 32, False)
    assert_same_bits(layer.bias, dense.bias)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (96, 40)


def test_from_linear_shares_the_bias_and_leaves_the_dense_layer_as_it_is() -> None:
    dense = dense_linear(96, 40).eval().half()
    before = copy.deepcopy(dense)
    layer = Linear4bit.from_linear(dense, "af4", 128)
    assert layer.bias is dense.bias and not layer.training
    assert layer.quantized_weight == quantize(dense.weight.detach(), "af4", 128, True)
    layer(normal(2, 96, dtype=torch.float16))
    assert_same_state(dense.state_dict(), before.state_dict())
    assert dense.weight.requires_grad


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_conv1d_of_transformers_is_taken_over_transposed(double_quant: bool) -> None:
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers not installed")
    conv = utils.Conv1D(40, 96)  # 96 to 40
    conv.bias.data = normal(40)
    layer = Linear4bit.from_linear(conv, double_quant=double_quant)
    transposed = conv.weight.detach().t().contiguous()
    assert layer.quantized_weight == quantize(transposed, double_quant=double_quant)
    assert layer.bias is conv.bias
    assert_as_exact_as_dense(layer, normal(5, 96), torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_index(bad: float) -> None:
    dense = dense_linear(96, 40)
    dense.weight.data[3, 7] = bad
    with pytest.raises(ValueError, match=rf"\[3, 7\] is {bad}"):
        Linear4bit.from_linear(dense)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.Conv2d(1, 1, 1), TypeError, "nn.Linear or a Conv1D, got Conv2d"),
        (nn.Conv1d(1, 1, 1), TypeError, "got Conv1d"),
        (nn.Linear(4, 4).double(), TypeError, "float64"),
        (Linear4bit(4, 4), TypeError, "4 bits already"),
    ],
)
def test_other_layers_are_refused(layer: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Linear4bit.from_linear(layer)


def test_a_model_of_two_layers_compiles_without_a_break() -> None:
    model = nn.Sequential(linear4bit(96, 40), nn.GELU(), linear4bit(40, 8, double_quant=False))
    results = []
    # aot_eager traces forward and backward in full and leaves out only the C++ compiler.
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        x = normal(5, 96).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        results.append((y, x.grad, model[0].bias.grad, model[2].bias.grad))
    for eager, compiled in zip(*results, strict=True):
        assert_same_bits(compiled, eager)


@pytest.mark.parametrize("bias", [False, True])
def test_without_a_gradient_a_layer_goes_round_autograd(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The way through it and PyTorch's dispatcher takes longer than a small product.
    monkeypatch.setattr(torch_library, "_Matmul4bit", None)
    layer, x = Linear4bit.from_linear(dense_linear(64, 8, bias)), normal(2, 64)
    with torch.no_grad():
        layer(x)
    with pytest.raises(AttributeError, match="apply"):  # what would have been called
        layer(x.requires_grad_())


def test_torch_func_differentiates_and_maps_over_x() -> None:
    layer, x = linear4bit(), normal(6, 96)
    parameters = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}

    def loss(x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    per_sample = vmap(grad(loss))(x)
    exact = x.double().requires_grad_()
    y = exact @ layer.dequantize().double().t() + layer.bias.detach().double()
    (expected,) = torch.autograd.grad(y.square().sum(), exact)
    # Two float32 products in a row with sums of 96 and 40 terms: within 100 roundings of 2^-24.
    torch.testing.assert_close(
        per_sample.double(), expected, rtol=0, atol=100 * 2**-24 * expected.abs().max().item()
    )


@pytest.mark.parametrize("double_quant", [False, True])
def test_repr_names_the_format(double_quant: bool) -> None:
    scales = "double_quant" if double_quant else "float32 scales"
    expected = f"codebook='fp4', block_size=32, {scales})"
    options: dict[str, Any] = dict(codebook="fp4", block_size=32, double_quant=double_quant)
    assert repr(Linear4bit(8, 4, **options)) == (
        f"Linear4bit(in_features=8, out_features=4, bias=True, {expected}"
    )
    assert (
        repr(Embedding4bit(8, 4, 2, **options)) == f"Embedding4bit(8, 4, padding_idx=2, {expected}"
    )


def embedding4bit(double_quant: bool = True, dtype: Any = torch.float32, **options: Any) -> Any:
    """50 rows of 24 values (blocks of 64 cross rows), and nn.Embedding of the restored table."""
    torch.manual_seed(2)
    table = nn.Embedding(50, 24, dtype=dtype, **options)
    layer = Embedding4bit.from_embedding(table, double_quant=double_quant)
    table.weight.data = layer.dequantize()
    return layer, table


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_looks_up_the_restored_table(dtype: torch.dtype, double_quant: bool) -> None:
    layer, table = embedding4bit(double_quant, dtype)
    for shape in ((), (0,), (7,), (3, 4), (2, 1, 3)):
        indices = torch.randint(50, shape, generator=torch.Generator().manual_seed(0))
        for kind in (torch.int64, torch.int32):
            assert_same_bits(layer(indices.to(kind)), table(indices))


@pytest.mark.parametrize("padding_idx", [0, 3, 49, -1])
def test_the_padding_row_is_zero(padding_idx: int) -> None:
    made = Embedding4bit(50, 24, padding_idx)
    taken_over, _ = embedding4bit(padding_idx=padding_idx)
    for layer in (made, taken_over):
        assert layer.padding_idx == padding_idx % 50
        rows = layer(torch.arange(50))
        assert [row for row in range(50) if not rows[row].any()] == [padding_idx % 50]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_max_norm_cuts_rows_down_as_nn_embedding_does(norm_type: float) -> None:
    # Near the median norm of a row of 24 normal values, so that some are cut and some are not.
    max_norm = {1.0: 19.0, 2.0: 4.8, 3.0: 3.3, math.inf: 2.2}[norm_type]
    layer, table = embedding4bit(max_norm=max_norm, norm_type=norm_type)
    before, indices = layer.dequantize(), torch.tensor([[1, 2, 3, 1], [4, 5, 6, 7], [8, 9, 10, 0]])
    rows, expected = layer(indices), table(indices)
    changed = (expected != before[indices]).any(dim=-1)
    assert changed.any() and not changed.all()
    # A norm of 24 float32 terms in another order, then one division and one product: 32 roundings.
    torch.testing.assert_close(rows, expected, rtol=32 * 2**-24, atol=0)
    assert_same_bits(layer.dequantize(), before)  # nn.Embedding would have changed its table


@pytest.mark.parametrize("index", [-1, 50, 2**40])
def test_an_index_that_is_not_in_the_table_is_refused(index: int) -> None:
    layer, table = embedding4bit()
    for module in (layer, table):
        with pytest.raises(IndexError):
            module(torch.tensor([1, index]))


def test_embedding_takes_every_argument_of_nn_embedding() -> None:
    arguments = (50, 24, 1, 2.0, 3.0, True, True)
    torch.manual_seed(5)
    table = nn.Embedding(*arguments, dtype=torch.bfloat16)
    torch.manual_seed(5)
    layer = Embedding4bit(*arguments, dtype=torch.bfloat16)
    taken_over = Embedding4bit.from_embedding(table.eval())
    for name in (*nn.Embedding.__constants__, "num_embeddings", "embedding_dim"):
        assert getattr(layer, name) == getattr(taken_over, name) == getattr(table, name)
    assert (
        layer.quantized_weight
        == taken_over.quantized_weight
        == quantize(table.weight, double_quant=True)
    )
    assert layer.training and not taken_over.training
    assert Embedding4bit(50, 24, device="meta").weight.shape == (50 * 24 // 2, 1)


def test_an_embedding_that_is_loaded_into_a_dense_model_keeps_its_options(tmp_path: Path) -> None:
    layer, table = embedding4bit(padding_idx=1, max_norm=4.8, norm_type=3.0, sparse=True)
    save_model(nn.Sequential(layer), tmp_path / "model")
    model = nn.Sequential(table)
    load_model_state(model, tmp_path / "model")
    for name in nn.Embedding.__constants__:
        assert getattr(model[0], name) == getattr(table, name)
    indices = torch.arange(50)
    assert_same_bits(model(indices), layer(indices))
