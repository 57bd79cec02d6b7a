"""Steps in C++ compute what their graphs say, whatever the rows, the lengths and the types."""

from __future__ import annotations

import threading
from typing import Any

import captures
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from thresher.errors import ThresherError
from thresher.formats import bitpack
from thresher.graph import capture
from thresher.graph.program import Program
from thresher.kernels import catalog, native
from thresher.kernels.nvfp4.quantize import quantize
from thresher.lowering.inductor.inductor import write_updates
from thresher.lowering.steps.operations import Unfit
from thresher.lowering.steps.program import Step
from thresher.lowering.target import lift_weights

catalog.load()
pytestmark = pytest.mark.skipif(native.load_error("step") is not None, reason="no C++ compiler")
DYNAMIC = torch.export.Dim.DYNAMIC
HEADS, KV_HEADS, WIDTH, HIDDEN = 6, 2, 16, 96
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def made(module: nn.Module, inputs: tuple[Any, ...], free: Any) -> tuple[Step, list[torch.Tensor]]:
    """A module's step and its weights; sizes marked in `free` change."""
    with torch.no_grad():
        exported = torch.export.export(module.eval(), inputs, dynamic_shapes=free, strict=False)
    return of(capture.from_export(exported))


def of(program: Program) -> tuple[Step, list[torch.Tensor]]:
    graph, names = lift_weights(program)
    write_updates(graph.graph, program)
    return Step(graph.graph), [program.weights[n].tensor for n in names]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(), expected[~finite].nan_to_num())
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual[finite], expected[finite]
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert expected.numel() == 0 or float(error) < TOLERANCE.get(actual.dtype, 1e-30)


class Layer(nn.Module):
    """A decoder's layer over a cache that it hands back, and a head."""

    def __init__(self, biased: bool):
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(HIDDEN, n * WIDTH, bias=biased) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        )
        self.gate, self.up = (nn.Linear(HIDDEN, 77, bias=biased) for _ in range(2))
        self.down, self.norm = nn.Linear(77, HIDDEN, bias=biased), nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def normed(self, x):
        return self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def forward(self, x, keys, values, visible, angle):
        def heads(y):
            return y.view(x.shape[0], 1, -1, WIDTH).transpose(1, 2)

        def turned(y):
            first, second = y[..., : WIDTH // 2], y[..., WIDTH // 2 :]
            cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
            return y * cos + torch.cat((-second, first), -1) * sin

        h = self.normed(x)
        keys = torch.cat((keys, turned(heads(self.k(h)))), 2)
        values = torch.cat((values, heads(self.v(h))), 2)
        seen = visible.logical_not().logical_not()
        mixed = torch.ops.thresher.kv_attention(turned(heads(self.q(h))), [], keys, values, seen, WIDTH**-0.5)
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape[0], 1, -1))
        h = self.normed(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return x, keys, values, x[:, -1]


def layer_inputs(rows: int, past: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(rows * 100 + past)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    visible = torch.rand(rows, past + 1, generator=g) < 0.7
    visible[:, -1] = True
    cache = (random(rows, KV_HEADS, past, WIDTH), random(rows, KV_HEADS, past, WIDTH))
    return random(rows, 1, HIDDEN), *cache, visible, random(rows, 1, WIDTH)


ROWS, CACHE = {0: DYNAMIC}, {0: DYNAMIC, 2: DYNAMIC}
LAYER_FREE = (ROWS, CACHE, CACHE, {0: DYNAMIC, 1: DYNAMIC}, ROWS)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def layer(request):
    torch.manual_seed(0)
    module = Layer(biased=request.param != torch.bfloat16).to(request.param)
    return module, request.param, *made(module, layer_inputs(3, 5, request.param), LAYER_FREE)


@pytest.mark.parametrize(("rows", "past"), [(3, 5), (1, 7), (2, 130), (8, 0), (21, 33)])
def test_a_layer_over_a_cache(layer, rows, past):
    module, dtype, step, weights = layer
    inputs = layer_inputs(rows, past, dtype)
    kept = [t.clone() for t in inputs]
    with torch.no_grad():
        expected = module(*inputs)
        for _ in range(2):  # with fresh memory, and with memory used before
            for actual, wanted in zip(step(*inputs, *weights), expected, strict=True):
                close(actual, wanted)
    assert all(map(torch.equal, inputs, kept))


def test_calls_at_the_same_time(layer):
    module, dtype, step, weights = layer
    given = [layer_inputs(rows, 9, dtype) for rows in (1, 2, 4, 6)]
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                found[index] = step(*given[index], *weights)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(given))]
    [t.start() for t in threads], [t.join() for t in threads]
    with torch.no_grad():
        for index, inputs in enumerate(given):
            for actual, wanted in zip(found[index], module(*inputs), strict=True):
                close(actual, wanted)


