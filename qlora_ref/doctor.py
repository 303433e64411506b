"""What was found on this machine, which backend serves each operation and why, how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import torch

from qlora_ref import native
from qlora_ref.dispatch import OPERATIONS, explain, forced_backend, forced_isa

_PACKAGES = {
    "numpy": "needed",
    "safetensors": "needed to save and load",
    "transformers": "needed by finetune: pip install 'qlora_ref[train]'",
    "gguf": "needed for GGUF files: pip install 'qlora_ref[train]'",
    "matplotlib": "needed for pictures: pip install 'qlora_ref[train]'",
    "triton": "needed by the triton backend: pip install triton",
    "peft": "not needed; reads and writes the same adapters",
    "bitsandbytes": "not needed; reads and writes the same checkpoints",
}


def diagnose() -> dict[str, Any]:
    """Facts by section, for JSON or for reading; never raises for what is missing."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "machine": _machine(),
        "packages": {
            name: installed_version(name) or f"absent ({why})" for name, why in _PACKAGES.items()
        },
        "tools": {tool: shutil.which(tool) or "absent" for tool in ("g++", "clang++", "nvcc")},
        "forced_backend": forced_backend(),
        "operations": {
            device: {name: _serves(name, device) for name in OPERATIONS} for device in devices
        },
        "advice": _advice(),
    }


def _machine() -> dict[str, Any]:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "c++ kernels": instruction_set(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": cuda,
    }


def instruction_set() -> str:
    """What the C++ kernels use, and what they could be forced to use."""
    try:
        available = native.available_isas(native.FOLDER)
    except native.BackendUnavailable as unavailable:
        return f"none: {unavailable}"
    isa = forced_isa() or available[-1]
    if isa not in available:
        isa += " is forced and does not run here"
    return f"{isa}, of {', '.join(available)}"


def _serves(operation: str, device: str) -> dict[str, Any]:
    explanation = explain(operation, device)
    return {"backend": explanation.backend, "reasons": explanation.reasons}


def _advice() -> list[str]:
    advice = []
    try:
        available, isa = native.available_isas(native.FOLDER), forced_isa()
    except native.BackendUnavailable:
        has_compiler = any(shutil.which(tool) for tool in ("g++", "clang++", "c++"))
        advice.append(
            "the C++ kernels are not there: "
            + ("reinstall the package to build them" if has_compiler else "install a C++ compiler")
        )
    else:
        if isa is not None and isa not in available:
            advice.append(f"{isa} does not run here; unset QLORA_REF_ISA for {available[-1]}")
    if installed_version("transformers") is None:
        advice.append("to fine-tune: pip install 'qlora_ref[train]'")
    if (forced := forced_backend()) is not None:
        advice.append(f"{forced} is forced; unset QLORA_REF_BACKEND for the default")
    return advice


def installed_version(package: str) -> str | None:
    """The version of an installed distribution; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
