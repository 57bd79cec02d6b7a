"""A Program as JSON and back. Nothing in it is code: a loaded graph can only call operators by name.

Only what cannot be computed is written: nodes, arguments, the placeholders' shapes and the symbols in
them. What every other node gives is found again by running the graph on fake tensors.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource

from thresher.errors import ThresherError
from thresher.graph import pure_ops
from thresher.graph.nodes import module_fqn, value
from thresher.graph.program import Program, Weight

from . import expressions

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{f.__name__}": f
    for f in (
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.truediv,
        operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.getitem,
        operator.pow, operator.and_, operator.or_,
    )
} | {
    f"torch.{n}": getattr(torch, n)
    for n in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite", "sym_sum")
}  # fmt: skip
_FUNCTION_NAMES = {f: name for name, f in _FUNCTIONS.items()}
LEAST = -(2**62)  # of a number that may be any, such as logits_to_keep
NAMESPACES = ("aten", "thresher", "prims")


class ArtifactError(ThresherError):
    """A program cannot be saved, or a file cannot be loaded; the message says which part and why."""


def encode(program: Program, hold: Callable[[torch.Tensor], int]) -> dict[str, Any]:
    """The program as a JSON value.

    hold: keeps one weight's tensor for the file and returns its number. Raises ArtifactError for what
    the format cannot say.
    """
    nodes: list[Any] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            nodes.append(["placeholder", node.name, _value(value(node))])
        elif node.op == "get_attr":
            nodes.append(["weight", node.name, str(node.target)])
        elif node.op == "call_function":
            line = ["call", node.name, target_name(node.target), [_argument(a) for a in node.args]]
            kwargs = {k: _argument(v) for k, v in node.kwargs.items()}
            nodes.append([*line, kwargs, module_fqn(node)])
        else:
            nodes.append(["output", [_argument(a) for a in node.args[0]]])
    used = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    return {
        "inputs": list(program.input_names),
        "symbols": _symbols(program),
        "nodes": nodes,
        "weights": {
            name: {"fqn": w.fqn, "tensor": hold(w.tensor)}
            for name, w in program.weights.items()
            if name in used
        },
        "notes": list(program.notes),
        "updates": [[result, place] for result, place in program.updates.items()],
        "fixed_linears": _has_fixed_linears(program),
    }


def decode(data: dict[str, Any], tensors: list[torch.Tensor]) -> Program:
    """The program, without fake tensors on its nodes: enough to run it; see `fakes.materialise`.

    torch writes a graph as Python and runs that, names as they are: a name that is none would be code. Raises
    ArtifactError for one, and for a call of anything but an operator that computes (`pure_ops`).
    """
    module, graph = fx.GraphModule(torch.nn.Module(), fx.Graph()), fx.Graph()
    weights: dict[str, Weight] = {}
    for name, entry in data["weights"].items():
        _identifier(name), _line(entry["fqn"])
        tensor = tensors[entry["tensor"]]
        weights[name] = Weight(entry["fqn"], tensor)
        module.register_buffer(name, tensor, persistent=False)
    made: dict[str, fx.Node] = {}
    for kind, *rest in data["nodes"]:
        if kind == "output":
            graph.output(tuple(_read(a, made) for a in rest[0]))
            break
        name = _identifier(rest[0])
        if kind == "placeholder":
            node = graph.placeholder(name)
            node.meta["saved"] = rest[1]
        elif kind == "weight":
            if rest[1] not in weights:
                raise ArtifactError(
                    f"The file's node {name} reads the weight {rest[1]!r}, which it does not hold."
                )
            node = graph.create_node("get_attr", rest[1], name=name)
        else:
            _, target, args, kwargs, place = rest
            function = find_target(target)
            given = tuple(_read(a, made) for a in args)
            named = {_identifier(k): _read(v, made) for k, v in kwargs.items()}
            if reason := pure_ops.call_refusal(function, given, named):
                raise ArtifactError(f"The file's node {name} calls {target!r}, which {reason}.")
            node = graph.create_node("call_function", function, given, named, name)
            if place:
                node.meta["nn_module_stack"] = {_line(place): (place, "")}
        made[name] = node
    module.graph = graph
    updates = dict(data.get("updates", ()))
    program = Program(
        module, weights, list(map(_line, data["inputs"])), notes=list(data["notes"]), updates=updates
    )
    _check_updates(program)
    for name, facts in data["symbols"].items():
        _identifier(name), _identifier(facts.get("source", name))
    program.graph_module.meta.update(symbols=data["symbols"], fixed_linears=data.get("fixed_linears", True))
    return program


def _identifier(name: Any) -> str:
    """A name that may stand in the code torch makes of a graph. Raises ArtifactError."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ArtifactError(f"The file names a part of its graph {name!r}, which is no name.")
    return name


def _line(text: Any) -> str:
    """A name for people, which may stand in a comment or a report. Raises ArtifactError."""
    if not isinstance(text, str) or not text.isprintable():
        raise ArtifactError(f"The file calls something {text!r}, which does not fit in one line.")
    return text


def _check_updates(program: Program) -> None:
    """Raise ArtifactError unless each value that is written to an input is a result, and has one input of its own."""
    results, places = len(program.outputs), len(program.input_names)
    for result, place in program.updates.items():
        if not (type(result) is type(place) is int and 0 <= result < results and 0 <= place < places):
            raise ArtifactError(
                f"The file writes its result {result!r} to its input {place!r}; it has {results} and {places}."
            )
    if len(set(program.updates.values())) < len(program.updates):
        raise ArtifactError("The file writes to one of its inputs twice.")


