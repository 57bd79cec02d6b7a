"""What structure recovery finds: linears, norms, attention and MLPs, each with its nodes and weights.

Sites point into one Program's graph. They describe it as it was when `recover` ran; after a rewrite,
recover again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.graph.packed_layout import Visibility


class Unknown(Exception):
    """Why something that looks like a site is not understood, as a full sentence."""


@dataclass(eq=False)
class LinearSite:
    """One multiplication by a weight of the model.

    fqn: the module, `model.layers.0.mlp.up_proj`. node: the operator (linear, addmm, mm or matmul).
    x, output: input [..., in_features] and result [..., out_features]; where the operator works on a
        flattened tensor these lie outside its reshapes, and a bias added apart is inside. A rewrite reads
        `x` and replaces `output`.
    weight, bias: attribute names in the Program. weight_fqn: the weight's name in the model.
    transposed: the weight is stored [in, out]; otherwise [out, in].
    role: q k v kv qkv o q_latent kv_latent up gate gate_up down head, router (chooses experts), embedding (between the
        embeddings and the first layer), or "" when the linear is in none of these places.
    tied: some other node reads the same weight.
    """

    fqn: str
    node: fx.Node
    x: fx.Node
    output: fx.Node
    weight: str
    weight_fqn: str
    bias: str | None
    in_features: int
    out_features: int
    transposed: bool
    tied: bool = False
    role: str = ""


def read_instead(sites: Iterable[Any], old: fx.Node, new: fx.Node) -> None:
    """Point linears and experts that read `old` directly to what replaced it."""
    for site in sites:
        if site.x is old:
            site.x = new


def by_module(sites: Iterable[LinearSite]) -> list[tuple[LinearSite, ...]]:
    """Sites that are one linear of the model put together, in graph order: a module may be called twice, and behind
    a cut its probes and the tokens that are kept go through it apart. They share their weights' new form, and a name."""
    found: dict[tuple[Any, ...], list[LinearSite]] = {}
    for s in sites:
        found.setdefault((s.fqn, s.weight, s.bias, s.transposed), []).append(s)
    return [tuple(group) for group in found.values()]


@dataclass(eq=False)
class NormSite:
    """A normalisation over the last dimension.

    kind: "rms" or "layer". weight, bias: attribute names, None when absent.
    offset: the scale is `offset + weight` (Gemma stores the difference from one).
    nodes: the operators it consists of, `output` last.
    """

    fqn: str
    kind: str
    input: fx.Node
    output: fx.Node
    weight: str | None
    bias: str | None
    eps: float
    offset: float = 0.0
    nodes: tuple[fx.Node, ...] = ()


@dataclass(eq=False)
class Projection:
    """A linear's output, or the part of a fused linear's output, as one operand.

    rows: which of the linear's out_features these are: int64 [heads, head_dim] in attention, [width] in an
        MLP. They are the weight's rows, or its columns when it is stored transposed.
    whole: these are all of them, in order. result: the node that holds the operand before it is shared
        among query heads, [batch, heads, sequence, head_dim] in attention.
    """

    linear: LinearSite
    rows: torch.Tensor
    whole: bool
    result: fx.Node


@dataclass(eq=False)
class Rope:
    """Rotary position embedding. kind: "half" (rotate_half) or "interleaved" (rotate_every_two).

    cos, sin: as computed, before they are laid out for the heads or repeated for pairs.
    dim: how many of the head's dimensions are rotated, from `start` on: behind those that are not, or at the front.
    "split" reads pairs and gives halves; "complex" multiplies pairs by complex numbers, `cos` and `sin` both.
    """

    kind: str
    cos: fx.Node
    sin: fx.Node
    dim: int
    start: int = 0


@dataclass(eq=False)
class Latent:
    """What an attention compresses the hidden state into, and makes queries, or keys and values, of (MLA).

    down: the linear that makes it, among other things. rows: which of its out_features these are, int64 [rank].
    norm: between the two. up: the linear that reads it. scale: a factor on the way. past: a cache of earlier tokens'
    latents that these are put behind, or None.
    """

    down: LinearSite
    rows: torch.Tensor
    norm: NormSite | None
    up: LinearSite
    scale: float = 1.0
    past: fx.Node | None = None


