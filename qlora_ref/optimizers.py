"""Optimizers beyond AdamW: one class, one small function for each rule.

A state is float32, or 8-bit codes with a scale for every 256 values that are decoded, updated and
encoded again at each step. AdamW has kernels and pages of its own: optim.py.
Source of the 8-bit states: Dettmers et al. (arXiv 2110.02861).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_ref import ops
from qlora_ref.checks import check_gradients
from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE, dynamic_codebook

Options = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """What an optimizer does to a parameter.

    update   (param, grad, moments, options, step) -> None, all float32, in place; step from 1
    signed   for each moment, by name: whether it can be negative, which decides its 8-bit levels
    """

    update: Callable[[Tensor, Tensor, list[Tensor], Options, int], None]
    signed: dict[str, bool]


def momentum(p: Tensor, g: Tensor, moments: list[Tensor], options: Options, step: int) -> None:
    """SGD with momentum:  g += wd p;  m = beta m + g;  p -= lr m  (Polyak, 1964)."""
    (m,) = moments
    g.add_(p, alpha=options["weight_decay"])
    m.mul_(options["betas"][0]).add_(g)
    p.sub_(m, alpha=options["lr"])


def rmsprop(p: Tensor, g: Tensor, moments: list[Tensor], options: Options, step: int) -> None:
    """RMSprop:  g += wd p;  v = beta v + (1 - beta) g^2;  p -= lr g / (sqrt(v) + eps)."""
    (v,) = moments
    beta = options["betas"][0]
    g.add_(p, alpha=options["weight_decay"])
    v.mul_(beta).addcmul_(g, g, value=1 - beta)
    p.addcdiv_(g, v.sqrt().add_(options["eps"]), value=-options["lr"])


def adagrad(p: Tensor, g: Tensor, moments: list[Tensor], options: Options, step: int) -> None:
    """Adagrad:  g += wd p;  v += g^2;  p -= lr g / (sqrt(v) + eps)  (Duchi et al., 2011)."""
    (v,) = moments
    g.add_(p, alpha=options["weight_decay"])
    v.addcmul_(g, g)
    p.addcdiv_(g, v.sqrt().add_(options["eps"]), value=-options["lr"])


def lion(p: Tensor, g: Tensor, moments: list[Tensor], options: Options, step: int) -> None:
    """Lion:  p *= 1 - lr wd;  p -= lr sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g.

    Source: Chen et al. (arXiv 2302.06675), algorithm 2.
    """
    (m,) = moments
    beta1, beta2 = options["betas"][:2]
    p.mul_(1 - options["lr"] * options["weight_decay"])
    p.sub_(torch.sign(m * beta1 + g * (1 - beta1)), alpha=options["lr"])
    m.mul_(beta2).add_(g, alpha=1 - beta2)


def ademamix(p: Tensor, g: Tensor, moments: list[Tensor], options: Options, step: int) -> None:
    """AdEMAMix: AdamW whose step also follows a slow mean of the gradients.

        m = b1 m + (1 - b1) g;   s = b3 s + (1 - b3) g;   v = b2 v + (1 - b2) g^2
        p *= 1 - lr wd;   p -= lr (m / (1 - b1^t) + alpha s) / (sqrt(v / (1 - b2^t)) + eps)

    Source: Pagliardini et al. (arXiv 2409.03137), algorithm 1, without its warm-up of alpha and b3.
    """
    m, s, v = moments
    beta1, beta2, beta3 = options["betas"]
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    s.mul_(beta3).add_(g, alpha=1 - beta3)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.mul_(1 - options["lr"] * options["weight_decay"])
    direction = (m / (1 - beta1**step)).add_(s, alpha=options["alpha"])
    root = (v / (1 - beta2**step)).sqrt_().add_(options["eps"])
    p.addcdiv_(direction, root, value=-options["lr"])


def lars(p: Tensor, g: Tensor, moments: list[Tensor], options: Options, step: int) -> None:
    """SGD with momentum whose step is cut down where it is large beside the parameter.

        g += wd p;  m = beta m + g;  p -= lr c m,   c = min(1, max_unorm |p| / |m|)

    bitsandbytes' form; in the paper (You et al., arXiv 1708.03888) the factor may be above 1.
    """
    (m,) = moments
    g.add_(p, alpha=options["weight_decay"])
    m.mul_(options["betas"][0]).add_(g)
    p.sub_(m * _cut(m, p, options), alpha=options["lr"])


def lamb(p: Tensor, g: Tensor, moments: list[Tensor], options: Options, step: int) -> None:
    """AdamW whose step is cut down where it is large beside the parameter.

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   u = m / (sqrt(v) + eps sqrt(1 - b2^t))
        c = min(1, max_unorm |p| / |u|)
        p *= 1 - lr wd;   p -= lr c u sqrt(1 - b2^t) / (1 - b1^t)

    The form of bitsandbytes' CPU backend; in the paper (You et al., arXiv 1904.00962, algorithm 2)
    the norm is that of the corrected direction with the decay, and the factor may be above 1.
    """
    m, v = moments
    beta1, beta2 = options["betas"]
    root = (1 - beta2**step) ** 0.5
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    direction = m / v.sqrt().add_(options["eps"] * root)
    factor = _cut(direction, p, options)
    p.mul_(1 - options["lr"] * options["weight_decay"])
    p.sub_(direction * factor, alpha=options["lr"] * root / (1 - beta1**step))


def _cut(direction: Tensor, p: Tensor, options: Options) -> Tensor:
    """min(1, max_unorm |p| / |direction|); 1 for a direction of zeros."""
    ratio = options["max_unorm"] * p.norm() / direction.norm()
    return ratio.nan_to_num(nan=1.0).clamp(max=1.0)


RULES = {
    "momentum": Rule(momentum, {"momentum": True}),
    "rmsprop": Rule(rmsprop, {"square": False}),
    "adagrad": Rule(adagrad, {"sum": False}),
    "lion": Rule(lion, {"momentum": True}),
    "lars": Rule(lars, {"momentum": True}),
    "lamb": Rule(lamb, {"momentum": True, "square": False}),
    "ademamix": Rule(ademamix, {"fast": True, "slow": True, "square": False}),
}


class RuleOptimizer(torch.optim.Optimizer):
    """An optimizer with one of `RULES`.

    params          as for torch.optim: tensors or groups, each with its own options
    rule            a name of RULES
    lr, eps, weight_decay   float, >= 0
    betas           floats in [0, 1): as many as the rule has, of which the first is the momentum
    alpha           float, >= 0; of ademamix only
    max_unorm       float, >= 0; of lars and lamb: the longest step, beside the parameter's norm
    state_bits      32 or 8
    smallest_8bit   parameters with fewer values keep a state of 32 bits

    Parameters of other dtypes are updated in float32 and rounded once. One without a gradient is
    left alone. Raises ValueError for options out of range, and for gradients that do not fit,
    before anything is changed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: str,
        lr: float,
        betas: tuple[float, ...] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 0.0,
        state_bits: int = 32,
        smallest_8bit: int = 0,
        max_unorm: float = 1.0,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {sorted(RULES)}, got {rule!r}")
        self.rule, self.smallest_8bit = RULES[rule], smallest_8bit
        defaults: Options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"alpha": alpha, "state_bits": state_bits, "max_unorm": max_unorm}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own. Raises ValueError for options out of range."""
        options = {**self.defaults, **param_group}
        for name in ("lr", "eps", "weight_decay", "alpha", "max_unorm"):
            if not 0 <= options[name]:
                raise ValueError(f"{name} must be at least 0, got {options[name]}")
        if not all(0 <= beta < 1 for beta in options["betas"]):
            raise ValueError(f"betas must be at least 0 and below 1, got {options['betas']}")
        if options["state_bits"] not in (8, 32):
            raise ValueError(f"state_bits must be 32 or 8, got {options['state_bits']}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [param for param in group["params"] if param.grad is not None]
            check_gradients(trained, [param.grad for param in trained])
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, group)
        return loss

    def _step_one(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["step"] = 0
            bits = group["state_bits"] if param.numel() >= self.smallest_8bit else 32
            zeros = torch.zeros_like(param, dtype=torch.float32)
            for name, signed in self.rule.signed.items():
                state.update(_encode(name, zeros.clone(), bits, signed))
        state["step"] += 1
        moments = [_decode(state, name, signed) for name, signed in self.rule.signed.items()]
        values = param.float()  # the parameter itself, if that is what it is
        self.rule.update(values, param.grad.float().clone(), moments, group, state["step"])
        if values is not param:
            param.copy_(values)
        for (name, signed), moment in zip(self.rule.signed.items(), moments):
            if state[name].dtype == torch.uint8:
                state.update(_encode(name, moment, 8, signed))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. Raises ValueError if it does not fit these parameters."""
        params = [param for group in self.param_groups for param in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for param, key in zip(params, keys):
            saved = state_dict["state"].get(key, {})
            for name in self.rule.signed if saved else ():
                if name not in saved or saved[name].shape != param.shape:
                    raise ValueError(
                        f"the saved state is of another model or rule: a parameter of shape "
                        f"{tuple(param.shape)} meets {sorted(saved)}"
                    )
        super().load_state_dict(state_dict)
        # PyTorch casts every tensor to the dtype of its parameter: put back what was saved.
        for param, key in zip(params, keys):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.to(param.device, copy=True)


def _encode(name: str, moment: Tensor, bits: int, signed: bool) -> dict[str, Tensor]:
    if bits == 32:
        return {name: moment}
    table = dynamic_codebook(signed).to(moment.device)
    codes, absmax = ops.quantize_8bit(moment, table, DYNAMIC_BLOCK_SIZE, check_finite=False)
    return {name: codes, f"{name}_absmax": absmax}


def _decode(state: dict[str, Tensor], name: str, signed: bool) -> Tensor:
    if state[name].dtype != torch.uint8:
        return state[name]
    table = dynamic_codebook(signed).to(state[name].device)
    return ops.dequantize_8bit(state[name], state[f"{name}_absmax"], table)
