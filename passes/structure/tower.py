"""What structure recovery finds: how sites hang on a residual stream, and the layers they form."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from .sites import AttentionSite, MlpSite, NormSite


@dataclass(eq=False)
class Branch:
    """A site on the residual stream: `add = stream + scale * post_norm(site(pre_norm(stream)))`.

    stream: the residual operand. pre_norm, post_norm: norms inside the branch. stream_norm: the norm the
    stream itself goes through after the addition (post-norm models such as BERT).
    scale: a number, or the attribute name of a weight, that multiplies the branch; None for one.
    adds: the additions from the site's output to the stream, `add` last; two in parallel layers.
    """

    site: AttentionSite | MlpSite
    stream: fx.Node
    add: fx.Node
    adds: tuple[fx.Node, ...]
    pre_norm: NormSite | None = None
    post_norm: NormSite | None = None
    stream_norm: NormSite | None = None
    scale: float | str | None = None


@dataclass(eq=False)
class LayerSite:
    """One layer of the residual stream.

    input, output: the hidden state before and after. parallel: attention and MLP read the same stream.
    inputs: every value the layer takes from outside, `input` first, then masks, rotary tables and sizes.
    nodes: the operators inside, in order. exports: those inside, besides `output`, that are read outside
        (keys and values for a cache).
    """

    index: int
    fqn: str
    input: fx.Node
    output: fx.Node
    branches: list[Branch]
    inputs: list[fx.Node] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    exports: list[fx.Node] = field(default_factory=list)

    def _sites(self, kind: type, cross: bool = False) -> list[Branch]:
        return [
            b for b in self.branches if isinstance(b.site, kind) and getattr(b.site, "cross", False) == cross
        ]

    @property
    def attention_branch(self) -> Branch | None:
        return next(iter(self._sites(AttentionSite)), None)

    @property
    def mlp_branch(self) -> Branch | None:
        return next(iter(self._sites(MlpSite)), None)

    @property
    def attention(self) -> AttentionSite | None:
        return self.attention_branch.site if self.attention_branch else None  # type: ignore[return-value]

    @property
    def mlp(self) -> MlpSite | None:
        return self.mlp_branch.site if self.mlp_branch else None  # type: ignore[return-value]

    @property
    def complete(self) -> bool:
        """Both its attention and its MLP were recovered; otherwise its ends may lie elsewhere."""
        return self.attention is not None and self.mlp is not None

    @property
    def parallel(self) -> bool:
        return len(self.branches) > 1 and len({b.stream for b in self.branches}) == 1

    @property
    def norm_position(self) -> str:
        """ "pre", "post" (the stream is normalised after each addition), "branch" or "sandwich"."""
        if any(b.stream_norm for b in self.branches):
            return "post"
        inside = any(b.post_norm for b in self.branches)
        before = any(b.pre_norm for b in self.branches)
        return {(True, True): "sandwich", (True, False): "pre", (False, True): "branch"}.get(
            (before, inside), "none"
        )

    @property
    def norms(self) -> list[NormSite]:
        """Norms of the hidden width, in the order they run."""
        found = [n for b in self.branches for n in (b.pre_norm, b.post_norm, b.stream_norm) if n is not None]
        return list(dict.fromkeys(found))


@dataclass(eq=False)
class EmbeddingSite:
    """A part of what starts a residual stream.

    kind: token, position, token_type, patch (a convolution), prefix (a learned token put in front) or
        input (the caller gives the embeddings).
    node: the look-up, the convolution, or the weight itself when it is added whole.
    scale: a number, or the attribute name of a weight, that multiplies it; None for one.
    """

    kind: str
    fqn: str
    node: fx.Node
    weight: str | None
    scale: float | str | None = None


@dataclass(eq=False)
class Tower:
    """One residual stream: embeddings, layers, final norm. norm: the embeddings' own norm.

    hidden: the stream after the last layer and the final norm.
    """

    embeddings: list[EmbeddingSite]
    layers: list[LayerSite]
    hidden: fx.Node
    embedding_norm: NormSite | None = None
    final_norm: NormSite | None = None

    @property
    def token_embedding(self) -> EmbeddingSite | None:
        return next((e for e in self.embeddings if e.kind == "token"), None)
