"""Tracing and compiling, so that other threads may run and compile meanwhile.

torch's tracers share fake tensors, symbols and settings of the process. Dynamo therefore compiles under one lock;
whatever of ours traces or compiles at a call, long after Dynamo is done, does so under the same lock: `compiling`.
torch's own `make_fx` also replaces `nn.Module.__call__` and `__getattr__` for the whole process while it runs, and
compiled functions called in other threads raise. `trace` traces functions that call no modules and replaces nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental import proxy_tensor


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Within the context no other thread traces or compiles with torch. May be entered again by the thread in it.

    Take it before any lock of one's own, never inside: Dynamo holds it around all that a backend does.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock, _said():
        yield


def _said() -> contextlib.AbstractContextManager[Any]:
    """`torch.compiler.is_compiling()` is true meanwhile: else a compiled function that another thread calls takes a
    trace that runs anywhere in the process for one around itself, and raises."""
    said = getattr(torch.compiler, "_compile_session_context", None)
    return said() if said is not None else contextlib.nullcontext()


def trace(run: Callable[..., Any], values: Sequence[Any], before_dispatch: bool = True) -> fx.GraphModule:
    """The graph of `run(*values)`, as `make_fx(run, pre_dispatch=before_dispatch)(*values)` gives it.

    run: must call no `nn.Module`. values: fake tensors and symbolic sizes; their fake mode is to be entered.
    """
    with compiling():
        maker = _maker(before_dispatch)
        if maker is None:
            return proxy_tensor.make_fx(run, pre_dispatch=before_dispatch)(*values)
        return maker.trace(run, *values)


def _maker(before_dispatch: bool) -> Any:
    """torch's maker of graphs, whose tracer patches nothing; None for a torch whose maker is built otherwise."""
    base: Any = getattr(proxy_tensor, "_MakefxTracer", None)
    if not hasattr(base, "_construct_modes_with_fx_tracer"):
        return None

    class Maker(base):  # type: ignore[misc]
        def _construct_modes_with_fx_tracer(self, fx_tracer: Any) -> None:
            super()._construct_modes_with_fx_tracer(fx_tracer)
            fx_tracer.trace = lambda root, concrete_args=None: _record(fx_tracer, root, concrete_args)

    try:  # as make_fx has them
        return Maker(None, "real", False, before_dispatch, False, False, True)
    except TypeError:
        return None


def _record(tracer: Any, root: Callable[..., Any], concrete_args: Any) -> fx.Graph:
    """`fx.Tracer.trace` for a function that calls no modules: without its patches of `nn.Module`, builtins and globals."""
    tracer.root, tracer.tensor_attrs = torch.nn.Module(), {}
    tracer.graph = fx.Graph(tracer_cls=type(tracer))
    function, arguments = tracer.create_args_for_root(root, False, concrete_args)
    tracer.create_node("output", "output", (tracer.create_arg(function(*arguments)),), {})
    tracer.submodule_paths = None
    return tracer.graph
