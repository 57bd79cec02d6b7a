"""What compiling takes, phase by phase: shown on stderr while it lasts, and kept in the report as seconds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from . import progress

TRACE, CAPTURE, PASSES, VERIFICATION, LOWERING = "trace", "capture", "passes", "verification", "lowering"
"""Dynamo's trace of the model's Python; its graph as a Program; matching and rewriting; judging what was rewritten; what the
target makes of it, Inductor's compilation included."""


class _Now(threading.local):
    """The phases that this thread is in, each with the seconds of those within it; where seconds go; when a call began."""

    def __init__(self) -> None:
        self.inner: list[float] = []
        self.seconds: dict[str, float] | None = None
        self.began: float | None = None
        self.shown: Any = None


_NOW = _Now()


@contextlib.contextmanager
def phase(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Within the context this thread is in a phase, whose seconds do not count those of phases within.

    seconds: where they are added by the phase's name; without it, where `recorded` says, if anywhere.
    """
    kept = seconds if seconds is not None else _NOW.seconds
    began, outer = time.perf_counter(), not _NOW.inner
    _NOW.inner.append(0.0)
    before = _show(name, outer)
    try:
        yield
    finally:
        whole = time.perf_counter() - began
        within = _NOW.inner.pop()
        if _NOW.inner:
            _NOW.inner[-1] += whole
        if kept is not None:
            kept[name] = kept.get(name, 0.0) + whole - within
        _hide(before, outer)


@contextlib.contextmanager
def recorded(seconds: dict[str, float]) -> Iterator[None]:
    """Within the context the phases of this thread add their seconds here, the trace that led here first."""
    if _NOW.began is not None:
        seconds[TRACE] = time.perf_counter() - _NOW.began
        _NOW.began = None
    before, _NOW.seconds = _NOW.seconds, seconds
    try:
        yield
    finally:
        _NOW.seconds = before


@contextlib.contextmanager
def call() -> Iterator[None]:
    """Around a call that may have to be compiled: what precedes the first phase is Dynamo's trace."""
    before, _NOW.began = _NOW.began, time.perf_counter()
    try:
        yield
    finally:
        _NOW.began = before


def _show(name: str, outer: bool) -> str | None:
    """Say on stderr what goes on, where it is a terminal; gives what was said before."""
    if outer and progress.shown():
        from rich.console import Console
        from rich.status import Status

        _NOW.shown = Status("", console=Console(stderr=True))
        _NOW.shown.start()
    if _NOW.shown is None:
        return None
    before = _NOW.shown.status
    _NOW.shown.update(f"thresher: {name}")
    return str(before)


def _hide(before: str | None, outer: bool) -> None:
    if _NOW.shown is None:
        return
    if outer:
        _NOW.shown.stop()
        _NOW.shown = None
    elif before is not None:
        _NOW.shown.update(before)
