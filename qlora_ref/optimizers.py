"""Optimizers beyond AdamW: one class for all rules of optimizer_rules.py.

A state is float32, or 8-bit codes with a scale for every 256 values that are decoded, updated and
encoded again at each step. Paging, saving and loading are in state_optimizer.py; AdamW, which has
kernels, in optim.py.
Source of the 8-bit states: Dettmers et al. (arXiv 2110.02861).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_ref import ops
from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE, dynamic_codebook
from qlora_ref.optimizer_rules import RULES, Rule, norms, squares
from qlora_ref.paged import DEFAULT_RESIDENT_BYTES, Slice
from qlora_ref.paging.layout import Fields, state_fields
from qlora_ref.state_optimizer import Batch, Options, Parts, StateOptimizer


class RuleOptimizer(StateOptimizer):
    """An optimizer with one of `RULES`.

    params          as for torch.optim: tensors or groups, each with its own options
    rule            a name of RULES
    lr, eps, weight_decay   float, >= 0
    betas           floats in [0, 1): as many as the rule has, of which the first is the momentum;
                    None: those of its source
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
        betas: tuple[float, ...] | None = None,
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
        betas = RULES[rule].betas if betas is None else betas
        defaults: Options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"alpha": alpha, "state_bits": state_bits, "max_unorm": max_unorm}
        defaults |= {"rule": rule, "t_alpha": t_alpha, "t_beta3": t_beta3}
        super().__init__(params, defaults, paged, resident_bytes, page_directory)

    def fields(self, group: Options) -> Fields:
        """See StateOptimizer."""
        return _fields(group["rule"], group["state_bits"])

    def count_betas(self, group: Options) -> int:
        """See StateOptimizer."""
        return len(RULES[group["rule"]].betas)

    def survey(self, trained: list[Tensor], parts: Parts) -> None:
        """See StateOptimizer: the norms of whole parameters, for the rules that need them."""
        rules = {p: (RULES[g["rule"]], g) for g in self.param_groups for p in g["params"]}
        seen: dict[Tensor, list[Tensor]] = {}
        for part in parts([param for param in trained if rules[param][0].direction]):
            (rule, group), step = rules[part.owner], self.state[part.owner]["step"]
            assert rule.direction is not None
            moments = [moment.clone() for moment in _moments(part, rule)]
            direction = rule.direction(*_values(part), moments, group, step)
            seen.setdefault(part.owner, []).append(squares(part.param.float(), direction))
        self._norms = {param: norms(found) for param, found in seen.items()}

    def step_alike(self, batch: Batch, group: Options, step: int) -> None:
        """See StateOptimizer."""
        rule = RULES[group["rule"]]
        for part in map(Slice, *batch):
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
