"""bitsandbytes.optim: its names for optim.AdamW and the rules of optimizers.py.

Each comes with 32 and 8 bits, and those that bitsandbytes pages with `Paged`; making one that is
missing raises NotImplementedError.
"""

from __future__ import annotations

from typing import Any

import torch

from qlora_ref import optim
from qlora_ref.integrations.bitsandbytes.optim_variants import (  # noqa: F401
    GlobalOptimManager,
    Overridable,
    variants,
)
from qlora_ref.integrations.bitsandbytes.other_optimizers import (
    LAMB,
    LARS,
    SGD,
    Adagrad,
    AdEMAMix,
    Lion,
    RMSprop,
)


class AdamW(Overridable, optim.AdamW):
    """optim.AdamW with bitsandbytes' arguments.

    optim_bits     32 or 8
    min_8bit_size  with 8 bits, smaller parameters keep a state of 32 bits
    is_paged       as `paged` of optim.AdamW
    args           of no meaning here; None
    Raises ValueError for options out of range, NotImplementedError for amsgrad.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        if amsgrad:
            raise NotImplementedError("amsgrad is not available: pass amsgrad=False")
        self._smallest = min_8bit_size
        bits, paged = self._bits or optim_bits, self._always_paged or is_paged
        super().__init__(params, lr, (betas[0], betas[1]), eps, weight_decay, bits, paged)


class Adam(AdamW):
    """AdamW without weight decay unless it is asked for.

    As in bitsandbytes it is then decoupled; torch.optim.Adam adds it to the gradient instead.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        options = (amsgrad, optim_bits, args, min_8bit_size, is_paged)
        super().__init__(params, lr, betas, eps, weight_decay, *options)


_BITS: frozenset[str] = frozenset({"optim_bits"})
_NAMES: tuple[tuple[type[Overridable], bool, frozenset[str]], ...] = (
    *((AdamW, True, _BITS), (Adam, True, _BITS | {"is_paged"}), (Adagrad, False, _BITS)),
    *((cls, True, frozenset()) for cls in (Lion, AdEMAMix)),
    *((cls, False, frozenset()) for cls in (SGD, RMSprop, LARS, LAMB)),
)
# The names of an optimizer's classes, by the module that bitsandbytes has them in.
FAMILIES: dict[str, tuple[str, ...]] = {}
for _cls, _paged, _kept in _NAMES:
    _made = variants(_cls, _paged, _kept)
    globals().update(_made)
    FAMILIES[_cls.__name__.lower()] = (_cls.__name__, *_made)


Optimizer8bit = Overridable  # what all of them are instances of


class PytorchLARS(torch.optim.Optimizer):
    """Not available."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError("PytorchLARS is not available: LARS is, in 32 and 8 bits")


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
