"""What each rewrite is expected to gain: the nodes it took out and put in, at the cost model's prices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from thresher.graph.program import Program
from thresher.machine.devices import Device

from .model import CostModel


class Ledger:
    """What each rewrite took out of a program, at its price, and which nodes it put in.

    ledger = Ledger(model, program)
    rewrite(...); ledger.note(program, "layers.0.mlp")       # after each site, before dead code is erased
    ledger.gains(after)                                      # {"layers.0.mlp": Gain(...)}
    """

    def __init__(self, model: CostModel, program: Program):
        self.model = model
        model.learn(program)
        self._live = _live(program)
        self._moved: dict[str, tuple[float, list[fx.Node]]] = {}

    def note(self, program: Program, site: str) -> None:
        """Record the rewrite of a site that was just done."""
        now = _live(program)
        spent, came = self._moved.get(site, (0.0, []))
        spent += sum(self.model.node(n) for n in self._live if n not in now)
        self._moved[site] = (spent, came + [n for n in now if n not in self._live])
        self._live = now

    def gains(self, after: Program) -> dict[str, Gain]:
        """Seconds before and after for each site."""
        self.model.learn(after)
        kept = set(after.graph.nodes)
        priced = {s: Gain(spent, sum(self.model.node(n) for n in came if n in kept))
                  for s, (spent, came) in self._moved.items()}  # fmt: skip
        return {s: gain for s, gain in priced.items() if gain.before > 0 and gain.after > 0}


@dataclass(frozen=True)
class Gain:
    """Expected seconds of a site as it was, and rewritten."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.before / self.after

    def loss(self, device: Device, least: float) -> str:
        """The sentence for a site that is not worth rewriting."""
        return (
            f"The cost model expects {self.ratio:.2f} times the speed of the site as it is "
            f"({self.after * 1e6:.0f} against {self.before * 1e6:.0f} microseconds on {device.name}, {device.source}), "
            f"below min_gain = {least:g}."
        )


def _live(program: Program) -> dict[fx.Node, None]:
    """The operators that results depend on, in order."""
    wanted, stack = set(), [program.output_node]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack += node.all_input_nodes
    return {n: None for n in program.graph.nodes if n in wanted and n.op == "call_function"}
