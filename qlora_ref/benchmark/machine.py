"""The machine and the versions that a measurement holds for."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from qlora_ref.doctor import installed_version, instruction_set
from qlora_ref.version import __version__

_PACKAGES = (
    *("torch", "triton", "bitsandbytes", "torchao", "openvino", "onnxruntime"),
    *("llama-cpp-python", "xllamacpp"),
)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, clocks, threads, memory, versions; of the GPU as well where that is measured."""
    found = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "processor": processor_name(),
        "instruction set": instruction_set(),
        "torch instruction set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clocks": _cpu_clocks(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "qlora_ref": __version__,
        **{name: version for name in _PACKAGES if (version := installed_version(name))},
    }
    return found | (_describe_gpu(device) if device.type == "cuda" else {})


def processor_name() -> str:
    """As the system knows it: the model on Linux."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _describe_gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "cuda": torch.version.cuda,
        "gpu clocks": _gpu_clocks(),
    }


def _cpu_clocks() -> str:
    clocks = [
        float(line.split(":")[1]) for line in _lines("/proc/cpuinfo") if line.startswith("cpu MHz")
    ]
    return f"{min(clocks):.0f} to {max(clocks):.0f} MHz" if clocks else "not known"


def _gpu_clocks() -> str:
    """Present and highest clocks, and the driver, as nvidia-smi says."""
    if shutil.which("nvidia-smi") is None:
        return "not known: nvidia-smi is not there"
    query = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.splitlines() or ["no answer"]
    return f"{query}: {lines[0]}"


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
