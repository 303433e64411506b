"""A state that torch.optim.AdamW saved, as one that AdamW of this library loads.

The other way needs nothing: torch.optim.AdamW loads a state of 32 bits as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Options of a group that say how torch steps, or what it does that AdamW here does not.
_OPTIONS = (
    "amsgrad",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
)


def from_torch_adamw(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The saved state with moments of 32 bits; any other than torch.optim.AdamW's as it is.

    Raises ValueError where torch did what AdamW here does not: amsgrad, maximize, or the weight
    decay of torch.optim.Adam.
    """
    groups = state_dict["param_groups"]
    if not all("amsgrad" in group and "state_bits" not in group for group in groups):
        return state_dict
    for group in groups:
        _check(group)
    return {
        **state_dict,
        "state": {key: _as_ours(state) for key, state in state_dict["state"].items()},
        "param_groups": [
            {**{k: v for k, v in group.items() if k not in _OPTIONS}, "state_bits": 32}
            for group in groups
        ],
    }


def _check(group: dict[str, Any]) -> None:
    unlike = [name for name in ("amsgrad", "maximize") if group.get(name)]
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"] != 0:
        unlike.append("the weight decay of torch.optim.Adam, which goes into the gradient")
    if unlike:
        raise ValueError(
            f"the saved state is of an optimizer with {' and '.join(unlike)}, which AdamW here "
            "has not: start with a new state"
        )


def _as_ours(state: dict[str, Any]) -> dict[str, Any]:
    """The count of steps as a number, moments in float32, as they are from bfloat16 too."""
    moments = {
        name: value.float() if isinstance(value, Tensor) else value for name, value in state.items()
    }
    return {**moments, "step": int(state["step"])}
