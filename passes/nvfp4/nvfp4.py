"""NVFP4: every large linear multiplies by weights of 4.5 bits.

    matched:  a linear (`linear`, `addmm`, `mm`, `matmul`; weights stored [out, in] or [in, out]) by a stored,
              finite weight that is large enough to be worth it and is not named by `keep`
    becomes:  one `thresher::nvfp4_linear` node, bias included, on three weights derived from the model's:
              codes uint8 [out, 8B], block scales (E4M3 bytes, uint8) [out, B] and a tensor scale fp32 [],
              with B = ceil(in / 16). They are computed anew when the model's weight changes.

Approximate: rounding moves each weight by about 9.5 % (root mean square) of the weights' own size, so
`budget` is an option and the pipeline measures the result against it. Memory shrinks in any case; a recipe
that is after speed alone sets `min_gain`, and the pipeline's cost model leaves what would lose. Which layers
stay as they are is `keep`, and `sensitive` on top of it: the share of weights whose rounding changes their
own output most, measured on calibration data (see calibration.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from thresher.compat import has_values
from thresher.errors import ArgumentError, unknown_key
from thresher.graph.edit import replace
from thresher.graph.nodes import value
from thresher.graph.program import Program, Weight
from thresher.recipe import PassConfig

from ..base import Context, Effect, Match, Miss, Pass, register_pass
from ..calibrate import Tap
from ..keep import check_keep, kept_experts, kept_layers
from ..savings import savings
from ..structure.linears import find_linears
from ..structure.recover import LinearSite
from ..structure.sites import by_module, read_instead
from .calibration import InputStatistics, most_sensitive
from .experts import PackedExperts, match_experts, rewrite_experts
from .weights import packed_weights

ops = torch.ops.thresher
MODES = ("thresher", "te", "torchao", "modelopt", "compressed_tensors")
SEARCHES = ("none", "mse", "four_over_six")
ACTIVATIONS = ("exact", "int16", "int8", "nvfp4")
KEPT_WORDS = ("head", "router", "embedding", "first", "last")
NEEDS_DATA = "It needs calibration: run thresher.calibrate with this recipe and name its file in `stats`."


@dataclass(frozen=True)
class NVFP4Config(PassConfig):
    """Options of the NVFP4 pass.

    mode: whose arithmetic the weights are rounded in: thresher, te, torchao, modelopt, compressed_tensors.
    search: choose each block's scale by squared error: "none" (from the block's maximum), "mse" (about 20 %
        less error, for some 0.2 s a million weights while compiling), "four_over_six".
    activations: "exact" (weight-only), "int16" or "int8" (integers a block of 16, faster on CPUs), or "nvfp4"
        (W4A4, for FP4 tensor cores).
    input_scale: the tensor scale of "nvfp4" activations: "dynamic", each call's own, or "calibrated".
    keep: linears to leave as they are: "head", "router" (chooses experts), "embedding" (between embeddings and the
        first layer), "first" or "first:2" and "last" or "last:8" for so many layers at either end, or a glob on
        the module's name, also on that of experts.
    sensitive: keep also the linears whose own output changes most, up to this share of all weights, 0 to 1.
    min_weights: leave smaller linears; below about 64 thousand weights the call costs more than it saves.
    budget: largest accepted difference of any output on the example, relative to its largest value.
    """

    name = "nvfp4"
    mode: str = "thresher"
    search: str = "none"
    activations: str = "exact"
    input_scale: str = "dynamic"
    keep: tuple[str, ...] = ("head", "router")
    sensitive: float = 0.0
    min_weights: int = 1 << 16
    budget: float = 0.5

    def validate(self) -> None:
        for field, known in (("mode", MODES), ("search", SEARCHES), ("activations", ACTIVATIONS),
                             ("input_scale", ("dynamic", "calibrated"))):  # fmt: skip
            if getattr(self, field) not in known:
                raise unknown_key(f"nvfp4 option {field}", str(getattr(self, field)), known)
        check_keep("nvfp4", self.keep)
        if self.input_scale == "calibrated" and self.activations != "nvfp4":
            raise ArgumentError(
                "nvfp4 option input_scale",
                f"'calibrated' with activations={self.activations!r}",
                "'dynamic', or activations='nvfp4'",
                "Only NVFP4 activations have a tensor scale.",
            )
        self.within(0, 1, "sensitive")
        self.within(0, float("inf"), "budget", "min_weights")


@dataclass(frozen=True)
class PackedSite:
    """A linear's places in the graph, the fixed tensor scale of its activations (fp32 []), if there is one, and how
    many bytes its weight takes as it is and packed."""

    sites: tuple[LinearSite, ...]
    input_scale: torch.Tensor | None
    bytes_before: int
    bytes_after: int


@register_pass
class NVFP4(Pass[NVFP4Config]):
    """Stores linears' weights in four bits and a half. See the module's docstring."""

    name = "nvfp4"
    per_rank, rewrites_weights = True, True
    effect = Effect(exact=False, budget=0.5)
    extends = frozenset({"rsq"})

    def budget(self, context: Context[NVFP4Config]) -> float:
        return context.config.budget

    def linear_kernels(self, config: NVFP4Config) -> Sequence[str]:
        return (f"nvfp4_linear.{config.activations}",)

    def taps(self, program: Program, context: Context[NVFP4Config]) -> Sequence[Tap]:
        config = context.config
        if config.input_scale == "dynamic" and not config.sensitive:
            return ()
        structure = context.structure()
        kept = kept_layers(structure, config.keep)
        return [
            Tap(s.fqn, s.x, InputStatistics)
            for s in structure.linears
            if s not in kept and unfit(program, s, config) is None
        ]

    def match(self, program: Program, context: Context[NVFP4Config]) -> Sequence[Match | Miss]:
        config = context.config
        structure = context.structure()
        kept = kept_layers(structure, config.keep, context.notes)
        stats = context.stats.get(self.name, {})
        places = {sites[0]: sites for sites in by_module(structure.linears)}
        fit: list[LinearSite] = []
        found: dict[LinearSite, Match | Miss] = {}
        for site, sites in places.items():
            reasons = (kept.get(s) or unfit(program, s, config) for s in sites)
            reason = next((r for r in reasons if r is not None), None)
            needs_data = config.input_scale == "calibrated" or config.sensitive > 0
            if reason is None and needs_data and site.fqn not in stats:
                reason = NEEDS_DATA
            if reason is None:
                fit.append(site)
            else:
                found[site] = Miss(site.fqn, reason)
        if config.sensitive:
            found.update(most_sensitive(program, fit, stats, config.sensitive, quantized_weight(config)))
        for site in fit:
            if site not in found:
                scale = stats[site.fqn]["amax"] / 2688 if config.input_scale == "calibrated" else None
                held = program.weights[site.weight]
                bytes_now = held.tensor.numel() * held.tensor.element_size()
                packed = PackedSite(places[site], scale, bytes_now, packed_bytes(site))
                found[site] = Match(site.fqn, packed, claims=held.origins)
        experts = match_experts(program, structure.experts, kept_experts(structure, config.keep), config)
        return [*(found[s] for s in places), *experts, *find_linears(program)[1]]

    def about(self, done: Sequence[Match], context: Context[NVFP4Config]) -> Sequence[str]:
        return savings([(m.data.bytes_before, m.data.bytes_after) for m in done])

    def rewrite(self, program: Program, match: Match, context: Context[NVFP4Config]) -> None:
        if isinstance(match.data, PackedExperts):
            rewrite_experts(program, match.data, quantized_weight(context.config), context.config.activations)
            return
        first, config = match.data.sites[0], context.config
        quantize = quantized_weight(config)
        parts = packed_weights(
            program.weights[first.weight], lambda w: quantize(w.t() if first.transposed else w)
        )
        names: list[str | None] = [program.add_weight(w) for w in parts]
        scale = match.data.input_scale
        if scale is not None:
            scale = scale.to(parts[0].tensor.device)
        names.append(None if scale is None else program.add_weight(Weight(f"{first.fqn}.input_scale", scale)))
        for site in match.data.sites:
            at = site.output
            held = [None if n is None else program.read_weight(n, at) for n in (*names, site.bias)]
            node = program.insert(at, ops.nvfp4_linear.default, site.x, *held, config.activations)
            replace(at, node)
            read_instead(context.structure().linears, at, node)


def unfit(program: Program, site: LinearSite, config: NVFP4Config) -> str | None:
    """Why a linear cannot or should not be rewritten, or None."""
    weight = program.weights[site.weight].tensor
    count = weight.numel()
    if count < config.min_weights:
        return (
            f"Its {site.out_features} x {site.in_features} = {count} weights are fewer than "
            f"min_weights={config.min_weights}: the call would cost more than it saves."
        )
    x, y = value(site.x), value(site.output)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or y.dtype != x.dtype:
        return (
            f"It turns {x.dtype} into {y.dtype}; the operator takes fp32, bf16 or fp16 and returns the same."
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"Its weight is stored as {weight.dtype}; fp32, bf16 and fp16 can be rounded to NVFP4."
    if has_values(weight):
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            return f"{site.weight_fqn} has {bad} NaN or infinite values, which NVFP4 cannot hold; repair the weight."
    return None


def quantized_weight(config: NVFP4Config) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """[N, K] -> codes, block scales and tensor scale, in the mode and with the search of the options."""
    return lambda weight: ops.nvfp4_quantize(weight, config.mode, config.search)


def packed_bytes(site: LinearSite) -> int:
    """What a linear's weight takes in NVFP4: half a byte a value, a byte for each 16 of a row, a scale of 4 bytes."""
    return site.out_features * -(-site.in_features // 16) * 9 + 4
