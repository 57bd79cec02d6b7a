"""Capture: from what torch hands us to a Program.

Dynamo's graph and an ExportedProgram are both run once more under `tracing.trace` with
the fake tensors they already carry, so that both ways give the same nodes; then canonicalised. The
given graph is never edited: Dynamo refuses graphs with attributes it did not put there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..compat import is_fake, lazy_module, source_name
from ..errors import CaptureError
from . import autocast, names, sharded
from .dialect import canonicalise, verify
from .edit import replace
from .functional import Functional, has_writes
from .inliner import Inliner, Unguarded
from .nodes import module_fqn, name_modules
from .program import Program, Weight
from .tracing import trace
from .vmapped import without_vmap
from .whole_model import Part, name_within, part_of

_WRITES = "The model writes to {!r} in its forward; export it without that state."


def _trace(
    source: fx.GraphModule,
    fakes: Sequence[Any],
    whole: Callable[[Sequence[Any]], Sequence[Any]] = tuple,
    inliner: type[Inliner] = Inliner,
) -> tuple[fx.GraphModule, list[int]]:
    """Run a graph once more on fakes, twice where it writes to tensors.

    whole: the graph's own arguments, from those that are traced. inliner: what runs it. Gives the new graph, functional,
    and the arguments whose new values stand behind its results, by number.
    """
    mode = next((f.fake_mode for f in fakes if isinstance(f, torch._subclasses.fake_tensor.FakeTensor)), None)
    if mode is None:
        raise CaptureError("The graph has no tensor inputs, so there is nothing to rewrite.")
    source = without_vmap(source, mode)

    def run(*args: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            flat, _ = torch.utils._pytree.tree_flatten(inliner(source).run(*whole(args)))
            if any(map(sharded.is_sharded, flat)):
                raise CaptureError(
                    "A result is a DTensor. Let the last parallel layer return a plain tensor."
                )
            return tuple(flat)

    with mode, torch.no_grad():  # factories inside must give fakes of the same mode
        traced = trace(run, fakes)
        written: list[int] = []
        if has_writes(traced.graph):
            functional = Functional(run)
            traced, written = trace(functional, fakes), functional.written
    autocast.write_casts(traced.graph, autocast.ambient())
    return traced, written


def assemble(
    traced: fx.GraphModule,
    names: Sequence[str],
    weights: dict[int, tuple[str, torch.Tensor]],
    notes: list[str],
    written: Sequence[int] = (),
) -> Program:
    """Turn the placeholders numbered in `weights` into get_attr nodes, and tidy.

    written: placeholders whose new values are the last results. CaptureError where one of them is a weight.
    """
    for index in written:
        if index in weights:
            raise CaptureError(_WRITES.format(weights[index][0]))
    module = lazy_module(traced.graph, traced)
    program = Program(module, {}, [], notes=notes)
    attributes: dict[int, str] = {}
    for index, node in enumerate([n for n in module.graph.nodes if n.op == "placeholder"]):
        if index not in weights:
            program.input_names.append(names[index])
            node._rename("in_self" if names[index] == "self" else re.sub(r"\W", "_", names[index]))
            node.target = node.name
            continue
        fqn, tensor = weights[index]
        if id(tensor) not in attributes:  # tied weights stay one
            attributes[id(tensor)] = program.add_weight(Weight(fqn, tensor))
        with module.graph.inserting_before(node):
            read = module.graph.create_node("get_attr", attributes[id(tensor)])
        read.meta = dict(node.meta)
        replace(node, read, erase=True)
    numbers = [i for i in range(len(names)) if i not in weights]
    program.updates = dict(enumerate(map(numbers.index, written), len(program.outputs) - len(written)))
    _name_constants(traced, program)
    name_modules(module.graph)
    _place_reads_first(module.graph)
    canonicalise(program)
    verify(program)
    return program


def _name_constants(traced: fx.GraphModule, program: Program) -> None:
    """Tensors created while tracing (torch.tensor([...]) in a forward) become weights too."""
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in program.weights:
            tensor = getattr(traced, str(node.target))
            if is_fake(tensor):
                raise CaptureError(
                    f"The values of {node.name}, made in {module_fqn(node) or 'the model'} while its graph was traced, are "
                    "not known: an operator there hides its result from the tracer."
                )
            fqn = names.unused(
                f"constant.{node.target}", {w.fqn for w in program.weights.values()}.__contains__
            )
            node.target = program.add_weight(Weight(fqn, tensor))


def _place_reads_first(graph: fx.Graph) -> None:
    """Weights are read right after the placeholders, so that a rewrite never reads one too late."""
    places = [n for n in graph.nodes if n.op == "placeholder"]
    anchor = places[-1] if places else None
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        if anchor is not None:
            anchor.append(node)
            anchor = node


def _input_name(expression: str, fallback: str) -> str:
    """`input_ids` from `L['kwargs']['input_ids']`, `eps` from `L['self']._modules['norm'].eps`."""
    last = re.search(r"(?:\[['\"]([^'\"]+)['\"]\]|\.([A-Za-z_]\w*))$", expression)
    return (last[1] or last[2]) if last else fallback


@dataclass
class Places:
    """What a Dynamo graph's arguments are: a name and a fake value for each, the weights among them by their
    index, and for each `input:NAME`, `weight:FQN`, or `object:NAME` for a device mesh.

    A buffer that the model writes to is an input like any other, once `from_places` has seen the write.
    part: what the graph is a part of, where Dynamo cut the model."""

    names: list[str]
    fakes: list[Any]
    weights: dict[int, tuple[str, torch.Tensor]]
    roles: list[str]
    part: Part | None = None


def places_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Places:
    """Tell the weights from the inputs, by where Dynamo found them."""
    found = Places([], [], {}, [])
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    sources: dict[int, str] = {}  # of the weights
    for index, (node, example) in enumerate(zip(nodes, example_inputs, strict=True)):
        known = node.meta.get("example_value", example)
        found.fakes.append(known)
        argument = node.meta.get("grapharg")
        expression = source_name(argument.source) if argument is not None else node.name
        name = _input_name(expression, node.name) if "size()" not in expression else node.name
        found.names.append(name)
        if isinstance(known, torch.Tensor) and names.is_weight(expression):
            real = sharded.local(argument.example if argument is not None else example)
            sources[index] = expression
            found.weights[index] = ("", real if isinstance(real, torch.Tensor) else sharded.local(known))
            found.roles.append("")
        elif sharded.is_object(known):
            found.roles.append(f"object:{name}")
        else:
            found.roles.append(f"input:{name}")
    tensors = [found.weights[i][1] for i in sources]
    relative = names.weight_names(list(sources.values()), list(map(id, tensors)))
    found.part, fqns = part_of(gm, tensors, relative)
    for index, fqn in zip(sources, fqns):
        found.weights[index] = (fqn, found.weights[index][1])
        found.roles[index] = f"weight:{fqn}"
    return found


def from_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[Program, list[str]]:
    """Capture the graph Dynamo gave to a backend.

    Returns the Program and, for each of the compiled function's arguments in order, either
    `input:NAME` or `weight:FQN`, which tells what the caller passes there at run time.
    """
    places = places_of(gm, example_inputs)
    return from_places(gm, places), places.roles


def from_places(gm: fx.GraphModule, places: Places) -> Program:
    """Capture a Dynamo graph whose arguments were told apart."""
    split = sharded.Local(places.fakes, list(places.weights))
    traced, written = _trace(gm, split.parts, split.whole)
    for old in (split.kept[new] for new in written):
        if old in places.weights:
            places.names[old] = places.weights.pop(old)[0]
            places.roles[old] = f"input:{places.names[old]}"
    weights = {new: places.weights[old] for new, old in enumerate(split.kept) if old in places.weights}
    program = assemble(traced, [places.names[i] for i in split.kept], weights, [], written)
    program.part = places.part
    if places.part is not None:
        name_within(program.graph, places.part.prefix)
    return program


def refuse_shared_writes(program: Program, inputs: Sequence[Any]) -> None:
    """Raise CaptureError where a tensor that the model writes to lies in the memory of another input: the other one would
    have to change with it, and the program takes inputs to be apart."""
    spans = {i: _span(x) for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.numel()}
    for number in program.updates.values():
        low, high = spans.get(number, (0, 0))
        for other, (start, end) in spans.items():
            if other != number and low < end and start < high:
                raise CaptureError(
                    f"The model writes to {program.input_names[number]}, which lies in the same memory as "
                    f"{program.input_names[other]}. Give each a tensor of its own."
                )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last address of a tensor's elements."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def constant_inputs(exported: torch.export.ExportedProgram) -> dict[str, Any]:
    """What was passed where a program has a constant now: by name, numbers, truth values, text and None."""
    constant = torch.export.graph_signature.ConstantArgument
    specs = [s.arg for s in exported.graph_signature.input_specs if isinstance(s.arg, constant)]
    return {arg.name: arg.value for arg in specs}


def from_export(exported: torch.export.ExportedProgram) -> Program:
    """Capture an ExportedProgram. Its user inputs become the placeholders, in order, without what export made a constant
    (`constant_inputs`): use_cache=False, labels=None.

    Raises CaptureError when the program writes to its inputs or buffers: the dialect is functional.
    """
    signature = exported.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        raise CaptureError(_WRITES.format(written[0]))
    owners = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    state = {**exported.state_dict, **exported.constants}
    names: list[str] = []
    weights: dict[int, tuple[str, torch.Tensor]] = {}
    fakes: list[Any] = []
    constants = constant_inputs(exported)
    places = [n for n in exported.graph.nodes if n.op == "placeholder"]
    for node in places:
        if node.name in constants:
            continue
        if node.name in owners:
            weights[len(names)] = (owners[node.name], state[owners[node.name]])
        names.append(node.name)
        fakes.append(node.meta["val"])

    def whole(given: Sequence[Any]) -> list[Any]:
        rest = iter(given)
        return [constants[n.name] if n.name in constants else next(rest) for n in places]

    traced, changed = _trace(exported.graph_module, fakes, whole, inliner=Unguarded)
    program = assemble(traced, names, weights, [], changed)
    for number in program.updates.values():
        raise CaptureError(_WRITES.format(program.input_names[number]))
    return program
