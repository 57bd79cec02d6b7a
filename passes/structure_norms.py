"""Finds normalisations: `layer_norm`, `rms_norm`, and RMS norms spelled out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from thresher.program import Program, module_fqn, value
from thresher.report import Miss

from .pattern import Found, Number, Var, call, either, is_cast, match, uncast
from .structure_sites import NormSite

aten = torch.ops.aten

mul, add, div = call(aten.mul.Tensor), call(aten.add.Tensor), call(aten.div.Tensor)
pow_, rsqrt, sqrt = call(aten.pow.Tensor_Scalar), call(aten.rsqrt.default), call(aten.sqrt.default)
mean = call(aten.mean.dim)

_x, _eps = Var("x"), Number("eps")
_weight = Var(
    "weight", lambda n: n.op == "get_attr" and value(n).dim() == 1, "a weight of one dimension", True
)
square = either(pow_(_x, 2), call(aten.square.default)(_x), mul(_x, _x))
_variance = either(mean(square, [-1], True), mean(square, -1, True))
_scaled = either(
    mul(_x, rsqrt(add(_variance, _eps))),
    mul(_x, pow_(add(_variance, _eps), -0.5)),
    div(_x, sqrt(add(_variance, _eps))),
)
RMS_NORM = either(mul(either(add(_weight, Number("offset")), _weight), _scaled), _scaled)
_ROOTS = (aten.rsqrt.default, aten.sqrt.default)


def find_norms(program: Program) -> tuple[list[NormSite], list[Miss]]:
    """Every norm in graph order, and a Miss for each reciprocal root that belongs to none."""
    found: list[NormSite] = []
    missed = []
    for node in program.nodes(
        aten.layer_norm.default, aten.rms_norm.default, *_ROOTS, aten.pow.Tensor_Scalar
    ):
        if node.target in (aten.layer_norm.default, aten.rms_norm.default):
            site: NormSite | str | None = _one_op(program, node)
        elif node.target is aten.pow.Tensor_Scalar and node.args[1] != -0.5:
            continue
        else:
            site = _spelled(program, node)
        if isinstance(site, NormSite):
            found.append(site)
        elif site is not None:
            missed.append(Miss(module_fqn(node) or node.name, site))
    return found, missed


def _one_op(program: Program, node: fx.Node) -> NormSite | str:
    layer = node.target is aten.layer_norm.default
    names = ("input", "shape", "weight", "bias", "eps") if layer else ("input", "shape", "weight", "eps")
    given: dict[str, Any] = {**dict(zip(names, node.args)), **node.kwargs}
    if len(given["shape"]) != 1:
        return f"It normalises over {len(given['shape'])} dimensions; a transformer's norms work on the last one."
    held = {k: given.get(k) for k in ("weight", "bias")}
    for name, argument in held.items():
        if argument is not None and program.weight(uncast(argument)) is None:
            return (
                f"Its {name} is computed in the graph by {argument.name}; only a stored one can be rewritten."
            )
    eps = given.get("eps")
    if eps is None:
        eps = 1e-5 if layer else torch.finfo(value(node).dtype).eps
    weight, bias = (str(uncast(a).target) if a is not None else None for a in held.values())
    return NormSite(
        _name(program, node, weight),
        "layer" if layer else "rms",
        given["input"],
        node,
        weight,
        bias,
        eps,
        nodes=(node,),
    )


def _spelled(program: Program, root: fx.Node) -> NormSite | str | None:
    failed = None
    for output in _results(root):
        result = match(RMS_NORM, output)
        if isinstance(result, Found) and root in result.nodes:
            weight = result.get("weight")
            name = str(weight.target) if weight is not None else None
            return NormSite(
                _name(program, output, name), "rms", uncast(result["x"]), output, name, None, result["eps"],
                result.get("offset", 0.0), tuple(sorted(result.nodes)),
            )  # fmt: skip
        if not isinstance(result, Found) and (failed is None or result.covered > failed.covered):
            failed = result
    if failed is None or (root.target is aten.sqrt.default and failed.covered < 4):
        return None  # a root that normalises nothing
    return f"It looks like an RMS norm, but {failed.reason}."


def _results(root: fx.Node) -> Iterator[fx.Node]:
    """Nodes that may be the result of a norm around this root: the product by the weight first."""

    def products(node: fx.Node) -> list[fx.Node]:
        found = []
        for user in node.users:
            if is_cast(user):
                found += products(user)
            elif user.target in (aten.mul.Tensor, aten.div.Tensor):
                found.append(user)
        return found

    scaled = products(root)
    for node in scaled:
        yield from (p for p in products(node) if p.target is aten.mul.Tensor)
    yield from scaled


def _name(program: Program, node: fx.Node, weight: str | None) -> str:
    if weight is not None:
        return program.weights[weight].fqn.rsplit(".", 1)[0]
    return module_fqn(node) or node.name