@dataclass(eq=False)
class AttentionSite:
    """One attention: from the projections to the output linear.

    node: the operator whose result is [batch, heads, sequence, head_dim]; for the eager spelling, the
        product of probabilities and values. spelling: "sdpa", "eager" or "varlen".
    q, k, v: share one LinearSite when it is fused. o: the output linear, in_features = heads * value_dim.
    mask: the mask or bias given to it, as a node; an eager attention can have several, added in order.
    visibility: what the mask shows, as far as its expression tells; "generic" when it does not.
    scale: what multiplies q @ k^T of the projections, everything included. softcap: the logits' soft cap, or None.
    operator_scale: what the operator multiplies `q.result @ k.result` by, which hold any factor that was on the way.
    cross: keys come from another sequence than queries. probabilities: after softmax, eager only.
    past: cached keys and values that are put in front of the new ones, or None.
    sinks: a stored score of each head that takes its share of the softmax and has no value, or None.
    q_latent, kv_latent: what queries, or keys and values, are made of where that is not the hidden state (MLA).
    k_shared: the part of the keys that all heads share, rows [1, dim], where `k` is only the rest of them.
    """

    fqn: str
    node: fx.Node
    spelling: str
    q: Projection
    k: Projection
    v: Projection
    o: LinearSite
    q_norm: NormSite | None
    k_norm: NormSite | None
    rope: Rope | None
    masks: tuple[fx.Node, ...]
    visibility: Visibility
    scale: float
    operator_scale: float
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    softcap: float | None = None
    cross: bool = False
    probabilities: fx.Node | None = None
    past: tuple[fx.Node, fx.Node] | None = None
    sinks: fx.Node | None = None
    q_latent: Latent | None = None
    kv_latent: Latent | None = None
    k_shared: Projection | None = None

    @property
    def latents(self) -> list[Latent]:
        """The latents that there are."""
        return [l for l in (self.q_latent, self.kv_latent) if l is not None]

    @property
    def apart(self) -> bool:
        """Queries, keys and values come each from a linear of its own that reads the hidden state."""
        return not (self.fused or self.latents)

    @property
    def fused(self) -> bool:
        """One linear makes q, k and v."""
        return self.q.linear is self.k.linear is self.v.linear

    @property
    def x(self) -> fx.Node:
        """The hidden state that queries are made of."""
        return self.q.linear.x if self.q_latent is None else self.q_latent.down.x

    @property
    def output(self) -> fx.Node:
        return self.o.output

    @property
    def is_causal(self) -> bool:
        return self.visibility.kind == "causal"

    @property
    def window(self) -> int | None:
        """How many earlier positions a query sees (and later ones, when bidirectional); None for all."""
        return self.visibility.window if self.visibility.window >= 0 else None

    @property
    def mask(self) -> fx.Node | None:
        """The only mask; None when there is none or several."""
        return self.masks[0] if len(self.masks) == 1 else None

    @property
    def linears(self) -> list[LinearSite]:
        """Each once, in the order q, k, v, o, what makes a latent before those that read it."""
        first, second = ([l.down] if l is not None else [] for l in (self.q_latent, self.kv_latent))
        shared = [] if self.k_shared is None else [self.k_shared.linear]
        between = (self.q.linear, *second, *shared, self.k.linear, self.v.linear, self.o)
        return list(dict.fromkeys((*first, *between)))


@dataclass(eq=False)
class MlpSite:
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` when gated.

    activation: relu, relu2, gelu, gelu_tanh, quick_gelu, silu, hardswish, hardsigmoid, sigmoid, ...
    activation_node: its result. hidden: the input of down, [..., width].
    up_activation: what a gated MLP's up projection goes through before the product; "" for nothing.
    """

    fqn: str
    up: Projection
    gate: Projection | None
    down: LinearSite
    activation: str
    activation_node: fx.Node
    hidden: fx.Node
    up_activation: str = ""

    @property
    def fused(self) -> bool:
        """One linear makes gate and up."""
        return self.gate is not None and self.gate.linear is self.up.linear

    @property
    def x(self) -> fx.Node:
        return self.up.linear.x

    @property
    def output(self) -> fx.Node:
        return self.down.output

    @property
    def width(self) -> int:
        return self.down.in_features

    @property
    def linears(self) -> list[LinearSite]:
        """Each once, in the order up, gate, down."""
        gate = [self.gate.linear] if self.gate is not None else []
        return list(dict.fromkeys((self.up.linear, *gate, self.down)))


def common_prefix(names: Sequence[str]) -> str:
    """The innermost module that contains all of these; one name gives its parent."""
    parts = [n.split(".") for n in names]
    if len(set(names)) == 1:
        return ".".join(parts[0][:-1])
    shared = []
    for level in zip(*parts):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
