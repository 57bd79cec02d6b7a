"""Embedding tables in 8 bits, and heads computed from the same codes (`export_onnx(..., table_bits=8)`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.program import Program

from .integers import nbits
from .weights import Weights

aten = torch.ops.aten
_BLOCK = 32
_LEAST_ROWS = 1024  # smaller tables are left alone: a table of positions or types saves nothing


def shrink(weights: Weights) -> None:
    """Store the program's embedding tables in 8 bits, and compute the head that shares one from the same codes.

    Codes [V, blocks, 32] around 128 with one fp32 scale a block: what `MatMulNBits` reads, and a row of it
    is gathered and scaled for the embedding.
    """
    program = weights.program
    tables: list[Any] = [n.args[0] for n in program.nodes(aten.embedding.default)]
    for name in sorted({str(t.target) for t in tables if _large(program, t)}):
        weight = program.weights[name]
        blocks = weight.tensor.detach().float().unflatten(1, (-1, _BLOCK))
        scales = blocks.abs().amax(-1) / 127
        codes = ((blocks / scales.clamp_min(1e-30)[..., None]).round() + 128).clamp(0, 255).to(torch.uint8)
        readers = [
            n
            for n in program.nodes(aten.embedding.default, aten.linear.default)
            if name in {getattr(a, "target", None) for a in n.args}
        ]
        first = next(n for n in readers if n.target is aten.embedding.default)
        held = [
            weights.keep(first, "table", codes),
            weights.keep(first, "table_scales", scales.flatten()),
        ]
        weights.note(
            f"{weight.fqn} is stored in 8 bits in blocks of {_BLOCK}, which the program does not say."
        )
        for node in readers:
            _read(node, weights, held)


def _read(node: fx.Node, weights: Weights, held: list[fx.Node]) -> None:
    rows, blocks = value(held[0]).shape[:2]

    def look_up(index: Any, codes: Any, scales: Any) -> Any:
        taken = codes[index].to(scales.dtype) - 128
        return (taken * scales.view(rows, blocks)[index][..., None]).flatten(-2)

    def head(x: Any, bias: Any, *table: Any) -> Any:
        return nbits(x, table, bias, rows, blocks * _BLOCK, 8, _BLOCK, 4)

    if node.target is aten.embedding.default:
        weights.replace(node, look_up, [node.args[1], *held])
    else:
        weights.replace(node, head, [node.args[0], (*node.args, None)[2], *held])


def _large(program: Program, node: Any) -> bool:
    weight = program.weight(node)
    return (
        weight is not None and weight.tensor.shape[0] >= _LEAST_ROWS and weight.tensor.shape[1] % _BLOCK == 0
    )
