"""Recovers the transformer from a Program: attention sites, MLP sites, norms, layers."""

from __future__ import annotations

from typing import Any

from thresher.program import Program


def recover(program: Program) -> Any:
    raise NotImplementedError
