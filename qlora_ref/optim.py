"""AdamW with its two moments in 32 bits, or in 8 bits with a scale for every 256 values.

Source: Loshchilov and Hutter (arXiv 1711.05101); Dettmers et al., 8-bit Optimizers via Block-wise
Quantization (arXiv 2110.02861). The arithmetic is ops.adamw_step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qlora_ref import ops
from qlora_ref.checks import check_gradients
from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE, dynamic_codebook

_TENSORS = {
    32: ("exp_avg", "exp_avg_sq"),
    8: ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"),
}


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay; state of 8 bytes per parameter, or 2.03 with 8 bits.

    params        as for torch.optim.AdamW: tensors or groups, each group with its own options
    lr            float, >= 0
    betas         two floats in [0, 1)
    eps           float, >= 0
    weight_decay  float, >= 0; each step multiplies the parameters by 1 - lr weight_decay first
    state_bits    32 or 8
    paged         False; paging the state is not there yet

    With state_bits=32 it computes what torch.optim.AdamW does, up to rounding. A parameter whose
    gradient has always been zero only decays; one without a gradient is left alone.
    Raises ValueError for options out of range, NotImplementedError for paged=True.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_bits: int = 32,
        paged: bool = False,
    ) -> None:
        if paged:
            raise NotImplementedError("optimizer state cannot be paged yet: use paged=False")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own. Raises ValueError for options out of range."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [
            [param for param in group["params"] if param.grad is not None]
            for group in self.param_groups
        ]
        for params in trained:  # all of them, before the first one moves or is counted
            _check_gradients(params)
        for group, params in zip(self.param_groups, trained):
            for batch in _alike(params, self._advance(params, group["state_bits"])):
                self._step_alike(batch, group)
        return loss

    def _advance(self, params: list[Tensor], state_bits: int) -> list[int]:
        """Count the step of each parameter, after giving it a state of zeros if it has none."""
        for param in params:
            state = self.state[param]
            if not state:
                state.update(_zero_state(param, state_bits))
            state["step"] += 1
        return [self.state[param]["step"] for param in params]

    def _step_alike(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[param] for param in params]
        names = _TENSORS[group["state_bits"]]
        tensors: list[Any] = [[state[name] for state in states] for name in names]
        if group["state_bits"] == 8:
            tensors += [_codebook(signed, params[0].device) for signed in (True, False)]
        ops.adamw_step(
            params,
            [param.grad for param in params if param.grad is not None],
            *tensors,
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=states[0]["step"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. Raises ValueError if it does not fit these parameters."""
        if not all("state_bits" in group for group in state_dict["param_groups"]):
            raise ValueError("the saved state is of another optimizer: its groups lack state_bits")
        params = [param for group in self.param_groups for param in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        saved = [
            (p, state_dict["state"][k]) for p, k in zip(params, keys) if k in state_dict["state"]
        ]
        for param, state in saved:
            _check_state(param, state)
        super().load_state_dict(state_dict)
        # PyTorch has cast the state to the dtype of the parameter. Codes and scales keep theirs.
        for param, state in saved:
            self.state[param] = {
                key: value.to(param.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }


def _check_options(options: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= options[name]:
            raise ValueError(f"{name} must be at least 0, got {options[name]}")
    if not all(0 <= beta < 1 for beta in options["betas"]):
        raise ValueError(f"betas must be at least 0 and below 1, got {options['betas']}")
    if options["state_bits"] not in _TENSORS:
        raise ValueError(f"state_bits must be 32 or 8, got {options['state_bits']}")


def _check_gradients(params: list[Tensor]) -> None:
    grads = [param.grad for param in params if param.grad is not None]
    if any(grad.is_sparse for grad in grads):
        raise ValueError("AdamW takes dense gradients; use torch.optim.SparseAdam for sparse")
    check_gradients(params, grads)


def _alike(params: list[Tensor], steps: list[int]) -> list[list[Tensor]]:
    """Parameters that one call can update together: those at the same step on the same device."""
    batches: dict[Any, list[Tensor]] = {}
    for param, step in zip(params, steps):
        batches.setdefault((step, param.device), []).append(param)
    return list(batches.values())


@functools.cache
def _codebook(signed: bool, device: torch.device) -> Tensor:
    # Every step wants both; nothing changes them.
    return dynamic_codebook(signed).to(device)


def _zero_state(param: Tensor, state_bits: int) -> dict[str, Any]:
    if state_bits == 32:
        zeros = {name: _zeros(param, param.shape, torch.float32) for name in _TENSORS[32]}
        return {"step": 0, **zeros}
    blocks = -(-param.numel() // DYNAMIC_BLOCK_SIZE)
    tables = (_codebook(signed, param.device) for signed in (True, False))
    first_zero, second_zero = (int((table == 0).nonzero()) for table in tables)
    return {
        "step": 0,
        "exp_avg": _zeros(param, param.shape, torch.uint8).fill_(first_zero),
        "exp_avg_sq": _zeros(param, param.shape, torch.uint8).fill_(second_zero),
        "exp_avg_absmax": _zeros(param, (blocks,), torch.float32),
        "exp_avg_sq_absmax": _zeros(param, (blocks,), torch.float32),
    }


def _zeros(param: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=param.device)


def _check_state(param: Tensor, state: dict[str, Any]) -> None:
    moment = state.get("exp_avg")
    if not isinstance(moment, Tensor) or moment.shape != param.shape:
        found = tuple(moment.shape) if isinstance(moment, Tensor) else sorted(state)
        raise ValueError(
            f"the saved state is of another model: a parameter of shape {tuple(param.shape)} "
            f"meets a state of {found}"
        )
