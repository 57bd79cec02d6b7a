"""Sizes in a graph as numbers: those of the example, and of those that only a call decides, what is expected."""

from __future__ import annotations

import dataclasses
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from thresher.graph.nodes import value
from thresher.graph.program import Program

_EXPECTED: WeakKeyDictionary[Any, dict[Any, int]] = WeakKeyDictionary()


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if isinstance(a, int) and isinstance(b, int):
        return a == b
    with disable_proxy_modes_tracing():  # while a piece is traced, the question is no part of it
        return statically_known_true(a == b)


def be_one_size(a: Any, b: Any) -> None:
    """Have two sizes that are equal in every valid call be one symbol, guarded by whoever calls; nothing where they differ
    in the example, or where data decide one of them."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    if isinstance(a, int) and isinstance(b, int):
        return
    if any(isinstance(s, torch.SymInt) and s.node.hint is None for s in (a, b)):
        return
    if example_of(a) == example_of(b) and not same_size(a, b):
        with disable_proxy_modes_tracing():
            bool(a == b)


def as_many_values(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> None:
    """Of attention's arguments: have the sizes of keys and values be one symbol where they are two. There are as many of
    each, which attention's fake does not ask; with a symbol for each layer's values no two layers of a step are alike."""
    if isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor) and key.dim() == value.dim() == 4:
        for dim in range(3):
            be_one_size(key.shape[dim], value.shape[dim])


def is_number(size: torch.SymInt) -> bool:
    """Whether a symbolic integer is an argument by itself, and no size of a tensor."""
    from torch._dynamo.source import TensorPropertySource

    symbol, env = size.node.expr, size.node.shape_env
    sources = getattr(env, "var_to_sources", {}).get(symbol, ()) if symbol.is_Symbol else ()
    return bool(sources) and not any(isinstance(s, TensorPropertySource) for s in sources)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, symbols included; no guard is made."""
    return a.dim() == b.dim() and all(same_size(x, y) for x, y in zip(a.shape, b.shape))


def example_of(size: Any) -> int:
    """A size as a number: the example's, or what was expected of one that data decide (0 where nobody said)."""
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    known = _EXPECTED.get(size.node.shape_env, {})
    return int(size.node.expr.xreplace({s: known.get(s, 0) for s in size.node.expr.free_symbols}))


def expect(size: torch.SymInt, count: int) -> None:
    """Say what a size that data decide may be expected to be."""
    _EXPECTED.setdefault(size.node.shape_env, {})[size.node.expr] = count


def allow_decided_by_data(mode: Any) -> None:
    """Let operators in a fake mode have results whose size only their data decide; Dynamo's own mode does not."""
    env = mode.shape_env
    env.settings = dataclasses.replace(env.settings, allow_dynamic_output_shape_ops=True)


def decided_by_data(program: Any) -> str | None:
    """The first node of a Program whose size only data decide, or None."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, torch.Tensor) and any(
                isinstance(s, torch.SymInt) and s.node.hint is None for s in one.shape
            ):
                return node.name
    return None


def symbol_of(mode: FakeTensorMode, example: int, name: str) -> Any:
    """A fresh symbolic size of at least 2."""
    from torch._dynamo.source import ConstantSource  # here: it brings all of Dynamo, two seconds

    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    tensor = mode.from_tensor(
        torch.empty(max(2, example), device="meta"), symbolic_context=context, source=ConstantSource(name)
    )
    return tensor.shape[0]


def free_number(program: Program, start: int) -> int:
    """An example T that no fixed size of the graph equals, so that nothing is mistaken for it."""
    taken = {
        example_of(s)
        for n in program.graph.nodes
        if isinstance(value(n), torch.Tensor)
        for s in value(n).shape
    }
    while start in taken:
        start += 1
    return start
