"""The rows of the GPU benchmark, most important first.

A row is a function of the card that yields what it found, a dict for each line. Sizes are those of the claims; dry ones
are tiny and go through the same code. `needs` is what the row is expected to take on a card, in seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import _gpu_models as models
import torch
from _gpu_card import Card, error
from torch.nn import functional as F

Found = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """name: for `--only`. needs: seconds on a card. claim: what it decides; empty for none."""

    name: str
    needs: float
    run: Callable[[Card], Found]
    claims: tuple[tuple[str, str], ...] = ()


# -- products ----------------------------------------------------------------------------------------------------------


def nvfp4_weight(card: Card, outputs: int, inputs: int) -> tuple[torch.Tensor, ...]:
    from thresher.kernels.nvfp4.quantize import quantize

    q = quantize(card.random(outputs, inputs, scale=0.02).float())
    return q.codes, q.block_scales, q.global_scale.reshape(())


def low_bit_weight(card: Card, outputs: int, inputs: int, bits: int, group: int) -> tuple[torch.Tensor, ...]:
    from thresher.formats import bitpack

    codes = torch.randint(0, 1 << bits, (outputs, inputs), device=card.device)
    scales = torch.rand(outputs, inputs // group, device=card.device) * 0.01
    return bitpack.pack(codes, bits), scales


def product(card: Card, rows: int, outputs: int, inputs: int, form: str) -> dict[str, Any]:
    """One linear by cuBLAS and by one of ours, on inputs that take turns so that no cache holds the weights."""
    ring = card.size(max(2, min(8, (256 << 20) // (outputs * inputs * 2))), 1)
    xs = [card.random(rows, inputs) for _ in range(ring)]
    dense = [card.random(outputs, inputs, scale=0.02) for _ in range(ring)]
    plain = card.time(*(lambda x=x, w=w: F.linear(x, w) for x, w in zip(xs, dense)))
    if form == "nvfp4":
        held = [nvfp4_weight(card, outputs, inputs) for _ in range(ring)]
        calls = [(x, *w, None, None, "exact") for x, w in zip(xs, held)]
        name, bits = "nvfp4_linear", 4.5
    elif form == "nvfp4 w4a4":
        held = [nvfp4_weight(card, outputs, inputs) for _ in range(ring)]
        calls = [(x, *w, None, None, "nvfp4") for x, w in zip(xs, held)]
        name, bits = "nvfp4_linear", 4.5
    else:
        width = int(form.split()[1])
        held = [low_bit_weight(card, outputs, inputs, width, 64) for _ in range(ring)]
        calls = [(x, *w, None, None, width, 64) for x, w in zip(xs, held)]
        name, bits = "wna16_linear", width + 32 / 64
    from thresher import ops

    if card.dry and form == "nvfp4 w4a4":
        ours, actual = (
            card.time(lambda: ops.get(name).reference(*calls[0])),
            ops.get(name).reference(*calls[0]),
        )
    else:
        ours = card.time(*(lambda c=c: card.run(name, *c) for c in calls))
        actual = card.run(name, *calls[0])
    floor = card.roofline(
        outputs * inputs * bits / 8 + 2 * rows * (inputs + outputs), 2 * rows * outputs * inputs
    )
    return {
        "form": form, "rows": rows, "outputs": outputs, "inputs": inputs, "us": ours * 1e6, "cublas_us": plain * 1e6,
        "over_cublas": plain / ours, "of_roofline": floor / ours, "error": error(actual, ops.get(name).reference(*calls[0])),
    }  # fmt: skip


SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))


def _shapes(card: Card) -> tuple[tuple[int, int], ...]:
    return ((32, 128),) if card.dry else SHAPES


def products_of(rows: int, forms: tuple[str, ...]) -> Callable[[Card], Found]:
    def run(card: Card) -> Found:
        for outputs, inputs in _shapes(card):
            for form in forms:
                yield product(card, card.size(rows, min(rows, 5)), outputs, inputs, form)

    return run


def int4_of_torchao(card: Card) -> Found:
    """What torchao's 4-bit weight takes for the same product."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    for outputs, inputs in _shapes(card):
        for rows in (1,) if card.dry else (1, 16, 256):
            layer = torch.nn.Linear(inputs, outputs, bias=False, device=card.device, dtype=card.dtype)
            x = card.random(rows, inputs)
            if card.dry:
                taken = card.time(lambda layer=layer, x=x: layer(x))
                yield {
                    "rows": rows,
                    "outputs": outputs,
                    "inputs": inputs,
                    "us": taken * 1e6,
                    "note": "dense when dry",
                }
                continue
            quantize_(layer, Int4WeightOnlyConfig(group_size=64))
            taken = card.time(lambda layer=layer, x=x: layer(x))
            yield {"rows": rows, "outputs": outputs, "inputs": inputs, "us": taken * 1e6}


# -- attention ---------------------------------------------------------------------------------------------------------


