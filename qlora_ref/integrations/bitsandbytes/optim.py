"""bitsandbytes.optim: Adam and AdamW are optim.AdamW with the options that their names say.

The other optimizers are in other_optimizers.py; making one that is missing raises
NotImplementedError.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ref import optim
from qlora_ref.integrations.bitsandbytes.other_optimizers import (  # noqa: F401  (their names)
    LAMB,
    LARS,
    SGD,
    Adagrad,
    Adagrad8bit,
    Adagrad32bit,
    AdEMAMix,
    AdEMAMix8bit,
    AdEMAMix32bit,
    LAMB8bit,
    LAMB32bit,
    LARS8bit,
    LARS32bit,
    Lion,
    Lion8bit,
    Lion32bit,
    RMSprop,
    RMSprop8bit,
    RMSprop32bit,
    SGD8bit,
    SGD32bit,
)

_MISSING = ("PytorchLARS", "PagedLion", "PagedAdEMAMix")


class AdamW(optim.AdamW):
    """optim.AdamW with bitsandbytes' arguments.

    optim_bits     32 or 8
    min_8bit_size  with 8 bits, smaller parameters keep a state of 32 bits
    is_paged       as `paged` of optim.AdamW
    args           of no meaning here; None
    Raises ValueError for options out of range, NotImplementedError for amsgrad.
    """

    _bits: int | None = None
    _paged_always = False

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
        bits, paged = self._bits or optim_bits, self._paged_always or is_paged
        super().__init__(params, lr, (betas[0], betas[1]), eps, weight_decay, bits, paged)
        GlobalOptimManager.get_instance().watch(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those whose state is to have 32 bits get a group of their own."""
        bits = param_group.get("state_bits", self.defaults["state_bits"])
        members = param_group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        exact = [param for param in members if bits == 8 and self._is_exact(param)]
        kept = {id(param) for param in exact}
        rest = [param for param in members if id(param) not in kept]
        if rest or not exact:
            super().add_param_group({**param_group, "params": rest})
        if exact:
            super().add_param_group({**param_group, "params": exact, "state_bits": 32})

    def _is_exact(self, param: Tensor) -> bool:
        bits = GlobalOptimManager.get_instance().bits(param)
        return bits == 32 or bits is None and param.numel() < self._smallest

    def keep_exact(self, param: Tensor) -> None:
        """Give a parameter that has no state yet one of 32 bits."""
        for group in list(self.param_groups):
            places = [at for at, member in enumerate(group["params"]) if member is param]
            if places and group["state_bits"] == 8 and not self.state.get(param):
                del group["params"][places[0]]
                super().add_param_group({**group, "params": [param], "state_bits": 32})


class AdamW32bit(AdamW):
    """AdamW with a state of 32 bits."""

    _bits = 32


class AdamW8bit(AdamW):
    """AdamW with a state of 8 bits."""

    _bits = 8


class PagedAdamW(AdamW):
    """AdamW with a paged state."""

    _paged_always = True


class PagedAdamW32bit(AdamW):
    """AdamW with a paged state of 32 bits."""

    _bits, _paged_always = 32, True


class PagedAdamW8bit(AdamW):
    """AdamW with a paged state of 8 bits."""

    _bits, _paged_always = 8, True


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


class Adam32bit(Adam):
    """Adam with a state of 32 bits."""

    _bits = 32


class Adam8bit(Adam):
    """Adam with a state of 8 bits."""

    _bits = 8


class PagedAdam(Adam):
    """Adam with a paged state."""

    _paged_always = True


class PagedAdam32bit(Adam):
    """Adam with a paged state of 32 bits."""

    _bits, _paged_always = 32, True


class PagedAdam8bit(Adam):
    """Adam with a paged state of 8 bits."""

    _bits, _paged_always = 8, True


class GlobalOptimManager:
    """Parameters whose state is to have other bits than their optimizer's."""

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        # By identity, beside a weak reference: tensors compare by value, and an id is used again.
        self._bits: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._optimizers: weakref.WeakSet[AdamW] = weakref.WeakSet()

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The only one."""
        cls._instance = cls._instance or cls()
        return cls._instance

    def register_parameters(self, params: Any) -> None:
        """Nothing to do: a parameter is known by its override alone."""

    def override_config(
        self,
        parameters: Any,
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Set `optim_bits` of some parameters, before their first step.

        Raises NotImplementedError for another option: param groups are there for those.
        """
        options = {**(key_value_dict or {}), **({} if key is None else {key: value})}
        if set(options) - {"optim_bits"} or options.get("optim_bits", 32) not in (8, 32):
            raise NotImplementedError(
                f"only optim_bits of 8 or 32 can be overridden, got {options}: give the "
                "parameters a param group of their own"
            )
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for param in listed if options else []:
            self._bits[id(param)] = (weakref.ref(param), options["optim_bits"])
            for optimizer in self._optimizers:
                if options["optim_bits"] == 32:
                    optimizer.keep_exact(param)

    def register_module_override(
        self, module: nn.Module, param_name: str, config: dict[str, Any]
    ) -> None:
        """`override_config` of one parameter of a module."""
        self.override_config(getattr(module, param_name), key_value_dict=config)

    def bits(self, param: Tensor) -> int | None:
        """What was set for a parameter; None if nothing was."""
        owner, bits = self._bits.get(id(param), (None, None))
        return bits if owner is not None and owner() is param else None

    def watch(self, optimizer: AdamW) -> None:
        """Apply later overrides to this optimizer, too."""
        self._optimizers.add(optimizer)


class _Missing(torch.optim.Optimizer):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} is not available: AdamW and Adam are, in 32 and 8 bits and "
            "paged; Lion, AdEMAMix, LAMB, LARS, SGD, RMSprop and Adagrad in 32 and 8 bits"
        )


def __getattr__(name: str) -> Any:
    if name.removesuffix("32bit").removesuffix("8bit") in _MISSING:
        return type(name, (_Missing,), {"__module__": __name__})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
