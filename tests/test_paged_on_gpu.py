"""Managed and pinned memory on a real device. All sizes are small: some tens of MB at most."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from test_paged import OPTIONS, SMALLEST, make_params, params_of, small_model, train
from torch import nn

from qlora_ref import AdamW
from qlora_ref.paging import cuda_calls
from qlora_ref.paging.cuda_calls import TorchCuda
from qlora_ref.paging.cuda_tiers import UnifiedTier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

MODES = ("unified", "pinned")
CPU, NEVER = -1, -2  # CU_DEVICE_CPU, CU_DEVICE_INVALID
LAST_PREFETCH_LOCATION = 4  # CU_MEM_RANGE_ATTRIBUTE_LAST_PREFETCH_LOCATION
POINTER_MEMORY_TYPE = 2  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE
# 64 MB of state, half of which streams through slots of 2 MiB: whole pages of the driver's too.
LARGE, ROOM = 8 << 20, 32 << 20


def has_managed_memory() -> bool:
    return TorchCuda(torch.device("cuda", 0)).has_managed_memory()


def need(mode: Any) -> None:
    if mode == "unified" and not has_managed_memory():
        pytest.skip("this device has no managed memory that moves while it works")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    need(request.param)
    return str(request.param)


def on_gpu(params: Any) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().cuda()) for param in params]


def adamw(params: Any, mode: Any = False, **options: Any) -> AdamW:
    return AdamW(params, **{**OPTIONS, "paged": mode, "resident_bytes": SMALLEST, **options})


def take_steps(optimizer: AdamW, steps: range) -> None:
    """With gradients that the device works out from the parameters."""
    for step in steps:
        for seed, param in enumerate(params_of(optimizer)):
            values = param.detach().float()
            param.grad = torch.sin(values * (step + 1) + seed).mul_(values).to(param.dtype)
        optimizer.step()


def pages_of(optimizer: AdamW) -> list[Any]:
    return optimizer._paged._tier._pages


# The numbers.


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("state_bits", (32, 8))
@pytest.mark.parametrize("mode", (True, *MODES))
def test_fifty_steps_have_the_bits_of_the_unpaged(
    mode: Any, state_bits: int, dtype: torch.dtype
) -> None:
    need(mode)
    paged = adamw(on_gpu(make_params(dtype=dtype)), mode, state_bits=state_bits)
    plain = adamw(on_gpu(make_params(dtype=dtype)), state_bits=state_bits)
    for step in range(50):
        take_steps(paged, range(step, step + 1))
        take_steps(plain, range(step, step + 1))
        for p, q in zip(params_of(paged), params_of(plain)):
            assert_same_bits(p.cpu(), q.cpu())
    saved, expected = paged.state_dict()["state"], plain.state_dict()["state"]
    for key, state in expected.items():
        for name in state.keys() - {"step"}:
            assert_same_bits(saved[key][name].cpu(), state[name].cpu())
    report = paged.paging_report()
    assert report.mode == mode if mode is not True else report.mode in MODES
    assert report.streamed_bytes > 0 and report.counters.misses == 0
    # Each step moves each streamed page in and out; the first has nothing to bring in.
    assert report.counters.bytes_in >= 49 * report.streamed_bytes
    assert report.counters.bytes_out >= 50 * report.streamed_bytes


@pytest.mark.parametrize("micro_batches", (1, 3))
def test_hooks_of_the_last_backward_bring_pages_in(mode: str, micro_batches: int) -> None:
    both = []
    for kind in (mode, False):
        model = small_model().cuda()
        optimizer = adamw(model.parameters(), kind)
        run = _on_cpu_input(model)
        train(run, optimizer, micro_batches)
        if kind:
            for micro in range(micro_batches):
                run(torch.ones(1, 300)).sum().backward()
                ahead = [page for page in pages_of(optimizer) if page.slot is not None]
                assert len(ahead) == (8 if micro == micro_batches - 1 else 0)
            optimizer.zero_grad()
        both.append(optimizer)
    for p, q in zip(*map(params_of, both)):
        assert_same_bits(p.cpu(), q.cpu())


def _on_cpu_input(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: model(x.cuda())


def test_steps_wait_for_gradients_that_are_still_computed(mode: str) -> None:
    # The device is busy for tens of milliseconds when each step is put on its stream: what leaves
    # or comes in without waiting does so long before.
    both = []
    for kind in (mode, False):
        optimizer = adamw(on_gpu(make_params()), kind)
        for step in range(4):
            torch.cuda._sleep(50_000_000)
            take_steps(optimizer, range(step, step + 1))
        both.append(optimizer)
    for p, q in zip(*map(params_of, both)):
        assert_same_bits(p.cpu(), q.cpu())


def test_steps_on_another_stream_and_in_other_threads(mode: str) -> None:
    both = []
    for kind in (mode, False):
        optimizer = adamw(on_gpu(make_params()), kind)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())

        def work(step: int, optimizer: AdamW = optimizer, stream: Any = stream) -> None:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(5_000_000)
                take_steps(optimizer, range(step, step + 1))

        for step in range(4):  # a new thread has no context of its own
            thread = threading.Thread(target=work, args=(step,))
            thread.start()
            thread.join()
        torch.cuda.current_stream().wait_stream(stream)
        take_steps(optimizer, range(4, 6))
        both.append(optimizer)
    for p, q in zip(*map(params_of, both)):
        assert_same_bits(p.cpu(), q.cpu())


@pytest.mark.parametrize("state_bits", (32, 8))
def test_saved_state_moves_between_modes_and_to_the_cpu_and_back(
    tmp_path: Path, state_bits: int
) -> None:
    unified = ["unified"] if has_managed_memory() else []
    plain = adamw(on_gpu(make_params()), state_bits=state_bits)
    take_steps(plain, range(2))
    last, at = plain, 2
    for mode in ("pinned", *unified, False, "file", *unified, "pinned", False):
        where = "cpu" if mode == "file" else "cuda"
        params = [nn.Parameter(p.detach().to(where, copy=True)) for p in params_of(last)]
        options = {"page_directory": tmp_path} if mode == "file" else {}
        now = adamw(params, mode, state_bits=state_bits, **options)
        now.load_state_dict(last.state_dict())
        _assert_same_states(now, last)
        if where == "cuda":
            take_steps(now, range(at, at + 2))
            take_steps(plain, range(at, at + 2))
            at += 2
            for p, q in zip(params_of(now), params_of(plain)):
                assert_same_bits(p.cpu(), q.cpu())
        last = now


def _assert_same_states(one: AdamW, other: AdamW) -> None:
    mine, theirs = one.state_dict()["state"], other.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for key, state in mine.items():
        assert state["step"] == theirs[key]["step"]
        for name in state.keys() - {"step"}:
            assert_same_bits(state[name].cpu(), theirs[key][name].cpu())


# Memory.


def _memory_type(address: int) -> int:
    """The driver's status when it is asked what lies at an address: 0 if it knows it."""
    found = ctypes.c_uint()
    torch.cuda.synchronize()
    query = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute
    return int(query(ctypes.byref(found), POINTER_MEMORY_TYPE, ctypes.c_uint64(address)))


