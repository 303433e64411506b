"""`qlora-ref bench`: wrong results are not timed, right ones come out in every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from training import qlora

from qlora_ref import dispatch, native
from qlora_ref.benchmark import limits, timing
from qlora_ref.benchmark.blockwise import dequantize_4bit, quantize_4bit
from qlora_ref.benchmark.candidates import Case, Prepared, relative_error, share_that_differs
from qlora_ref.benchmark.compare import compare
from qlora_ref.benchmark.plan import Plan, make_plan
from qlora_ref.benchmark.products import GRADIENT, matmul_4bit
from qlora_ref.benchmark.report import Measurement, read_measurement
from qlora_ref.benchmark.run import FAILED, PASSED, REFUSED, Row, measure_case
from qlora_ref.benchmark.timing import Timing, time_in_turn
from qlora_ref.benchmark.weights import Weights

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = ("bench", "--shapes", "64x128", "--tokens", "1", "--repeats", "1", "--threads", "1")
OURS = ("--no-peers", "--dtypes", "float32")


def a_case(**runs: Callable[[], Any]) -> Case:
    """Each candidate should return 1; they are ours."""
    prepared = {
        name: (lambda run=run: Prepared(run, lambda found: abs(found - 1), 0.0))
        for name, run in runs.items()
    }
    return Case("an operation", "", "1x1", "float32", 1 << 16, 0, prepared)


def a_row(name: str = "cpu", median: float = 1.0, spread: float = 0.1, **others: Any) -> Row:
    row = measure_case(a_case(**{name: lambda: 1}), CPU, 1)[0]
    low, high = median - spread, median + spread
    return replace(row, seconds=median, low=low, high=high, **others)


# What passes and what does not


def test_a_wrong_result_is_refused_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SECONDS_TO_STEADY", 0.0)
    calls = {"right": 0, "wrong": 0}

    def run(name: str, value: float) -> float:
        calls[name] += 1
        return value

    case = a_case(right=lambda: run("right", 1.0), wrong=lambda: run("wrong", 1.25))
    right, wrong = measure_case(case, CPU, repeats=5)
    assert (right.status, wrong.status) == (PASSED, REFUSED)
    assert right.seconds is not None and right.runs == 5
    assert wrong.seconds is None and wrong.runs == 0 and "off by 0.25" in wrong.why
    # A check; a warm-up and five rounds, each timed after one run; and a check.
    assert calls == {"right": 1 + 2 * (1 + 5), "wrong": 1}


def test_a_result_that_is_not_a_number_is_refused() -> None:
    assert measure_case(a_case(nan=lambda: float("nan")), CPU, 1)[0].status == REFUSED


def test_what_raises_fails_with_its_words_and_the_others_go_on() -> None:
    def broken() -> float:
        raise RuntimeError("no such device\nsecond line")

    bad, good = measure_case(a_case(bad=broken, good=lambda: 1.0), CPU, 1)
    assert (bad.status, bad.why) == (FAILED, "RuntimeError: no such device")
    assert good.status == PASSED


def planted(monkeypatch: pytest.MonkeyPatch, operation: str, spoil: Callable[[Any], Any]) -> None:
    """From now on the C++ backend's results of an operation are spoiled."""
    real = dispatch._load

    def load(backend: str, name: str, isa: str | None) -> Callable[..., Any]:
        function = real(backend, name, isa)
        if (backend, name) != ("cpu", operation):
            return function
        return lambda *arguments: spoil(function(*arguments))

    monkeypatch.setattr(dispatch, "_load", load)


def flip_a_bit(result: Any) -> Any:
    first = result[0] if isinstance(result, tuple) else result
    first.view(torch.uint8).flatten()[3] ^= 1
    return result


