"""Options of DEFT."""

from __future__ import annotations

from dataclasses import dataclass

from thresher.errors import ArgumentError
from thresher.recipe import PassConfig

MEASURED = -1.0  # tau: the operator measures its break-even on the machine that runs it


@dataclass(frozen=True)
class DeftConfig(PassConfig):
    """Options of sparse MLPs.

    approximate: also drop small activations of GELU and SiLU, by calibrated thresholds.
    error: approximate mode's budget: root mean square, over the MLPs, of the relative L2 error of their outputs.
    budget: largest change of the model's outputs that approximate mode may cause; above it is rolled back.
    bmax: most tokens a call may have for its active neurons to be looked for.
    tau: largest share of neurons, on for any token of a call, that runs sparse; -1 measures it on the machine.
    min_bytes: down projections smaller than this stay dense.
    skip_up: let gated MLPs skip the up projection's rows; False leaves that linear for other passes.
    bits: 16 keeps the weights; 8 or 4 rounds down projections to so many, in groups along the outputs so that
        a neuron that is off still costs no byte. `budget` then bounds what that does to the outputs.
    """

    name = "deft"
    approximate: bool = False
    error: float = 0.05
    budget: float = 0.1
    bmax: int = 64
    tau: float = MEASURED
    min_bytes: int = 1 << 17
    skip_up: bool = True
    bits: int = 16

    def validate(self) -> None:
        if not (self.tau == MEASURED or 0 <= self.tau <= 1):
            raise ArgumentError(
                "deft's tau", self.tau, "0 to 1, or -1 for measured", "Leave it out to measure it."
            )
        for name, given in (("error", self.error), ("budget", self.budget)):
            if not 0 < given < 1:
                raise ArgumentError(f"deft's {name}", given, "between 0 and 1", "0.05 is five percent.")
        if self.bits not in (16, 8, 4):
            raise ArgumentError("deft's bits", self.bits, "16, 8 or 4", "16 keeps the weights as they are.")
        self.within(1, float("inf"), "bmax")
        self.within(0, float("inf"), "min_bytes")
