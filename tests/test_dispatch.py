"""Which backend runs: preference, forcing, the environment, and what is said about the others.

Which library of the C++ backend: test_isa.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from compare import normal

from qlora_ref import codebooks, dispatch, native, ops
from qlora_ref.dispatch import OPERATIONS, explain, force_backend, force_isa

NF4 = codebooks.nf4_codebook()
DYNAMIC = codebooks.dynamic_codebook()
BACKENDS = ("cuda", "cpu", "triton", "reference")

CODES = torch.zeros(64, dtype=torch.uint8)
SCALES = torch.ones(1)
ZEROS = torch.zeros(64)
ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
CALLS = {
    "quantize_4bit": lambda: ops.quantize_4bit(ZEROS, NF4),
    "dequantize_4bit": lambda: ops.dequantize_4bit(CODES[:32], SCALES, NF4, 64, (64,)),
    "quantize_8bit": lambda: ops.quantize_8bit(ZEROS, DYNAMIC),
    "dequantize_8bit": lambda: ops.dequantize_8bit(CODES, SCALES, DYNAMIC),
    "matmul_4bit": lambda: ops.matmul_4bit(ZEROS[:8], CODES[:32], SCALES, NF4, 64, (8, 8)),
    "adamw_step": lambda: ops.adamw_step(*([ZEROS.clone()] for _ in range(4)), **ADAMW),
}


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in ("QLORA_REF_BACKEND", "QLORA_REF_ISA", "TRITON_INTERPRET"):
        monkeypatch.delenv(variable, raising=False)
    with force_backend(None), force_isa(None):
        yield


def running(operation: str = "quantize_4bit") -> str | None:
    return explain(operation).backend


# Forcing.


def test_function_forces_until_it_is_lifted() -> None:
    usual = running()
    force_backend("reference")
    assert running() == "reference"
    assert dispatch.forced_backend() == "reference"
    force_backend(None)
    assert running() == usual
    assert dispatch.forced_backend() is None


def test_context_manager_forces_inside_only() -> None:
    usual = running()
    with force_backend("reference"):
        assert running() == "reference"
    assert running() == usual


def test_nested_contexts_restore_one_by_one() -> None:
    with force_backend("reference"):
        with force_backend("cuda"):
            with force_backend(None):
                assert dispatch.forced_backend() is None
            assert dispatch.forced_backend() == "cuda"
        assert dispatch.forced_backend() == "reference"
    assert dispatch.forced_backend() is None


def test_context_inside_a_function_call_restores_what_was_forced() -> None:
    force_backend("reference")
    with force_backend("cuda"):
        pass
    assert dispatch.forced_backend() == "reference"


def test_an_exception_restores_and_passes_through() -> None:
    with pytest.raises(KeyError), force_backend("cuda"):
        raise KeyError
    assert dispatch.forced_backend() is None


@pytest.mark.parametrize("name", ["", "gpu", "CUDA", "fastest", "torch"])
def test_unknown_backends_are_refused_with_the_known_ones(name: str) -> None:
    force_backend("reference")
    with pytest.raises(ValueError, match=f"no backend is called '{name}'.*cuda.*reference"):
        force_backend(name)
    assert dispatch.forced_backend() == "reference"  # as before


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_forced_backend_that_cannot_run_raises(operation: str) -> None:
    with force_backend("cuda"), pytest.raises(native.BackendUnavailable) as caught:
        CALLS[operation]()
    message = str(caught.value)
    assert f"'cuda' is forced but cannot run {operation} on cpu" in message
    assert "works on cuda tensors only" in message
    assert "force_backend(None)" in message


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_forced_backend_never_falls_back(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(backend: str, operation: str, isa: str | None) -> None:
        raise AssertionError(f"{backend} was loaded")

    with force_backend("cuda"):
        monkeypatch.setattr(dispatch, "_load", refuse)
        with pytest.raises(native.BackendUnavailable):
            CALLS[operation]()


def test_unavailable_is_a_runtime_error() -> None:
    assert issubclass(native.BackendUnavailable, RuntimeError)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_forced_backend_is_the_one_that_runs(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], dispatch._load

    def record(backend: str, operation: str, isa: str | None):
        loaded.append((backend, operation))
        return load(backend, operation, isa)

    monkeypatch.setattr(dispatch, "_load", record)
    with force_backend("reference"):
        CALLS[operation]()
    assert set(loaded) == {("reference", operation)}


def test_forcing_holds_in_the_backward_pass() -> None:
    x = normal(8).requires_grad_()
    with force_backend("reference"):
        product = ops.matmul_4bit(x, CODES[:32], SCALES, NF4, 64, (8, 8))
    with force_backend("cuda"), pytest.raises(native.BackendUnavailable, match="matmul_4bit"):
        product.sum().backward()


# The environment.


def test_environment_variable_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_REF_BACKEND", "cuda")
    assert dispatch.forced_backend() == "cuda"
    with pytest.raises(native.BackendUnavailable, match="'cuda' is forced"):
        CALLS["quantize_4bit"]()


def test_force_backend_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_REF_BACKEND", "cuda")
    with force_backend("reference"):
        assert dispatch.forced_backend() == "reference"
    assert dispatch.forced_backend() == "cuda"


def test_unknown_name_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_REF_BACKEND", "gpu")
    with pytest.raises(ValueError, match="no backend is called 'gpu'"):
        CALLS["quantize_4bit"]()


def test_empty_variable_forces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_REF_BACKEND", "")
    assert dispatch.forced_backend() is None


def test_environment_holds_from_the_start_of_a_process() -> None:
    program = "from qlora_ref.dispatch import explain; print(explain('matmul_4bit'))"
    environment = {**os.environ, "QLORA_REF_BACKEND": "reference"}
    output = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.startswith("matmul_4bit on cpu: reference\n")


# The preference and its explanation.


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_backend_has_a_reason(operation: str) -> None:
    explanation = explain(operation)
    assert tuple(explanation.reasons) == BACKENDS  # in order of preference
    assert all(explanation.reasons.values())
    assert explanation.reasons[explanation.backend] == "runs"
    assert list(explanation.reasons.values()).count("runs") == 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_first_backend_without_an_obstacle_runs(operation: str) -> None:
    chosen = explain(operation).backend
    order = list(BACKENDS)
    for name in order[: order.index(chosen)]:
        with force_backend(name), pytest.raises(native.BackendUnavailable):
            CALLS[operation]()
    CALLS[operation]()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_explanation_is_printed_a_line_a_backend(operation: str) -> None:
    first, *rest = str(explain(operation)).split("\n")
    assert first == f"{operation} on cpu: {running(operation)}"
    assert [line.split()[0] for line in rest] == list(BACKENDS)
    assert "cuda       works on cuda tensors only" in rest[0]


def test_explanation_says_when_a_forced_backend_cannot_run() -> None:
    with force_backend("cuda"):
        explanation = explain("adamw_step")
    assert explanation.backend is None
    assert str(explanation).startswith("adamw_step on cpu: raises an error\n")
    assert explanation.reasons["cuda"] == "works on cuda tensors only"
    assert explanation.reasons["reference"] == "cuda is forced"


def test_explanation_says_what_was_forced() -> None:
    with force_backend("reference"):
        reasons = explain("quantize_4bit").reasons
    assert reasons["reference"] == "runs"
    assert reasons["cuda"] == "works on cuda tensors only"  # a reason of its own comes first


@pytest.mark.parametrize("where", ["cpu", torch.device("cpu"), torch.zeros(1)], ids=str)
def test_explain_takes_a_device_or_a_tensor(where: object) -> None:
    assert explain("quantize_4bit", where) == explain("quantize_4bit")


def test_explain_can_be_asked_about_a_device_that_is_not_there() -> None:
    explanation = explain("quantize_4bit", "cuda")
    assert explanation.device == "cuda"
    assert explanation.reasons["cpu"] == "works on cpu tensors only"


def test_unknown_operations_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no operation is called 'matmul'.*matmul_4bit"):
        explain("matmul")
