"""The modules of bitsandbytes 0.50.2 that are none here: which names they hold, and from where.

Ours are split by idea, not by optimizer; programs that say `from bitsandbytes.optim.adamw import
AdamW8bit` find the name all the same.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from typing import Any

_BOTH = ("", "32bit", "8bit")


def _variants(name: str, paged: bool = False) -> dict[str, str]:
    return {f"{p}{name}{bits}": "optim" for p in ("", "Paged")[: 1 + paged] for bits in _BOTH}


# By path: the names, each with the module of ours that has it.
MODULES: dict[str, dict[str, str]] = {
    "optim.adam": _variants("Adam", paged=True),
    "optim.adamw": _variants("AdamW", paged=True),
    "optim.ademamix": _variants("AdEMAMix", paged=True),
    "optim.lion": _variants("Lion", paged=True),
    "optim.adagrad": _variants("Adagrad"),
    "optim.lamb": _variants("LAMB"),
    "optim.lars": {**_variants("LARS"), "PytorchLARS": "optim"},
    "optim.rmsprop": _variants("RMSprop"),
    "optim.sgd": _variants("SGD"),
    "optim.optimizer": {"GlobalOptimManager": "optim", "Optimizer8bit": "optim"},
    "autograd._functions": {
        **dict.fromkeys(("MatMul4Bit", "matmul_4bit"), "autograd"),
        **dict.fromkeys(("MatMul8bitFp", "MatMul8bitLt", "MatmulLtState", "matmul"), "autograd"),
    },
}


def define(package: str) -> None:
    """Make these modules importable below the package, and attributes of their parents."""
    for path, names in MODULES.items():
        parent, _, leaf = path.rpartition(".")
        spec = importlib.machinery.ModuleSpec(f"{package}.{path}", None)
        module = importlib.util.module_from_spec(spec)
        module.__doc__ = f"The names of bitsandbytes.{path}, which are at home elsewhere."
        for name, home in names.items():
            setattr(module, name, getattr(sys.modules[f"{package}.{home}"], name))
        owner: Any = sys.modules[f"{package}.{parent}"]
        owner.__path__ = []  # a module that has submodules is a package
        setattr(owner, leaf, module)
        sys.modules[f"{package}.{path}"] = module
