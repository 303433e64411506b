"""Are the rows of a weight matrix drawn from normal distributions? The paper's own test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.05  # a true normal row is rejected with this probability


@dataclass(frozen=True)
class Normality:
    """rows tested, how many were rejected at the 5 % level, their median excess kurtosis."""

    rows: int
    rejected: int
    kurtosis: float

    @property
    def share(self) -> float:
        """The rejected part of the rows."""
        return self.rejected / self.rows


def row_normality(weight: Tensor) -> Normality:
    """Shapiro-Wilk's test of each row: one output unit's weights, as in the paper's appendix F.

    weight  float (rows, up to 5000); beyond 5000 scipy's p-values are not accurate
    Raises ImportError without scipy.
    """
    try:
        from scipy.stats import shapiro
    except ImportError as error:
        raise ImportError(
            "the Shapiro-Wilk test needs scipy: pip install 'qlora_ref[study]'"
        ) from error
    rows = weight.double()
    rejected = sum(shapiro(row).pvalue < LEVEL for row in rows.numpy())
    centred = rows - rows.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1)
    kurtosis = centred.pow(4).mean(dim=1) / variance.square() - 3
    return Normality(len(rows), int(rejected), kurtosis.median().item())


def null_rejected(width: int, rows: int, seed: int) -> Normality:
    """The same of rows that are normal."""
    return row_normality(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))
