"""bitsandbytes' names for the rules of optimizers.py."""

from __future__ import annotations

from typing import Any

from qlora_ref.optimizers import RuleOptimizer


def _refuse(options: dict[str, Any]) -> None:
    """Raise NotImplementedError for options that are asked for and not available."""
    asked = {name: value for name, value in options.items() if value}
    if asked:
        raise NotImplementedError(f"not available: {asked}; leave these options out")


class SGD(RuleOptimizer):
    """SGD with momentum, which must not be 0; a weight decay is added to the gradient."""

    _bits: int | None = None

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
        super().__init__(params, "momentum", lr, betas, 0.0, weight_decay, 0.0, bits, min_8bit_size)


class LARS(RuleOptimizer):
    """SGD with momentum, each step at most `max_unorm` times as long as the parameter."""

    _bits: int | None = None

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
        options = (betas, 0.0, weight_decay, 0.0, bits, min_8bit_size, max_unorm)
        super().__init__(params, "lars", lr, *options)


class LAMB(RuleOptimizer):
    """AdamW, each step at most `max_unorm` times as long as the parameter."""

    _bits: int | None = None

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
        options = (betas, eps, weight_decay, 0.0, bits, min_8bit_size, max_unorm)
        super().__init__(params, "lamb", lr, *options)


class RMSprop(RuleOptimizer):
    """RMSprop; a weight decay is added to the gradient."""

    _bits: int | None = None

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
        super().__init__(params, "rmsprop", lr, betas, eps, weight_decay, 0.0, bits, min_8bit_size)


class Adagrad(RuleOptimizer):
    """Adagrad; a weight decay is added to the gradient."""

    _bits: int | None = None

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
        super().__init__(params, "adagrad", lr, (), eps, weight_decay, 0.0, bits, min_8bit_size)


class Lion(RuleOptimizer):
    """Lion with decoupled weight decay."""

    _bits: int | None = None

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
        _refuse({"is_paged": is_paged})
        bits = self._bits or optim_bits
        super().__init__(params, "lion", lr, betas, 0.0, weight_decay, 0.0, bits, min_8bit_size)


class AdEMAMix(RuleOptimizer):
    """AdEMAMix with decoupled weight decay, without the warm-up of alpha and beta3."""

    _bits: int | None = None

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
        _refuse({"t_alpha": t_alpha, "t_beta3": t_beta3, "is_paged": is_paged})
        bits = self._bits or optim_bits
        super().__init__(
            params, "ademamix", lr, betas, eps, weight_decay, alpha, bits, min_8bit_size
        )


def _with_bits(cls: type[RuleOptimizer], bits: int) -> Any:
    name = f"{cls.__name__}{bits}bit"
    text = f"{cls.__name__} with a state of {bits} bits."
    return type(name, (cls,), {"_bits": bits, "__doc__": text, "__module__": __name__})


SGD32bit, SGD8bit = _with_bits(SGD, 32), _with_bits(SGD, 8)
LARS32bit, LARS8bit = _with_bits(LARS, 32), _with_bits(LARS, 8)
LAMB32bit, LAMB8bit = _with_bits(LAMB, 32), _with_bits(LAMB, 8)
RMSprop32bit, RMSprop8bit = _with_bits(RMSprop, 32), _with_bits(RMSprop, 8)
Adagrad32bit, Adagrad8bit = _with_bits(Adagrad, 32), _with_bits(Adagrad, 8)
Lion32bit, Lion8bit = _with_bits(Lion, 32), _with_bits(Lion, 8)
AdEMAMix32bit, AdEMAMix8bit = _with_bits(AdEMAMix, 32), _with_bits(AdEMAMix, 8)
