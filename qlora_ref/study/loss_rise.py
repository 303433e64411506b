"""Part 3: what rounding the weights of a small language model costs in loss on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qlora_ref.study.options import Options
from qlora_ref.study.paired import Mean, crossed_mean, mean_of
from qlora_ref.study.report import Claim, Part, Table, verdict
from qlora_ref.study.roundings import Calibrated, Rounding, calibrated, roundings
from qlora_ref.study.small_model import CALIBRATION, SmallModel
from qlora_ref.study.workers import in_two_processes

ROTATIONS = 6
QUICK_ROTATIONS, QUICK_WINDOWS = 3, 64
DOUBLE_QUANT_NATS = 5e-4  # a loss rise that nobody would see

_INTRODUCTION = """\
One rounding of one model is a single draw. The rounding error is a small random step, and the \
loss goes up or down along it by chance: on other text than it was trained on, this model's loss \
may even fall. So each format is measured in {rotations} coordinate systems as well: the residual \
stream is rotated by a random orthogonal matrix, which leaves what the model computes as it was, \
but every weight is another number, and its rounding another draw of the same error (this model's \
weights are close to normal, rotated or not). The mean over draws is what the format costs. Loss \
is in nats a token on {windows} held-out windows of 128 tokens; before rounding it is {base:.4f}. \
Standard errors count both windows and rotations. "Fed back" is GPTQ's error feedback on NF4's \
levels, with {calibration} windows of the model's training text."""


def study(options: Options, tell: Callable[[str], None]) -> Part:
    """The rise of the loss under each rounding, and paired comparisons of roundings."""
    part = Part(3, "Loss of a small language model")
    try:
        small = _load(options)
    except (FileNotFoundError, ImportError) as error:
        part.skipped.append(str(error))
        return part
    base = small.losses()
    text = _INTRODUCTION.format(
        rotations=_rotations(options),
        windows=len(base),
        base=base.mean().item(),
        calibration=CALIBRATION,
    )
    part.content.append(text)
    # The last is the slowest: it comes first, so that no process waits for the other at the end.
    names = [rounding.name for rounding in reversed(_all())]
    found = dict(zip(names, in_two_processes(partial(measure, options), names, names, tell)))
    rises = {rounding.name: found[rounding.name].rotated - base for rounding in _all()}
    part.content.append(_table(found, base, rises))
    part.content.append(_comparisons(part, rises))
    part.data = {
        "loss": base.mean().item(),
        "rises": {
            name: {"mean": m.mean, "error": m.error, "relative_error": found[name].relative_error}
            for name, m in ((name, crossed_mean(rise)) for name, rise in rises.items())
        },
    }
    return part


@dataclass(frozen=True)
class Measured:
    """Losses of windows with rounded weights.

    relative_error  |W' - W|^2 / |W|^2 over all layers
    stored          weights rounded as they are, float64 (windows,)
    rotated         in each rotation, float64 (rotations, windows)
    """

    relative_error: float
    stored: Tensor
    rotated: Tensor


def measure(options: Options, name: str) -> Measured:
    """The losses under the rounding of that name."""
    rounding = next(rounding for rounding in _all() if rounding.name == name)
    stored, relative = _round(options, rounding, None)
    turns = range(options.seed, options.seed + _rotations(options))
    rotated = [_round(options, rounding, turn)[0] for turn in turns]
    return Measured(relative, stored, torch.stack(rotated))


def _round(
    options: Options, rounding: Rounding | Calibrated, turn: int | None
) -> tuple[Tensor, float]:
    small = _load(options, turn)
    if isinstance(rounding, Calibrated):
        relative = small.calibrate(**rounding.options)
    else:
        relative = small.put(rounding.restore)
    return small.losses(), relative


def _all() -> list[Rounding | Calibrated]:
    return [*roundings(), *calibrated()]


def _load(options: Options, turn: int | None = None) -> SmallModel:
    return SmallModel(options.model, options.text, QUICK_WINDOWS if options.quick else None, turn)


