"""The one place that knows how torch 2.11 to 2.15 differ."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

TORCH = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
OLDEST, NEWEST = (2, 11), (2, 15)


def unsupported_torch() -> str | None:
    """Why this torch is outside the range Thresher is tested on, or None."""
    if OLDEST <= TORCH <= NEWEST:
        return None
    span = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    return f"torch {torch.__version__} is outside the tested range {span}."


def source_name(source: Any) -> str:
    """A Dynamo source's expression, such as `L['self']._parameters['weight']`; so too where Dynamo goes by way of a
    module's `__dict__`, as it does for modules whose forward sets attributes."""
    name = source.name
    said: str = name() if callable(name) else name
    return re.sub(r"\.__dict__\[['\"](_parameters|_buffers|_modules)['\"]\]", r".\1", said)


def is_fake(value: Any) -> bool:
    """Whether something is a fake tensor, which has shape and dtype only."""
    return isinstance(value, torch._subclasses.fake_tensor.FakeTensor)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers; fake and meta tensors, as in a dry run, hold none."""
    return not tensor.is_meta and not is_fake(tensor)


def lazy_module(graph: fx.Graph, root: torch.nn.Module | None = None) -> fx.GraphModule:
    """A module whose Python is written when it first runs: most programs are rewritten again before that.

    root: the module that holds what the graph's get_attr nodes name; None where it names nothing.
    """
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(torch.nn.Module() if root is None else root, graph)


def any_autocast() -> bool:
    """Whether autocast is on for any device, in one cheap question."""
    ask = getattr(torch._C, "_is_any_autocast_enabled", None)
    return ask() if ask is not None else torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def unchanged_state() -> Callable[[], bool]:
    """A question: whether what Dynamo compiles for beside a call's arguments is on this thread what it is now: gradients,
    autocast, the default type, modes of functions, determinism, threads, and hooks of all modules."""
    guard = torch._C._dynamo.guards.GlobalStateGuard()
    module: Any = torch.nn.modules.module

    def same() -> bool:
        modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
        return not modes and guard.check() and not module._has_any_global_hook()

    return same


def has_autocast_kernel(overload: Any, device: str) -> bool:
    """Whether autocast on a device converts arguments of an operator."""
    key = f"Autocast{device.upper()}"
    return torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key)


def without_fake_mode() -> Any:
    """A context in which tensors are real, also inside a compiler callback."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def tracing() -> bool:
    """Whether this thread is in the midst of a trace, by Dynamo or by what compiles its graphs."""
    return torch._guards.TracingContext.try_get() is not None


def trace_structured_json(name: str, payload: str) -> None:
    """Attach a JSON artifact to torch's structured trace, where tlparse shows it."""
    from torch._logging import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=lambda: payload,
        expect_trace_id=False,
    )


class _Rest:
    """How many threads want the collector to rest; the last of them wakes it, if the first put it to sleep."""

    def __init__(self) -> None:
        self.lock, self.count, self.ours = threading.Lock(), 0, False


_REST = _Rest()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within the context Python's garbage collector rests: compiling makes many objects and little garbage."""
    with _REST.lock:
        _REST.count += 1
        if _REST.count == 1:
            _REST.ours = gc.isenabled()
            gc.disable()
    try:
        yield
    finally:
        with _REST.lock:
            _REST.count -= 1
            if _REST.count == 0 and _REST.ours:
                gc.enable()


@contextlib.contextmanager
def settings(module: Any, **values: Any) -> Iterator[None]:
    """Within the context one of torch's modules of settings has these. Its own `patch` makes a class at every use, which a
    decoding step feels."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, given in values.items():
            setattr(module, name, given)
        yield
    finally:
        for name, given in before.items():
            setattr(module, name, given)


_MOST_GRAPHS = 1024


@functools.cache
def isolated() -> dict[str, Any]:
    """Arguments of torch.compile that keep its compiled graphs apart from other calls' on the same class.

    Without them models of one class share one limit of recompilations, and, compiled by equal backends, their
    graphs. Empty for a torch that cannot keep them apart.
    """
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def room_for_graphs() -> contextlib.AbstractContextManager[Any]:
    """Within the context a model may have many graphs, and past their limit torch raises.

    Dynamo's usual limit is eight, behind which it runs calls as they are, unsaid.
    """
    return settings(
        torch._dynamo.config,
        recompile_limit=_MOST_GRAPHS,
        accumulated_recompile_limit=_MOST_GRAPHS,
        fail_on_recompile_limit_hit=True,
    )


def free_sizes(apart: bool) -> contextlib.AbstractContextManager[Any]:
    """Within the context a size of one may be one that changes. apart: sizes equal in one call may differ in the next."""
    from torch.fx.experimental import _config

    return settings(_config, backed_size_oblivious=True, use_duck_shape=not apart)


def mark_sizes(tensor: torch.Tensor, changing: tuple[int, ...]) -> None:
    """Say which of a tensor's sizes change from call to call (a program that needs one fixed may still fix it), and let
    Dynamo take the others for constants, also where it makes these symbols."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        marks = _marks(tensor.dim(), changing)
        vars(tensor).update({k: set(v) if isinstance(v, set) else v for k, v in marks.items()})
        return
    _mark(tensor, changing)


def _mark(tensor: torch.Tensor, changing: tuple[int, ...]) -> None:
    for dim in range(tensor.dim()):
        if dim in changing:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        else:
            torch._dynamo.mark_static(tensor, dim)


@functools.cache
def _marks(dims: int, changing: tuple[int, ...]) -> dict[str, Any]:
    """What torch notes on a tensor marked so. A step marks two tensors a layer, for which torch's functions take as long as
    a layer's products."""
    plain = torch.empty((2,) * dims)
    _mark(plain, changing)
    return dict(vars(plain))


def own_symbols() -> contextlib.AbstractContextManager[Any]:
    """Within the context sizes that happen to be equal get a symbol each, not one together."""
    from torch.fx.experimental import _config

    return settings(_config, use_duck_shape=False)


def tensor_handles(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Of each tensor, an address of PyTorch's C++ object, as its C interface takes it. Each keeps its tensor's memory alive
    until `aoti_torch_delete_tensor_object` is called on it."""
    unpack = ctypes.pythonapi.PyCapsule_GetPointer
    unpack.restype, unpack.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return [
        unpack(capsule, None) for capsule in torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    ]
