"""Every public name of bitsandbytes is in the alias, or here with the reason why it is not."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from compare import normal
from torch import Tensor, nn

from qlora_ref.integrations import bitsandbytes as ours
from qlora_ref.integrations.bitsandbytes import functional as F

bnb = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is missing: pip install bitsandbytes==0.50.2"
)

INT8 = "belongs to LLM.int8"
INSIDE = "a detail of its compiled library; ours is native.py"
HELPERS = "a helper of its own for LLM.int8 or for finding a library"
ABSENT = {
    "functional": {
        **dict.fromkeys(("C", "lib", "name2qmap", "FIRST_CUDA_DEVICE", "is_on_gpu"), INSIDE),
        **dict.fromkeys(("CUBLAS_Context", "GlobalPageManager"), INSIDE),
    },
    "nn.modules": dict.fromkeys(
        (
            *("INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING", "OutlierTracer", "GlobalOptimManager"),
            *("fix_4bit_weight_quant_state_from_module", "maybe_rearrange_weight"),
            *("has_avx512bf16", "logger", "T"),
        ),
        HELPERS,
    ),
    "utils": dict.fromkeys(
        (
            *("INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING", "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING"),
            *("OutlierTracer", "outlier_hook", "find_outlier_dims", "execute_and_return"),
            *("replace_linear", "sync_gpu", "logger"),
        ),
        HELPERS,
    ),
    "cextension": dict.fromkeys(
        (
            *("BNBNativeLibrary", "CudaBNBNativeLibrary", "XpuBNBNativeLibrary", "CUDASpecs"),
            *("ErrorHandlerMockBNBNativeLibrary", "DYNAMIC_LIBRARY_SUFFIX", "PACKAGE_DIR"),
            *("ROCM_GPU_ARCH", "get_available_cuda_binary_versions", "get_cuda_bnb_library_path"),
            *("get_cuda_specs", "get_cuda_version_tuple", "get_native_library"),
            *("get_rocm_gpu_arch", "get_xpu_bnb_library_path", "lib", "logger"),
            "parse_cuda_version",
        ),
        INSIDE,
    ),
}
RULES = "its base class; ours is optimizers.RuleOptimizer, whose rules are functions"
for _path in ("adagrad", "lars", "lion", "rmsprop", "sgd"):
    ABSENT[f"optim.{_path}"] = {"Optimizer1State": RULES}
for _path in ("adam", "adamw", "ademamix", "lamb"):
    ABSENT[f"optim.{_path}"] = {"Optimizer2State": RULES}
ABSENT |= {
    "optim.optimizer": {
        **dict.fromkeys(("MockArgs", "Optimizer1State", "Optimizer2State"), RULES),
        **dict.fromkeys(("sync_gpu", "logger"), HELPERS),
    },
    "autograd._functions": dict.fromkeys(("GlobalOutlierPooler", "logger"), HELPERS),
    "nn.parametrize": {},
    **{"autograd": {}, "nn": {}, "optim": {}},
}
MODULES = sorted(ABSENT)
ABSENT_MODULES = {
    "__main__": "qlora-ref doctor says what it says",
    "_ops": "torch.ops.bitsandbytes has the operators, whoever imports this",
    **dict.fromkeys(("consts", "cuda_specs"), INSIDE),
    **dict.fromkeys((f"diagnostics{name}" for name in ("", ".cuda", ".main", ".utils")), INSIDE),
    **dict.fromkeys(("backends", "backends.utils"), "its kernels; ours are behind ops.py"),
    **{
        f"backends.{device}{module}": "its kernels; ours are behind ops.py"
        for device in ("cpu", "cuda", "default", "hpu", "mps", "triton", "xpu")
        for module in ("", ".ops")
    },
    **{
        f"backends.triton.{name}": "its kernels; ours are in qlora_kernels"
        for name in ("kernels_4bit", "kernels_8bit_quant", "kernels_optim")
    },
}
# They raise, whatever they are given.
RAISE = {
    *("int8_double_quant", "int8_linear_matmul", "int8_mm_dequant", "int8_vectorwise_dequant"),
    *("int8_vectorwise_quant", "igemm", "batched_igemm", "check_matmul", "matmul"),
    *("MatmulLtState", "get_paged", "prefetch_tensor", "fill", "elementwise_func"),
    *("Int8Params", "Linear8bitLt", "Embedding8bit", "OutlierAwareLinear", "PytorchLARS"),
}


def own_names(module: ModuleType) -> set[str]:
    """What a module defines or offers, without what it imports for itself from elsewhere."""
    found = set()
    for name, value in vars(module).items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        home = getattr(value, "__module__", None) or ""
        if home.startswith("bitsandbytes") or not callable(value):
            found.add(name)
    return found


def arguments(function: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_every_name_of_the_package_is_there() -> None:
    names = {name for name in own_names(bnb) if not name.startswith("__")}
    names |= {"nn", "optim", "functional", "autograd", "utils", "modules", "adam", "cextension"}
    assert not [name for name in names if not hasattr(ours, name)]


def test_every_module_is_there_or_has_its_reason() -> None:
    folder = Path(bnb.__file__).parent
    files = [file.relative_to(folder).with_suffix("") for file in folder.rglob("*.py")]
    paths = {".".join(part for part in file.parts if part != "__init__") for file in files} - {""}
    assert paths == {*MODULES, *ABSENT_MODULES}


def test_a_program_imports_names_from_every_module() -> None:
    names = {m: sorted(own_names(importlib.import_module(f"bitsandbytes.{m}"))) for m in MODULES}
    lines = [
        f"from bitsandbytes.{module} import {name}"
        for module in MODULES
        for name in names[module]
        if name not in ABSENT[module]
    ]
    assert len(lines) > 150
    lines += [f"import bitsandbytes.{module}" for module in MODULES]
    absent = [
        f"try:\n import bitsandbytes.{module}\n print('found {module}')\n"
        "except ModuleNotFoundError: pass"
        for module in ABSENT_MODULES
    ]
    check = "assert bitsandbytes.optim.adamw.AdamW is bitsandbytes.optim.AdamW"
    start = "import qlora_ref; qlora_ref.as_bitsandbytes(); import bitsandbytes"
    script = "\n".join([start, *lines, *absent, check])
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr + done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_every_name_of_a_module_is_there_or_has_its_reason(module: str) -> None:
    theirs = importlib.import_module(f"bitsandbytes.{module}")
    mine = importlib.import_module(f"qlora_ref.integrations.bitsandbytes.{module}")
    absent = {name for name in own_names(theirs) if not hasattr(mine, name)}
    assert absent == set(ABSENT.get(module, ()))


@pytest.mark.parametrize("name", sorted(RAISE))
def test_what_is_not_available_raises_with_a_sentence(name: str) -> None:
    found = [m for m in (ours, F, ours.nn, ours.optim) if hasattr(m, name)]
    with pytest.raises(NotImplementedError, match=f"(?s){name}.{{20,}}"):
        getattr(found[0], name)(torch.zeros(2, 2))


@pytest.mark.parametrize("module", ["functional", "nn", "utils"])
def test_what_is_there_takes_the_same_arguments(module: str) -> None:
    theirs = importlib.import_module(f"bitsandbytes.{module}")
    mine = importlib.import_module(f"qlora_ref.integrations.bitsandbytes.{module}")
    for name in own_names(theirs) - RAISE - {"QuantState"}:
        if callable(getattr(mine, name, None)):
            first, second = (
                [
                    (p.name, p.default)
                    for p in inspect.signature(getattr(m, name)).parameters.values()
                ]
                for m in (mine, theirs)
            )
            assert first == second, name


# What came with them.


@pytest.mark.parametrize("cut", [torch.chunk, torch.split])
def test_parts_of_a_weight_are_of_its_class_with_the_state_of_the_whole(cut: Any) -> None:
    parts = {}
    for library in (ours, bnb):
        torch.manual_seed(0)
        weight = library.nn.LinearNF4(64, 64).to("cpu").weight
        pieces = cut(weight, 2) if cut is torch.chunk else cut(weight, 1024)
        assert all(type(piece) is library.nn.Params4bit for piece in pieces)
        assert all(piece.quant_state is weight.quant_state for piece in pieces)
        assert type(weight.clone()) is Tensor
        parts[library] = [(piece.shape, piece.bnb_quantized, piece.blocksize) for piece in pieces]
        if library is ours:
            assert torch.equal(torch.cat([piece.data for piece in pieces]), weight.data)
    assert parts[ours] == parts[bnb]


NAMES = ["adam", "momentum", "rmsprop", "adagrad", "lion", "ademamix", "lamb", "lars"]
ONE_STATE = ("momentum", "rmsprop", "adagrad", "lion", "lars")
# Three steps of 0.01 on values of 1, each rounded a few times.
ROUNDINGS = 3 * 8 * 2.0**-24


def states(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor | None]:
    first = torch.zeros((2, *shape) if name == "ademamix" else shape, dtype=dtype)
    return [first, None if name in ONE_STATE else torch.zeros(shape, dtype=dtype)]


@pytest.mark.parametrize("name", NAMES)
def test_an_update_of_32_bits_is_that_of_bitsandbytes(name: str) -> None:
    results = []
    for library in (F, bnb.functional):
        p, (state1, state2) = normal(40, 130), states(name, (40, 130), torch.float32)
        longest = (
            {"max_unorm": 0.02, "unorm_vec": torch.zeros(1)} if name in ("lamb", "lars") else {}
        )
        for step in (1, 2, 3):
            g = normal(40, 130, seed=step)
            numbers = {"beta2": 0.999, "beta3": 0.9999, "alpha": 5.0, "weight_decay": 0.1}
            library.optimizer_update_32bit(
                name,
                g,
                p,
                state1,
                0.9,
                1e-8,
                step,
                0.01,
                state2,
                **numbers,
                **longest,
                gnorm_scale=0.5,
            )
        results.append((p, state1))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=2**-20, atol=ROUNDINGS)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("lamb", "lars")])
def test_an_update_of_8_bits_is_that_of_32_on_the_restored_states(name: str) -> None:
    shape = (40, 130)
    p, twin = normal(*shape), normal(*shape)
    blocks = -(-p.numel() // 256)
    (state1, state2), (exact1, exact2) = (
        states(name, shape, d) for d in (torch.uint8, torch.float32)
    )
    qmap1, qmap2 = F.create_dynamic_map(), F.create_dynamic_map(signed=False)
    if name in ("rmsprop", "adagrad"):
        qmap1 = qmap2
    absmax1 = torch.zeros((2, blocks) if name == "ademamix" else blocks)
    absmax2 = torch.zeros(blocks)
    numbers = (0.9, 0.999, 0.9999, 5.0, 1e-8)
    levels = (qmap1, qmap2, absmax1, absmax2)
    for step in (1, 2):
        g = normal(*shape, seed=step)
        states_8 = (state1, state2, *numbers, step, 0.01, *levels, 0.1)
        F.optimizer_update_8bit_blockwise(name, g, p, *states_8)
        more = (0.999, 0.9999, 5.0, 0.1)
        F.optimizer_update_32bit(name, g, twin, exact1, 0.9, 1e-8, step, 0.01, exact2, *more)
        assert torch.equal(p, twin)  # the step itself is in float32
        pairs = [(exact1, state1, qmap1, absmax1), (exact2, state2, qmap2, absmax2)]
        for exact, codes, table, absmax in pairs:
            if exact is not None:
                flat = table[codes.flatten(-2).int()]
                scales = absmax.repeat_interleave(256, -1)[..., : p.numel()]
                exact.copy_((flat * scales).view_as(exact))


def test_updates_on_what_does_not_fit_are_refused() -> None:
    p, g, state = normal(4), normal(4), torch.zeros(4)
    with pytest.raises(ValueError, match="optimizer_name must be adam or one of"):
        F.optimizer_update_32bit("adamax", g, p, state, 0.9, 1e-8, 1, 0.1)
    with pytest.raises(ValueError, match=r"adam has 2 moments .* \(4,\), got \[\(4,\)\]"):
        F.optimizer_update_32bit("adam", g, p, state, 0.9, 1e-8, 1, 0.1)
    with pytest.raises(ValueError, match="lion has 1 moments"):
        F.optimizer_update_32bit("lion", g, p, torch.zeros(3), 0.9, 1e-8, 1, 0.1)
    for options in ({"skip_zeros": True}, {"max_unorm": 1.0}):
        with pytest.raises(NotImplementedError, match=next(iter(options))):
            F.optimizer_update_32bit("lion", g, p, state, 0.9, 1e-8, 1, 0.1, **options)


@pytest.mark.parametrize("name", ["Embedding", "StableEmbedding"])
def test_dense_embeddings_keep_32_bits_in_an_optimizer_of_8(name: str) -> None:
    embedding = getattr(ours.nn, name)(100, 64, padding_idx=3)
    theirs = getattr(bnb.nn, name)(100, 64, padding_idx=3)
    theirs.load_state_dict(embedding.state_dict())
    tokens = torch.tensor([[1, 3], [99, 0]])
    assert torch.equal(embedding(tokens), theirs(tokens))
    assert torch.equal(embedding.weight[3], torch.zeros(64))
    bound = (6 / 164) ** 0.5
    assert 0.9 * bound < embedding.weight.abs().max() <= bound
    other = nn.Parameter(normal(100, 64))
    optimizer = ours.optim.AdamW8bit([embedding.weight, other])
    for param in (embedding.weight, other):
        param.grad = torch.ones_like(param)
    optimizer.step()
    dtypes = [optimizer.state[p]["exp_avg"].dtype for p in (embedding.weight, other)]
    assert dtypes == [torch.float32, torch.uint8]
