"""Every target by the name that users call it: a line here and its module make a target."""

from __future__ import annotations

import importlib
from typing import Any

from thresher.errors import ArgumentError, unknown_key

from .target import Runtime

TARGETS: dict[str, str] = {
    # name: the module under thresher.lowering whose RUNTIMES hold it
    "reference": "reference",
    "inductor": "inductor.runtimes",
    "aoti": "inductor.runtimes",
    "onnx-portable": "onnx.runtimes",
    "onnx-ort": "onnx.runtimes",
    "onnx-ort-cuda": "onnx.runtimes",
    "onnx-tensorrt": "onnx.runtimes",
    "tensorrt": "tensorrt.runtimes",
}


def runtime(name: str, argument: str = "target", *, lowers: bool = False) -> Runtime:
    """What a target can do. lowers: only one that `thresher.compile` and `thresher.load` can run with.

    Raises ArgumentError, naming `argument`, for another name.
    """
    if not (can_lower(name) if lowers else name in TARGETS):
        raise unknown_key(argument, name, lowering() if lowers else TARGETS)
    return _load(name)


def can_lower(name: str) -> bool:
    """Whether a model can be compiled for a target of that name."""
    return name in TARGETS and _load(name).lower is not None


def lowering() -> tuple[str, ...]:
    """The names of targets that a model can be compiled for."""
    return tuple(name for name in TARGETS if can_lower(name))


def split_options(name: str, given: dict[str, Any], argument: str = "target") -> dict[str, Any]:
    """Take a target's own options out of `given` and return them. Raises ArgumentError for an option of another target."""
    own = runtime(name, argument, lowers=True).options
    for other in lowering():
        strange = sorted((_load(other).options - own) & set(given))
        if strange:
            raise ArgumentError(
                strange[0], repr(given[strange[0]]), f"an option of target={other!r}, and target is {name!r}",
                f"Pass target={other!r}, or leave it out.",
            )  # fmt: skip
    return {key: given.pop(key) for key in sorted(own & set(given))}


def _load(name: str) -> Runtime:
    module = importlib.import_module(f"thresher.lowering.{TARGETS[name]}")
    return next(r for r in module.RUNTIMES if r.name == name)
