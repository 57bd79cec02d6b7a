"""Stand-ins with which torch-tensorrt-rtx builds engines on a machine without a GPU; nothing is run.

    python fake_cuda.py SM89 SM120    # one JSON line for each engine: part, capability, bytes, kernels

It asks torch.cuda for a device at import and later, wants its C++ runtime, which links CUDA, and loads each engine
it has built. The first is answered, the second hidden, and the third skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from unittest import mock

import torch


def load(capability=(12, 0)):
    """torch_tensorrt, on a torch that sees no GPU."""
    properties = types.SimpleNamespace(
        name="no GPU", major=capability[0], minor=capability[1], total_memory=24 << 30, multi_processor_count=84,
        warp_size=32, is_integrated=0, uuid="GPU-0",
    )  # fmt: skip
    answers = dict(
        get_device_capability=capability, get_device_properties=properties, get_device_name=properties.name,
        current_device=0, device_count=1, mem_get_info=(20 << 30, 24 << 30), empty_cache=None, synchronize=None,
    )  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = types.SimpleNamespace
    is_file = os.path.isfile
    with mock.patch("os.path.isfile", lambda path: "libtorchtrt" not in str(path) and is_file(path)):
        import torch_tensorrt
    device = torch_tensorrt._Device.Device
    to = device.to
    device.to = lambda self, kind: torch.device("cpu") if kind is torch.device else to(self, kind)
    return torch_tensorrt


class Serialized:
    """Stands for the runtime, which needs a GPU: hands an engine's bytes back untouched."""

    def __init__(self, payload):
        self.payload = payload

    def deserialize_cuda_engine(self, payload):
        return Serialized(bytes(payload))

    def serialize(self):
        return self.payload


@contextlib.contextmanager
def building_for(sm):
    """Engines for this capability, which are not loaded."""
    import tensorrt
    import torch_tensorrt.dynamo.conversion._TRTInterpreter as interpreter

    class Library:
        def __getattr__(self, name):
            return Serialized if name == "Runtime" else getattr(tensorrt, name)

    real = interpreter.TRTInterpreter._populate_trt_builder_config

    def populate(self, *args, **kwargs):
        config = real(self, *args, **kwargs)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(tensorrt.ComputeCapability, sm), 0)
        return config

    with (
        mock.patch.object(interpreter, "trt", Library()),
        mock.patch.object(interpreter.TRTInterpreter, "_populate_trt_builder_config", populate),
    ):
        yield


def body():
    """The packed body of one Llama layer in half precision."""
    import captures
    import masks
    import zoo
    from tiny_llama import make

    from thresher import backend
    from thresher.recipe import Recipe

    inputs = zoo.tokens(masks.right((5, 8, 12)))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    program = captures.export(make(num_hidden_layers=1, hidden_size=64).half(), inputs, dynamic=True)
    recipe = Recipe.of("exact", verify=False)
    return backend.run_pipeline(program, recipe, captures.arguments(program, inputs))[0]


def main(capabilities):
    load()
    from thresher.lowering.tensorrt import converters
    from thresher.lowering.tensorrt.build import kernels
    from thresher.lowering.tensorrt.graph_parts import cut
    from thresher.lowering.tensorrt.profiles import Ranges

    program = body()
    ranges = Ranges(program, {})
    _, parts, _ = cut(program)
    for sm in capabilities:
        for part in parts:
            with building_for(sm):
                plan = converters.serialize(part.program, ranges.shapes(part.program))
            names = [k.name for k in kernels(plan)]
            print(json.dumps({"part": part.name, "sm": sm, "bytes": len(plan), "kernels": names}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
