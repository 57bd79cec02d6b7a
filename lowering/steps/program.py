"""A step in C++, called from Python: prelude, room for results, one call."""

from __future__ import annotations

import ctypes
import functools
import logging
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from thresher.errors import ThresherError
from thresher.graph.nodes import value
from thresher.kernels import native
from thresher.machine import huge_pages

from ..sizes import Sizes
from .operations import TYPES, Unfit
from .tape import build

_log = logging.getLogger(__name__)
_KERNELS = (
    ("wna16", "wna16_linear_f32"), ("wna16", "wna16_dequantize_f32"), ("wna16_bf16", "wna16_bf16_linear"),
    ("wna16_bf16", "wna16_bf16_few"),
    ("nvfp4_linear", "nvfp4_linear"), ("nvfp4_bf16", "nvfp4_bf16_linear"), ("nvfp4_quantize", "nvfp4_dequantize"),
    ("kv_attention", "kv_attention"), ("hadamard", "hadamard_f32"),
)  # fmt: skip
_TORCH = ("aoti_torch_create_tensor_from_blob", "aoti_torch_delete_tensor_object", "aoti_torch_cpu_mm_out",
          "aoti_torch_cpu_addmm_out")  # fmt: skip
"""Functions of PyTorch's C interface for compiled programs, which it keeps from version to version."""


@functools.cache
def _library() -> Any:
    """The C++ of steps, given the kernels that it calls. Raises RuntimeError, OSError or AttributeError without."""
    library = native.load("step")
    pytorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    found = [getattr(native.load(name), function) for name, function in _KERNELS]
    found += [getattr(pytorch, function) for function in _TORCH]
    pointers = (ctypes.c_void_p * len(found))(*(ctypes.cast(f, ctypes.c_void_p).value for f in found))
    library.step_functions(pointers, ctypes.c_int64(len(found)))
    library.step_make.restype = ctypes.c_void_p
    library.step_make.argtypes = [ctypes.c_void_p] + [ctypes.c_int64] * 4 + [ctypes.c_void_p, ctypes.c_int64]
    library.step_free.argtypes = [ctypes.c_void_p]
    library.step_run.restype = ctypes.c_char_p
    library.step_run.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int]
    return library


def lower(graph: fx.Graph) -> Callable[..., list[Any]] | None:
    """A callable of the values of the graph's placeholders, or None where it is not a step that C++ runs.

    graph: lowered, its weights placeholders, on a CPU, with fake tensors.
    """
    try:
        made = Step(graph)
    except Unfit as reason:
        _log.info("not a step in C++: %s", reason)
        return None
    except (RuntimeError, OSError, AttributeError) as reason:
        _log.info("no steps in C++ on this machine: %s", reason)
        return None
    return made


