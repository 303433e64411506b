"""The modules of bitsandbytes 0.50.2 that are none here: their names are found in their parents.

Ours are split by idea, not by optimizer; programs that say `from bitsandbytes.optim.adamw import
AdamW8bit` find the name all the same.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from typing import Any

from qlora_ref.integrations.bitsandbytes.optim import FAMILIES

MODULES: dict[str, tuple[str, ...]] = {
    **{f"optim.{family}": names for family, names in FAMILIES.items()},
    "optim.lars": (*FAMILIES["lars"], "PytorchLARS"),
    "optim.optimizer": ("GlobalOptimManager", "Optimizer8bit"),
    "autograd._functions": (
        *("MatMul4Bit", "MatMul8bitFp", "MatMul8bitLt", "MatmulLtState"),
        *("matmul", "matmul_4bit"),
    ),
}


def define(package: str) -> None:
    """Make these modules importable below the package, and attributes of their parents."""
    for path, names in MODULES.items():
        parent, _, leaf = path.rpartition(".")
        owner: Any = sys.modules[f"{package}.{parent}"]
        spec = importlib.machinery.ModuleSpec(f"{package}.{path}", None)
        module = importlib.util.module_from_spec(spec)
        module.__doc__ = f"The names of bitsandbytes.{path}, which are at home elsewhere."
        for name in names:
            setattr(module, name, getattr(owner, name))
        owner.__path__ = []  # a module that has submodules is a package
        setattr(owner, leaf, module)
        sys.modules[f"{package}.{path}"] = module