def test_weights_are_those_of_the_call(layer):
    _, dtype, step, weights = layer
    inputs = layer_inputs(2, 4, dtype)
    others = [torch.randn_like(w) for w in weights]
    turned = [w.t().contiguous().t() if w.dim() == 2 else w for w in others]
    with torch.no_grad():
        step(*inputs, *weights)
        wanted = step(*inputs, *others)
        assert not torch.equal(wanted[0], step(*inputs, *weights)[0])
        for given in (others, turned, turned, others):  # laid out otherwise: the same values
            assert torch.equal(step(*inputs, *given)[0], wanted[0])
        with pytest.raises(ThresherError, match="the step was made for"):
            step(*inputs, *(w.double() for w in weights))


def test_inputs_that_do_not_belong_together_are_refused_before_they_are_read(layer):
    _, dtype, step, weights = layer
    x, keys, values, visible, angle = layer_inputs(3, 5, dtype)
    for given in ((x, keys[:, :, :4], values, visible, angle), (x, keys, values, visible[:, :4], angle),
                  (x, keys, values, visible[:1], angle), (x[:2], keys, values, visible, angle)):  # fmt: skip
        with pytest.raises(ThresherError, match="A step in C"):
            step(*given, *weights)
    step(x, keys, values, visible, angle, *weights)