class Step:
    """Called with the values of the graph's placeholders, in order; safe to call from several threads.

    tape, sizes: of the graph. rooms: the results' shapes from the symbols' values. types: the results' types, also as C++
    has them. fixed: the weights described. library,
    handle: for `step_run`.
    """

    def __init__(self, graph: fx.Graph):
        tape = build(graph)
        places = [n for n in graph.nodes if n.op == "placeholder"]
        self.tape, self.library, self.sizes = tape, _library(), Sizes(places)
        self.rooms = _shapes(tape.made, self.sizes.symbols)
        self.types = [(fake.dtype, TYPES[fake.dtype]) for fake in tape.made]
        code, constants = array("q", tape.code), array("d", tape.constants)
        self.handle = ctypes.c_void_p(
            self.library.step_make(code.buffer_info()[0], len(code), tape.values, tape.slots, len(tape.external),
                                    constants.buffer_info()[0], len(constants)))  # fmt: skip
        fixed = [
            what if kind == "made" else value(places[what]) for kind, what in tape.external[: tape.fixed]
        ]
        self.fixed = array("q", [n for t in fixed for n in (TYPES[t.dtype], t.dim(), *t.shape)])
        self._shapes_of_fixed = [(t.dtype, t.shape) for t in fixed]
        self._seen: array[int] = array("Q")  # where the weights lay when they were last looked at

    def __del__(self) -> None:
        step = getattr(self, "handle", None)
        if step is not None:
            self.library.step_free(step)

    def __call__(self, *given: Any) -> list[Any]:
        tape = self.tape
        early = tape.prelude.forward(*[given[i] for i in tape.reads])
        shapes = self.rooms(*self.sizes.of(given))
        made = [torch.empty(shape, dtype=kind) for shape, (kind, _) in zip(shapes, self.types)]
        sources = {"place": given, "early": early, "result": made}
        tensors = [what if kind == "made" else sources[kind][what] for kind, what in tape.external]
        pointers = array("Q", [t.data_ptr() for t in tensors])
        if pointers[: tape.fixed] != self._seen:
            self._look(tensors, pointers)
        described = self.fixed[:]
        for index in range(tape.fixed, len(tensors)):
            kind, what = tape.external[index]
            if kind == "result":
                described.extend((self.types[what][1], len(shapes[what]), *shapes[what]))
                continue
            tensor = tensors[index]
            if not tensor.is_contiguous():
                tensors[index] = tensor = self.ordered(tensor, kind, what)
                pointers[index] = tensor.data_ptr()
            shape = tensor.shape
            described.extend((TYPES[tensor.dtype], len(shape), *shape))
        self.run(pointers, described, early[tape.early :])
        return [what if kind == "known" else sources[kind][what] for kind, what in tape.results]

    def look(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise ThresherError where weights are of other types or sizes than the step was made for."""
        weights = tensors[: self.tape.fixed]
        for tensor, (kind, shape) in zip(weights, self._shapes_of_fixed):
            if tensor.dtype != kind or tensor.shape != shape:
                raise ThresherError(
                    f"A weight is {tensor.dtype} {tuple(tensor.shape)}, and the step was made for {kind} {tuple(shape)}."
                )
        huge_pages.move(weights)

    def _look(self, tensors: list[torch.Tensor], pointers: array[int]) -> None:
        """Weights lie elsewhere than at the last call: see that they are still laid out as the code reads them."""
        ordered = True
        self.look(tensors)
        for index in range(self.tape.fixed):
            if not tensors[index].is_contiguous():
                ordered = False
                tensors[index] = self.ordered(tensors[index], *self.tape.external[index])
                pointers[index] = tensors[index].data_ptr()
        self._seen = pointers[: self.tape.fixed] if ordered else array("Q")

    def run(self, pointers: array[int], described: array[int], numbers: Sequence[int]) -> None:
        """Run the code over values that lie at `pointers` and are as `described`; see `step_run`. Raises ThresherError."""
        given = array("q", numbers)
        failed = self.library.step_run(
            self.handle, pointers.buffer_info()[0], described.buffer_info()[0], given.buffer_info()[0],
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise ThresherError(f"A step in C++ failed: {failed.decode()}.")

    def ordered(self, tensor: torch.Tensor, kind: str, what: int) -> torch.Tensor:
        """The tensor laid out in order. Raises ThresherError for one that is written in place and is not."""
        if tensor.is_contiguous():
            return tensor
        if kind == "place" and what in self.tape.written:
            raise ThresherError("A cache that is written in place has to be contiguous.")
        return tensor.contiguous()


def _shapes(made: Sequence[torch.Tensor], symbols: Sequence[Any]) -> Callable[..., Sequence[Sequence[int]]]:
    """The results' shapes as a function of the symbols' values."""
    import sympy

    shapes = [[s.node.expr if isinstance(s, torch.SymInt) else s for s in fake.shape] for fake in made]
    size: Any  # a number or an expression
    for size in (s for shape in shapes for s in shape):
        free: set[Any] = getattr(size, "free_symbols", set())
        if not free <= set(symbols) or not (not free or size.is_polynomial(*free)):
            raise Unfit(f"No call's inputs say {size}, a size of a result.")
    return sympy.lambdify(list(symbols), shapes, "math")
