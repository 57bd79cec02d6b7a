"""The packed body: its nodes traced again at one row of T tokens, or at rows of a capacity."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from thresher.graph.capture import assemble
from thresher.graph.deepen import Unlike
from thresher.graph.dialect import unrepeated_both
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of, free_number, symbol_of
from thresher.graph.token_labels import copied
from thresher.graph.tracing import trace

from ..tokens.axes import BATCH, SEQUENCE, TOKENS, Labels, Stop, TokenAxes
from .alike import Twins, continued, twins
from .frontier import Frontier, plan_fields
from .island import as_rows, as_tokens, run_island

aten = torch.ops.aten
_log = logging.getLogger(__name__)


def trace_body(program: Program, frontier: Frontier, leaving: Sequence[fx.Node]) -> Program:
    """Trace the labelled nodes at one row of T tokens, or at rows of a capacity; all of these symbolic.

    Returns the body as a Program. Of layers that are alike few are traced.
    """
    found = twins(program, frontier, leaving)
    if found.of:
        try:
            return _traced(program, frontier, leaving, found)
        except Unlike as reason:
            _log.info("every layer of the body is traced: %s", reason)
    return _traced(program, frontier, leaving, Twins())


def _traced(program: Program, frontier: Frontier, leaving: Sequence[fx.Node], found: Twins) -> Program:
    axes, further = frontier.axes, found.by_twin
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    tokens = symbol_of(mode, free_number(program, max(64, axes.batch * axes.sequence // 2)), "tokens")
    if frontier.rows:
        rows = symbol_of(mode, free_number(program, example_of(tokens) + 1), "packed_rows")
        packed = {BATCH: rows, SEQUENCE: tokens, TOKENS: rows * tokens}
    else:
        packed = {BATCH: 1, SEQUENCE: tokens, TOKENS: tokens}
    offsets = symbol_of(mode, axes.batch + 1 + (axes.batch + 1 == example_of(tokens)), "offsets")
    longest = symbol_of(mode, axes.sequence, "longest")
    sinks = {site.sinks for site in frontier.sites.values()}
    inside = {n for island in frontier.islands.values() for n in island.nodes}
    weights = [
        n
        for n in program.graph.nodes
        if n.op == "get_attr"
        and (n in sinks or any((u in axes and u not in found.of) or u in inside for u in n.users))
    ]
    device = value(next(iter(frontier.entering))).device
    whole = (packed[BATCH], packed[SEQUENCE])
    shapes = {
        "cu_seqlens": offsets,
        "rows": tokens,
        "columns": whole if frontier.rows else tokens,
        "segments": whole,
    }
    fields = plan_fields(frontier)
    passed_fakes = [
        _fresh(mode, n, i) for i, n in enumerate(frontier.passed)
    ]  # the mode would make them static
    with mode:
        fakes: list[Any] = [_packed_fake(n, labels, packed) for n, labels in frontier.entering.items()]
        for name in fields:
            dtype = torch.int32 if name == "cu_seqlens" else torch.int64
            fakes.append(
                longest if name == "max_len" else torch.empty(shapes[name], dtype=dtype, device=device)
            )
        fakes += passed_fakes
        fakes += [_weight_fake(mode, program.weights[str(n.target)].tensor) for n in weights]
    passed = frontier.passed
    names = [n.name for n in frontier.entering] + fields + [n.name for n in passed]

    def run(*arguments: Any) -> tuple[Any, ...]:
        env: dict[fx.Node, Any] = dict(zip(frontier.entering, arguments))
        given = dict(zip(names, arguments))
        whole = dict(zip(passed, arguments[len(names) - len(passed) : len(names)]))
        env.update((n, v) for n, v in whole.items() if n not in env)
        env.update(zip(weights, arguments[len(names) :]))
        for node in program.graph.nodes:
            if node in axes and node.op == "call_function" and node not in found.of:
                with fx.traceback.set_current_meta(node):
                    if node in frontier.islands:
                        env[node] = _on_rows(frontier, node, {**env, **whole}, given)
                    else:
                        env[node] = _replay(node, env, axes, frontier, given, packed)
                env.update((twin, env[node]) for twin in further.get(node, ()))
        return tuple(env[n] for n in leaving if n not in found.of)

    with mode, torch.no_grad(), fx.traceback.preserve_node_meta():
        traced = trace(run, fakes)
    held = {len(names) + i: _held(program, n) for i, n in enumerate(weights)}
    body = assemble(traced, names, held, list(program.notes))
    if found.of:
        body = continued(body, program, found, list(frontier.entering), leaving)
    known = {w.fqn: w for w in program.weights.values()}  # computed ones keep how they are computed
    body.weights = {name: known.get(w.fqn, w) for name, w in body.weights.items()}
    return body


def _held(program: Program, node: fx.Node) -> tuple[str, torch.Tensor]:
    weight = program.weights[str(node.target)]
    return weight.fqn, weight.tensor


def _replay(
    node: fx.Node,
    env: dict[fx.Node, Any],
    axes: TokenAxes,
    frontier: Frontier,
    given: dict[str, Any],
    packed: dict[str, Any],
) -> Any:
    def of(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda n: env[n])

    if node in frontier.sites:
        return (_attend_in_rows if frontier.rows else _attend)(node, env, frontier, given)
    if node.target in (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int):
        return torch.ops.aten.reshape.default(of(node.args[0]), _packed_shape(node, axes, packed))
    if node.target is aten.expand.default:
        return torch.ops.aten.expand.default(of(node.args[0]), _packed_shape(node, axes, packed))
    return node.target(*of(node.args), **of(node.kwargs))  # type: ignore[operator]


def _on_rows(frontier: Frontier, node: fx.Node, env: dict[fx.Node, Any], given: dict[str, Any]) -> Any:
    """An island's result: its operators on padded rows."""
    island, padding = frontier.islands[node], frontier.padding
    assert padding is not None
    size, values = env[padding].shape, dict(env)
    for read in island.entering:
        values[read] = as_rows(env[read], frontier.axes[read], given["rows"], given["columns"], size)
    was = [value(n).shape for n in (padding, *island.entering)]
    size_of = _sizes_for(was, [size, *(values[e].shape for e in island.entering)])
    return as_tokens(run_island(island, values, size_of), given["rows"], given["columns"])