def _has_fixed_linears(program: Program) -> bool:
    """Whether the number of tokens that some linear takes is the same in every call."""
    shapes = [value(n.args[0]).shape[:-1] for n in program.nodes(torch.ops.aten.linear.default)]
    return any(all(isinstance(size, int) for size in shape) for shape in shapes)


def _symbols(program: Program) -> dict[str, Any]:
    """Example value and range of each symbol in the placeholders' sizes."""
    found: dict[str, Any] = {}
    for place in program.placeholders:
        known = value(place)
        for size in known.shape if isinstance(known, torch.Tensor) else [known]:
            if not isinstance(size, torch.SymInt):
                continue
            env = size.node.shape_env
            hints = getattr(env, "backed_var_to_val", None) or env.var_to_val
            for symbol in size.node.expr.free_symbols:
                limits = env.var_to_range[symbol]
                upper = int(limits.upper) if limits.upper <= 2**62 else None
                lower = int(limits.lower) if limits.lower >= LEAST else LEAST
                found[str(symbol)] = {"hint": int(hints[symbol]), "min": lower, "max": upper}
                source = next(iter(getattr(env, "var_to_sources", {}).get(symbol, ())), None)
                base = getattr(source, "base", None)
                if isinstance(
                    base, ConstantSource
                ):  # a size of ours: under this name it gets its symbol again
                    found[str(symbol)]["source"] = base.source_name
    return found


def relations(program: Program) -> list[str]:
    """What was assumed of the sizes while tracing, as expressions over the placeholders' symbols.

    An assumption that cannot be written so, such as what a float that was computed from a size came to, holds for the
    example's sizes: those are then the ones that the program is for.
    """
    mode, symbols = program.fake_mode(), _symbols(program)
    found: list[str] = []
    for guard in getattr(mode.shape_env, "guards", ()) if mode is not None else ():
        names = {str(s) for s in guard.expr.free_symbols}
        if not names or not names <= symbols.keys():
            continue
        kept = [str(guard.expr)]
        if not expressions.readable(kept[0]):
            kept = [f"Eq({n}, {symbols[n]['hint']})" for n in sorted(names)]
        found += [one for one in kept if one not in found]
    return found


def target_name(target: Any) -> str:
    """A node's target as text. Raises ArtifactError for one that cannot be found again by name."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        if reason := pure_ops.refusal(target):
            raise ArtifactError(f"The program calls {target}, which {reason}, so that no file may hold it.")
        return str(target)
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise ArtifactError(
        f"The program calls {target}, which has no name in the file format; it knows operators of "
        f"{', '.join(NAMESPACES)} and arithmetic on sizes."
    )


def find_target(name: str) -> Callable[..., Any]:
    """The operator of that name. Raises ArtifactError when this installation has none."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = None
    if namespace in NAMESPACES:
        found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ArtifactError(
            f"The file calls the operator {name!r}, which this torch {torch.__version__} and this Thresher do "
            "not have. Load it with the versions named in its manifest."
        )
    if reason := pure_ops.refusal(found):
        raise ArtifactError(
            f"The file calls {name!r}, which {reason}. It was altered, or not written by Thresher."
        )
    return found


def _argument(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return {"node": argument.name}
    if isinstance(argument, float) and argument - argument != 0:
        return {"float": str(argument)}
    if argument is None or isinstance(argument, (bool, int, float, str)):
        return argument
    if isinstance(argument, tuple) and not isinstance(argument, torch.Size):
        return {"tuple": [_argument(a) for a in argument]}
    if isinstance(argument, (list, torch.Size)):
        return [_argument(a) for a in argument]
    if isinstance(argument, slice):
        return {"slice": [_argument(a) for a in (argument.start, argument.stop, argument.step)]}
    for kind in ("dtype", "device", "layout", "memory_format"):
        if isinstance(argument, getattr(torch, kind)):
            return {kind: str(argument).removeprefix("torch.")}
    raise ArtifactError(f"The program holds {argument!r} as an argument, which the file format cannot say.")


def _read(data: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(data, list):
        return [_read(a, made) for a in data]
    if not isinstance(data, dict):
        return data
    ((kind, given),) = data.items()
    if kind == "node":
        return made[given]
    if kind == "float":
        return float(given)
    if kind == "tuple":
        return tuple(_read(a, made) for a in given)
    if kind == "slice":
        return slice(*(_read(a, made) for a in given))
    if kind == "device":
        return torch.device(given)
    found = getattr(torch, given, None)
    if kind in ("dtype", "layout", "memory_format") and isinstance(found, getattr(torch, kind)):
        return found
    raise ArtifactError(f"The file holds an argument of an unknown kind, {kind!r}: {given!r}.")


def _value(known: Any) -> Any:
    if isinstance(known, torch.Tensor):
        sizes, strides = ([expressions.write(s) for s in part] for part in (known.shape, known.stride()))
        return {
            "dtype": str(known.dtype).removeprefix("torch."),
            "shape": sizes,
            "stride": strides,
            "device": str(known.device),
        }
    if isinstance(known, torch.SymInt):
        return {"size": expressions.write(known)}
    if known is None or isinstance(known, (bool, int, float)):
        return known
    raise ArtifactError(
        f"An input of the program is a {type(known).__name__}; only tensors and numbers can be."
    )
