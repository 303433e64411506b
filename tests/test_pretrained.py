"""What transformers does with a model that was converted, not loaded, beyond saving it."""

from __future__ import annotations

import sys

import pytest
import torch
from training import (
    one_thread,  # noqa: F401
    tiny_model,
)

import qlora_ref
from qlora_ref.module4bit import layers_4bit

pytest.importorskip("transformers", reason="transformers is not installed")


def test_a_model_of_an_older_transformers_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qlora_ref.integrations.transformers", None)  # cannot import
    qlora_ref.convert_model(model := tiny_model())
    assert layers_4bit(model) and getattr(model, "hf_quantizer", None) is None


@pytest.mark.slow
def test_compiled_generation_writes_the_same_tokens() -> None:
    from transformers.generation.configuration_utils import CompileConfig

    qlora_ref.convert_model(model := tiny_model())
    ids = torch.arange(6).unsqueeze(0)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options)
    compiling = CompileConfig()
    compiling._compile_all_devices = True  # else only on a GPU
    options |= {"cache_implementation": "static", "compile_config": compiling}
    assert torch.equal(model.generate(ids, **options), expected)
    assert model._compiled_call is not None