@pytest.mark.parametrize(
    "operation", ["quantize_4bit", "dequantize_4bit", "quantize_8bit", "dequantize_8bit"]
)
def test_one_wrong_bit_of_a_backend_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, operation: str
) -> None:
    planted(monkeypatch, operation, flip_a_bit)
    done = qlora(*SMALL, *OURS, "--operations", operation, "--json", tmp_path / "a.json")
    assert done.returncode == 1 and "did not pass" in done.stderr and operation in done.stderr
    rows = {row.name: row for row in read_measurement(tmp_path / "a.json").rows}
    assert rows["cpu"].status == REFUSED and rows["cpu"].seconds is None
    assert rows["reference"].status == PASSED


def test_a_product_that_is_a_little_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "matmul_4bit", lambda y: y * 1.0001)
    case = matmul_4bit(Weights((64, 128), torch.float32), tokens=3)
    rows = {row.name: row.status for row in measure_case(replace(case, peers={}), CPU, 1)}
    assert rows == {"cpu": REFUSED, "reference": PASSED}


def test_a_peer_that_is_wrong_is_refused_and_does_not_fail_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    monkeypatch.setattr(bnb, "dequantize_4bit", lambda packed, state: torch.zeros(64, 128))
    what = ("--operations", "dequantize_4bit", "--dtypes", "float32")
    done = qlora(*SMALL, *what, "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    rows = {row.name: row for row in read_measurement(tmp_path / "a.json").rows}
    assert rows["bitsandbytes"].status == REFUSED
    assert "refused: off by" in done.stdout


def test_a_case_that_cannot_be_made_is_a_row_and_the_others_go_on() -> None:
    plan = make_plan("quantize_4bit", "64x128", None, "float32,bfloat16", "cpu", repeats=1)
    real = torch.randn
    with mock.patch("torch.randn", side_effect=[MemoryError("all gone"), real(64, 128)]):
        broken, fine = plan.measure()
    assert [row.status for row in broken] == [FAILED] and "all gone" in broken[0].why
    assert broken[0].operation == "quantize_4bit" and fine[0].status == PASSED


# What is counted


def test_a_case_counts_the_bytes_that_must_move() -> None:
    n = 64 * 128
    stored = n // 2 + 4 * n // 64  # codes, scales
    assert quantize_4bit((64, 128), torch.bfloat16, "cpu").nbytes == 2 * n + stored
    assert dequantize_4bit((64, 128), torch.float32, "cpu").nbytes == 4 * n + stored
    weights = Weights((64, 128), torch.float32)
    case = matmul_4bit(weights, 3)
    assert case.nbytes == stored + 4 * 3 * (64 + 128) and case.flops == 2 * 3 * n
    dense = case.peers["torch dense"]()
    assert dense.nbytes == 4 * n + 4 * 3 * (64 + 128)
    assert matmul_4bit(weights, 3, GRADIENT).nbytes == case.nbytes


def test_the_gradient_is_checked_against_the_untransposed_weight() -> None:
    case = matmul_4bit(Weights((64, 128), torch.float32), 3, GRADIENT)
    for prepare in (*case.ours.values(), *case.peers.values()):
        prepared = prepare()
        with torch.no_grad():
            assert prepared.run().shape == (3, 128)
            assert prepared.check() <= prepared.tolerance


def test_errors_are_what_they_are_called() -> None:
    a, b = torch.tensor([1.0, 2.0, 0.0, 4.0]), torch.tensor([1.0, 2.0, -0.0, 5.0])
    assert share_that_differs(a, b) == 0.5  # the sign of a zero is a difference
    assert share_that_differs(a, a.double()) == share_that_differs(a, a[:3]) == 1.0
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]).double()) == 0.2


