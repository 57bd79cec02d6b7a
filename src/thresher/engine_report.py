"""What is said of an engine that a target builds for a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class EngineReport:
    """One engine among what runs a program, such as TensorRT's.

    gpu: what it was built for. builder: with its version. operators: how many nodes it holds. bytes: of the engine.
    seconds: of its build, 0 where it was kept from before. profiles: the three shapes of each input that varies.
    sites: for each product by a weight, by the weight's FQN, what the engine multiplies. runs: False where it was only
        built. rebuilt: how often a changed weight made it anew.
    """

    name: str
    gpu: str
    builder: str
    operators: int
    bytes: int = 0
    seconds: float = 0.0
    cached: bool = False
    profiles: dict[str, list[list[int]]] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)
    runs: bool = True
    rebuilt: int = 0

    def __str__(self) -> str:
        how = "kept from before" if self.cached else f"built in {self.seconds:.1f} s"
        kinds = Counter(self.sites.values())
        held = "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        ranges = ", ".join(
            f"{name} {'..'.join('x'.join(map(str, s)) for s in shapes)}"
            for name, shapes in self.profiles.items()
        )
        return (
            f"{self.name} for {self.gpu} by {self.builder}: {self.operators} nodes, {self.bytes / 1e6:.2f} MB, {how}"
            f"{'' if self.runs else ', not run here'}{', sizes ' + ranges if ranges else ''}"
            f"{', products ' + held if held else ''}."
        )


def known_fields(kind: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """What of plain data the fields of a dataclass take; what this version does not know is left out."""
    return {f.name: data[f.name] for f in fields(kind) if f.init and f.name in data}
