"""One small function for each optimizer: what a step does to a parameter and its moments.

All in float32 and in place, on a parameter or, if its state is paged, on a part of one. What holds
the moments, in 32 or 8 bits: optimizers.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE

Options = dict[str, Any]  # of a param group


@dataclass(frozen=True)
class Rule:
    """What an optimizer does to a parameter.

    update     (param, grad, moments, options, step) -> None, all float32, in place; step from 1
    betas      those of its source, as many as it has
    signed     for each moment, by name: whether it can be negative, which decides its 8-bit levels
    direction  the same arguments -> Tensor: what a step goes along, of a rule that has to know
               the norm of all of it. It updates the moments and leaves the parameter
    """

    update: Callable[[Tensor, Tensor, list[Tensor], Options, int], None]
    betas: tuple[float, ...]
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
    own, length = options.get("norms") or norms([squares(p, direction)])
    ratio = options["max_unorm"] * own / length
    return ratio.nan_to_num(nan=1.0).clamp(max=1.0)


def norms(parts: list[Tensor]) -> tuple[Tensor, ...]:
    """The norms of p and of the direction, from the `squares` of all parts in their order."""
    return torch.cat(parts, dim=1).sum(dim=1).sqrt().float().unbind()


def squares(*tensors: Tensor) -> Tensor:
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
    "momentum": Rule(momentum, (0.9,), {"momentum": True}),
    "rmsprop": Rule(rmsprop, (0.9,), {"square": False}),
    "adagrad": Rule(adagrad, (), {"sum": False}),
    "lion": Rule(lion, (0.9, 0.99), {"momentum": True}),
    "lars": Rule(lars, (0.9,), {"momentum": True}, _lars_direction),
    "lamb": Rule(lamb, (0.9, 0.999), {"momentum": True, "square": False}, _lamb_direction),
    "ademamix": Rule(ademamix, (0.9, 0.999, 0.9999), {"fast": True, "slow": True, "square": False}),
}