class LowBit(nn.Module):
    """Products of 4 bits with zero points and a bias and without, one of 8 bits, and one of NVFP4."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for bits in (4, 8):
            codes = torch.randint(0, 1 << bits, (48, HIDDEN), generator=g)
            self.register_buffer(f"codes{bits}", bitpack.pack(codes, bits))
        self.register_buffer("scales", (torch.rand(48, 3, generator=g) + 0.5) / 16)
        self.register_buffer("zeros", torch.randint(0, 16, (48, 3), generator=g, dtype=torch.uint8))
        self.register_buffer("bias", torch.randn(48, generator=g).to(dtype))
        q = quantize(torch.randn(40, HIDDEN, generator=g) * 0.02)
        self.register_buffer("codes", q.codes)
        self.register_buffer("blocks", q.block_scales)
        self.register_buffer("scale", q.global_scale)
        self.register_buffer("more", torch.randn(40, generator=g).to(dtype))
        self.register_buffer("signs", torch.randint(0, 2, (HIDDEN,), generator=g).float() * 2 - 1)

    def forward(self, x):
        op = torch.ops.thresher
        x = op.hadamard(x, self.signs, 32)
        return (
            op.wna16_linear(x, self.codes4, self.scales, self.zeros, self.bias, 4, 32),
            op.wna16_linear(x, self.codes4, self.scales, None, None, 4, 32),
            op.wna16_linear(x, self.codes8, self.scales, None, self.bias, 8, 32),
            op.nvfp4_linear(x, self.codes, self.blocks, self.scale, None, self.more),
            op.nvfp4_linear(x, self.codes, self.blocks, self.scale, None, None, "int8"),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_bit_products(dtype):
    torch.manual_seed(0)
    module = LowBit(dtype)
    x = torch.randn(40, 1, HIDDEN).to(dtype)
    step, weights = made(module, (x[:3],), ({0: DYNAMIC},))
    for rows in (1, 2, 8, 12, 16, 40):  # each side of every change of form
        for actual, wanted in zip(step(x[:rows], *weights), module(x[:rows]), strict=True):
            close(actual, wanted)


class Pieces(nn.Module):
    """Functions and views one by one."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 24).to(dtype))

    def forward(self, x):
        y = F.linear(x, self.weight)  # [B, 1, 12]
        z, half = y.reshape(-1, 3, 4), x[..., :12]
        turned = z.permute(2, 0, 1)
        return (
            half.sigmoid(), F.silu(half), F.gelu(half), F.gelu(half, approximate="tanh"), half.tanh(), half.exp(),
            y.relu(), -y, y.abs().sqrt(), (y.abs() + 0.5).pow(-0.5), (y.abs() + 0.5).reciprocal(), y - 2 * half,
            torch.sub(y, half, alpha=3), y / 7, torch.maximum(y, half), torch.minimum(y, half),
            z.mean(-1), turned.mean(-1, keepdim=True), z.transpose(1, 2).reshape(-1, 12), turned, z[:, 1], z[:, 0:3:2],
            z.unsqueeze(1).expand(-1, 2, -1, -1).reshape(-1, 6, 4), z.squeeze(1),
            torch.cat([z, z[..., 1:], z.transpose(1, 2)[:, :3]], -1), y.float() * 3, y.to(torch.bfloat16), y.clone(), x,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_and_views(dtype):
    torch.manual_seed(0)
    module = Pieces(dtype)
    step, weights = made(module, (torch.randn(3, 1, 24).to(dtype),), ({0: DYNAMIC},))
    for rows in (3, 1, 50):
        x = torch.randn(rows, 1, 24)
        x[0, 0, 3], x[-1, 0, 5] = float("nan") if rows == 3 else 1e4, -200.0
        with torch.no_grad():
            for actual, wanted in zip(step(x.to(dtype), *weights), module(x.to(dtype)), strict=True):
                close(actual, wanted)


class Written(nn.Module):
    """A cache that is written in place."""

    def __init__(self):
        super().__init__()
        self.k = nn.Linear(8, 4, bias=False)

    def forward(self, x, cache, place):
        cache.index_copy_(1, place, self.k(x))
        return cache.mean(-1) + self.k(x).mean(-1)


def test_a_cache_written_in_place():
    module = Written()
    given = {"x": torch.randn(2, 1, 8), "cache": torch.randn(2, 5, 4), "place": torch.tensor([3])}
    program = captures.dynamo(module, given)
    assert program.updates
    step, weights = of(program)
    for at in (3, 0, 4):
        given = {"x": torch.randn(2, 1, 8), "cache": torch.randn(2, 5, 4), "place": torch.tensor([at])}
        mine, lies = given["cache"].clone(), given["cache"].data_ptr()
        with torch.no_grad():
            wanted = module(given["x"], mine, given["place"])
            results = step(*captures.arguments(program, given), *weights)
        close(next(r for r in results if r is not None), wanted)
        close(given["cache"], mine)
        assert given["cache"].data_ptr() == lies
    for wrong, said in ((torch.tensor([5]), "beyond the end"), (torch.tensor([-6]), "beyond the end")):
        with pytest.raises(ThresherError, match=said):
            step(*captures.arguments(program, given | {"place": wrong}), *weights)
    with pytest.raises(ThresherError, match="contiguous"):
        step(*captures.arguments(program, given | {"cache": torch.randn(2, 4, 5).transpose(1, 2)}), *weights)


class Strange(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        y = F.linear(x, self.weight)
        return y.cumsum(-1) if self.kind == "behind a product" else y


@pytest.mark.parametrize(
    ("kind", "tokens", "said"),
    [("behind a product", 1, "Behind the first product: .*cumsum"), ("several tokens", 4, "more than one token"),
     ("double", 1, "torch.float64")],
)  # fmt: skip
def test_what_is_no_step(kind, tokens, said):
    module, x = Strange(kind), torch.randn(2, tokens, 8)
    if kind == "double":
        module, x = module.double(), x.double()
    with pytest.raises(Unfit, match=said):
        made(module, (x,), None)