def test_a_memory_limit_is_the_better_of_copy_and_read() -> None:
    memory = limits.MemoryLimit(1600, CPU)
    for run in memory.runs.values():
        run()
    times = {"copy": Timing(2e-6, 0, 0, 1), "read": Timing(1e-6, 0, 0, 1)}
    assert memory.bytes_per_second(times) == pytest.approx(1600 / 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_arithmetic_limit_is_the_best_of_its_kinds(dtype: torch.dtype) -> None:
    arithmetic = limits.ArithmeticLimit(dtype, CPU)
    multiply = native.load("cpu", "multiply_in_registers")
    rounds = limits._ROUNDS
    floats, halves = multiply(torch.float32, rounds), multiply(torch.bfloat16, rounds)
    names = [f"registers {kind}" for kind in (torch.float32, torch.bfloat16)]
    assert list(arithmetic.runs) == names
    seconds = dict(zip(names, (Timing(2.0, 0, 0, 1), Timing(0.5, 0, 0, 1)), strict=True))
    # A float is the sum of three bfloat16; of their nine products the three smallest are left out.
    expected = max(floats / 2, 2 * halves if dtype == torch.bfloat16 else 2 * halves / 6)
    assert arithmetic.flops_per_second(seconds) == pytest.approx(expected)


def test_without_a_compiled_library_the_limit_is_a_product_of_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    arithmetic = limits.ArithmeticLimit(torch.float16, CPU)
    assert set(arithmetic.runs) == {"product torch.float16", "product torch.float32"}
    assert {run().shape for run in arithmetic.runs.values()} == {(1024, 1024)}
    times = {name: Timing(0.5, 0, 0, 1) for name in arithmetic.runs}
    assert arithmetic.flops_per_second(times) == 2 * 2 * 1024**3


# How time is taken


def test_candidates_run_in_turn_and_the_first_round_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    found = time_in_turn({n: (lambda n=n: order.append(n)) for n in "ab"}, repeats=9)
    rounds = {"".join(order[i : i + 2]) for i in range(0, 20, 2)}
    assert (len(order), rounds) == (20, {"ab", "ba"})
    assert found["a"] == Timing(1.0, 1.0, 1.0, 9)


def test_quartiles_are_those_of_the_counted_rounds() -> None:
    assert timing._summary([1.0, 2.0, 3.0, 4.0, 5.0]) == Timing(3.0, 2.0, 4.0, 5)
    assert timing._summary([7.0]) == Timing(7.0, 7.0, 7.0, 1)


def test_a_budget_ends_the_rounds_but_leaves_three() -> None:
    assert time_in_turn({"a": lambda: None}, repeats=50, budget=0)["a"].runs == 3


def test_on_a_gpu_the_cache_is_flushed_before_and_read_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.5  # milliseconds

    class Trash:
        def zero_(self) -> None:
            happened.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: Trash())
    found = time_in_turn({"a": lambda: happened.append("run")}, 1, "cuda")
    once = ["flush", "event", "run", "event"]
    assert happened == [*once, *once, "wait"]
    assert found["a"].median == 2.5e-3


# What comes out


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("bench")
    what = ("--dtypes", "float32", "--operations", "quantize_4bit,matmul_4bit")
    files = ("--json", folder / "a.json", "--csv", folder / "a.csv", "--markdown", folder / "a.md")
    done = qlora(*SMALL, *what, *files)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_every_format_holds_every_row(measured: tuple[Path, str]) -> None:
    folder, shown = measured
    found = read_measurement(folder / "a.json")
    rows = found.rows
    assert {row.operation for row in rows} == {"quantize_4bit", "matmul_4bit"}
    lines = list(csv.DictReader(io.StringIO((folder / "a.csv").read_text())))
    assert [line["name"] for line in lines] == [row.name for row in rows]
    assert [line["seconds"] for line in lines] == [str(row.seconds or "") for row in rows]
    text = (folder / "a.md").read_text()
    assert text.count("\n### ") == 2 and all(f"\n| {row.name} |" in text for row in rows)
    for row in rows:
        assert row.name in shown
    for fact in ("processor", "threads", "clocks", "torch", "python"):
        assert found.machine[fact] and f"- {fact}: " in text


