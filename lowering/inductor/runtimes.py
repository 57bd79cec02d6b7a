"""What Inductor can do, as a compiler and as a maker of packages."""

from __future__ import annotations

from ..target import Runtime
from .inductor import Inductor

RUNTIMES = (
    Runtime(
        "inductor",
        operators=True,
        sizes=True,
        lower=lambda options, mode: Inductor(options, mode),
        peer="inductor",
    ),
    Runtime("aoti", operators=True, sizes=True),
)
