"""Finds normalisations: `layer_norm` and `rms_norm`, as one operator or spelled out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import module_fqn, value
from thresher.graph.program import Program
from thresher.report import Miss

from .pattern import Bindings, Number, Var, call, either, is_cast, match, uncast
from .sites import NormSite

aten = torch.ops.aten

mul, add, div = call(aten.mul.Tensor), call(aten.add.Tensor), call(aten.div.Tensor)
pow_, rsqrt, sqrt = call(aten.pow.Tensor_Scalar), call(aten.rsqrt.default), call(aten.sqrt.default)
mean = call(aten.mean.dim)

# Half-precision T5 squares a cast of what it multiplies, so that x is told by what stands before its casts.
_x, _eps = Var("x", through_casts=True), Number("eps")
_weight = Var(
    "weight", lambda n: n.op == "get_attr" and value(n).dim() == 1, "a weight of one dimension", True
)
_scale = either(add(_weight, Number("offset")), _weight)


def _normed(x: Any) -> Any:
    """x divided by its root mean square, then scaled, or not."""
    square = either(pow_(x, 2), call(aten.square.default)(x), mul(x, x))
    variance = add(either(mean(square, [-1], True), mean(square, -1, True)), _eps)
    scaled = either(mul(x, rsqrt(variance)), mul(x, pow_(variance, -0.5)), div(x, sqrt(variance)))
    return either(mul(_scale, scaled), scaled)


RMS_NORM = _normed(_x)
LAYER_NORM = _normed(call(aten.sub.Tensor)(_x, either(mean(_x, [-1], True), mean(_x, -1, True))))
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
        return f"It normalises over {len(given['shape'])} dimensions, and only norms over the last are known."
    offset, nodes = 0.0, (node,)  # type: tuple[float, tuple[fx.Node, ...]]
    if found := match(_scale, given.get("weight")):
        given["weight"], offset, nodes = found["weight"], found.get("offset", 0.0), (*found.nodes, node)
    held: list[str | None] = []
    for part in ("weight", "bias"):
        argument = uncast(given.get(part))
        if argument is not None and program.weight(argument) is None:
            return (
                f"Its {part} is computed in the graph by {argument.name}; only a stored one can be rewritten."
            )
        held.append(None if argument is None else str(argument.target))
    weight, bias = held
    eps = given.get("eps")
    if eps is None:
        eps = 1e-5 if layer else torch.finfo(value(node).dtype).eps
    kind, output = "layer" if layer else "rms", _cast_back(node, given["input"])
    return NormSite(
        _name(program, node, weight), kind, given["input"], output, weight, bias, eps, offset, nodes
    )


def _cast_back(node: fx.Node, like: fx.Node) -> fx.Node:
    """The norm's result in the type of its input, where it is cast back to that and used in no other."""
    users = list(node.users)
    if len(users) == 1 and is_cast(users[0]) and value(users[0]).dtype == value(uncast(like)).dtype:
        return users[0]
    return node


def _spelled(program: Program, root: fx.Node) -> NormSite | str | None:
    failed = None
    for output in _results(root):
        for kind, pattern in (("layer", LAYER_NORM), ("rms", RMS_NORM)):
            result = match(pattern, output)
            if isinstance(result, Bindings) and root in result.nodes:
                return _spelled_site(program, kind, output, result)
            if not isinstance(result, Bindings) and (failed is None or result.covered > failed.covered):
                failed = result
    if failed is None or (root.target is aten.sqrt.default and failed.covered < 4):
        return None  # a root that normalises nothing
    return f"It looks like a norm, but {failed.reason}."


def _spelled_site(program: Program, kind: str, output: fx.Node, found: Bindings) -> NormSite:
    weight, bias = found.get("weight"), None
    name = str(weight.target) if weight is not None else None
    nodes, result = sorted(found.nodes), output
    users = list(output.users)
    if kind == "layer" and len(users) == 1 and users[0].target is aten.add.Tensor and not users[0].kwargs:
        for argument in users[0].args:
            if (held := program.weight(uncast(argument))) is not None and held.tensor.dim() == 1:
                bias, result = str(uncast(argument).target), users[0]
                nodes.append(result)
    source = uncast(found["x"])
    return NormSite(
        _name(program, output, name), kind, source, _cast_back(result, source), name, bias, found["eps"],
        found.get("offset", 0.0), tuple(nodes),
    )  # fmt: skip


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
