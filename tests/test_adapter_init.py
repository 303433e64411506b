"""Adapters that start near the dense weight: against exact SVD, and the errors they take away."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import normal
from torch import Tensor, nn

import qlora_ref
from qlora_ref.adapter import load_adapter, save_adapter
from qlora_ref.adapter_init import dense_weights, low_rank
from qlora_ref.checkpoint import save_base
from qlora_ref.lora import lora_layers
from qlora_ref.models import load_model

TINY = Path(__file__).parent / "data" / "tiny_llama"

# Sums of a few hundred float32 products of numbers around 1, and an SVD of them.
FLOAT32 = 1e-4


def best_rank(matrix: Tensor, r: int) -> Tensor:
    """The nearest matrix of rank r, by LAPACK in float64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :r] * s[:r]) @ vt[:r]


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 40))


def started(init: str, codebook: str = "nf4", **options: Any) -> tuple[nn.Module, dict]:
    model = small_model()
    originals = dense_weights(model)
    qlora_ref.convert_model(model, codebook)
    qlora_ref.add_lora(model, r=4, init=init, originals=originals, **options)
    return model, originals


def distances(model: nn.Module, originals: dict[str, Tensor]) -> list[float]:
    """|W - (Q + s B A)|^2 of each layer."""
    return [
        (originals[name].double() - layer.base.dequantize().double() - layer.delta())
        .square()
        .sum()
        .item()
        for name, layer in lora_layers(model).items()
    ]


# Decomposition.


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (7, 7), (200, 120)], ids=str)
@pytest.mark.parametrize("r", [1, 5])
def test_low_rank_is_the_best_of_its_rank(shape: tuple[int, int], r: int) -> None:
    matrix = normal(*shape, seed=1) * torch.logspace(0, -2, shape[1])  # a spectrum that falls
    a, b = low_rank(matrix, r)
    assert a.shape == (r, shape[1]) and b.shape == (shape[0], r)
    assert torch.allclose((b @ a).double(), best_rank(matrix, r), rtol=0, atol=FLOAT32)
    sizes = a.square().sum(dim=1), b.square().sum(dim=0)
    assert torch.allclose(*sizes, rtol=FLOAT32)  # A and B share the singular values evenly


def test_of_noise_low_rank_holds_nearly_what_the_best_would() -> None:
    matrix = normal(300, 500, seed=2)
    a, b = low_rank(matrix, 8)
    kept = matrix.square().sum() - (matrix - b @ a).square().sum()
    assert kept > 0.96 * best_rank(matrix, 8).square().sum()


@pytest.mark.parametrize("r", [0, 41])
def test_a_rank_that_the_matrix_has_not_is_refused(r: int) -> None:
    with pytest.raises(ValueError, match="r must be from 1 to 40"):
        low_rank(normal(40, 64), r)


# LoftQ and PiSSA.


