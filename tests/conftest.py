"""Fixtures: every test of an operation runs on each backend that this machine has.

A test module of an operation names it in `OPERATION`; a test that takes the fixture `backend` is
then collected once for each backend that can run it here, `reference` always among them; where it
runs on a GPU the test is marked `gpu`. The C++ backend counts once for each instruction set that it
was compiled for and this machine has: `cpu-avx2` and so on. Where there is no GPU the CUDA backend
runs on a simulated one (simulated.py): `cuda-A100`. What is missing is said once, below the run,
not in a skip per test.

The fixture `cpu` is the operations of one library, fresh from the sources, once for each
instruction set. `--libraries FOLDER` tests libraries from elsewhere (tests/sanitize.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from native_program import setup_definitions
from simulated import GPUS, SimulatedOperations, missing, on_simulated_gpu, open_simulated

from qlora_ref import dispatch, native
from qlora_ref.dispatch import explain, force_backend, force_isa
from qlora_ref.native_operations import CpuOperations

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The same examples in each run: a failure that chance found once must not be able to hide again.
# The fixture `backend` only sets a name, so that sharing it between examples is sound.
settings.register_profile(
    "qlora_ref",
    derandomize=True,
    deadline=None,
    max_examples=20 if INTERPRETED else 60,  # a kernel that is interpreted takes 20 ms
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("qlora_ref")


def device_of(backend: str) -> str:
    """Where a backend's tensors are in these tests."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def obstacle(backend: str, operation: str) -> str | None:
    """Why a backend cannot run an operation on this machine; None if it can."""
    with force_backend(backend):
        explanation = explain(operation, device_of(backend))
    return None if explanation.backend == backend else explanation.reasons[backend]


def available_backends(operation: str) -> list[str]:
    """`reference`, then every other backend that can run; `cpu-<isa>` for each instruction set,
    `cuda-<gpu>` for each simulated GPU."""
    names = ["reference"]
    for backend in ("cpu", "triton", "cuda"):
        if obstacle(backend, operation) is None:
            isas = native.available_isas(native.FOLDER) if backend == "cpu" else ()
            names += [f"cpu-{isa}" for isa in isas] or [backend]
    are_ours = native.FOLDER == Path(native.__file__).parent  # otherwise only the others are tested
    if are_ours and not torch.cuda.is_available() and missing() is None:
        names += [f"cuda-{gpu}" for gpu in simulated_gpus(operation)]
    return names


def marks_of(backend: str, test: Any) -> list[pytest.MarkDecorator]:
    """What runs on a GPU, and what takes long on a simulated one: beside the first one nothing but
    the sizes differs; modules that say so; tests of many examples."""
    if device_of(backend) == "cuda":
        return [pytest.mark.gpu]
    if not backend.startswith("cuda-"):
        return []
    is_extra = backend != f"cuda-{next(iter(GPUS))}"
    says_so = getattr(test.module, "LONG_ON_SIMULATED_GPUS", False)
    has_examples = getattr(test.function, "is_hypothesis_test", False)
    return [pytest.mark.slow] if is_extra or says_so or has_examples else []


def simulated_gpus(operation: str) -> tuple[str, ...]:
    """The GPUs that an operation's kernels tell apart, or one of them."""
    return tuple(GPUS) if operation == "matmul_4bit" else tuple(GPUS)[:1]


def available_isas() -> tuple[str, ...]:
    """The instruction sets to test: none where nothing was built."""
    try:
        return native.available_isas(native.FOLDER)
    except native.BackendUnavailable:
        return ()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--libraries", type=Path, help="load the C++ libraries from this folder")


def pytest_configure(config: pytest.Config) -> None:
    if folder := config.getoption("--libraries"):
        native.FOLDER = folder
    if INTERPRETED:
        spare_patches()


def spare_patches() -> None:
    """Triton's interpreter replaces the functions of triton.language for each call of a function
    inside of a kernel, which can take longer than the call. For functions of kernels/ it is done
    already: by the launch of the kernel that calls them."""
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith("qlora_kernels."):
            return self.rewrite()(*args, **kwargs)
        return patch_and_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the number of threads are for the backends that work with torch's threads."""
    threaded = ("reference", "cpu")
    deselected = [
        item
        for item in items
        if item.get_closest_marker("threads") is not None
        and not item.callspec.params["backend"].startswith(threaded)
    ]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names = available_backends(metafunc.module.OPERATION)
        parameters = [pytest.param(name, marks=marks_of(name, metafunc)) for name in names]
        metafunc.parametrize("backend", parameters, indirect=True)
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", available_isas())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    untested: dict[str, list[str]] = {}
    for backend in ("cpu", "triton", "cuda"):
        for operation in dispatch.OPERATIONS:
            if (why := obstacle(backend, operation)) is not None:
                if backend == "cuda" and not torch.cuda.is_available():
                    if missing() is None:
                        continue
                    why = f"no GPU, and none simulated: {missing()}"
                untested.setdefault(f"{backend}: {why}", []).append(operation)
    for reason, operations in untested.items():
        names = "all" if len(operations) == len(dispatch.OPERATIONS) else ", ".join(operations)
        terminalreporter.line(f"not tested here: {names} on {reason}")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend, forced while the test runs."""
    name, _, variant = request.param.partition("-")
    with ExitStack() as stack:
        stack.enter_context(force_backend(name))
        if name == "cuda" and variant:
            opened = open_simulated(request.getfixturevalue("cuda_library"))
            operations = SimulatedOperations(*opened, GPUS[variant])
            stack.enter_context(on_simulated_gpu(operations))
        elif variant:
            stack.enter_context(force_isa(variant))
        yield name


@pytest.fixture
def device(backend: str) -> str:
    """The device on which the forced backend works."""
    return device_of(backend)


@pytest.fixture(scope="session")
def build() -> SimpleNamespace:
    """What setup.py defines; skips where there is no compiler."""
    definitions = setup_definitions()
    try:
        definitions.find_compiler()
    except definitions.CompileError as error:
        pytest.skip(str(error))
    return definitions


@pytest.fixture(scope="session")
def fresh_folder(build: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libraries compiled from the sources as they are now."""
    folder = tmp_path_factory.mktemp("libraries")
    for isa, flags in build.isa_flags(build.find_compiler()).items():
        build.compile_library(build.cpu_sources(), native.library_path(folder, isa), flags)
    return folder


@pytest.fixture(scope="session")
def cuda_library(build: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What setup.py compiles for users, without the CUDA runtime."""
    if (why := missing()) is not None:
        pytest.skip(why)
    library = tmp_path_factory.mktemp("cuda") / native.CUDA_LIBRARY
    build.link_cuda(build.cuda_objects(), library, runtime="none")
    return library


@pytest.fixture
def cpu(isa: str, fresh_folder: Path) -> CpuOperations:
    """The operations in the library for an instruction set."""
    return CpuOperations(native.open_library(native.library_path(fresh_folder, isa)))