def test_json_reads_back_as_it_was(measured: tuple[Path, str]) -> None:
    text = (measured[0] / "a.json").read_text()
    assert read_measurement(measured[0] / "a.json").to_json() == text


def test_ours_come_first_and_time_1(measured: tuple[Path, str]) -> None:
    text = (measured[0] / "a.md").read_text()
    for case in text.split("\n### ")[1:]:
        first = case.splitlines()[4].split("|")
        assert first[1].strip() == "cpu" and first[-2].strip() == "1.00"


def test_a_dash_puts_one_format_alone_on_standard_output() -> None:
    done = qlora(*SMALL, *OURS, "--operations", "quantize_8bit", "--json", "-")
    assert done.returncode == 0 and json.loads(done.stdout)["schema"] == 1
    done = qlora(*SMALL, *OURS, "--operations", "quantize_8bit", "--csv", "-")
    assert done.stdout.startswith("operation,detail,") and len(done.stdout.splitlines()) == 3


# What has changed


def test_a_change_is_one_only_beyond_the_spread() -> None:
    def verdict(now: Row, before: Row) -> str:
        return compare([now], [before])[now.key].verdict

    before = a_row(median=1.0, spread=0.1)
    assert verdict(a_row(median=0.5), before) == "faster"
    assert verdict(a_row(median=2.0), before) == "slower"
    assert verdict(a_row(median=0.85), before) == "same"  # 0.75 to 0.95 meets 0.9 to 1.1
    assert verdict(a_row(median=1.02, spread=1e-4), a_row(median=1.0, spread=1e-4)) == "same"
    assert compare([a_row(median=0.5)], [before])[before.key].ratio == 0.5


def test_rows_of_other_names_shapes_or_threads_are_not_compared() -> None:
    before = a_row()
    for other in (a_row("triton"), replace(before, shape="2x2"), replace(before, threads=99)):
        assert compare([other], [before]) == {}
    assert compare([replace(before, seconds=None, low=None, high=None)], [before]) == {}


def test_compare_adds_a_column_and_names_another_machine(
    measured: tuple[Path, str], tmp_path: Path
) -> None:
    found = read_measurement(measured[0] / "a.json")
    slow = [replace(row, **times_hundred(row)) for row in found.rows]
    machine = {**found.machine, "processor": "a slow one"}
    old = tmp_path / "old.json"
    old.write_text(Measurement(machine, slow).to_json())
    what = ("--operations", "quantize_4bit", "--compare", old, "--markdown", "-")
    done = qlora(*SMALL, *OURS, *what)
    assert done.returncode == 0, done.stderr
    assert "processor: a slow one before" in done.stderr
    assert "now / before" in done.stdout and done.stdout.count("faster") == 2


def times_hundred(row: Row) -> dict[str, float | None]:
    times = {"seconds": row.seconds, "low": row.low, "high": row.high}
    return {name: None if value is None else 1e4 * value for name, value in times.items()}


# What is not understood


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--operations", "matmul_5bit"), "no operation is called 'matmul_5bit'"),
        (("--shapes", "4096"), "a shape is NxK"),
        (("--shapes", "64x100"), "multiple of 64"),
        (("--dtypes", "float8"), "no dtype is called 'float8'"),
        (("--device", "tpu"), "no device is called 'tpu'"),
        (("--tokens", "0"), "at least 1"),
        (("--tokens", "one"), "whole numbers"),
        (("--operations", ","), "got none"),
        (("--json", "-", "--csv", "-"), "only one of"),
        (("--compare", "/nowhere.json"), "/nowhere.json"),
        (("--compare", str(ROOT / "tests/data/tiny_llama/config.json")), "no measurement"),
    ],
)
def test_an_error_says_what_was_expected(arguments: Any, message: str) -> None:
    done = qlora("bench", *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        Plan(("quantize_4bit",), ((64, 64),), (1,), ("float32",), "cuda")
