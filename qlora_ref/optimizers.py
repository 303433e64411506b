"""Optimizers beyond AdamW: one class, one small function for each rule.

A state is float32, or 8-bit codes with a scale for every 256 values that are decoded, updated and
encoded again at each step. Paging, saving and loading are in state_optimizer.py; AdamW, which has
kernels, in optim.py.
Source of the 8-bit states: Dettmers et al. (arXiv 2110.02861).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_ref import ops
from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE, dynamic_codebook
from qlora_ref.paged import DEFAULT_RESIDENT_BYTES, Slice
from qlora_ref.paging.layout import Fields, state_fields
from qlora_ref.state_optimizer import Options, Parts, StateOptimizer


@dataclass(frozen=True)
class Rule:
    """What an optimizer does to a parameter.

    update     (param, grad, moments, options, step) -> None, all float32, in place; step from 1
    signed     for each moment, by name: whether it can be negative, which decides its 8-bit levels
    direction  the same arguments -> Tensor: what a step goes along, of a rule that has to know
               the norm of all of it. It updates the moments and leaves the parameter
    """

    update: Callable[[Tensor, Tensor, list[Tensor], Options, int], None]
    signed: dict[str, bool]
    direction: Callable[[Tensor, Tensor, list[Tensor], Options, int], Tensor] | None = None


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

    alpha grows from 0 in t_alpha steps, b3 from b1 in t_beta3 steps, if these are given.
    Source: Pagliardini et al. (arXiv 2409.03137), algorithm 1 and its schedulers.
    """
    m, s, v = moments
    beta1, beta2 = options["betas"][:2]
    alpha, beta3 = _slow_mean(options, step)
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    s.mul_(beta3).add_(g, alpha=1 - beta3)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.mul_(1 - options["lr"] * options["weight_decay"])
    direction = (m / (1 - beta1**step)).add_(s, alpha=alpha)
    root = (v / (1 - beta2**step)).sqrt_().add_(options["eps"])
    p.addcdiv_(direction, root, value=-options["lr"])


def _slow_mean(options: Options, step: int) -> tuple[float, float]:
    """alpha and b3 at a step:  alpha t / T,  and b3 with half-lives that grow in equal steps.

    exp(ln b1 ln b3 / ((1 - t/T) ln b3 + t/T ln b1)), from b1 at t = 0 to b3 at t = T.
    """
    alpha, (beta1, _, beta3) = options["alpha"], options["betas"]
    if options["t_alpha"]:
        alpha *= min(1.0, step / options["t_alpha"])
    if options["t_beta3"] and step < options["t_beta3"] and beta1 > 0:
        done, first, last = step / options["t_beta3"], math.log(beta1), math.log(beta3)
        beta3 = math.exp(first * last / ((1 - done) * last + done * first))
    return alpha, beta3


def lars(p: Tensor, g: Tensor, moments: list[Tensor], options: Options, step: int) -> None:
    """SGD with momentum whose step is cut down where it is large beside the parameter.

        g += wd p;  m = beta m + g;  p -= lr c m,   c = min(1, max_unorm |p| / |m|)

    bitsandbytes' form; in the paper (You et al., arXiv 1708.03888) the factor may be above 1.
    """
    m = _lars_direction(p, g, moments, options, step)
    p.sub_(m * _cut(m, p, options), alpha=options["lr"])


def _lars_direction(
    p: Tensor, g: Tensor, moments: list[Tensor], options: Options, step: int
) -> Tensor:
    g.add_(p, alpha=options["weight_decay"])
    return moments[0].mul_(options["betas"][0]).add_(g)


def lamb(p: Tensor, g: Tensor, moments: list[Tensor], options: Options, step: int) -> None:
    """AdamW whose step is cut down where it is large beside the parameter.

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   u = m / (sqrt(v) + eps sqrt(1 - b2^t))
        c = min(1, max_unorm |p| / |u|)
        p *= 1 - lr wd;   p -= lr c u sqrt(1 - b2^t) / (1 - b1^t)

    The form of bitsandbytes' CPU backend; in the paper (You et al., arXiv 1904.00962, algorithm 2)
    the norm is that of the corrected direction with the decay, and the factor may be above 1.
    """
    beta1, beta2 = options["betas"][:2]
    direction = _lamb_direction(p, g, moments, options, step)
    factor = _cut(direction, p, options)
    p.mul_(1 - options["lr"] * options["weight_decay"])
    root = (1 - beta2**step) ** 0.5
    p.sub_(direction * factor, alpha=options["lr"] * root / (1 - beta1**step))


def _lamb_direction(
    p: Tensor, g: Tensor, moments: list[Tensor], options: Options, step: int
) -> Tensor:
    m, v = moments
    beta1, beta2 = options["betas"][:2]
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return m / v.sqrt().add_(options["eps"] * (1 - beta2**step) ** 0.5)


def _cut(direction: Tensor, p: Tensor, options: Options) -> Tensor:
    """min(1, max_unorm |p| / |direction|); 1 for a direction of zeros.

    Where these are parts of a parameter, the options have the norms of the whole.
    """
    own, length = options.get("norms") or _norms([_squares(p, direction)])
    ratio = options["max_unorm"] * own / length
    return ratio.nan_to_num(nan=1.0).clamp(max=1.0)


def _norms(squares: list[Tensor]) -> tuple[Tensor, ...]:
    """The norms of p and of the direction, from the `_squares` of all parts in their order."""
    return torch.cat(squares, dim=1).sum(dim=1).sqrt().float().unbind()


def _squares(*tensors: Tensor) -> Tensor:
    """The sum of squares of each block of 256 values, float64 (tensors, blocks).

    Halves are added to halves, and parts begin where blocks do: it has the same bits wherever a
    parameter is cut.
    """
    return torch.stack([_squares_of_blocks(tensor.flatten().double()) for tensor in tensors])


