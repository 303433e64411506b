"""Where and how CUDA kernels are launched: what CUDA graphs and several GPUs ask of host code.

A GPU is not needed: the library's calls are counted, or answered by stand-ins.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from compare import normal, random_weight
from sim.machine import Chunk
from simulated import GPUS, SimulatedOperations, open_simulated
from torch import Tensor

from qlora_ref import codebooks
from qlora_ref.native_operations import CudaOperations, describe_gpu

STREAM = 0x5151
NF4, DYNAMIC = codebooks.nf4_codebook(), codebooks.dynamic_codebook()

# What the host code of a launch calls, and the functions that csrc/cuda itself names.
OF_NVCC = re.compile(r"__cuda\w+")
ALLOWED = {"cudaFuncSetAttribute", "cudaGetLastError", "cudaGetErrorString"}


def test_the_library_launches_and_does_nothing_else(cuda_library: Path) -> None:
    # No allocation, copy or wait: a call can be captured in a CUDA graph, and never holds up a GPU.
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    command = ["nm", "--dynamic", "--undefined-only", str(cuda_library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    called = {line.split()[-1].split("@")[0] for line in listed.splitlines()}
    of_cuda = {name for name in called if "cuda" in name.lower()}
    assert "__cudaLaunchKernel" in of_cuda
    assert {name for name in of_cuda if not OF_NVCC.fullmatch(name)} == ALLOWED


class OnStream(SimulatedOperations):
    """On a stream that is not the default one."""

    def _execution(self, device: torch.device) -> int:
        return STREAM


def multiply(run: SimulatedOperations, tokens: int, transposed: bool) -> None:
    weight = random_weight(64, 1088, 64, nested=True).arguments("cpu")
    x = normal(tokens, 64 if transposed else 1088, dtype=torch.bfloat16)
    nested = [weight[name] for name in ("nested_absmax", "nested_codebook", "offset")]
    given = (weight["packed"], weight["absmax"], weight["codebook"], 64, (64, 1088))
    run.matmul_4bit(x, *given, None, transposed, *nested)


def step(run: SimulatedOperations, bits: int) -> None:
    param, grad = normal(520), normal(520, seed=1)
    options = (1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    if bits == 32:
        moments = [torch.zeros(520)], [torch.zeros(520)]
        run.adamw_step([param], [grad], *moments, [], [], None, None, *options)
        return
    moments = tuple([torch.zeros(520, dtype=torch.uint8)] for _ in range(2))
    scales = [torch.zeros(3)], [torch.zeros(3)]
    run.adamw_step([param], [grad], *moments, *scales, DYNAMIC, DYNAMIC, *options)


CALLS: dict[str, Callable[[SimulatedOperations], object]] = {
    "quantize_4bit": lambda run: run.quantize_4bit(normal(200), NF4, 64),
    "quantize_8bit": lambda run: run.quantize_8bit(normal(300), DYNAMIC, 256),
    "dequantize_4bit": lambda run: run.dequantize_4bit(
        torch.zeros(101, dtype=torch.uint8), torch.ones(4), NF4, 64, (202,), torch.bfloat16
    ),
    "dequantize_8bit": lambda run: run.dequantize_8bit(
        torch.zeros(300, dtype=torch.uint8), torch.ones(2), DYNAMIC, 256, torch.bfloat16
    ),
    "few tokens": lambda run: multiply(run, 3, transposed=False),
    "gradient": lambda run: multiply(run, 3, transposed=True),
    "adamw 32-bit": lambda run: step(run, 32),
    "adamw 8-bit": lambda run: step(run, 8),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_kernel_is_launched_on_the_stream_of_the_call(name: str, cuda_library: Path) -> None:
    library, device = open_simulated(cuda_library)
    device.streams.clear()
    CALLS[name](OnStream(library, device, GPUS["A100"]))
    assert device.streams == {STREAM}


def steps_run(run: SimulatedOperations, first: Tensor, second: Tensor) -> int:
    """How many instructions AdamW with 8-bit moments takes in codebooks, for 16 values a thread."""
    moments = tuple([torch.zeros(512, dtype=torch.uint8)] for _ in range(2))
    scales = [torch.zeros(2)], [torch.zeros(2)]
    options = (1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    with mock.patch.object(Chunk, "_execute", autospec=True, side_effect=Chunk._execute) as execute:
        run.adamw_step(
            [normal(512)], [normal(512, seed=1)], *moments, *scales, first, second, *options
        )
    return execute.call_count


def test_codes_of_the_usual_maps_are_looked_up(cuda_library: Path) -> None:
    # Where levels crowd no table serves: the search among 256 takes eight comparisons for each of a
    # thread's 16 values, and more than a look-up takes.
    run = SimulatedOperations(*open_simulated(cuda_library), GPUS["A100"])
    signed, unsigned = DYNAMIC, codebooks.dynamic_codebook(signed=False)
    crowd = torch.cat([torch.linspace(0, 1e-3, 255), torch.ones(1)])
    usual = steps_run(run, signed, unsigned)
    assert steps_run(run, signed, crowd) > usual + 16 * 8
    assert steps_run(run, crowd, unsigned) > usual + 16 * 8


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch says where there are two; the list's only element is the current one."""
    current = [0]

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(
            multi_processor_count=100 + device.index,
            clock_rate=1_000_000,
            memory_clock_rate=1_000_000,
            memory_bus_width=4096,
            shared_memory_per_block=48 * 1024,
            shared_memory_per_block_optin=163 * 1024,
        )

    streams = SimpleNamespace
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: streams(cuda_stream=70 + d.index))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    describe_gpu.cache_clear()
    return current


def test_a_call_runs_on_the_gpu_and_the_stream_of_its_tensors(two_gpus: list[int]) -> None:
    seen = []
    library = SimpleNamespace(work=lambda *given: seen.append((two_gpus[0], given)))
    for index in (1, 0):
        CudaOperations(library)._call("work", torch.device("cuda", index), 7)
    assert seen == [(1, (7, 71)), (0, (7, 70))]
    assert two_gpus == [0]


def test_kernels_are_chosen_for_the_gpu_of_the_tensors(two_gpus: list[int]) -> None:
    gpus = [describe_gpu(torch.device("cuda", index)) for index in (0, 1)]
    describe_gpu.cache_clear()
    assert [gpu.multiprocessors for gpu in gpus] == [100, 101]
    assert gpus[0].bandwidth == 2 * 1e9 * 4096 / 8
