"""The name under which a rewritten program is kept: a hash of everything that decided it and its proof.

The graph as Dynamo gave it, the values of all weights and example inputs, the sizes that may vary, the recipe,
Thresher's own source, versions, machine and settings. What cannot be told apart by content, such as a pass or an
operator from outside Thresher, has no name: `Unnamed` says which.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name
from torch.utils.weak import WeakIdKeyDictionary

import thresher
from thresher.passes.base import PASSES

from .. import kernels, lowering, ops, passes, runtime
from ..compat import has_values
from ..graph import autocast
from ..graph.capture import Places
from ..graph.nodes import module_fqn, module_types
from ..graph.stamp import Sample, stamp
from ..machine import devices
from ..recipe import Recipe
from ..records.certificate import machine, versions

SWITCH = "THRESHER_REWRITE_CACHE"
_WHERE_ONLY = (SWITCH, "THRESHER_WAIT", "THRESHER_CACHE_DIR", "THRESHER_UPDATE_DOCS", "THRESHER_RTX_PYTHON")
_KNOWN_ROOTS = ("torch", "_operator", "operator", "builtins", "math", "thresher")


class Unnamed(Exception):
    """Why a program cannot be kept, as a sentence."""


def name(
    gm: fx.GraphModule, places: Places, inputs: Sequence[Any] | None, recipe: Recipe, target: str
) -> str:
    """The name of what the recipe makes of this graph. Raises Unnamed."""
    _check_origin(recipe)
    if inputs is None:
        raise Unnamed("There are no real example inputs.")
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())

    add([_own_source(), versions(), machine(), _settings(), target])
    add(recipe.to_dict())
    add(devices.of(torch.device("cpu")).to_dict())
    add([places.names, places.roles, [_sizes(f) for f in places.fakes], environment(places)])
    add(None if places.part is None else [places.part.where, places.part.vocabulary])
    tensors = [id(tensor) for _, tensor in places.weights.values()]
    add([_graph(gm), [tensors.index(t) for t in tensors]])  # equal values are not yet one tensor
    for value in [*(t for _, t in places.weights.values()), *inputs]:
        _hash_value(value, digest)
    return digest.hexdigest()


def environment(places: Places) -> dict[str, list[str]]:
    """What is known and assumed of the sizes that may vary."""
    env = shape_env(places)
    if env is None:
        return {}
    hints = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    return {
        "guards": [str(g.expr) for g in env.guards],
        "fixed": sorted(f"{k} {v}" for k, v in env.replacements.items()),
        "ranges": sorted(f"{k} {v}" for k, v in env.var_to_range.items()),
        "examples": sorted(f"{k} {v}" for k, v in hints.items()),
        "asserts": sorted(str(a) for a in env.deferred_runtime_asserts.items()),
    }


def shape_env(places: Places) -> Any:
    """Dynamo's shape environment, or None."""
    for fake in places.fakes:
        if isinstance(fake, torch._subclasses.fake_tensor.FakeTensor):
            return fake.fake_mode.shape_env
    return None


def _check_origin(recipe: Recipe) -> None:
    if recipe.stats is not None:
        raise Unnamed("The recipe reads statistics from a file.")
    for config in recipe.passes:
        if not type(PASSES[config.name]).__module__.startswith("thresher."):
            raise Unnamed(f"The pass {config.name} is not Thresher's own.")
    for op in ops.all_ops():
        for run in (op.reference, *(p.run for p in op.providers)):
            if not str(getattr(run, "__module__", "")).startswith("thresher."):
                raise Unnamed(f"An implementation of thresher::{op.name} is not Thresher's own.")
        if getattr(op._forced, "name", None) is not None:
            raise Unnamed(f"The provider of thresher::{op.name} is chosen by force(), and not as usual.")


