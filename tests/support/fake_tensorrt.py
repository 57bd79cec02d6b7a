"""A stand-in for TensorRT's Python that computes: an ONNX file in an engine's place, run by ONNX Runtime."""

import ctypes

import numpy as np
import onnxruntime


class FakeEngine:
    """An ONNX file in place of an engine, run by ONNX Runtime on the addresses that a context was given."""

    def __init__(self, data):
        self.session = onnxruntime.InferenceSession(data)
        self.given, self.returned = ([v.name for v in side] for side in
                                     (self.session.get_inputs(), self.session.get_outputs()))  # fmt: skip
        self.types = {v.name: v.type for v in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.given) + len(self.returned)
        self.shapes, self.addresses, self.results = {}, {}, None

    def get_tensor_name(self, i):
        return [*self.returned[::-1], *self.given][i]  # an engine lists them as it likes

    def get_tensor_mode(self, name):
        return FakeTensorRT.TensorIOMode.INPUT if name in self.given else FakeTensorRT.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        names = {"float": "FLOAT", "float16": "HALF", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
        return type("DataType", (), {"name": names[self.types[name][len("tensor(") : -1]]})

    def create_execution_context(self):
        return self

    def set_input_shape(self, name, shape):
        self.shapes[name], self.results = shape, None

    def set_tensor_address(self, name, address):
        assert address
        self.addresses[name] = address

    def _array(self, name, shape):
        kind = {"FLOAT": "f4", "HALF": "f2", "INT64": "i8", "INT32": "i4", "BOOL": "?"}
        dtype = np.dtype(kind[self.get_tensor_dtype(name).name])
        count = int(np.prod(shape))
        held = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.addresses[name])
        return np.frombuffer(held, dtype, count).reshape(shape)

    def get_tensor_shape(self, name):
        if self.results is None:
            feeds = {n: self._array(n, self.shapes[n]) for n in self.given}
            self.results = dict(zip(self.returned, self.session.run(self.returned, feeds)))
        return self.results[name].shape

    def execute_async_v3(self, stream):
        for name, array in self.results.items():
            self._array(name, array.shape)[...] = array
        return True


class FakeTensorRT:
    """As much of TensorRT's Python as running an engine takes."""

    __version__ = "of this test"

    class TensorIOMode:
        INPUT, OUTPUT = "input", "output"

    class Logger:
        ERROR = 1

        def __init__(self, level):
            pass

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, data):
            return FakeEngine(data) if data else None