def varlen(card: Card) -> Found:
    """Packed attention of many lengths, beside torch's varlen_attn and FlexAttention under a document mask."""
    heads, kv_heads, width = (32, 8, 128) if not card.dry else (2, 1, 16)
    for name, lengths in _length_sets(card):
        total = sum(lengths)
        q, k, v = (card.random(1, total, h, width).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
        offsets = torch.tensor([0, *lengths], device=card.device).cumsum(0).to(torch.int32)
        scale = width**-0.5
        args = (q, k, v, offsets, max(lengths), scale, True, -1, 0.0)
        operations = sum(4 * n * n / 2 * heads * width for n in lengths)
        floor = card.roofline(2 * total * width * (2 * heads + 2 * kv_heads), operations)
        own = card.provider("varlen_attention", *args)
        ours = card.time(lambda args=args: card.run("varlen_attention", *args))
        found = {"set": name, "tokens": total, "us": ours * 1e6, "of_roofline": floor / ours}
        if not card.dry:
            triton = card.time(lambda own=own, args=args: own.run(*args))
            found["triton_us"] = triton * 1e6
            flex, mask = _flex(card, offsets, total)
            call = functools.partial(flex, q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
            found["flex_us"] = card.time(call) * 1e6
            found["over_flex"] = found["flex_us"] / found["us"]
            found["triton_over_flex"] = found["flex_us"] / found["triton_us"]
            found["error"] = error(own.run(*args), call())
        yield found


def _length_sets(card: Card) -> list[tuple[str, list[int]]]:
    from thresher.tools import lengths

    if card.dry:
        return [("long-tail", lengths.draw("long-tail", 3, 12))]
    return [(n, lengths.draw(n, 32, 2048)) for n in ("long-tail", "uniform", "mmlu-like", "all-same")]


def _flex(card: Card, offsets: torch.Tensor, total: int) -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    segment = torch.bucketize(torch.arange(total, device=card.device), offsets[1:], right=True)

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (segment[i] == segment[j]) & (i >= j)

    mask = create_block_mask(seen, None, None, total, total, device=str(card.device))
    return torch.compile(flex_attention), mask


def kv_attention(card: Card) -> Found:
    """One query row over a quantized cache, beside dense attention over the cache as it was."""
    from thresher.kernels.kv.format import quantize

    heads, kv_heads, width = (32, 8, 128) if not card.dry else (2, 1, 64)
    for slots in (card.size(4096, 40),) if card.dry else (4096, 32768):
        for bits in (4, 2):
            k, v = (card.random(1, kv_heads, slots, width) for _ in range(2))
            q = card.random(1, heads, 1, width)
            pool = quantize(k, v, bits, 32)
            tail = [t[:, :, -32:].contiguous() for t in (k, v)]
            args = (q, list(pool), *tail, None, width**-0.5)
            ours = card.time(lambda args=args: card.run("kv_attention", *args))
            dense = card.time(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
            moved = 2 * kv_heads * slots * (width * bits / 8 + 4)
            yield {"slots": slots, "bits": bits, "us": ours * 1e6, "dense_us": dense * 1e6, "over_dense": dense / ours,
                   "of_roofline": card.roofline(moved, 4 * heads * slots * width) / ours}  # fmt: skip


# -- sparse ------------------------------------------------------------------------------------------------------------


def deft(card: Card) -> Found:
    """The down projection of one token with half, a tenth and a twentieth of its neurons on."""
    from thresher.kernels.sparse.down import activations

    neurons, features = (14336, 4096) if not card.dry else (256, 128)
    weight = card.random(neurons, features, scale=0.02)
    other = [weight, *(weight.clone() for _ in range(card.size(2, 0)))]
    for sparsity in (0.5, 0.9, 0.95):
        make = torch.Generator().manual_seed(0)
        act = activations((1,), neurons, 1 - sparsity, card.device, card.dtype, make)
        ours = card.time(
            *(lambda w=w, a=act: card.run("sparse_down", a, w, None, None, None, 1.0, 16, "") for w in other)
        )
        dense = card.time(*(lambda w=w, a=act: a @ w for w in other))
        moved = 2 * neurons * features * (1 - sparsity)
        yield {"sparsity": sparsity, "us": ours * 1e6, "dense_us": dense * 1e6, "over_dense": dense / ours,
               "of_roofline": card.roofline(moved, 0) / ours}  # fmt: skip


ROWS = (
    Row("products, 1 row", 12, products_of(1, ("nvfp4", "rsq 4")), (("over_cublas", ">= 2.5"),)),
    Row("varlen attention", 40, varlen, (("over_flex", ">= 1.0"),)),
    Row("products, 16 rows", 12, products_of(16, ("nvfp4", "rsq 4")), (("over_cublas", ">= 1.8"),)),
    Row("products, 256 rows", 12, products_of(256, ("nvfp4", "rsq 4")), (("over_cublas", ">= 1.0"),)),
    Row("products, 2048 rows", 14, products_of(2048, ("nvfp4", "rsq 4")), (("over_cublas", ">= 0.9"),)),
    Row("prepacking", 60, models.prepacking, (("E", ">= 0.90"),)),
    Row("deft", 6, deft),
    Row("kv attention", 8, kv_attention),
    Row("products, other widths", 20, products_of(1, ("rsq 2", "rsq 3", "rsq 8", "nvfp4 w4a4"))),
    Row("torchao int4", 10, int4_of_torchao),
    Row("pruned prefill", 90, models.pruned, (("over_dense", ">= 2.0"), ("of_attainable", ">= 0.9"))),
    Row("generate, 1B", 100, models.generate, (("over_inductor", ">= 2.0"),)),
    Row("tensorrt", 40, models.tensorrt),
)
