"""Part 5: what the paper and common articles say of NF4 and of memory, worked out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_ref.codebooks import (
    NORMAL_FLOAT_OFFSET,
    af4_codebook,
    fp4_codebook,
    fp4_ocp_codebook,
    int4_codebook,
    nf4_codebook,
)
from qlora_ref.study.bytes_said import bytes_claims, bytes_table
from qlora_ref.study.expected_error import (
    bin_use,
    entropy_bits,
    expected_error,
    least_absolute_levels,
)
from qlora_ref.study.options import Options
from qlora_ref.study.report import Claim, Part, Table


def study(options: Options, tell: Callable[[str], None]) -> Part:
    """The levels, the bins, the optimum; bits and bytes."""
    part = Part(5, "What is said, and what is so")
    part.content.append("Nothing in this part is random: it is arithmetic and integrals.")
    _add_levels(part)
    _add_bins(part)
    _add_optimum(part)
    part.content.append(bytes_table())
    part.claims += bytes_claims()
    return part


def equation_4_levels(bits: int = 4) -> Tensor:
    """Equation 4 as printed, without its two infinite terms, divided by the largest; float64.

    q_i = (Q(i / (2^k + 1)) + Q((i + 1) / (2^k + 1))) / 2,   i = 1 ... 2^k - 1
    """
    steps = torch.arange(1, 2**bits + 1, dtype=torch.float64) / (2**bits + 1)
    quantiles = torch.special.ndtri(steps)
    levels = (quantiles[:-1] + quantiles[1:]) / 2
    return levels / levels.abs().max()


def _levels_table() -> Table:
    nf4, printed = nf4_codebook().double(), equation_4_levels()
    rows = [
        (i, nf4[i].item(), printed[i - 1].item() if i else None, fp4.item(), ocp.item())
        for i, (fp4, ocp) in enumerate(zip(_sixteen(fp4_codebook()), _sixteen(fp4_ocp_codebook())))
    ]
    columns = {
        "i": "d",
        "NF4 (appendix E)": ".7f",
        "equation 4 as printed": ".7f",
        "FP4 of bitsandbytes": ".7f",
        "E2M1 of the OCP standard": ".7f",
    }
    return Table("Levels", columns, rows)


def _add_levels(part: Part) -> None:
    part.content.append(_levels_table())
    distance = (nf4_codebook()[1:] - equation_4_levels()).abs().max().item()
    part.claims.append(
        Claim(
            "equation 4 gives the values of appendix E",
            "paper, section 3",
            "its terms for i = 0 and i = 16 are infinite; the other 15 are symmetric about 0 and "
            f"up to {distance:.3f} away",
            "does not hold",
        )
    )
    exact = 1 - (1 / 32 + 1 / 30) / 2
    part.claims.append(
        Claim(
            f"the offset {NORMAL_FLOAT_OFFSET} was found empirically",
            "bitsandbytes' comments",
            f"it is 1 - (1/32 + 1/30) / 2 = 929/960 = {exact:.10f} to its seven digits",
            "does not hold",
        )
    )
    smallest = [levels[levels > 0].min().item() for levels in (fp4_codebook(), fp4_ocp_codebook())]
    errors = [expected_error(levels, 64).mse for levels in (fp4_codebook(), fp4_ocp_codebook())]
    part.claims.append(
        Claim(
            "bitsandbytes' FP4 is E2M1",
            "articles",
            f"its smallest level is 1/{1 / smallest[0]:.0f}, that of the OCP standard "
            f"1/{1 / smallest[1]:.0f}; squared error at block 64 {errors[0]:.4e}, {errors[1]:.4e}",
            "does not hold",
        )
    )
    gaps = [_gaps_at_zero(levels) for levels in (nf4_codebook(), int4_codebook())]
    part.content.append(
        f"Next to 0 the steps of NF4 are {gaps[0][0]:.4f} and {gaps[0][1]:.4f}, that of int4 is "
        f"{gaps[1][0]:.4f} (of absmax): levels are dense where weights are many, not where a "
        "weight matters most."
    )


def _sixteen(levels: Tensor) -> Tensor:
    """Ascending; the code -0, which is read as 0, twice."""
    return levels.double().sort().values


def _gaps_at_zero(levels: Tensor) -> tuple[float, float]:
    return -levels[levels < 0].max().item(), levels[levels > 0].min().item()


def _add_bins(part: Part) -> None:
    shares = {block_size: bin_use(nf4_codebook(), block_size) for block_size in (64, 4096)}
    columns = {"level": ".4f", **{f"B = {b}, % of weights": ".2f" for b in shares}}
    rows = [
        (level, *(100 * share[i].item() for share in shares.values()))
        for i, level in enumerate(nf4_codebook().tolist())
    ]
    part.content.append(Table("How NF4's levels are used by N(0, 1) weights", columns, rows))
    found = [
        f"from {100 * s.min():.2f} % to {100 * s.max():.2f} % in blocks of {b}, "
        f"entropy {entropy_bits(s):.3f} bits"
        for b, s in shares.items()
    ]
    part.claims.append(
        Claim(
            "each level gets as many weights: 6.25 %, 4 bits of information",
            "paper, section 3",
            "; ".join(found),
            "does not hold",
        )
    )
    part.data["bin_use"] = {str(b): s.tolist() for b, s in shares.items()}


def _add_optimum(part: Part) -> None:
    codebooks = {
        "NF4": nf4_codebook(),
        "AF4": af4_codebook(),
        "least absolute error": least_absolute_levels(64),
    }
    errors = {name: expected_error(levels, 64) for name, levels in codebooks.items()}
    rows = [(name, e.normalised_mae, e.mae, e.mse) for name, e in errors.items()]
    columns = {
        "levels": "",
        "absolute error / absmax": ".6f",
        "absolute error": ".5f",
        "squared error": ".4e",
    }
    part.content.append(Table("How near to the optimum: N(0, 1), blocks of 64", columns, rows))
    optimum = errors["least absolute error"].normalised_mae
    excess = {name: 100 * (e.normalised_mae / optimum - 1) for name, e in errors.items()}
    part.claims.append(
        Claim(
            "AF4 has the least absolute error of 16 levels with -1, 0 and 1",
            "arXiv 2306.06965",
            f"AF4 {excess['AF4']:.2f} % above the least, NF4 {excess['NF4']:.2f} %",
            "does not hold",
        )
    )
    part.data["least_absolute_levels"] = codebooks["least absolute error"].tolist()
