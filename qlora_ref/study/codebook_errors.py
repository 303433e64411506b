"""Part 1: the error of every codebook and block size on N(0, 1), exactly and by drawing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_ref.quantized import quantize
from qlora_ref.study.expected_error import block_maximum, expected_error
from qlora_ref.study.formats import Format, study_formats
from qlora_ref.study.options import Options
from qlora_ref.study.paired import Mean, difference, mean_of
from qlora_ref.study.report import Claim, Part, Table, verdict
from qlora_ref.study.scales import scale_errors

BLOCK_SIZES = (32, 64, 128, 256, 1024, 4096)
CHUNK = 2**18  # values looked at together; whole blocks
SAMPLES = 2**22  # 2^20 give the error of NF4 in blocks of 64 to 0.2 %
QUICK_SAMPLES = 2**18
NEGLIGIBLE_PERCENT = 0.2  # of the mean squared error


def study(options: Options, tell: Callable[[str], None]) -> Part:
    """Exact and drawn errors of each format, and what double quantisation adds."""
    part = Part(1, "Errors of codebooks on normal weights")
    formats = study_formats()
    tell("exact errors")
    exact = {f.name: [expected_error(f.make(b), b, f.signed) for b in BLOCK_SIZES] for f in formats}
    names = [(form.name, form.bits, form.says) for form in formats]
    part.content.append(Table("Codebooks", {"name": "", "bits": "d", "levels": ""}, names))
    part.content.append(
        "Blocks of B independent values of N(0, 1), divided by their absmax. The figures of the "
        "next two tables are integrals, exact to all digits shown: nothing was drawn."
    )
    for title, key in (("Mean squared error", "mse"), ("Mean absolute error", "mae")):
        columns = {"codebook": "", **{f"B = {b}": ".4e" for b in BLOCK_SIZES}}
        rows = [[f.name, *(getattr(e, key) for e in exact[f.name])] for f in formats]
        part.content.append(Table(title, columns, rows))
    largest = [(m * w).sum().item() for m, w in map(block_maximum, BLOCK_SIZES)]
    columns = {f"B = {b}": ".4f" for b in BLOCK_SIZES}
    part.content.append(
        Table("Expected absmax of a block, in standard deviations", columns, [largest])
    )

    count = QUICK_SAMPLES if options.quick else SAMPLES
    tell(f"the same from {count:,} draws for each")
    x = torch.randn(count, generator=torch.Generator().manual_seed(options.seed))
    drawn = {f.name: [drawn_error(f, x, b) for b in BLOCK_SIZES] for f in formats}
    part.content.append(_drawn_table(formats, exact, drawn, count))
    part.data["mse"] = _data(formats, exact, drawn)
    _add_double_quantisation(part, x)
    return part


def drawn_error(form: Format, x: Tensor, block_size: int) -> Mean:
    """Mean squared error on x; blocks are the independent samples of its standard error."""
    parts = x.split(CHUNK)
    return mean_of(
        torch.cat(
            [_block_errors(part, form.restored(part, block_size), block_size) for part in parts]
        )
    )


def _block_errors(x: Tensor, restored: Tensor, block_size: int) -> Tensor:
    return (restored.double() - x.double()).square().view(-1, block_size).mean(dim=1)


def _drawn_table(formats: list[Format], exact: Any, drawn: Any, count: int) -> Table:
    columns = {
        "codebook": "",
        "exact, B = 64": ".4e",
        "drawn, B = 64": ".4e",
        "standard error": ".1e",
        "largest deviation over all B, %": ".2f",
        "largest t over all B": ".1f",
    }
    rows = []
    at = BLOCK_SIZES.index(64)
    for form in formats:
        pairs = list(zip(exact[form.name], drawn[form.name]))
        deviations = [100 * abs(d.mean / e.mse - 1) for e, d in pairs]
        ts = [abs(d.mean - e.mse) / d.error for e, d in pairs]
        e, d = pairs[at]
        rows.append((form.name, e.mse, d.mean, d.error, max(deviations), max(ts)))
    return Table(f"The same, drawn: {count:,} values through this library's kernels", columns, rows)


def _data(formats: list[Format], exact: Any, drawn: Any) -> dict[str, Any]:
    return {
        form.name: {
            "block_sizes": BLOCK_SIZES,
            "levels": form.make(64).unique().tolist(),
            "exact": [e.mse for e in exact[form.name]],
            "exact_mae": [e.mae for e in exact[form.name]],
            "drawn": [d.mean for d in drawn[form.name]],
            "drawn_error": [d.error for d in drawn[form.name]],
        }
        for form in formats
    }


def _add_double_quantisation(part: Part, x: Tensor) -> None:
    """What 8-bit scales add to the error of NF4, and other ways of holding scales in fewer bits."""
    once = quantize(x, "nf4", 64)
    twice = quantize(x, "nf4", 64, double_quant=True)
    plain = _block_errors(x, once.dequantize(), 64)
    # 256 scales share one of their own: their blocks are the independent samples.
    added = difference(
        _block_errors(x, twice.dequantize(), 64 * 256), plain.view(-1, 256).mean(dim=1)
    )
    relative = Mean(100 * added.mean / plain.mean().item(), 100 * added.error / plain.mean().item())
    part.content.append(
        f"Double quantisation adds {added.mean:.2e} (standard error {added.error:.1e}) to the mean "
        f"squared error of NF4 in blocks of 64: {relative.mean:.3f} % ({relative.error:.3f} %)."
    )
    columns = {
        "scales held as": "",
        "bits a weight": ".4f",
        "rms relative error": ".2e",
        "largest": ".2e",
    }
    part.content.append(
        Table("Ways to hold the scales of blocks of 64", columns, scale_errors(once.absmax))
    )
    part.data["double_quantisation_percent"] = {"mean": relative.mean, "error": relative.error}
    spare = (NEGLIGIBLE_PERCENT - relative.mean) / relative.error
    part.claims.append(
        Claim(
            "double quantisation does not cost accuracy",
            "paper, section 3",
            f"mean squared error +{relative.mean:.3f} % (standard error {relative.error:.3f} %); "
            f"t is for less than {NEGLIGIBLE_PERCENT} %",
            verdict(spare),
            spare,
        )
    )
