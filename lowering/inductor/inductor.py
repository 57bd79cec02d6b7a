"""The Inductor target: C++ on a CPU, Triton on a GPU. The default for torch.compile."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from thresher import waiting
from thresher.errors import ThresherError
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import decided_by_data

from .. import half_linears, steps
from ..target import Lowered, Target, fake_inputs, lift_weights
from . import direct_calls, few_tokens, isa_probe
from . import repeats as repeated
from .later import Later, still_wanted
from .layered import Layered

_log = logging.getLogger(__name__)


@dataclass
class Inductor(Target):
    """options: Inductor's configuration for this program, by name, as `torch.compile(options=...)` takes it.
    mode: torch.compile's mode, such as "max-autotune". layered: compile layers that are alike once."""

    name = "inductor"
    fakes = "ends"
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    layered: bool = True

    def lower(self, program: Program) -> Lowered:
        module, names = lift_weights(program)
        if program.packing is None:  # else they are results of the prologue, which the session writes
            write_updates(module.graph, program)
        call = self._compile(module, program)

        def run(inputs: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[Any]:
            with torch.no_grad():
                return list(call(*inputs, *weights))

        later, step = (call if isinstance(call, kind) else None for kind in (Later, steps.Step))
        return Lowered(self.name, names, run, later=later, step=step)

    def _compile(self, module: fx.GraphModule, program: Program) -> Any:
        mode = program.fake_mode()
        if mode is None:
            raise ThresherError("The program has no fake tensors, so its shapes are unknown to Inductor.")
        on_cpu = all(w.tensor.device.type == "cpu" for w in program.weights.values())
        plainly = on_cpu and not self._config()
        if plainly and program.packing is None:  # a packed body is no step
            _infer_values(module, mode)
            step = steps.lower(module.graph)
            if step is not None:
                return step
        if on_cpu:
            half_linears.rewrite(module.graph)
            if plainly and waiting.is_at_once():
                plain = fx.GraphModule(torch.nn.Module(), copy.deepcopy(module.graph)).forward
                return Later(plain, lambda: self._compiled(module, program, mode, on_cpu))
        return self._compiled(module, program, mode, on_cpu)

    def _compiled(self, module: fx.GraphModule, program: Program, mode: Any, on_cpu: bool) -> Any:
        if on_cpu:
            few_tokens.rewrite(module.graph)
            direct_calls.install()
            module.recompile()
        config = {**(isa_probe.settings() if on_cpu else {}), **self._config()}
        node = decided_by_data(program) if config.get("triton.cudagraphs") else None
        if node is not None:
            raise ThresherError(
                f"A CUDA graph has fixed sizes, and in {node} each call's data decide how many tokens attend (zipvl's "
                "counts='exact'). Use counts='bucketed', or another mode of torch.compile."
            )
        written = program.updates.values() if program.packing is None else ()
        stays = [i in written or i >= len(program.placeholders) for i in range(len(fake_inputs(module)))]

        def compile(graph: fx.GraphModule, stays: Sequence[bool]) -> Any:
            still_wanted()
            return _compile(graph, stays, mode, config)

        repeats = None
        whole = config.get("triton.cudagraphs") or config.get("max_autotune")
        # Inductor may find two free sizes to be one while it compiles a piece, and then write the one that the piece was
        # not given: seen with a step's rows, slots and mask, and not with a prompt's rows and tokens.
        whole = whole or (program.packing is None and _over_a_cache(program))
        if self.layered and not whole:
            _infer_values(module, mode)
            repeats = repeated.find(module.graph, len(program.placeholders))
        if repeats is not None:
            try:
                return Layered(module.graph, repeats, stays, compile)
            except KeyError as symbol:
                _log.info("compiled as one program: only data decide %s", symbol)
        return compile(module, stays)

    def _config(self) -> dict[str, Any]:
        from torch._inductor import list_mode_options

        modes = list_mode_options(self.mode, None) if self.mode and self.mode != "default" else {}
        return {**modes, **{name.replace("-", "_"): given for name, given in self.options.items()}}


def _compile(module: fx.GraphModule, stays: Sequence[bool], mode: Any, config: Mapping[str, Any]) -> Any:
    """Inductor's code for a graph. stays: for each input, whether it lies in the same place at every call."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    # compile_fx and not torch.compile: the latter, called while Dynamo is at work, silently runs eager
    inputs, made = fake_inputs(module), []

    def inner(graph: fx.GraphModule, given: Sequence[Any], **options: Any) -> Any:
        # A CUDA graph copies inputs at each replay but for those that stay where they are: the weights, and what the
        # model writes to. Inductor learns that from Dynamo's notes on a graph of Dynamo's own, which ours is not.
        # A graph whose weights have moved all the same is recorded anew.
        still_wanted()
        if len(given) == len(inputs):
            options["static_input_idxs"] = [i for i, stay in enumerate(stays) if stay]
        compiled = compile_fx_inner(graph, given, **options)
        if len(given) == len(inputs):
            made.append(compiled)
        return compiled

    with tracing(TracingContext(mode)), torch.no_grad():
        call = compile_fx(module, inputs, inner_compile=inner, config_patches=dict(config))
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    places = [n for n in module.graph.nodes if n.op == "placeholder"]
    rows = [i for i, place in enumerate(places) if not stays[i] and _lies_in_rows(place)]
    return _in_rows(_without_autograd(call, made, len(output.args[0])), rows)


def _over_a_cache(program: Program) -> bool:
    """Whether an input is as keys and values of earlier tokens are: [batch, heads, slots, width], any number of slots."""
    known = [value(place) for place in program.placeholders]
    return any(
        isinstance(k, torch.Tensor) and k.dim() == 4 and isinstance(k.shape[2], torch.SymInt) for k in known
    )


def _infer_values(module: fx.GraphModule, mode: Any) -> None:
    """Give nodes their fake tensors where a program read from a file has those of its inputs only."""
    if any(n.op == "call_function" and n.users and value(n) is None for n in module.graph.nodes):
        with torch.no_grad(), enable_python_dispatcher():
            FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fake_inputs(module))


def _lies_in_rows(place: fx.Node) -> bool:
    """Whether a graph is compiled for an input whose rows follow each other, and only reads it. Asks nothing that would
    fix a size."""
    known, expected = value(place), 1
    if not isinstance(known, torch.Tensor) or known.dim() < 2:
        return False
    if any(_writes(user, place) for user in place.users):
        return False
    for size, stride in zip(reversed(known.shape), reversed(known.stride())):
        if str(stride) != str(expected):
            return False
        expected = size * expected
    return True


def _writes(user: fx.Node, place: fx.Node) -> bool:
    """Whether an operator writes to this argument of it."""
    schema = getattr(user.target, "_schema", None)
    written = (
        ()
        if schema is None
        else (a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    )
    return any(yes and given is place for yes, given in zip(written, user.args))


def _in_rows(call: Any, rows: Sequence[int]) -> Any:
    """`call`, given those inputs in the order in memory that it asserts: what another graph made can have come out in
    another, as a sum with a position bias does in the bias's."""
    if not rows:
        return call

    def run(*given: Any) -> Any:
        if all(given[i].is_contiguous() for i in rows):
            return call(*given)
        return call(*(g.contiguous() if i in rows else g for i, g in enumerate(given)))

    return run


def _without_autograd(call: Any, made: Sequence[Any], count: int) -> Any:
    """The compiled code itself, without what AOTAutograd does around it at each call for gradients that nobody records:
    a tenth of a millisecond, which a layer of a decode step feels. `call` where that cannot be told to be the same."""
    if len(made) != 1 or not getattr(made[0], "_boxed_call", False):
        return call
    direct = made[0]

    def run(*given: Any) -> Any:
        results = direct(list(given))
        if len(results) != count:
            raise ThresherError(
                f"Inductor's code returned {len(results)} results where the graph has {count}."
            )
        return results

    return run


def write_updates(graph: fx.Graph, program: Program) -> None:
    """Add the writes to a program's inputs (`Program.updates`), each behind the last node that reads the input, so that
    Inductor does it in place; None in the results' places."""
    places = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    order = {node: index for index, node in enumerate(graph.nodes)}
    results = list(output.args[0])
    for index, place in program.updates.items():
        last = max(
            (results[index], *(u for u in places[place].users if u is not output)), key=order.__getitem__
        )
        with graph.inserting_after(last):
            graph.call_function(torch.ops.aten.copy_.default, (places[place], results[index]))
        results[index] = None
    output.args = (tuple(results),)
