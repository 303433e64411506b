"""The Trainer's names for bitsandbytes' optimizers, such as `optim="paged_adamw_32bit"`.

Without this switch, our optimizer goes in as an argument:
`Trainer(..., optimizer_cls_and_kwargs=(qlora_ref.AdamW, {"lr": 1e-4, "paged": True}))`, and the
same for TRL's SFTTrainer.
"""

from __future__ import annotations

from typing import Any

from transformers import trainer_optimizer

from qlora_ref.optim import AdamW
from qlora_ref.optimizers import RuleOptimizer
from qlora_ref.state_optimizer import StateOptimizer

_HANDLERS = trainer_optimizer._OPTIMIZER_HANDLERS
_THEIRS = dict(_HANDLERS)


def use_for_optimizer_names(enabled: bool = True) -> None:
    """Let the names of bitsandbytes' optimizers give ours, for the whole process.

    adamw_8bit (and adamw_bnb_8bit), lion_8bit, lion_32bit, ademamix, ademamix_8bit, each with
    paged_ as well; rmsprop_bnb, rmsprop_bnb_8bit, rmsprop_bnb_32bit. `optim_args` are read as
    transformers reads them for bitsandbytes. `enabled=False` undoes it.
    """
    for name in trainer_optimizer._BITSANDBYTES_OPTIMIZERS:
        _HANDLERS[name] = _ours if enabled else _THEIRS[name]


def _ours(context: Any) -> tuple[type[StateOptimizer], dict[str, Any]]:
    name = str(context.args.optim.value)
    options = {**context.optimizer_kwargs, "state_bits": 8 if "8bit" in name else 32}
    options["paged"] = "paged" in name
    if "adamw" in name:
        return AdamW, {**options, **context.adam_kwargs}
    return RuleOptimizer, {**options, **_rule_options(name, context.args, context.optim_args)}


def _rule_options(name: str, arguments: Any, given: dict[str, Any]) -> dict[str, Any]:
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    if "lion" in name:
        return {"rule": "lion", "betas": betas}
    if "rmsprop" in name:
        unknown = set(given) - {"alpha", "eps"}
        if unknown:
            raise NotImplementedError(f"optim={name!r}: optim_args {sorted(unknown)} are not known")
        alpha, eps = float(given.get("alpha", 0.99)), float(given.get("eps", 1e-8))
        return {"rule": "rmsprop", "betas": (alpha,), "eps": eps}
    if "ademamix" not in name:
        raise NotImplementedError(f"optim={name!r} is not available")
    defaults = {"beta1": betas[0], "beta2": betas[1], "beta3": 0.9999}
    return {
        "rule": "ademamix",
        "betas": tuple(float(given.get(key, value)) for key, value in defaults.items()),
        "alpha": float(given.get("alpha", 5.0)),
        "eps": float(given.get("eps", arguments.adam_epsilon)),
        **{key: int(given[key]) for key in ("t_alpha", "t_beta3") if key in given},
    }