def _rotations(options: Options) -> int:
    return QUICK_ROTATIONS if options.quick else ROTATIONS


def _table(found: dict[str, Measured], base: Tensor, rises: dict[str, Tensor]) -> Table:
    columns = {
        "rounding": "",
        "bits a weight": ".3f",
        "relative squared error": ".3e",
        "rise as stored": "+.5f",
        "(error over windows)": ".5f",
        "rise, mean over rotations": "+.5f",
        "(standard error)": ".5f",
        "rise / relative error": ".2f",
    }
    rows = []
    for rounding in _all():
        one, mean = found[rounding.name], crossed_mean(rises[rounding.name])
        once, relative = mean_of(one.stored - base), one.relative_error
        cells = (once.mean, once.error, mean.mean, mean.error, mean.mean / relative)
        rows.append((rounding.name, rounding.bits, relative, *cells))
    return Table("Loss rise", columns, rows)


# The first is claimed to cost more than the second.
_CLAIMS = (
    ("fp4", "nf4", "NF4 is better than FP4", "paper, tables 2 and 4"),
    ("int4", "nf4", "NF4 is better than symmetric Int4", "paper, table 2"),
    ("int4 affine", "nf4", "NF4 is better than affine int4", "articles"),
    ("fp4_e3m0", "nf4", "NF4 is better than E3M0", "paper, table 2"),
    ("int4", "fp4", "FP4 (bitsandbytes' E2M1) is better than Int4", "paper, table 2"),
    ("int4", "fp4_ocp", "the standard's E2M1 is better than Int4", "paper, table 2"),
    ("fp4", "fp4_e3m0", "E3M0 is better than E2M1", "paper, table 2"),
    ("nf4", "af4", "AF4 is better than NF4", "arXiv 2306.06965"),
    ("nf4, 4096", "nf4", "small blocks are better than blocks of 4096", "paper, section 2"),
    ("nf4", "nf4, searched", "a search for scales helps NF4", "this library"),
    ("nf4", "nf4, fed back", "error feedback (GPTQ) helps NF4", "arXiv 2210.17323"),
    ("nf4", "bof4", "BOF4 is better than NF4", "arXiv 2505.06653"),
    ("nf4", "bof4_s", "BOF4-S is better than NF4", "arXiv 2505.06653"),
    ("nf3", "bof3_s", "BOF3-S is better than NF3", "arXiv 2505.06653"),
    ("nf2", "bof2_s", "BOF2-S is better than NF2", "arXiv 2505.06653"),
    ("nf3", "nf4", "a fourth bit helps", ""),
)


def _comparisons(part: Part, rises: dict[str, Tensor]) -> Table:
    rows = []
    for worse, better, statement, source in _CLAIMS:
        found = crossed_mean(rises[worse] - rises[better])
        rows.append((worse, better, found.mean, found.error, found.t))
        if source:
            text = f"loss rise of {worse} less that of {better}: {found.mean:+.5f} nats"
            part.claims.append(Claim(statement, source, text, verdict(found.t), found.t))
    double = crossed_mean(rises["nf4, double"] - rises["nf4"])
    rows.append(("nf4, double", "nf4", double.mean, double.error, double.t))
    part.claims.append(_double_quantisation_claim(double))
    columns = {"rounding": "", "less": "", "difference": "+.5f", "error": ".5f", "t": "+.1f"}
    return Table("Paired differences of the loss rise", columns, rows)


def _double_quantisation_claim(double: Mean) -> Claim:
    spare = (DOUBLE_QUANT_NATS - abs(double.mean)) / max(double.error, 1e-12)
    text = (
        f"loss {double.mean:+.5f} nats (standard error {double.error:.5f}); t is for a change of "
        f"less than {DOUBLE_QUANT_NATS} nats"
    )
    holds = verdict(spare) if math.isfinite(spare) else "not settled"
    return Claim("double quantisation does not cost loss", "paper, table 4", text, holds, spare)
