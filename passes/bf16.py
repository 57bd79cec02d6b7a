"""bf16: linears multiply in bfloat16 and add up in fp32, where the processor has instructions for it.

    matched:  a linear of fp32 inputs by a stored fp32 weight that no other pass has claimed and `keep` does not name
    becomes:  linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).float(), the weight converted once

Half the bytes, and up to twice the multiplications a second (AVX512-BF16, AMX, tensor cores). Everything between
linears stays fp32: norms, attention, the residual stream. bfloat16 keeps 8 bits of each factor, so a linear's result
moves by about 0.3 % of its size. It comes after every pass that stores weights in fewer bits, and takes what they left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thresher.graph.edit import replace
from thresher.graph.nodes import value
from thresher.graph.program import Program, Weight
from thresher.machine.devices import bf16_products
from thresher.recipe import PassConfig

from .base import Context, Effect, Match, Miss, Pass, register_pass
from .keep import check_keep, kept_layers
from .structure.linears import find_linears
from .structure.recover import LinearSite
from .structure.sites import read_instead

aten = torch.ops.aten


@dataclass(frozen=True)
class BF16Config(PassConfig):
    """Options of the bf16 pass.

    keep: linears to leave in fp32: "head", "embedding", "first:2", "last:8", or a glob on the module's name.
    min_weights: leave smaller linears, where conversions cost more than the product.
    emulate: also where the processor has no bf16 instructions, to save memory or to look at the error.
    budget: largest accepted difference of any output on the example, relative to its largest value. Outputs at
        pads count where they are computed, and move most: they attend to nothing that was learned.
    """

    name = "bf16"
    keep: tuple[str, ...] = ()
    min_weights: int = 1 << 14
    emulate: bool = False
    budget: float = 0.5

    def validate(self) -> None:
        check_keep("bf16", self.keep)
        self.within(0, float("inf"), "budget", "min_weights")


@register_pass
class BF16(Pass[BF16Config]):
    """Computes fp32 linears in bfloat16 where the machine multiplies that faster. See the module's docstring."""

    name = "bf16"
    per_rank, rewrites_weights = True, True
    effect = Effect(exact=False, budget=0.5)

    def budget(self, context: Context[BF16Config]) -> float:
        return context.config.budget

    def linear_kernels(self, config: BF16Config) -> Sequence[str]:
        return ("linear.bfloat16",)

    def match(self, program: Program, context: Context[BF16Config]) -> Sequence[Match | Miss]:
        structure, config = context.structure(), context.config
        kept = kept_layers(structure, config.keep, context.notes)
        slow = None if config.emulate else no_instructions(context.device)
        found: list[Match | Miss] = []
        for site in structure.linears:
            reason = kept.get(site) or unfit(program, site, config) or slow
            claims = program.weights[site.weight].origins
            found.append(Match(site.fqn, site, claims) if reason is None else Miss(site.fqn, reason))
        return [*found, *find_linears(program)[1]]

    def rewrite(self, program: Program, match: Match, context: Context[BF16Config]) -> None:
        site: LinearSite = match.data
        at = site.output
        weight = program.get_weight(narrow(program.weights[site.weight], site.transposed), before=at)
        bias = (
            None if site.bias is None else program.get_weight(narrow(program.weights[site.bias]), before=at)
        )
        x = program.insert(at, aten.to.dtype, site.x, torch.bfloat16)
        product = program.insert(at, aten.linear.default, x, weight, bias)
        made = program.insert(at, aten.to.dtype, product, torch.float32)
        replace(at, made)
        read_instead(context.structure().linears, at, made)


def narrow(held: Weight, transposed: bool = False) -> Weight:
    """A weight [out, in] or a bias in bfloat16, made anew when the model's changes."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.t() if transposed else tensor).to(torch.bfloat16).contiguous()

    return Weight(f"{held.fqn}.bf16", cast(held.tensor), held.origins, held.then(cast), held.origin_tensors)


def unfit(program: Program, site: LinearSite, config: BF16Config) -> str | None:
    """Why a linear cannot or should not be rewritten, or None."""
    weight = program.weights[site.weight].tensor
    if weight.numel() < config.min_weights:
        return f"Its {weight.numel()} weights are fewer than min_weights={config.min_weights}."
    known = (weight.dtype, value(site.x).dtype, value(site.output).dtype)
    if known != (torch.float32,) * 3:
        return f"It turns {known[1]} into {known[2]} by a weight of {known[0]}; only fp32 throughout has bits to spare."
    return None


def no_instructions(device: torch.device) -> str | None:
    """Why bfloat16 products are no faster than fp32 ones on a device, as a sentence, or None."""
    if device.type != "cpu":
        return None
    if bf16_products():
        return None
    return "This processor multiplies no bfloat16 (neither AVX512-BF16 nor AMX); emulate=True does it all the same."
