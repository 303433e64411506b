"""Which CUDA kernel multiplies: a rule on numbers of a GPU, so that it is tested without one."""

from __future__ import annotations

import dataclasses

import pytest

from qlora_ref.dispatch import explain
from qlora_ref.matmul_plan import Gpu, Kernel, Product, choose

# Multiprocessors, clock, bandwidth and shared memory from NVIDIA's data sheets (H100 SXM5, A100
# SXM4 80 GB, GeForce RTX 4090).
H100 = Gpu(132, 1.83e9, 3.35e12, 227 * 1024)
A100 = Gpu(108, 1.41e9, 2.039e12, 163 * 1024)
RTX_4090 = Gpu(128, 2.52e9, 1.008e12, 99 * 1024)

PRODUCT = Product(1, 4096, 4096, 64, is_narrow=True, transposed=False, is_aligned=True)


def product(**changes: object) -> Product:
    return dataclasses.replace(PRODUCT, **changes)


def test_slots_per_weight_are_lanes_by_time() -> None:
    # 4 schedulers of 32 lanes; 0.5 + 1/64 + 4 / 16384 bytes a weight.
    gpu = Gpu(1, 1e9, (0.5 + 1 / 64 + 4 / 16384) * 1e9, 0)
    assert gpu.slots_per_weight == pytest.approx(128)


@pytest.mark.parametrize("gpu", [H100, A100], ids=["H100", "A100"])
def test_fast_memory_leaves_time_for_a_table_only(gpu: Gpu) -> None:
    assert choose(PRODUCT, gpu).kernel is Kernel.FEW_TOKENS_TABLE
    assert choose(product(tokens=512), gpu).kernel is Kernel.MANY_TOKENS_TABLE


def test_slower_memory_leaves_time_for_permutations() -> None:
    assert choose(PRODUCT, RTX_4090).kernel is Kernel.FEW_TOKENS_PERMUTE
    assert choose(product(tokens=512), RTX_4090).kernel is Kernel.MANY_TOKENS_PERMUTE


def test_many_tokens_have_no_table_where_shared_memory_is_short() -> None:
    short = dataclasses.replace(H100, shared_bytes=99 * 1024)
    assert choose(product(tokens=512), short).kernel is Kernel.MANY_TOKENS_PERMUTE
    assert choose(PRODUCT, short).kernel is Kernel.FEW_TOKENS_TABLE


def test_few_tokens_end_at_32_and_a_gradient_is_never_of_few() -> None:
    assert choose(product(tokens=32), H100).kernel is Kernel.FEW_TOKENS_TABLE
    assert choose(product(tokens=33), H100).kernel is Kernel.MANY_TOKENS_TABLE
    assert choose(product(transposed=True), H100).kernel is Kernel.MANY_TOKENS_TABLE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_narrow": False}, "float32"),
        ({"block_size": 96}, "power of two"),
        ({"block_size": 16}, "power of two"),
        ({"columns": 4080}, "multiple of 32"),
        ({"rows": 1 << 29}, "32 bits"),
        ({"rows": 1 << 21, "columns": 1 << 17}, "32 bits"),
        ({"rows": 4092, "transposed": True}, "multiple of 8"),
        ({"is_aligned": False}, "multiple of 16 bytes"),
    ],
    ids=str,
)
def test_what_tensor_cores_cannot_do_is_general(changes: dict, reason: str) -> None:
    plan = choose(product(**changes), H100)
    assert plan.kernel is Kernel.GENERAL and reason in plan.reason


def test_a_sum_is_cut_until_each_multiprocessor_has_two_blocks() -> None:
    # 128 tiles of 32 outputs: two for each of 132 multiprocessors are 264, of 64 are 128.
    assert choose(PRODUCT, H100).splits == 264 // 128
    assert choose(PRODUCT, dataclasses.replace(H100, multiprocessors=64)).splits == 1
    assert choose(product(rows=32, columns=1024), H100).splits == 2  # at least 512 inputs a part
    assert choose(product(rows=32, columns=10**6 // 64 * 64), H100).splits == 8
    assert choose(product(tokens=0), H100).splits >= 1


def test_explain_prints_the_choice_for_a_gpu_that_is_not_there() -> None:
    text = str(explain("matmul_4bit", "cuda", PRODUCT, RTX_4090))
    assert "few tokens permute" in text and "instructions fit" in text
