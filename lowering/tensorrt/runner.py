"""Runs an engine by TensorRT's own Python: `tensorrt` or `tensorrt_rtx`, whichever this process can import.

Its shapes, addresses and stream are tested with a stand-in for that package; an engine itself needs a GPU and is **not
verified**.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from thresher.errors import ThresherError

from . import build as tensorrt_build
from .profiles import check_sizes

_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


class Runner:
    """A loaded engine, called with its inputs in the order of `names`. shapes: its profiles, by input."""

    def __init__(self, plan: str | Path, names: Sequence[str], shapes: Mapping[str, Any]):
        flavor, self._trt = tensorrt_build.library()
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(Path(plan).read_bytes())
        if self._engine is None:
            raise ThresherError(
                f"{flavor} {self._trt.__version__} cannot load {plan}, which was built for another GPU or by another "
                "version. Remove it, and it is built anew."
            )
        self._context = self._engine.create_execution_context()
        self._lock = threading.Lock()  # a context runs one call at a time
        self._names, self._shapes = list(names), shapes
        held = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = self._trt.TensorIOMode
        self._inputs = [n for n in held if self._engine.get_tensor_mode(n) == mode.INPUT]
        self._outputs = _in_order([n for n in held if self._engine.get_tensor_mode(n) == mode.OUTPUT])

    def __call__(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors = dict(zip(self._names, given, strict=True))
        with self._lock:
            # until the call is on the stream: the allocator then knows the order
            alive: list[torch.Tensor] = []
            for name in self._inputs:
                tensor = tensors[name].contiguous()
                if name in self._shapes:
                    check_sizes(name, tensor.shape, self._shapes[name])
                self._context.set_input_shape(name, tuple(tensor.shape))
                self._set(name, tensor, alive)
            results = []
            for name in self._outputs:
                shape = tuple(self._context.get_tensor_shape(name))
                if any(n < 0 for n in shape):
                    raise ThresherError(f"The size of the engine's result {name} depends on data: {shape}.")
                kind = _TYPES[self._engine.get_tensor_dtype(name).name]
                results.append(torch.empty(shape, dtype=kind, device=given[0].device))
                self._set(name, results[-1], alive)
            if not self._context.execute_async_v3(self._stream(given[0].device)):
                raise ThresherError("TensorRT could not start the engine; its log says why.")
        return tuple(results)

    def _set(self, name: str, tensor: torch.Tensor, alive: list[torch.Tensor]) -> None:
        """An empty tensor has no address, and TensorRT wants one."""
        held = tensor if tensor.numel() else torch.empty(16, dtype=torch.uint8, device=tensor.device)
        alive.append(held)
        self._context.set_tensor_address(name, held.data_ptr())

    @staticmethod
    def _stream(device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _in_order(names: list[str]) -> list[str]:
    """Results by their number in their names (`output_0`, `output_1`): an engine lists them as it likes."""
    return sorted(names, key=lambda name: int(name.rsplit("_", 1)[1]))
