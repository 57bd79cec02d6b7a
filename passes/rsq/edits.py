"""What is planned for the weights of a model: an `Edit` for each linear, and the plan that holds them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from thresher.report import Miss

from ..structure.experts import ExpertSite
from ..structure.recover import LinearSite, NormSite
from .rotation import (
    Rotation,
    centre_writer,
    fuse_norm,
    rotate_heads_in,
    rotate_heads_out,
    rotate_reader,
    rotate_writer,
)
from .stream import Stream


@dataclass(eq=False)
class Edit:
    """How a linear's weight and bias change.

    norm: fused into the input side. reads: rotation of the input. heads_in: rotation of each head of the
    input. online: rotation that the graph applies to the input, and the weight undoes. writes, centred: of
    the output. heads_out, rows: rotation of each value head, and which rows of the weight these are
    (int64 [heads, head_dim]). cached: values leave the graph or come into it, unrotated. latent_in: `reads`
    is of a latent and not of the stream. latent_out: `heads_out` makes one.
    """

    site: LinearSite
    norm: NormSite | None = None
    reads: Rotation | None = None
    heads_in: Rotation | None = None
    online: Rotation | None = None
    writes: Rotation | None = None
    centred: bool = False
    heads_out: Rotation | None = None
    rows: torch.Tensor | None = None
    cached: bool = False
    latent_in: bool = False
    latent_out: bool = False
    transposed: bool = field(init=False)  # as the model stores the weight; the site itself moves along

    def __post_init__(self) -> None:
        self.transposed = self.site.transposed

    @property
    def changes(self) -> bool:
        return any((self.norm, self.reads, self.heads_in, self.online, self.writes, self.heads_out))

    def apply(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gain: torch.Tensor | None,
        shift: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """([N, K], [N] or None). weight: as the model stores it. gain, shift: the norm's, [K]."""
        w = weight.t() if self.transposed else weight
        if self.norm is not None:
            gain = torch.ones(w.shape[1], dtype=w.dtype, device=w.device) if gain is None else gain
            w, bias = fuse_norm(w, bias, gain + self.norm.offset, shift)
        if self.reads is not None:
            w = rotate_reader(w, self.reads)
        if self.heads_in is not None:
            w = rotate_heads_in(w, self.heads_in)
        if self.online is not None:
            w = rotate_reader(w, self.online)
        if self.writes is not None:
            if self.centred:
                w, bias = centre_writer(w, bias)
            w, bias = rotate_writer(w, bias, self.writes)
        if self.heads_out is not None:
            assert self.rows is not None
            chosen = self.rows.flatten()
            part, part_bias = rotate_heads_out(
                w[chosen], None if bias is None else bias[chosen], self.heads_out
            )
            w = w.clone().index_copy_(0, chosen, part)
            bias = (
                bias if part_bias is None or bias is None else bias.clone().index_copy_(0, chosen, part_bias)
            )
        return w.contiguous(), bias


@dataclass
class RotationPlan:
    """What to do. streams: rotated ones with their R1. latents: the same of attentions', by their norms. edits: one a
    linear that is rotated or quantised. quantise: the linears that get low-bit weights, in graph order. experts: the
    same of products by experts, none of which is rotated. missed, notes: for the report.
    again: of a linear that is quantised and called several times, its later calls.
    turned: online transforms that stand in the graph already, by the value and the rotation."""

    streams: list[tuple[Stream, Rotation]] = field(default_factory=list)
    latents: list[tuple[NormSite, Rotation]] = field(default_factory=list)
    edits: dict[LinearSite, Edit] = field(default_factory=dict)
    quantise: list[LinearSite] = field(default_factory=list)
    again: dict[LinearSite, tuple[LinearSite, ...]] = field(default_factory=dict)
    experts: list[ExpertSite] = field(default_factory=list)
    missed: list[Miss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    turned: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)

    def edit(self, site: LinearSite) -> Edit:
        """What is planned for a linear, to be added to; empty at first."""
        return self.edits.setdefault(site, Edit(site))
