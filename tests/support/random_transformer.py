"""Small transformers of random shape, spelled in plain PyTorch."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import nn

VOCABULARY = 40
ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}


@dataclass(frozen=True)
class Shape:
    """One small architecture.

    size: of a head. rope: "none", "half" (two halves), "pairs" (neighbours), "partial" (half of a head). window: tokens
    that a token sees, 0 for all. experts: MLPs of which each token takes the best two, 0 for one MLP. post: norms stand
    behind what they norm. fused: one linear for q, k and v. repeat: KV heads are repeated, not shared.
    """

    layers: int
    heads: int
    kv_heads: int
    size: int
    hidden: int
    activation: str
    gated: bool
    norm: str
    post: bool
    bias: bool
    mask: str
    head: str
    rope: str
    window: int
    experts: int
    fused: bool
    repeat: bool

    @classmethod
    def random(cls, draw: random.Random) -> Shape:
        """One of them all; unusual parts are drawn less often."""
        heads = draw.choice((1, 2, 3, 4))
        return cls(
            layers=draw.choice((1, 1, 2)), heads=heads,
            kv_heads=draw.choice([k for k in (1, 2, 3, 4) if heads % k == 0]),
            size=draw.choice((8, 8, 12, 16, 24, 40, 64, 96)), hidden=draw.choice((20, 48)),
            activation=draw.choice(list(ACTIVATIONS)), gated=draw.random() < 0.5, norm=draw.choice(("rms", "layer")),
            post=draw.random() < 0.5, bias=draw.random() < 0.5,
            mask=draw.choice(("padding", "padding float", "causal", "causal float", "none")),
            head=draw.choice(("own", "tied", "first", "none")),
            rope=draw.choice(("none", "half", "half", "pairs", "partial")), window=draw.choice((0, 0, 0, 3)),
            experts=draw.choice((0, 0, 0, 0, 3)), fused=draw.random() < 0.5, repeat=draw.random() < 0.5,
        )  # fmt: skip

    @property
    def width(self) -> int:
        return 8 * self.heads  # of the stream; heads together may be wider


class Net(nn.Module):
    """A transformer of that shape. input_ids, attention_mask: int64 [batch, sequence]."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(VOCABULARY, s.width)
        self.positions = nn.Embedding(64, s.width)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = norm(s)
        self.out = nn.Linear(s.width, VOCABULARY, bias=False)
        if s.head == "tied":
            self.out.weight = self.embed.weight
        self.config = type("Config", (), {"use_cache": False})()

    def forward(self, input_ids, attention_mask):
        length = input_ids.shape[1]
        places = torch.arange(length)
        x = self.embed(input_ids) + self.positions(places)[None]
        seen = (attention_mask != 0)[:, None, None, :].expand(-1, 1, length, -1)
        far = places[:, None] - places[None]
        if "causal" in self.s.mask:
            seen = seen & (far >= 0)[None, None]
        if self.s.window:
            seen = seen & (far.abs() < self.s.window)[None, None]
        if self.s.mask == "none":
            seen = None
        elif "float" in self.s.mask:
            seen = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, seen, places)
        x = self.norm(x)
        if self.s.head == "first":
            return torch.tanh(self.out(x[:, 0]))
        return x if self.s.head == "none" else self.out(x)


class Layer(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        kv, inner = s.kv_heads * s.size, s.heads * s.size
        if s.fused:
            self.qkv = nn.Linear(s.width, inner + 2 * kv, bias=s.bias)
        else:
            self.q, self.k, self.v = (nn.Linear(s.width, n, bias=s.bias) for n in (inner, kv, kv))
        self.o = nn.Linear(inner, s.width, bias=s.bias)
        self.router = nn.Linear(s.width, s.experts, bias=False) if s.experts else None
        self.experts = nn.ModuleList(Feed(s) for _ in range(max(1, s.experts)))
        self.first, self.second = norm(s), norm(s)

    def attend(self, h, seen, places):
        s, kv = self.s, self.s.kv_heads * self.s.size
        parts = (
            self.qkv(h).split([s.heads * s.size, kv, kv], -1)
            if s.fused
            else (self.q(h), self.k(h), self.v(h))
        )
        q, k, v = (p.unflatten(-1, (-1, s.size)).transpose(1, 2) for p in parts)
        q, k = (rotated(t, places, s.rope) for t in (q, k))
        if s.repeat and s.kv_heads != s.heads:
            k, v = (t[:, :, None].expand(-1, -1, s.heads // s.kv_heads, -1, -1).flatten(1, 2) for t in (k, v))
        shared = k.shape[1] != q.shape[1]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=shared)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def feed(self, h):
        if self.router is None:
            return self.experts[0](h)
        best, which = self.router(h).softmax(-1).topk(2, -1)
        shares = torch.zeros_like(self.router(h)).scatter(-1, which, best)
        return sum(shares[..., i : i + 1] * expert(h) for i, expert in enumerate(self.experts))

    def forward(self, x, seen, places):
        if self.s.post:
            x = self.first(x + self.attend(x, seen, places))
            return self.second(x + self.feed(x))
        x = x + self.attend(self.first(x), seen, places)
        return x + self.feed(self.second(x))


class Feed(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.act = ACTIVATIONS[s.activation]
        self.up, self.down = (
            nn.Linear(s.width, s.hidden, bias=s.bias),
            nn.Linear(s.hidden, s.width, bias=s.bias),
        )
        self.gate = nn.Linear(s.width, s.hidden, bias=s.bias) if s.gated else None

    def forward(self, h):
        return self.down(
            self.act(self.gate(h)) * self.up(h) if self.gate is not None else self.act(self.up(h))
        )


def rotated(t: torch.Tensor, places: torch.Tensor, kind: str) -> torch.Tensor:
    """t: [batch, heads, tokens, size], turned by its place."""
    if kind == "none":
        return t
    if kind == "partial":
        half = t.shape[-1] // 2
        return torch.cat([rotated(t[..., :half], places, "half"), t[..., half:]], -1)
    angle = places[:, None] * (0.3 ** torch.arange(t.shape[-1] // 2))[None]
    cos, sin = torch.cos(angle).to(t.dtype), torch.sin(angle).to(t.dtype)
    if kind == "pairs":
        even, odd = t[..., ::2], t[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    left, right = t.chunk(2, -1)
    return t * torch.cat([cos, cos], -1) + torch.cat([-right, left], -1) * torch.cat([sin, sin], -1)


def norm(s: Shape) -> nn.Module:
    return nn.RMSNorm(s.width, eps=1e-6) if s.norm == "rms" else nn.LayerNorm(s.width)