def _sizes_for(known: Sequence[Any], now: Sequence[Any]) -> Callable[[Any], Any]:
    """Gives a size of the captured program for the padded rows at hand. known, now: shapes, and what they are here."""
    bound = {
        s.node.expr: n
        for was, here in zip(known, now)
        for s, n in zip(was, here)
        if isinstance(s, torch.SymInt) and s.node.expr.is_symbol
    }

    def size_of(size: Any) -> Any:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if not expression.free_symbols <= bound.keys():
            raise Stop(f"a size inside a part that mixes positions is {expression}, which no row has")
        return sympy_interp(PythonReferenceAnalysis, bound, expression)

    return size_of


def _packed_shape(node: fx.Node, axes: TokenAxes, packed: dict[str, Any]) -> list[Any]:
    shape = []
    for label, size in zip(axes[node], value(node).shape):
        if label is None and not isinstance(size, int):
            raise Stop(f"{node.name} has a symbolic dimension that is neither batch nor sequence")
        shape.append(_packed_size(label, packed) if label is not None else size)
    return shape


def _packed_size(label: str, packed: dict[str, Any]) -> Any:
    outer, inner = copied(label) or (1, 1)
    return packed[TOKENS] * (outer * inner) if outer * inner > 1 else packed[label]


def _attend(node: fx.Node, env: dict[fx.Node, Any], frontier: Frontier, given: Any) -> Any:
    site = frontier.sites[node]
    q, k, v = _alike(env[n] for n in (site.q, *_shared(site.k, site.v, frontier.axes)))
    scale = site.scale if site.scale is not None else value(site.q).shape[-1] ** -0.5
    seen = frontier.visibilities[node]
    if seen.kind == "generic":
        result = torch.ops.thresher.varlen_attention_masked(
            q,
            k,
            v,
            env[site.mask],  # type: ignore[index]
            given["rows"],
            given["columns"],
            given["cu_seqlens"],
            given["max_len"],
            scale,
        )
        return _like(result, node)
    result = torch.ops.thresher.varlen_attention(
        q,
        k,
        v,
        given["cu_seqlens"],
        given["max_len"],
        scale,
        seen.kind == "causal",
        seen.window,
        site.softcap,
        *([] if site.sinks is None else [env[site.sinks]]),
    )
    return _like(result, node)