def test_loftq_with_one_iteration_leaves_the_base_and_fits_its_error() -> None:
    model, originals = started("loftq", init_iterations=1)
    plain = small_model()
    qlora_ref.convert_model(plain)
    for name, layer in lora_layers(model).items():
        base: Any = plain.get_submodule(name)
        assert layer.base.quantized_weight == base.quantized_weight
        error = originals[name] - base.dequantize()
        assert torch.allclose(layer.delta(), best_rank(error, 4), rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("codebook", ["nf4", "nf2", "bof4_s"])
def test_no_iteration_of_loftq_adds_to_the_distance(codebook: str) -> None:
    zero = distances(*started("zero", codebook))
    found = [sum(distances(*started("loftq", codebook, init_iterations=n))) for n in (1, 2, 5)]
    assert sum(zero) > 1.05 * found[0] and found[0] >= found[1] >= found[2]
    assert found[2] < 0.99 * found[0] or codebook == "nf2"  # there it steps back


def test_pissa_with_one_iteration_holds_the_largest_singular_directions() -> None:
    model, originals = started("pissa", init_iterations=1)
    for name, layer in lora_layers(model).items():
        expected = best_rank(originals[name], 4)
        assert torch.allclose(layer.delta(), expected, rtol=0, atol=FLOAT32)
        rest = (originals[name] - expected).float()
        plain = qlora_ref.quantize(rest, double_quant=True)
        # What is left is what quantising the rest leaves.
        left = (originals[name] - layer.base.dequantize() - layer.delta()).square().sum()
        assert left.item() == pytest.approx(plain.error(rest).mse * rest.numel(), rel=0.02)


def test_pissa_and_loftq_begin_nearer_to_the_dense_model_than_zero() -> None:
    zero, loftq, pissa = (sum(distances(*started(init))) for init in ("zero", "loftq", "pissa"))
    assert pissa < zero and loftq < 0.9 * zero


@pytest.mark.parametrize("alpha,rslora", [(32, False), (1, True), (-3, False)])
def test_the_scaling_is_taken_into_account(alpha: float, rslora: bool) -> None:
    model, originals = started("pissa", init_iterations=1, alpha=alpha, rslora=rslora)
    for name, layer in lora_layers(model).items():
        expected = best_rank(originals[name], 4)
        assert torch.allclose(layer.delta(), expected, rtol=0, atol=FLOAT32)


def test_zero_computes_what_the_base_does_and_asks_for_nothing() -> None:
    model = small_model()
    qlora_ref.convert_model(model)
    x, before = normal(3, 96), None
    before = model(x)
    qlora_ref.add_lora(model, r=4)
    assert torch.equal(model(x), before)


def test_gpt2_conv1d_weights_are_taken_the_right_way_round() -> None:
    pytorch_utils = pytest.importorskip(
        "transformers.pytorch_utils", reason="transformers is not installed"
    )
    model = nn.ModuleDict({"c": pytorch_utils.Conv1D(32, 32)})  # square: shapes tell nothing
    weights = dense_weights(model)
    assert torch.equal(weights["c"], model["c"].weight.t())


@pytest.mark.parametrize(
    "options,message",
    [
        ({"init": "svd"}, "init must be one of zero, loftq, pissa"),
        ({"init": "loftq"}, "needs the dense weight of 0: pass originals"),
        ({"init": "loftq", "originals": {"0": torch.zeros(3, 3)}}, r"shape \(64, 96\)"),
        ({"init": "pissa", "init_iterations": 0}, "init_iterations must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_changed(options: dict, message: str) -> None:
    model = small_model()
    qlora_ref.convert_model(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        qlora_ref.add_lora(model, r=4, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_dense_layers_are_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="is for layers in 4 bits"):
        qlora_ref.add_lora(model, r=4, init="pissa", originals=dense_weights(model), targets=["0"])


# An adapter and the base that it belongs to.


def tiny_with(init: str, **options: Any) -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = load_model(TINY)
    originals = dense_weights(model)
    qlora_ref.convert_model(model, skip=["layers.[123]"])
    qlora_ref.add_lora(model, r=4, init=init, originals=originals, **options)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(torch.arange(3, 43).view(2, 20)).logits


def test_base_and_adapter_are_read_again_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_with("pissa", init_iterations=2)
    save_base(model, tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    assert len(lora_layers(model)) == 7  # they are where they were
    loaded = load_model(tmp_path / "base")
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    save_adapter(loaded, tmp_path / "again")
    with pytest.raises(ValueError, match="another base"):
        load_adapter(tiny_base(), tmp_path / "again")


def tiny_base() -> Any:
    model = load_model(TINY)
    qlora_ref.convert_model(model, skip=["layers.[123]"])
    return model


def test_an_adapter_of_its_own_base_is_refused_on_another(tmp_path: Path) -> None:
    save_adapter(tiny_with("loftq", init_iterations=2), tmp_path / "adapter", "runs/base")
    with pytest.raises(ValueError, match="another base.*runs/base"):
        load_adapter(tiny_base(), tmp_path / "adapter")


def test_an_adapter_that_left_its_base_as_it_was_fits_the_plain_one(tmp_path: Path) -> None:
    model = tiny_with("loftq", init_iterations=1)
    save_adapter(model, tmp_path / "adapter")
    plain = tiny_base()
    load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(logits(plain), logits(model))


def test_peft_reads_base_and_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_with("pissa", init_iterations=1)
    save_base(model, tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    assert "init_lora_weights" not in json.loads(
        (tmp_path / "adapter" / "adapter_config.json").read_text()
    )
    theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(logits(theirs), logits(model), rtol=0, atol=1e-4)  # another order of sums
