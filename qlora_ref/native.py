"""Finds the compiled libraries, declares their functions, turns error codes into exceptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class BackendUnavailable(RuntimeError):
    """A backend cannot run an operation; the text says why."""


def load(backend: str, operation: str) -> Callable[..., Any]:
    raise BackendUnavailable("no compiled library")