def _attend_in_rows(node: fx.Node, env: dict[fx.Node, Any], frontier: Frontier, given: dict[str, Any]) -> Any:
    """Attention in rows that sequences share: a mask keeps each to itself. Columns are the padded batch's."""
    site, seen = frontier.sites[node], frontier.visibilities[node]
    if seen not in (masks := given.setdefault("made", {})):
        segments, columns = given["segments"], given["columns"]
        mask = segments.unsqueeze(2) == segments.unsqueeze(1)
        # filler has columns of its own order only by chance: it sees all filler
        distance = torch.where(
            (segments < 0).unsqueeze(2),
            torch.zeros_like(columns).unsqueeze(2),
            columns.unsqueeze(2) - columns.unsqueeze(1),
        )
        if seen.kind == "causal":
            mask = mask & (distance >= 0)
        if seen.window >= 0:
            mask = mask & (distance.abs() <= seen.window)
        masks[seen] = mask.unsqueeze(1)
    q, k, v = _alike((env[site.q], env[site.k], env[site.v]))
    result = torch.ops.aten.scaled_dot_product_attention.default(
        q, k, v, masks[seen], 0.0, False, scale=site.scale
    )
    return _like(result, node)


def _alike(operands: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Queries, keys and values in the widest of their dtypes: a model may spell out fp32 scores of bf16 values."""
    given = list(operands)
    wide = functools.reduce(torch.promote_types, [x.dtype for x in given])
    return [x if x.dtype == wide else x.to(wide) for x in given]


def _like(result: torch.Tensor, node: fx.Node) -> torch.Tensor:
    """What attention gives, in the dtype that the model's own gives."""
    known = value(node).dtype
    return result if result.dtype == known else result.to(known)


def _shared(k: fx.Node, v: fx.Node, axes: TokenAxes) -> tuple[fx.Node, fx.Node]:
    """Keys and values before they are repeated for each query head: the operator shares them instead."""
    sources = unrepeated_both(k, v)
    return sources if all(s in axes for s in sources) else (k, v)


def _packed_fake(node: fx.Node, labels: Labels, packed: dict[str, Any]) -> torch.Tensor:
    known = value(node)
    shape = [
        packed[label] if label is not None else example_of(size) for label, size in zip(labels, known.shape)
    ]
    return torch.empty(shape, dtype=known.dtype, device=known.device)


def _fresh(mode: FakeTensorMode, node: fx.Node, number: int) -> torch.Tensor:
    """A padded tensor in the body's own fake mode, each of its dynamic sizes a symbol of its own."""
    known = value(node)
    dynamic = [DimDynamic.STATIC if isinstance(s, int) else DimDynamic.DYNAMIC for s in known.shape]
    example = torch.empty([example_of(s) for s in known.shape], dtype=known.dtype, device="meta")
    fake = mode.from_tensor(
        example,
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic),
        source=ConstantSource(f"mask{number}"),
    )
    with mode:
        return torch.empty(fake.shape, dtype=known.dtype, device=known.device)


def _weight_fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return mode.from_tensor(tensor.detach(), static_shapes=True)
