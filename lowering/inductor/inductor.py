"""The Inductor target: C++ on a CPU, Triton on a GPU. The default for torch.compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing

from thresher.errors import ThresherError
from thresher.graph.program import Program
from thresher.graph.sizes import decided_by_data

from ..target import Lowered, Target, fake_inputs, lift_weights
from . import direct_calls, few_tokens, isa_probe


@dataclass
class Inductor(Target):
    """options: Inductor's configuration for this program, by name, as `torch.compile(options=...)` takes it.
    mode: torch.compile's mode, such as "max-autotune"."""

    name = "inductor"
    fakes = "ends"
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None

    def lower(self, program: Program) -> Lowered:
        module, names = lift_weights(program)
        if program.packing is None:  # else they are results of the prologue, which the session writes
            write_updates(module.graph, program)
        call = self._compile(module, program)

        def run(inputs: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[Any]:
            with torch.no_grad():
                return list(call(*inputs, *weights))

        return Lowered(self.name, names, run)

    def _compile(self, module: fx.GraphModule, program: Program) -> Any:
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        # compile_fx and not torch.compile: the latter, called while Dynamo is at work, silently runs eager
        mode = program.fake_mode()
        if mode is None:
            raise ThresherError("The program has no fake tensors, so its shapes are unknown to Inductor.")
        on_cpu = all(w.tensor.device.type == "cpu" for w in program.weights.values())
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
        inputs = fake_inputs(module)
        written = program.updates.values() if program.packing is None else ()
        stay = [*written, *range(len(program.placeholders), len(inputs))]

        def inner(graph: fx.GraphModule, given: Sequence[Any], **options: Any) -> Any:
            # A CUDA graph copies inputs at each replay but for those that stay where they are: the weights, and what the
            # model writes to. Inductor learns that from Dynamo's notes on a graph of Dynamo's own, which ours is not.
            # A graph whose weights have moved all the same is recorded anew.
            if len(given) == len(inputs):
                options["static_input_idxs"] = stay
            return compile_fx_inner(graph, given, **options)

        with tracing(TracingContext(mode)), torch.no_grad():
            return compile_fx(module, inputs, inner_compile=inner, config_patches=config)

    def _config(self) -> dict[str, Any]:
        from torch._inductor import list_mode_options

        modes = list_mode_options(self.mode, None) if self.mode and self.mode != "default" else {}
        return {**modes, **{name.replace("-", "_"): given for name, given in self.options.items()}}


def write_updates(graph: fx.Graph, program: Program) -> None:
    """End a program's graph with the writes to its inputs (`Program.updates`), which Inductor then does in place where
    the input is not read afterwards; None in the results' places."""
    places = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    results = list(output.args[0])
    with graph.inserting_before(output):
        for index, place in program.updates.items():
            graph.call_function(torch.ops.aten.copy_.default, (places[place], results[index]))
            results[index] = None
    output.args = (tuple(results),)
