"""A pass outside of Thresher: GELU by its tanh formula, which is cheaper where erf is slow.

matched:  aten.gelu(x) of an MLP, exact
becomes:  aten.gelu(x, approximate="tanh"), which differs by at most 5e-4
"""

from dataclasses import dataclass

import torch

from thresher.errors import ArgumentError
from thresher.graph.edit import call_before, replace
from thresher.passes.base import Effect, Match, Miss, Pass, register_pass
from thresher.recipe import PassConfig

aten = torch.ops.aten


@dataclass(frozen=True)
class CheapGeluConfig(PassConfig):
    """budget: largest change of a model output, relative to its largest value. min_width: leave narrower MLPs."""

    name = "cheap_gelu"
    budget: float = 1e-2
    min_width: int = 0

    def validate(self):
        if self.min_width < 0:
            raise ArgumentError(
                "cheap_gelu option min_width", self.min_width, "0 or more", "Leave it out for all."
            )


@register_pass
class CheapGelu(Pass[CheapGeluConfig]):
    name = "cheap_gelu"
    effect = Effect(exact=False, budget=1e-2)

    def budget(self, context):
        return context.config.budget

    def match(self, program, context):
        found = []
        for mlp in context.structure().mlps:
            if mlp.activation != "gelu":
                found.append(Miss(mlp.fqn, f"Its activation is {mlp.activation}, not an exact GELU."))
            elif mlp.width < context.config.min_width:
                found.append(
                    Miss(mlp.fqn, f"Its width {mlp.width} is below min_width={context.config.min_width}.")
                )
            else:
                found.append(Match(mlp.fqn, mlp.activation_node))
        return found

    def rewrite(self, program, match, context):
        old = match.data
        replace(old, call_before(old, aten.gelu.default, (old.args[0],), {"approximate": "tanh"}))