def _last_place(page: Any) -> int:
    """Where a managed page was last told to go."""
    place = ctypes.c_int(-7)
    query = ctypes.CDLL("libcuda.so.1").cuMemRangeGetAttribute
    size, address = ctypes.c_size_t(page.nbytes), ctypes.c_uint64(page.home)
    out = ctypes.byref(place), ctypes.c_size_t(ctypes.sizeof(place))
    assert query(*out, LAST_PREFETCH_LOCATION, address, size) == 0
    return place.value


def test_managed_pages_live_on_the_host_and_come_when_asked_for() -> None:
    need("unified")
    optimizer = adamw(on_gpu([torch.ones(LARGE)]), "unified", resident_bytes=ROOM)
    take_steps(optimizer, range(2))
    torch.cuda.synchronize()
    tier = optimizer._paged._tier
    streamed = [number for number, page in enumerate(tier._pages) if not page.stays]
    assert len(streamed) == 24
    assert {_last_place(tier._pages[number]) for number in streamed} == {CPU}
    tier.prefetch(streamed)
    torch.cuda.synchronize()
    device = torch.cuda.current_device()
    places = [_last_place(tier._pages[number]) for number in streamed]
    assert places == [device] * 8 + [CPU] * 16
    assert all(_last_place(page) == NEVER for page in tier._pages if page.stays)


def test_managed_memory_is_given_back_when_the_optimizer_is_dropped() -> None:
    need("unified")
    optimizer = adamw(on_gpu([torch.ones(LARGE)]), "unified", resident_bytes=ROOM)
    take_steps(optimizer, range(2))
    addresses = [page.home for page in pages_of(optimizer)]
    assert all(_memory_type(address) == 0 for address in addresses)
    del optimizer
    gc.collect()
    assert all(_memory_type(address) != 0 for address in addresses)


