"""Rotations: which construction is used, and that a rotated decoder computes what it did, in fp64."""

import pytest
import torch
from torch.nn import functional as F

from thresher.errors import ArgumentError
from thresher.passes.rsq.rotation import (
    centre_writer,
    fuse_norm,
    rotate_heads_in,
    rotate_heads_out,
    rotate_reader,
    rotate_writer,
    rotation,
)

F64 = torch.float64


@pytest.mark.parametrize(
    "order, kind, block, said",
    [
        (64, "auto", 64, "order 64 (64)"),
        (576, "auto", 576, "order 576 (36 x 16)"),
        (1536, "auto", 1536, "order 1536 (12 x 128)"),
        (90, "auto", 0, "no Hadamard matrix of order 90"),
        (90, "block", 2, "in 45 blocks"),
        (184, "block", 8, "in 23 blocks"),
        (60, "block", 60, "order 60 (60)"),
        (33, "block", 1, "in 33 blocks"),
        (48, "orthogonal", 0, "Random orthogonal"),
    ],
)
def test_construction_is_orthogonal_and_says_what_it_is(order, kind, block, said):
    r = rotation(order, seed=5, kind=kind)
    assert r.block == block and said in r.note and r.note.endswith(".")
    matrix = r.matrix()
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(order, dtype=F64), atol=1e-12, rtol=0)


def test_seed_decides_the_signs_and_nothing_else_does():
    assert torch.equal(rotation(64, 1).matrix(), rotation(64, 1).matrix())
    assert not torch.equal(rotation(64, 1).matrix(), rotation(64, 2).matrix())
    assert torch.equal(rotation(90, 1).matrix(), rotation(90, 1).matrix())
    assert not torch.equal(rotation(90, 1).matrix(), rotation(90, 2).matrix())
    assert rotation(64, 1, signed=False).signs is None


def test_a_hadamard_rotation_is_what_the_operator_computes():
    from thresher.kernels.hadamard import op as kernel  # the pass emits this operator

    for kind, order in (("hadamard", 576), ("block", 184)):
        r = rotation(order, 3, kind)
        x = torch.randn(4, order, dtype=F64)
        torch.testing.assert_close(kernel.hadamard(x, r.signs, r.block), r.right(x), atol=1e-12, rtol=0)


def test_refusals():
    with pytest.raises(ArgumentError, match="kind='block' or 'orthogonal'"):
        rotation(90, 0, "hadamard")
    with pytest.raises(ArgumentError, match="kind"):
        rotation(64, 0, "paley")
    with pytest.raises(ArgumentError, match="multiple of the head dimension"):
        rotate_heads_in(torch.ones(8, 24), rotation(16, 0))


