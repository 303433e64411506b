"""AdamW with its two moments in 32 bits, or in 8 bits with a scale for every 256 values.

Source: Loshchilov and Hutter (arXiv 1711.05101); Dettmers et al., 8-bit Optimizers via Block-wise
Quantization (arXiv 2110.02861). The arithmetic is ops.adamw_step; how the state is kept, paged and
saved is in state_optimizer.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_ref import torch_library
from qlora_ref.checks import check_table
from qlora_ref.codebooks import CODES_8BIT, dynamic_codebook
from qlora_ref.paged import DEFAULT_RESIDENT_BYTES
from qlora_ref.paging.layout import Fields, state_fields
from qlora_ref.state_optimizer import Batch, StateOptimizer
from qlora_ref.torch_adamw import from_torch_adamw

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether they can be negative


class AdamW(StateOptimizer):
    """Adam with decoupled weight decay; state of 8 bytes per parameter, or 2.03 with 8 bits.

    params          as for torch.optim.AdamW: tensors or groups, each group with its own options
    lr              float, >= 0
    betas           two floats in [0, 1)
    eps             float, >= 0
    weight_decay    float, >= 0; each step multiplies the parameters by 1 - lr weight_decay first
    state_bits      32 or 8
    paged           False; "file", "unified" or "pinned"; True: what suits the parameters' device
    resident_bytes  int; what the pages of a paged state may occupy at once
    page_directory  where "file" keeps them: $TMPDIR or /var/tmp unless it is given

    With state_bits=32 it computes what torch.optim.AdamW does, up to rounding. A parameter whose
    gradient has always been zero only decays; one without a gradient is left alone. Paged or not,
    the bits are the same; the state of small parameters is never paged (see paged.py), that of
    others is not in `optimizer.state` but in `state_dict()`.
    Raises ValueError for options out of range. A step of a paged state raises OSError for a disk
    that is full or fails; parameters and state are then as they were before it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_bits: int = 32,
        paged: bool | str = False,
        resident_bytes: int = DEFAULT_RESIDENT_BYTES,
        page_directory: Path | str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
        }
        super().__init__(params, defaults, paged, resident_bytes, page_directory)

    def fields(self, group: dict[str, Any]) -> Fields:
        """See StateOptimizer."""
        return adamw_fields(group["state_bits"])

    def count_betas(self, group: dict[str, Any]) -> int:
        """See StateOptimizer."""
        return 2

    def step_alike(self, batch: Batch, group: dict[str, Any], step: int) -> None:
        """See StateOptimizer."""
        fields = self.fields(group)
        state: list[Any] = [[state[field.name] for state in batch.states] for field in fields]
        if group["state_bits"] == 8:
            state += [_codebook(signed, batch.params[0].device) for signed in (True, False)]
        else:
            state += [[], [], None, None]  # neither scales nor codebooks
        options = (float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], step)
        # Not ops.adamw_step: StateOptimizer has made its checks, of all groups first.
        torch_library.adamw_step(batch.params, batch.grads, *state, *options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, of torch.optim.AdamW too; its groups' options come with it.

        Raises ValueError if it does not fit these parameters.
        """
        super().load_state_dict(from_torch_adamw(state_dict))


@functools.cache
def adamw_fields(state_bits: int) -> Fields:
    """The tensors of AdamW's state: `MOMENTS`, and with 8 bits their scales."""
    return state_fields(MOMENTS, state_bits)


@functools.cache
def _codebook(signed: bool, device: torch.device) -> Tensor:
    # Every step wants both; nothing changes them. Kernels read them as float32 without a look.
    codebook = dynamic_codebook(signed).to(device)
    check_table("codebook", codebook, CODES_8BIT)
    return codebook
