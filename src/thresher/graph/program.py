"""A Program: one graph in the dialect, with named weights.

Both captures end here and every pass begins here. The graph takes the caller's tensors and sizes
as placeholders, holds each weight as one `get_attr` node, and returns a flat tuple.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx

from thresher.compat import has_values, lazy_module
from thresher.recipe import MASK_NAME
from thresher.tensor_files import release

from .edit import call_before
from .nodes import fake_like, fake_mode, value, writes

aten = torch.ops.aten
T = TypeVar("T")


@dataclass(frozen=True)
class Weight:
    """A tensor the graph holds.

    fqn: where the model keeps it, `layers.0.mlp.up_proj.weight`; a packed weight has a name of its own.
    tensor: the storage is shared with the model. A meta or fake tensor is allowed for a dry run.
    source: FQNs of the model weights this one was computed from; empty for the model's own.
    derive: recomputes this tensor from the tensors of `source`, for when those change.
    made_from: the very tensors of `source` it was computed from, to notice when those change.
    """

    fqn: str
    tensor: torch.Tensor
    source: tuple[str, ...] = ()
    derive: Callable[..., torch.Tensor] | None = None
    made_from: tuple[torch.Tensor, ...] = ()

    @property
    def origins(self) -> tuple[str, ...]:
        """FQNs of the model weights behind this one; its own for the model's."""
        return self.source or (self.fqn,)

    @property
    def origin_tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors of `origins`."""
        return self.made_from or (self.tensor,)

    def then(self, make: Callable[[torch.Tensor], T]) -> Callable[..., T] | None:
        """Recomputes `make(this weight)` from the tensors of `origins`; None where this one cannot be recomputed."""
        before = self.derive
        if before is None:
            return None if self.source else make
        return lambda *origins: make(before(*origins))


@dataclass
class Program:
    """A graph module in the dialect, its weights by attribute name, and what its inputs are called.

    input_names: the caller's name for each placeholder, in order (`input_ids`, `attention_mask`, ...).
    packing: set by the prepacking pass: how the caller's padded tensors become this graph's inputs.
    notes: sentences for the report, about the capture rather than about one pass.
    calls: set by passes whose rewrite depends on what a call brings: a `CallPlan`.
    updates: results that are not the caller's but new values of tensors the caller gave and the model writes to, such
        as a static cache: result -> placeholder, both by number. Whoever runs the program copies them there.
    mask_name: what the caller calls the input that marks real tokens.
    alike: the model's layers, where all from the third on are alike (`deepen.Layers`); None where that is not known.
    part: what this graph is a part of, where Dynamo cut the model (`whole_model.Part`); None for a whole one.
    """

    graph_module: fx.GraphModule
    weights: dict[str, Weight]
    input_names: list[str]
    packing: Any = None
    notes: list[str] = field(default_factory=list)
    calls: Any = None
    updates: dict[int, int] = field(default_factory=dict)
    mask_name: str = MASK_NAME
    alike: Any = None
    part: Any = None

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def nodes(self, *targets: Any) -> list[fx.Node]:
        """The call nodes with one of these targets, in order; all call nodes when none is named."""
        wanted = set(targets)
        return [n for n in self.graph.nodes if n.op == "call_function" and (not wanted or n.target in wanted)]

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def padding_mask(self) -> fx.Node | None:
        """The input that marks real tokens, [batch, sequence]; None without one of that name and rank."""
        for place, name in zip(self.placeholders, self.input_names):
            known = value(place)
            if name == self.mask_name and isinstance(known, torch.Tensor) and known.dim() == 2:
                return place
        return None

    def real_tokens(self, inputs: Sequence[Any]) -> torch.Tensor | None:
        """bool [batch, sequence], False at pads, from the placeholders' values; None without a padding mask."""
        place = self.padding_mask
        given = None if place is None else inputs[self.placeholders.index(place)]
        return given != 0 if isinstance(given, torch.Tensor) and given.dim() == 2 else None

    @property
    def outputs(self) -> list[fx.Node | None]:
        return list(self.output_node.args[0])  # type: ignore[arg-type]

    @property
    def output_node(self) -> fx.Node:
        return next(n for n in reversed(self.graph.nodes) if n.op == "output")

    def weight(self, node: object) -> Weight | None:
        """The weight a node reads, or None when it is not a weight."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.weights.get(str(node.target))
        return None

    def add_weight(self, weight: Weight) -> str:
        """Hold one more tensor; returns the attribute name for a `get_attr` node. Names stay unique."""
        name = base = "w_" + re.sub(r"\W+", "_", weight.fqn)
        number = 1
        while name in self.weights:
            name, number = f"{base}_{number}", number + 1
        self.weights[name] = weight
        self.graph_module.register_buffer(name, weight.tensor, persistent=False)
        return name

    def get_weight(self, weight: Weight, before: fx.Node) -> fx.Node:
        """Hold a new tensor and read it just before a node."""
        return self.read_weight(self.add_weight(weight), before)

    def read_weight(self, name: str, before: fx.Node) -> fx.Node:
        """Read a tensor the program holds, by attribute name, just before a node."""
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", name)
        node.meta["val"] = fake_like(self.weights[name].tensor, before)
        return node

    def insert(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A call just before a node, with the place of that node in the model and a fake result."""
        return call_before(before, target, args)

    def forget_weights(self, fqns: Collection[str]) -> None:
        """Put a fake tensor in the place of each of these weights, for a dry run without values."""
        for node in self.graph.nodes:
            weight = self.weight(node)
            if weight is not None and weight.fqn in fqns:
                fake = node.meta["val"]
                self.weights[str(node.target)] = dataclasses.replace(weight, tensor=fake)
                self.graph_module._buffers[str(node.target)] = fake

    def fake_mode(self) -> Any:
        """The fake mode whose symbols the graph's sizes use, or None for a graph without tensors."""
        return fake_mode(self.graph)

    def clean(self) -> None:
        """Drop what nothing reads, unused weights too, and recompile."""
        self.graph.eliminate_dead_code(
            is_impure_node=lambda n: n.op in ("placeholder", "output") or writes(n)
        )
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        for name in [n for n in self.weights if n not in used]:
            del self.weights[name]
            self.graph_module._buffers.pop(name, None)
        self.graph.lint()
        self.graph_module.recompile()

    def copy(self) -> Program:
        """A Program whose graph can be rewritten without touching this one; weights stay shared."""
        module = lazy_module(fx.Graph())
        for name, weight in self.weights.items():
            module.register_buffer(name, weight.tensor, persistent=False)
        mapping: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        for node in self.graph.nodes:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = copy.copy(node.meta)
        module.graph = graph
        return dataclasses.replace(
            self,
            graph_module=module,
            weights=dict(self.weights),
            input_names=list(self.input_names),
            notes=list(self.notes),
            updates=dict(self.updates),
        )

    def run(self, *inputs: Any) -> list[Any]:
        """Run the graph as it stands, in plain PyTorch; flat outputs."""
        return list(self.graph_module(*inputs))

    def settle(self, results: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """Write new values of inputs (`updates`) to them; gives the caller's own results.

        None in a new value's place: the target has written it itself.
        """
        for index, place in self.updates.items():
            if results[index] is not None:
                inputs[place].copy_(results[index])
        return [r for i, r in enumerate(results) if i not in self.updates]

    def fingerprint(self) -> str:
        """Hash of the graph's structure and of its weights' names, shapes and dtypes (not their values)."""
        parts = [self.text()]
        parts += [f"{w.fqn}:{tuple(w.tensor.shape)}:{w.tensor.dtype}" for w in self.weights.values()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def text(self) -> str:
        """The graph as a Python module that can be run: `program(weights, *inputs) -> tuple`.

        `weights` maps FQN to tensor. Each line's comment gives the result's dtype and shape and the
        module it came from.
        """
        from .program_text import text

        return text(self)


def weights_fingerprint(program: Program) -> str:
    """Hash of the names, shapes and a sample of the values of the model's own weights."""
    digest = hashlib.sha256()
    for weight in sorted(program.weights.values(), key=lambda w: w.fqn):
        if weight.source or weight.fqn.startswith("constant."):
            continue
        tensor = weight.tensor.detach()
        digest.update(f"{weight.fqn}:{tuple(tensor.shape)}:".encode())
        if not has_values(tensor):
            continue
        flat = tensor.flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].double().cpu()
        digest.update(sample.numpy().tobytes())
        release()  # 64 values of a mapped table can bring in most of it
    return digest.hexdigest()[:16]