@functools.cache
def _own_source() -> str:
    """Hash of every source file of the package, the C++ ones too."""
    digest = hashlib.sha256()
    for package in (thresher, passes, kernels, lowering, runtime):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".hpp", ".cu"):
                digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def _settings() -> list[str]:
    """Global settings of torch and Thresher that results may depend on."""
    named = {k: v for k, v in os.environ.items() if k.startswith("THRESHER_") and k not in _WHERE_ONLY}
    return [
        torch.version.git_version or "",
        str(sorted(named.items())),
        str(torch.get_default_dtype()),
        torch.get_float32_matmul_precision(),
        str(torch.are_deterministic_algorithms_enabled()),
        str(autocast.ambient()),
        str(torch.backends.mkldnn.enabled),
        str(torch.get_flush_denormal() if hasattr(torch, "get_flush_denormal") else ""),
    ]


def _graph(gm: fx.GraphModule) -> list[Any]:
    """A graph as data: nothing in it depends on the process."""
    nodes: list[Any] = []
    for node in gm.graph.nodes:
        where = [module_fqn(node), module_types(node)]
        if node.op == "call_function":
            target: Any = _function(node.target)
        elif node.op == "get_attr":
            target = _attribute(gm, str(node.target))
        elif node.op in ("placeholder", "call_method", "output"):
            target = str(node.target)
        else:
            raise Unnamed(f"The graph holds a {node.op} of {node.target}.")
        nodes.append([node.op, node.name, target, _data(node.args), _data(node.kwargs), where])
    return nodes


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    found: Any = functools.reduce(getattr, path.split("."), gm)
    if isinstance(found, fx.GraphModule):
        return _graph(found)
    digest = hashlib.sha256()
    _hash_value(found, digest)
    return digest.hexdigest()


def _function(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher order {target.name()}"
    try:
        text = str(_get_qualified_name(target))
    except Exception as reason:
        raise Unnamed(f"The graph calls {target}, whose code has no name.") from reason
    if "<" in text or text.partition(".")[0] not in _KNOWN_ROOTS:
        raise Unnamed(f"The graph calls {text}, whose code is not torch's.")
    return text


def _data(given: Any) -> Any:
    if isinstance(given, fx.Node):
        return f"%{given.name}"
    if given is None or isinstance(given, (bool, int, float, str)):
        return [type(given).__name__, repr(given)]
    if isinstance(given, (tuple, list)):
        return [type(given).__name__, [_data(v) for v in given]]
    if isinstance(given, Mapping):
        return ["dict", [[_data(k), _data(v)] for k, v in given.items()]]
    if isinstance(given, slice):
        return ["slice", [_data(v) for v in (given.start, given.stop, given.step)]]
    plain = (
        torch.dtype, torch.device, torch.layout, torch.memory_format, torch.SymInt, torch.SymFloat, torch.SymBool,
        complex, enum.Enum, type(...),
    )  # fmt: skip
    if isinstance(given, plain):
        return [type(given).__name__, str(given)]
    raise Unnamed(f"The graph holds {given!r} as an argument.")


def _sizes(fake: Any) -> Any:
    if isinstance(fake, torch.Tensor):
        return [
            str(fake.dtype),
            str(tuple(fake.shape)),
            str(fake.stride()),
            str(fake.device),
            fake.requires_grad,
        ]
    return _data(fake)


def _hash_value(value: Any, digest: Any) -> None:
    if not isinstance(value, torch.Tensor):
        digest.update(json.dumps(_data(value)).encode())
        return
    if value.device.type != "cpu" or not has_values(value):
        raise Unnamed("A tensor is not in CPU memory.")
    digest.update(f"{value.dtype}{tuple(value.shape)}{value.stride()}".encode())
    if value.numel():
        digest.update(_of_values(value))


_KNOWN: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # a model's graphs share its weights, which are many bytes


def _of_values(tensor: torch.Tensor) -> bytes:
    """Hash of a tensor's values; it is kept until something is seen to happen to the tensor."""
    now, known = stamp(tensor), _KNOWN.get(tensor)
    if known is not None and known[0] == now and not known[1].changed():
        return known[2]
    flat = tensor.detach().contiguous().reshape(-1)
    found = hashlib.sha256(memoryview(flat.view(torch.uint8).numpy())).digest()  # type: ignore[arg-type]
    if not tensor.is_inference():
        _KNOWN[tensor] = (now, Sample(tensor), found)
    return found
