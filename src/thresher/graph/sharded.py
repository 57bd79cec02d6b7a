"""Tensor parallelism: a graph over DTensors, seen as one rank sees it.

    linear(x, W) with W a DTensor   becomes   linear(x, this rank's part of W), and an all_reduce where rows were split

Dynamo hands over weights as DTensors, with `from_local`, `redistribute` and `to_local` around each parallel linear.
Tracing these on local tensors leaves plain operators and functional collectives: a graph like any other, which passes
rewrite rank by rank. Each rank packs its own part of a weight.

Understood are the layouts of `ColwiseParallel` and `RowwiseParallel` on a mesh of one dimension, with as many rows or
columns on every rank. Anything else computed on DTensors is refused by name, as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import CaptureError
from .stamp import Stamp, stamp

if TYPE_CHECKING:
    from .program import Program

_PRIMITIVES = ("prim_from_local", "prim_redistribute", "prim_to_local")
METHODS = ("redistribute", "to_local")
_COLLECTIVES = ("_c10d_functional::all_reduce", "_c10d_functional::all_gather_into_tensor",
                "_c10d_functional::reduce_scatter_tensor")  # fmt: skip


def is_sharded(known: Any) -> bool:
    """Whether something is a DTensor; False without torch.distributed, which is then not imported."""
    if not isinstance(known, torch.Tensor) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(known, DTensor)


def local(known: Any) -> Any:
    """This rank's part of a DTensor, the very tensor it holds; anything else as it is."""
    return known._local_tensor if is_sharded(known) else known


class Parts:
    """This rank's parts of a model's live weights, by name. A part is another tensor once its DTensor was changed.

    Writing to a DTensor in place counts up its own version and not its part's, so packed weights would go stale.
    """

    def __init__(self) -> None:
        self._any: bool | None = None
        self._held: dict[str, tuple[torch.Tensor, Stamp, torch.Tensor]] = {}

    def of(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The live weights with each DTensor replaced by this rank's part, by FQN."""
        if self._any is None:
            self._any = any(map(is_sharded, weights.values()))
        return {fqn: self._part(fqn, t) for fqn, t in weights.items()} if self._any else weights

    def _part(self, fqn: str, tensor: torch.Tensor) -> torch.Tensor:
        if not is_sharded(tensor):
            return tensor
        now = stamp(tensor)
        known = self._held.get(fqn)
        if known is None or known[1] != now:
            part = local(tensor)
            self._held[fqn] = known = (tensor, now, part if known is None else part.detach())
        return known[2]


def gathered(node: fx.Node) -> bool:
    """Whether a graph's argument is a weight of a module that FSDP manages."""
    argument = node.meta.get("grapharg")
    known = getattr(getattr(argument, "source", None), "guard_source", None)
    return "FSDP" in str(known() if callable(known) else known)


def is_object(known: Any) -> bool:
    """Whether a graph's argument is an object behind a tensor's hooks, such as a device mesh."""
    return isinstance(known, torch._library.fake_class_registry.FakeScriptObject)


class Local:
    """A graph's arguments as one rank has them. kept: which of the arguments these are; parts: their fake values."""

    def __init__(self, fakes: Sequence[Any], weights: Sequence[int]):
        for index, known in enumerate(fakes):
            if is_sharded(known) and index not in weights:
                raise CaptureError(
                    f"Input {index} of the graph is a DTensor. Pass plain tensors: each rank's part, or the whole."
                )
        self._fakes = fakes
        self.kept = [i for i, f in enumerate(fakes) if not is_object(f)]
        self.parts = [local(fakes[i]) for i in self.kept]

    def whole(self, parts: Sequence[Any]) -> list[Any]:
        """The graph's own arguments, DTensors and objects among them, around `parts`."""
        own = [f.real_obj if is_object(f) else None for f in self._fakes]
        for index, part in zip(self.kept, parts):
            known = self._fakes[index]
            own[index] = _like(part, known) if is_sharded(known) else part
        return own


def _like(part: torch.Tensor, known: Any) -> Any:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    spec = known._spec
    mesh = getattr(spec.mesh, "real_obj", spec.mesh)
    return DTensor(
        part, DTensorSpec(mesh, spec.placements, tensor_meta=spec.tensor_meta), requires_grad=False
    )  # type: ignore[call-arg]


def call(target: Callable[..., Any] | str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator of the graph that takes a DTensor. Raises CaptureError for one whose layout is not understood."""
    if callable(target) and getattr(target, "__name__", "") in _PRIMITIVES:
        return target(*args, **kwargs)
    if target is torch._C._nn.linear:
        given = dict(zip(("input", "weight", "bias"), args)) | kwargs
        return _linear(given["input"], given["weight"], given.get("bias"))
    name = getattr(target, "__name__", str(target))
    raise CaptureError(
        f"{name} is computed on a DTensor; only linears of ColwiseParallel and RowwiseParallel are understood there. "
        "Inductor compiles such a graph as it is."
    )


def takes(args: Any, kwargs: Any) -> bool:
    """Whether a DTensor is among the arguments."""
    return any(map(is_sharded, torch.utils._pytree.tree_leaves((args, kwargs))))


def _linear(x: Any, weight: Any, bias: Any) -> Any:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    known = [t for t in (x, weight, bias) if t is not None]
    if not all(map(is_sharded, known)) or any(t.device_mesh.ndim != 1 for t in known):
        raise CaptureError(
            "A linear mixes DTensors and plain tensors, or its mesh has several dimensions. Inductor compiles it."
        )
    mesh, last = x.device_mesh, Shard(x.dim() - 1)
    places = tuple(t.placements[0] for t in known[:2])
    beside = None if bias is None else bias.placements[0]
    result: Any
    if (
        places == (Replicate(), Shard(0))
        and weight.shape[0] % mesh.size() == 0
        and beside in (None, Shard(0))
    ):
        result = last
    elif places == (last, Shard(1)) and weight.shape[1] % mesh.size() == 0 and beside in (None, Replicate()):
        result = Partial()
    elif places == (Replicate(), Replicate()) and beside in (None, Replicate()):
        result = Replicate()
    else:
        raise CaptureError(
            f"A linear's input lies as {places[0]} and its weight {tuple(weight.shape)} as {places[1]} over "
            f"{mesh.size()} ranks; understood are ColwiseParallel and RowwiseParallel in equal parts."
        )
    linear = torch.nn.functional.linear
    if bias is not None and isinstance(
        result, Partial
    ):  # added up with the products, so each rank adds its share
        made = linear(local(x), local(weight)) + local(bias) / mesh.size()
    else:
        made = linear(local(x), local(weight), None if bias is None else local(bias))
    return DTensor.from_local(made, mesh, [result], run_check=False)


def group_of(program: Program) -> Any:
    """The process group a program's collectives talk to, or None when it has none."""
    for node in program.nodes():
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _COLLECTIVES:
            name: Any = node.args[-1]  # a type of torch's own on some versions, text on others
            return torch.distributed.distributed_c10d._resolve_process_group(name)
    return None


def agreed(error: float, program: Program) -> float:
    """The largest of all ranks' errors: a rewrite is kept by all or by none, or their collectives would not meet."""
    group = group_of(program)
    if group is None:
        return error
    largest = torch.tensor(error if error == error else float("inf"))
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    return float(largest)
