"""What the optimizers under bitsandbytes' names share: their variants, and GlobalOptimManager."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from torch import Tensor, nn

from qlora_ref.state_optimizer import StateOptimizer


class Overridable(StateOptimizer):
    """What the optimizers under bitsandbytes' names share.

    min_8bit_size  with 8 bits, smaller parameters keep a state of 32 bits, as do those that
                   GlobalOptimManager was told of: they get a group of their own
    """

    _bits: int | None = None  # what the name of a class says; else `optim_bits`
    _always_paged = False
    _smallest = 4096

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
        GlobalOptimManager.get_instance().watch(self)

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


def variants(cls: type[Overridable], paged: bool, kept: frozenset[str]) -> dict[str, Any]:
    """The classes of an optimizer by name: with 32 and 8 bits and, if `paged`, the same `Paged`.

    They do not take the arguments that their names decide, but for those that bitsandbytes leaves
    them (`kept`), which are without effect.
    """
    made = {}
    for is_paged in (False, True) if paged else (False,):
        for bits in (None, 32, 8) if is_paged else (32, 8):
            name = f"{'Paged' * is_paged}{cls.__name__}{f'{bits}bit' if bits else ''}"
            decided = {"is_paged"} if is_paged else set()
            decided |= {"optim_bits"} if bits else set()
            what = f" of {bits} bits" if bits else ""
            attributes = {
                "__init__": _without(decided - kept, cls.__init__),
                "__doc__": f"{cls.__name__} with a {'paged ' * is_paged}state{what}.",
                "__module__": f"{__package__}.optim",
                "_bits": bits,
                "_always_paged": is_paged,
            }
            made[name] = type(name, (cls,), attributes)
    return made


def _without(names: set[str], function: Any) -> Any:
    """The function, which no longer takes arguments of these names."""
    signature = inspect.signature(function)
    kept = [p for name, p in signature.parameters.items() if name not in names]
    shorter = signature.replace(parameters=kept)

    def call(*arguments: Any, **options: Any) -> Any:
        return function(**shorter.bind(*arguments, **options).arguments)

    call.__signature__ = shorter  # type: ignore[attr-defined]
    return call


class GlobalOptimManager:
    """Parameters whose state is to have other bits than their optimizer's."""

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        # By identity, beside a weak reference: tensors compare by value, and an id is used again.
        self._bits: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._optimizers: weakref.WeakSet[Overridable] = weakref.WeakSet()

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

    def watch(self, optimizer: Overridable) -> None:
        """Apply later overrides to this optimizer, too."""
        self._optimizers.add(optimizer)