def _squares_of_blocks(values: Tensor) -> Tensor:
    padded = F.pad(values, (0, -values.numel() % DYNAMIC_BLOCK_SIZE))
    sums = padded.view(-1, DYNAMIC_BLOCK_SIZE).square()
    while sums.shape[1] > 1:
        left, right = sums.chunk(2, dim=1)
        sums = left + right
    return sums[:, 0]


RULES = {
    "momentum": Rule(momentum, {"momentum": True}),
    "rmsprop": Rule(rmsprop, {"square": False}),
    "adagrad": Rule(adagrad, {"sum": False}),
    "lion": Rule(lion, {"momentum": True}),
    "lars": Rule(lars, {"momentum": True}, _lars_direction),
    "lamb": Rule(lamb, {"momentum": True, "square": False}, _lamb_direction),
    "ademamix": Rule(ademamix, {"fast": True, "slow": True, "square": False}),
}


class RuleOptimizer(StateOptimizer):
    """An optimizer with one of `RULES`.

    params          as for torch.optim: tensors or groups, each with its own options
    rule            a name of RULES
    lr, eps, weight_decay   float, >= 0
    betas           floats in [0, 1): as many as the rule has, of which the first is the momentum
    alpha           float, >= 0; of ademamix only
    t_alpha, t_beta3   int or None: steps in which these two of ademamix reach their values
    max_unorm       float, >= 0; of lars and lamb: the longest step, beside the parameter's norm
    state_bits      32 or 8
    paged, resident_bytes, page_directory   as for optim.AdamW; lars and lamb, which need the norm
                    of a whole parameter, bring each page in twice a step

    Parameters of other dtypes are updated in float32 and rounded once. One without a gradient is
    left alone. Raises ValueError for options out of range, and for gradients that do not fit,
    before anything is changed.
    """

    # Of the parameters that are stepped in parts; see `survey`.
    _norms: Mapping[Tensor, tuple[Tensor, ...]] = {}

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
        max_unorm: float = 1.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        paged: bool | str = False,
        resident_bytes: int = DEFAULT_RESIDENT_BYTES,
        page_directory: Path | str | None = None,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {sorted(RULES)}, got {rule!r}")
        defaults: Options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"alpha": alpha, "state_bits": state_bits, "max_unorm": max_unorm}
        defaults |= {"rule": rule, "t_alpha": t_alpha, "t_beta3": t_beta3}
        super().__init__(params, defaults, paged, resident_bytes, page_directory)

    def fields(self, group: Options) -> Fields:
        """See StateOptimizer."""
        return _fields(group["rule"], group["state_bits"])

    def survey(self, trained: list[Tensor], parts: Parts) -> None:
        """See StateOptimizer: the norms of whole parameters, for the rules that need them."""
        rules = {p: (RULES[g["rule"]], g) for g in self.param_groups for p in g["params"]}
        squares: dict[Tensor, list[Tensor]] = {}
        for part in parts([param for param in trained if rules[param][0].direction]):
            (rule, group), step = rules[part.owner], self.state[part.owner]["step"]
            assert rule.direction is not None
            moments = [moment.clone() for moment in _moments(part, rule)]
            direction = rule.direction(*_values(part), moments, group, step)
            squares.setdefault(part.owner, []).append(_squares(part.param.float(), direction))
        self._norms = {param: _norms(found) for param, found in squares.items()}

    def step_alike(self, batch: list[Slice], group: Options, step: int) -> None:
        """See StateOptimizer."""
        rule = RULES[group["rule"]]
        for part in batch:
            moments = _moments(part, rule)
            values, grad = _values(part)
            options = {**group, "norms": self._norms.get(part.owner)}
            rule.update(values, grad, moments, options, step)
            if values is not part.param:
                part.param.copy_(values)
            for (name, signed), moment in zip(rule.signed.items(), moments):
                _encode(part.state, name, signed, moment)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. Raises ValueError if it does not fit these parameters."""
        mine, theirs = (
            sorted({str(group.get("rule")) for group in groups})
            for groups in (self.param_groups, state_dict["param_groups"])
        )
        if mine != theirs:
            raise ValueError(f"the saved state is of the rule {theirs}, this optimizer has {mine}")
        super().load_state_dict(state_dict)


def _moments(part: Slice, rule: Rule) -> list[Tensor]:
    """In float32: those of a state of 32 bits themselves."""
    return [_decode(part.state, *moment) for moment in rule.signed.items()]


def _values(part: Slice) -> tuple[Tensor, Tensor]:
    """Parameter and gradient in float32: the parameter itself, if that is what it is."""
    return part.param.float(), part.grad.float().clone()


@functools.cache
def _fields(rule: str, state_bits: int) -> Fields:
    return state_fields(RULES[rule].signed, state_bits)


def _decode(state: Mapping[str, Tensor], name: str, signed: bool) -> Tensor:
    if state[name].dtype != torch.uint8:
        return state[name]
    table = dynamic_codebook(signed).to(state[name].device)
    return ops.dequantize_8bit(state[name], state[f"{name}_absmax"], table)


def _encode(state: Mapping[str, Tensor], name: str, signed: bool, moment: Tensor) -> None:
    if state[name].dtype != torch.uint8:  # the rule has changed it in place
        return
    table = dynamic_codebook(signed).to(moment.device)
    codes, absmax = ops.quantize_8bit(moment, table, DYNAMIC_BLOCK_SIZE, check_finite=False)
    state[name].copy_(codes.view_as(state[name]))
    state[f"{name}_absmax"].copy_(absmax)
