"""Compiles the Triton kernels for a GPU that need not be there, as a launch on it would."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from qlora_kernels import (
    adamw_step,
    decode,
    dequantize_4bit,
    dequantize_8bit,
    matmul_4bit,
    quantize_4bit,
    quantize_8bit,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora_ref import codebooks

NF4 = decode.nearest_table(codebooks.nf4_codebook()).constants()
SIGNED = decode.nearest_table(codebooks.dynamic_codebook()).constants()
UNSIGNED = decode.nearest_table(codebooks.dynamic_codebook(signed=False)).constants()

TABLES = {"entries_ptr": "*i64", "thresholds_ptr": "*fp32", "codes_ptr": "*u8"}
SCALES = {
    "packed_ptr": "*u8",
    "absmax_ptr": "*u8",
    "nested_absmax_ptr": "*fp32",
    "nested_codebook_ptr": "*fp32",
    "offset_ptr": "*fp32",
}
OPTIONS = {
    name: "fp32"
    for name in (
        *("beta1", "one_minus_beta1", "beta2", "one_minus_beta2"),
        *("eps", "decay", "step_size", "root_correction"),
    )
}
MOMENTS = {"param_ptr": "*bf16", "grad_ptr": "*bf16", "n": "i32", **OPTIONS}
PRODUCT = {
    **{"x_ptr": "*bf16", "bias_ptr": "*bf16", "y_ptr": "*bf16", **SCALES},
    **{"tokens": "i32", "rows": "i32", "columns": "i32"},
}
TILE = {"NESTED": True, "HAS_BIAS": True, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}
QUANTIZE = {"x_ptr": "*bf16", "absmax_ptr": "*fp32", "n": "i32", "block_size": "i32", **TABLES}


def _of_8bit_moments() -> tuple[dict[str, str], dict[str, Any]]:
    names = ("codebook", "entries", "thresholds", "codes")
    types = dict(zip(names, ("*fp32", "*i64", "*fp32", "*u8")))
    tables = {f"{o}_{n}_ptr": types[n] for o in ("first", "second") for n in names}
    absmaxes = {"m_absmax_ptr": "*fp32", "v_absmax_ptr": "*fp32"}
    constants = {f"FIRST_{name}": value for name, value in SIGNED.items()}
    constants |= {f"SECOND_{name}": value for name, value in UNSIGNED.items()}
    signature = {**MOMENTS, "m_ptr": "*u8", "v_ptr": "*u8", **absmaxes, **tables}
    return signature, {"ROWS": 8, **constants}


# Each kernel, the types of its arguments, and its constants.
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "quantize_4bit": (
        quantize_4bit._quantize_rows,
        {**QUANTIZE, "packed_ptr": "*u8", "zero": "i32"},
        {"ROWS": 32, "PAIRS": 32, **NF4},
    ),
    "dequantize_4bit": (
        dequantize_4bit._dequantize_4bit,
        {**SCALES, "pairs_ptr": "*i64", "y_ptr": "*bf16", "n": "i32", "chunks_per_block": "i32"},
        {"NESTED": True, "ROWS": 32, "BYTES": 32},
    ),
    "quantize_8bit": (
        quantize_8bit._quantize_rows,
        {**QUANTIZE, "y_ptr": "*u8"},
        {"ROWS": 8, "WIDTH": 256, **SIGNED},
    ),
    "dequantize_8bit": (
        dequantize_8bit._dequantize_8bit,
        {
            **{"codes_ptr": "*u8", "absmax_ptr": "*fp32", "codebook_ptr": "*fp32"},
            **{"y_ptr": "*bf16", "n": "i32", "chunks_per_block": "i32"},
        },
        {"ROWS": 8, "CHUNK": 256},
    ),
    "matmul_4bit": (
        matmul_4bit._matmul_tiled,
        {**PRODUCT, "pairs_ptr": "*i64", "chunks_per_block": "i32"},
        {**TILE, "CHUNK": 64},
    ),
    "matmul_4bit transposed": (
        matmul_4bit._matmul,
        {**PRODUCT, "codebook_ptr": "*fp32", "block_size": "i32"},
        {**TILE, "HAS_BIAS": False, "TRANSPOSED": True},
    ),
    "adamw_step": (
        adamw_step._step,
        {**MOMENTS, "m_ptr": "*fp32", "v_ptr": "*fp32"},
        {"WIDTH": 2048},
    ),
    "adamw_step 8-bit": (adamw_step._step_8bit, *_of_8bit_moments()),
}


def compile_kernel(name: str, vendor: str, architecture: str) -> Any:
    """The compiled kernel; what is a multiple of 16 in a launch is taken for one."""
    function, signature, constants = KERNELS[name]
    types = {argument: signature.get(argument, "constexpr") for argument in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(types.values())
        if kind[0] == "*" or kind == "i32"
    }
    source = ASTSource(function, signature=types, constexprs=constants, attrs=aligned)
    is_cuda = vendor == "cuda"
    target = GPUTarget(
        vendor, int(architecture) if is_cuda else architecture, 32 if is_cuda else 64
    )
    return triton.compile(source, target=target, options=decode.OPTIONS)


def compile_all(vendor: str, architecture: str) -> dict[str, int]:
    """Bytes of registers that each kernel spills; for other GPUs than NVIDIA's, 0."""
    spilled = {}
    for name in KERNELS:
        compiled = compile_kernel(name, vendor, architecture)
        spilled[name] = _spilled_bytes(compiled.asm["cubin"]) if vendor == "cuda" else 0
    return spilled


def _spilled_bytes(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        command = [str(tool), "-res-usage", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(found) for found in re.findall(r"(?:STACK|LOCAL):(\d+)", text))
