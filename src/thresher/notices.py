"""What Thresher says while it works, and the switch that keeps it from working.

`THRESHER_DISABLE=1` runs every model as it was written. `THRESHER_LOGS=info` (debug, info, warning, error) prints the
logger "thresher" to stderr; without it the logger is silent unless the program sets logging up itself.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

LEVELS = ("debug", "info", "warning", "error")
logger = logging.getLogger("thresher")


class ThresherWarning(UserWarning):
    """Something was left as it was, and the message says what and why."""


def disabled() -> bool:
    """Whether THRESHER_DISABLE is set, to anything but 0."""
    return os.environ.get("THRESHER_DISABLE", "0") not in ("", "0")


def _set_up() -> None:
    logger.addHandler(logging.NullHandler())
    level = os.environ.get("THRESHER_LOGS", "").lower()
    if not level:
        return
    if level not in LEVELS:
        warnings.warn(
            f"THRESHER_LOGS is {level!r}, which is none of {', '.join(LEVELS)}: nothing is logged.",
            ThresherWarning,
            stacklevel=2,
        )
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("thresher %(levelname)s: %(message)s"))
    handler.addFilter(lambda record: not getattr(record, "warned", False))  # that is on stderr already
    logger.addHandler(handler)
    logger.setLevel(level.upper())


_set_up()
_SAID: WeakIdKeyDictionary = WeakIdKeyDictionary()


def warn(said: str, gm: fx.GraphModule | None = None, stacklevel: int = 2) -> None:
    """A ThresherWarning, also in the log. With a graph of Dynamo's it names that, and appears once a model."""
    if gm is not None:
        if _told(gm, said):
            return
        said = f"{said} (This is {name_of(gm)}.)"
    logger.warning(said, extra={"warned": True})
    warnings.warn(said, ThresherWarning, stacklevel=stacklevel + 1)


def _told(gm: fx.GraphModule, said: str) -> bool:
    """Whether it was said of the same model before; a model is known by its first weight."""
    examples = [example for _, example in _inputs(gm)]
    weight = next((e for e in examples if isinstance(e, torch.nn.Parameter)), None)
    if weight is None:
        return False
    told = _SAID.setdefault(weight, set())
    known = said in told
    told.add(said)
    return known


def name_of(gm: fx.GraphModule) -> str:
    """A graph of Dynamo's in words: its number, and the inputs it was compiled for."""
    shown = [
        f"{name} {list(example.shape)}"
        for name, example in _inputs(gm)
        if isinstance(example, torch.Tensor) and not isinstance(example, torch.nn.Parameter)
    ]
    number = gm.meta.get("dynamo_compile_id", "?")
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return f"graph {number} on {', '.join(shown[:4]) or 'no tensor'}{more}"


def _inputs(gm: fx.GraphModule) -> Sequence[tuple[str, Any]]:
    """The graph's arguments: what they are called where they come from, and the real ones where they are at hand."""
    found = []
    for node in gm.graph.nodes:
        argument = node.meta.get("grapharg") if node.op == "placeholder" else None
        if argument is not None:
            found.append((_name(argument, node.name), argument.example))
    return found


def _name(argument: Any, default: str) -> str:
    name = getattr(argument.source, "name", default)
    words = re.findall(r"\['(\w+)'\]", name() if callable(name) else name)
    return words[-1] if words else default