def test_making_and_dropping_many_takes_no_memory(mode: str) -> None:
    def once() -> None:
        optimizer = adamw(on_gpu([torch.ones(LARGE)]), mode, resident_bytes=ROOM)
        take_steps(optimizer, range(1))
        del optimizer
        gc.collect()
        torch.cuda.empty_cache()

    once()  # imports, contexts, the first sizes of caches
    allocated, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    for _ in range(20):  # 16 MiB that stay on the device each: 320 MiB if they were kept
        once()
    assert torch.cuda.memory_allocated() == allocated
    assert free - torch.cuda.mem_get_info()[0] < 128 << 20


def test_on_the_device_is_what_is_resident(mode: str) -> None:
    before = torch.cuda.memory_allocated()
    param = on_gpu([torch.ones(LARGE)])[0]
    optimizer = adamw([param], mode, resident_bytes=ROOM)
    take_steps(optimizer, range(2))
    param.grad = None
    ours = torch.cuda.memory_allocated() - before - 4 * LARGE
    # Managed memory is not torch's; what is pinned has its slots there.
    assert ours <= (ROOM if mode == "pinned" else 0) + (1 << 20)


def test_memory_that_is_not_there_leaves_everything_as_it_was(mode: str) -> None:
    calls = TorchCuda(torch.device("cuda", 0))
    with pytest.raises((MemoryError, RuntimeError)):
        calls.allocate_managed(1 << 60) if mode == "unified" else calls.pinned(1 << 60)
    optimizer = adamw(on_gpu(make_params()), mode)  # and the device goes on
    take_steps(optimizer, range(2))
    plain = adamw(on_gpu(make_params()))
    take_steps(plain, range(2))
    for p, q in zip(params_of(optimizer), params_of(plain)):
        assert_same_bits(p.cpu(), q.cpu())


def test_device_without_managed_memory_pages_through_pinned_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_calls.TorchCuda, "has_managed_memory", lambda self: False)
    optimizer = adamw(on_gpu(make_params()), True)
    take_steps(optimizer, range(1))
    assert optimizer.paging_report().mode == "pinned"
    with pytest.raises(ValueError, match='use paged="pinned"'):
        take_steps(adamw(on_gpu(make_params()), "unified"), range(1))
    with pytest.raises(ValueError, match='paged="file" is for parameters on the CPU'):
        take_steps(adamw(on_gpu(make_params()), "file"), range(1))


# The calls and their times.


def test_managed_memory_keeps_its_bytes_when_it_moves() -> None:
    need("unified")
    calls = TorchCuda(torch.device("cuda", 0))
    tier = UnifiedTier(calls, ROOM)
    tier.allocate([2 << 20] * 12)
    data, stream = tier._pages[-1].data, calls.new_stream()
    assert data.device == torch.device("cuda", 0) and data.data_ptr() == tier._pages[-1].home
    data.copy_(torch.arange(2 << 20, device="cuda") % 251)
    torch.cuda.synchronize()
    for to_device in (False, True, False):
        calls.move(tier._pages[-1].home, 2 << 20, to_device, stream)
        torch.cuda.synchronize()
    assert torch.equal(data.cpu(), (torch.arange(2 << 20) % 251).byte())


def test_report_tells_how_long_pages_moved_and_were_waited_for(mode: str) -> None:
    optimizer = adamw(on_gpu([torch.ones(LARGE)]), mode, resident_bytes=ROOM)
    take_steps(optimizer, range(3))
    torch.cuda.synchronize()
    counters = optimizer.paging_report().counters
    # 48 MiB in and as much out, three times over, at less than 3 TB/s.
    assert 1e-4 < counters.busy_seconds < 3
    assert 0 <= counters.stalled_seconds < 3 and counters.hidden_seconds >= 0


def test_a_mode_for_each_of_several_optimizers() -> None:
    need("unified")
    ours = [adamw(on_gpu(make_params()), mode, state_bits=b) for mode in MODES for b in (32, 8)]
    plain = [adamw(on_gpu(make_params()), state_bits=b) for _ in MODES for b in (32, 8)]
    for step in range(3):
        for optimizer in (*ours, *plain):
            take_steps(optimizer, range(step, step + 1))
    for one, other in zip(ours, plain):
        _assert_same_states(one, other)
        for p, q in zip(params_of(one), params_of(other)):
            assert_same_bits(p.cpu(), q.cpu())
