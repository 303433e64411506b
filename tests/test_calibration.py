"""The moments of layers' inputs against plain hooks, and what calibration gains on the small LM."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import normal
from torch import Tensor, nn

import qlora_ref
from qlora_ref.calibration import input_moments

DATA = Path(__file__).parent / "data"
WINDOW = 128


def plain_moments(model: nn.Module, name: str, batches: list) -> Tensor:
    """mean(x x^T) over all calls of a layer, in float64."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2).double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    hook.remove()
    x = torch.cat(seen)
    return x.t() @ x / len(x)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # Sums of up to 1,000 float32 products beside float64 ones.
    assert (actual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def llama() -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from qlora_ref.models import load_model

    return load_model(DATA / "tiny_llama")


def tokens(count: int, length: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 512, (2, length), generator=generator) for _ in range(count)]


def test_layers_outside_of_blocks_are_seen_in_one_run() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    batches = [normal(5, 7, 16, seed=1), normal(3, 16, seed=2)]
    (moments,) = input_moments(model, ["0", "2"], batches)
    for name in ("0", "2"):
        assert_close(moments[name], plain_moments(model, name, batches))


def gemma3() -> Any:
    """A window of 8 tokens in the first block, all before it in the second; other rotations."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**sizes, **heads, **kinds)
    return transformers.Gemma3ForCausalLM(config).eval()


def t5() -> Any:
    """The first block makes the bias of relative positions, which the second is called with."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4}
    torch.manual_seed(0)
    config = transformers.T5Config(**sizes, num_layers=2, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5"])
def test_each_block_sees_what_the_quantised_blocks_before_it_give(
    kind: str, request: pytest.FixtureRequest
) -> None:
    batches: list[Any] = tokens(2)
    if kind == "t5":
        model, blocks = t5(), "decoder.block"
        batches = [{"input_ids": ids, "decoder_input_ids": ids.flip(1)} for ids in batches]
    else:
        model = gemma3() if kind == "gemma3" else copy.deepcopy(request.getfixturevalue("llama"))
        blocks = "model.layers"
    inside = model.get_submodule(blocks).named_modules()
    names = [f"{blocks}.{name}" for name, module in inside if isinstance(module, nn.Linear)]
    seen = []
    for moments in input_moments(model, names, batches):
        for name, moment in moments.items():
            assert_close(moment, plain_moments(model, name, batches))
        for name in moments:  # as if quantised: something else than before
            model.get_submodule(name).weight.data *= 1.5
        seen += moments
    assert sorted(seen) == sorted(names)


def test_one_tensor_of_hidden_states_a_batch_is_held(llama: Any) -> None:
    model, batches, layers = copy.deepcopy(llama), tokens(2), llama.config.num_hidden_layers
    outputs: list[Any] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, x, y: outputs.append(weakref.ref(y)))
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(layers)]
    for index, _ in enumerate(input_moments(model, names, batches)):
        assert sum(output() is not None for output in outputs) == (len(batches) if index else 0)


@pytest.mark.parametrize("training", [False, True])
def test_modes_and_cache_are_put_back(llama: Any, training: bool) -> None:
    model = copy.deepcopy(llama).train(training)
    model.config.use_cache = True
    for moments in input_moments(model, ["model.layers.1.mlp.up_proj"], tokens(1)):
        assert torch.is_grad_enabled() and moments
    assert model.training == training and model.config.use_cache is True


def test_what_the_text_does_not_reach_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"no input of \['idle'\]"):
        list(input_moments(model, ["used", "idle"], [normal(3, 4)]))


def test_a_block_that_no_run_calls_is_named() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    model.forward = lambda x: model["blocks"][0](x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="block 1, a Linear, once, got 0 calls in 1 runs"):
        list(input_moments(model, ["blocks.0", "blocks.1"], [normal(3, 4)]))


def test_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        qlora_ref.convert_model(nn.Sequential(nn.Linear(64, 64)), calibration=[])


def test_a_whole_model_is_converted_with_smaller_errors_of_its_outputs(llama: Any) -> None:
    batches = tokens(4)
    with torch.no_grad():
        dense = torch.cat([llama(batch).logits for batch in batches])
    errors = []
    for calibration in (None, batches):
        model = copy.deepcopy(llama)
        report = qlora_ref.convert_model(
            model, "nf2", calibration=calibration, skip=["layers.[23]"]
        )
        assert len(report.converted) == 14
        with torch.no_grad():
            logits = torch.cat([model(batch).logits for batch in batches])
        errors.append((logits - dense).square().mean().item())
    assert errors[1] < 0.5 * errors[0]


def test_a_calibrated_checkpoint_is_read_again_bit_for_bit(llama: Any, tmp_path: Path) -> None:
    from qlora_ref.checkpoint import save_model
    from qlora_ref.models import load_model

    model = copy.deepcopy(llama)
    qlora_ref.convert_model(model, calibration=tokens(1), skip=["layers.[123]"])
    save_model(model, tmp_path / "model")
    batch = tokens(1)[0]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model")(batch).logits, model(batch).logits)


def shakespeare(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Windows of the text that the model was trained on, and of the text held out from it."""
    data = (DATA / "shakespeare.txt").read_bytes()
    chunks = [data[i : i + 4096].decode("ascii") for i in range(0, len(data), 4096)]
    parts = [c for i, c in enumerate(chunks) if i % 10 != 9], chunks[9::10]
    ids = [torch.tensor(tokenizer.backend_tokenizer.encode("".join(part)).ids) for part in parts]
    trained, held_out = (i[: len(i) // WINDOW * WINDOW].view(-1, WINDOW) for i in ids)
    return trained, held_out


@torch.no_grad()
def log_probabilities(model: Any, windows: Tensor) -> Tensor:
    return torch.cat([model(w).logits.log_softmax(dim=-1) for w in windows.split(32)])


@pytest.mark.slow
def test_error_feedback_halves_what_quantising_costs_the_small_model(llama: Any) -> None:
    from qlora_ref.models import load_tokenizer

    trained, held_out = shakespeare(load_tokenizer(DATA / "tiny_llama"))
    dense, distances = log_probabilities(llama, held_out), []
    for calibration in (None, trained[::7].split(32)):
        model = copy.deepcopy(llama)
        qlora_ref.convert_model(model, calibration=calibration)
        quantised = log_probabilities(model, held_out)
        # What the loss rises by where the text is as the dense model says: its minimum is there, so
        # that the rise is due to the errors alone. On other text a change may lower the loss.
        distances.append((dense.exp() * (dense - quantised)).sum(dim=-1).mean().item())
    assert distances[1] < 0.5 * distances[0]
