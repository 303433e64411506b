"""bitsandbytes' names for the rules of optimizers.py."""

from __future__ import annotations

from typing import Any

from qlora_ref.integrations.bitsandbytes.optim_variants import Overridable
from qlora_ref.optimizers import RuleOptimizer


def _refuse(options: dict[str, Any]) -> None:
    """Raise NotImplementedError for options that are asked for and not available."""
    asked = {name: value for name, value in options.items() if value}
    if asked:
        raise NotImplementedError(f"not available: {asked}; leave these options out")


class SGD(Overridable, RuleOptimizer):
    """SGD with momentum, which must not be 0; a weight decay is added to the gradient."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        _refuse({"dampening": dampening, "nesterov": nesterov})
        if momentum == 0:
            raise NotImplementedError("SGD without momentum has no state: use torch.optim.SGD")
        bits, betas = self._bits or optim_bits, (momentum,)
        self._smallest = min_8bit_size
        super().__init__(params, "momentum", lr, betas, 0.0, weight_decay, state_bits=bits)


class LARS(Overridable, RuleOptimizer):
    """SGD with momentum, each step at most `max_unorm` times as long as the parameter."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
    ) -> None:
        _refuse({"dampening": dampening, "nesterov": nesterov})
        if momentum == 0:
            raise NotImplementedError("LARS without momentum is not available: pass momentum=0.9")
        bits, betas = self._bits or optim_bits, (momentum,)
        self._smallest = min_8bit_size
        options = (betas, 0.0, weight_decay, 0.0, bits, max_unorm)
        super().__init__(params, "lars", lr, *options)


class LAMB(Overridable, RuleOptimizer):
    """AdamW, each step at most `max_unorm` times as long as the parameter."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
    ) -> None:
        _refuse({"amsgrad": amsgrad})
        if not (bias_correction and adam_w_mode):
            raise NotImplementedError("LAMB is available with bias_correction and adam_w_mode only")
        bits = self._bits or optim_bits
        self._smallest = min_8bit_size
        options = (betas, eps, weight_decay, 0.0, bits, max_unorm)
        super().__init__(params, "lamb", lr, *options)


class RMSprop(Overridable, RuleOptimizer):
    """RMSprop; a weight decay is added to the gradient."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        _refuse({"momentum": momentum, "centered": centered})
        bits, betas = self._bits or optim_bits, (alpha,)
        self._smallest = min_8bit_size
        super().__init__(params, "rmsprop", lr, betas, eps, weight_decay, state_bits=bits)


class Adagrad(Overridable, RuleOptimizer):
    """Adagrad; a weight decay is added to the gradient."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        _refuse({"lr_decay": lr_decay, "initial_accumulator_value": initial_accumulator_value})
        bits = self._bits or optim_bits
        self._smallest = min_8bit_size
        super().__init__(params, "adagrad", lr, (), eps, weight_decay, state_bits=bits)


class Lion(Overridable, RuleOptimizer):
    """Lion with decoupled weight decay."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        self._smallest = min_8bit_size
        bits, paged = self._bits or optim_bits, self._always_paged or is_paged
        super().__init__(params, "lion", lr, betas, 0.0, weight_decay, state_bits=bits, paged=paged)


class AdEMAMix(Overridable, RuleOptimizer):
    """AdEMAMix with decoupled weight decay; alpha and beta3 grow in t_alpha and t_beta3 steps."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        self._smallest = min_8bit_size
        bits, paged = self._bits or optim_bits, self._always_paged or is_paged
        warm_up: Any = {"t_alpha": t_alpha, "t_beta3": t_beta3, "paged": paged}
        super().__init__(params, "ademamix", lr, betas, eps, weight_decay, alpha, bits, **warm_up)
