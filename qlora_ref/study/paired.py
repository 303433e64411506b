"""Means, their standard errors, and differences between things measured on the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """The mean of independent samples and its standard error; t = mean / error."""

    mean: float
    error: float

    @property
    def t(self) -> float:
        """How many standard errors the mean is away from 0; 0 if both are 0."""
        return self.mean / self.error if self.error else math.copysign(math.inf, self.mean)


def mean_of(samples: Tensor) -> Mean:
    """The mean of samples (n,), with its standard error s / sqrt(n)."""
    samples = samples.double()
    error = samples.std().item() / math.sqrt(samples.numel())
    return Mean(samples.mean().item(), error)


def difference(mine: Tensor, other: Tensor) -> Mean:
    """The mean of mine - other over the same samples: what both share drops out of its error."""
    return mean_of(mine.double() - other.double())


def crossed_mean(samples: Tensor) -> Mean:
    """The mean of samples (draws, windows), in which each draw saw the same windows.

    error^2 = s^2(means of draws) / draws + s^2(means of windows) / windows

    Both have noise of their own that more of the other does not take away. What is left between
    them counts twice, so that the error is rather too large than too small.
    """
    samples = samples.double()
    of_draws, of_windows = mean_of(samples.mean(dim=1)), mean_of(samples.mean(dim=0))
    return Mean(of_draws.mean, math.hypot(of_draws.error, of_windows.error))