class Decoder:
    """Two layers of everything that meets a rotation: GQA, q/k/v and writer biases, gated MLP, tied head."""

    def __init__(self, width=36, heads=4, kv_heads=2, dim=8, inner=24, vocabulary=50, layer_norm=False):
        make = torch.Generator().manual_seed(0)

        def tensor(*shape):
            return torch.randn(*shape, generator=make, dtype=F64) * 0.3

        self.sizes, self.layer_norm, self.r4 = (heads, kv_heads, dim), layer_norm, None
        self.embedding = tensor(vocabulary, width)
        self.head, self.head_bias = self.embedding.clone(), None
        self.norm, self.norm_shift = 1 + tensor(width), tensor(width) if layer_norm else None
        self.layers = [
            {
                "n1": 1 + tensor(width), "b1": tensor(width) if layer_norm else None,
                "n2": 1 + tensor(width), "b2": tensor(width) if layer_norm else None,
                "q": tensor(heads * dim, width), "qb": tensor(heads * dim),
                "k": tensor(kv_heads * dim, width), "kb": tensor(kv_heads * dim),
                "v": tensor(kv_heads * dim, width), "vb": tensor(kv_heads * dim),
                "o": tensor(width, heads * dim), "ob": tensor(width),
                "g": tensor(inner, width), "gb": None, "u": tensor(inner, width), "ub": tensor(inner),
                "d": tensor(width, inner), "db": tensor(width),
            }
            for _ in range(2)
        ]  # fmt: skip

    def normed(self, x, gain, shift):
        if self.layer_norm:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
        return x if shift is None else x + shift

    def __call__(self, tokens):
        heads, kv_heads, dim = self.sizes
        x = self.embedding[tokens]
        for layer in self.layers:
            h = self.normed(x, layer["n1"], layer["b1"])
            q, k, v = (
                F.linear(h, layer[n], layer[n + "b"]).unflatten(-1, (c, dim)).transpose(1, 2)
                for n, c in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + F.linear(h.transpose(1, 2).flatten(2), layer["o"], layer["ob"])
            h = self.normed(x, layer["n2"], layer["b2"])
            h = F.silu(F.linear(h, layer["g"], layer["gb"])) * F.linear(h, layer["u"], layer["ub"])
            h = h if self.r4 is None else self.r4.right(h)
            x = x + F.linear(h, layer["d"], layer["db"])
        return F.linear(self.normed(x, self.norm, self.norm_shift), self.head, self.head_bias)


def rotate(model, r1, r2, r4):
    """What the graph pass does, on the toy decoder."""
    ones = torch.ones_like(model.norm)

    def reader(layer, names, gain, shift):
        for n in names:
            layer[n], layer[n + "b"] = fuse_norm(layer[n], layer[n + "b"], layer[gain], layer[shift])
            layer[n] = rotate_reader(layer[n], r1)
        layer[gain], layer[shift] = ones, None

    model.head, model.head_bias = fuse_norm(model.head, None, model.norm, model.norm_shift)
    model.head = rotate_reader(model.head, r1)
    model.norm, model.norm_shift = ones, None
    if model.layer_norm:
        model.embedding = centre_writer(model.embedding.t(), None)[0].t()
    model.embedding = rotate_reader(model.embedding, r1)
    for layer in model.layers:
        reader(layer, "qkv", "n1", "b1")
        reader(layer, "gu", "n2", "b2")
        layer["v"], layer["vb"] = rotate_heads_out(layer["v"], layer["vb"], r2)
        layer["o"] = rotate_heads_in(layer["o"], r2)
        layer["d"] = rotate_reader(layer["d"], r4)
        for n in "od":
            if model.layer_norm:
                layer[n], layer[n + "b"] = centre_writer(layer[n], layer[n + "b"])
            layer[n], layer[n + "b"] = rotate_writer(layer[n], layer[n + "b"], r1)
    model.layer_norm, model.r4 = False, r4


@pytest.mark.parametrize("layer_norm", [False, True], ids=["rmsnorm", "layernorm"])
@pytest.mark.parametrize("width, kind", [(36, "auto"), (35, "auto"), (40, "block"), (36, "orthogonal")])
def test_rotated_decoder_is_exact(layer_norm, width, kind):
    model = Decoder(width=width, layer_norm=layer_norm)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    before, weight = model(tokens), model.layers[0]["q"].clone()
    rotate(model, rotation(width, 1, kind), rotation(8, 2), rotation(24, 3, signed=False))
    assert not torch.allclose(model.layers[0]["q"], weight)
    torch.testing.assert_close(model(tokens), before, atol=1e-9, rtol=1e-9)


def test_results_keep_the_weight_dtype():
    r = rotation(16, 0)
    weight, bias = torch.randn(16, 16).bfloat16(), torch.randn(16).bfloat16()
    assert rotate_reader(weight, r).dtype == torch.bfloat16
    assert [t.dtype for t in rotate_writer(weight, bias, r)] == [torch.bfloat16] * 2
    assert [t.dtype for t in rotate_heads_out(weight, bias, r)] == [torch.bfloat16] * 2
    assert [t.dtype for t in fuse_norm(weight, None, bias, bias)] == [torch.bfloat16] * 2
    assert [t.dtype for t in centre_writer(weight, bias)] == [torch.bfloat16] * 2


def test_rotation_flattens_an_outlier():
    weight = torch.full((4, 576), 0.01)
    weight[:, 7] = 5.0
    assert float(rotate_reader(weight, rotation(576, 0)).abs().max()) < 0.5
