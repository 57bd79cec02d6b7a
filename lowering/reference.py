"""The reference target: a Program run node by node in plain PyTorch. What every other target must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from thresher.graph.program import Program

from . import half_linears
from .target import Lowered, Runtime, Target, lift_weights


class Reference(Target):
    """Runs a program as it stands, in plain PyTorch: what every other target is compared with. Only linears of half types
    are not PyTorch's where the CPU does not multiply them (`half_linears`): there a proof would take eight times as long."""

    name = "reference"
    fakes = "none"

    def lower(self, program: Program) -> Lowered:
        module, names = lift_weights(program)
        if half_linears.rewrite(module.graph):
            module.recompile()
        forward = module.forward

        def run(inputs: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[Any]:
            with torch.no_grad():
                return list(forward(*inputs, *weights))

        return Lowered(self.name, names, run)


RUNTIMES = (Runtime("reference", operators=True, sizes=True, lower=lambda options, mode: Reference()),)
