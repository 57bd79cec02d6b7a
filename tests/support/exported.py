"""What tests of ONNX files share: to run one by ONNX Runtime or by ONNX's reference, and to compare its results."""

import numpy as np
import onnxruntime
import torch

ANY = torch.export.Dim.DYNAMIC


GENERATOR = torch.Generator().manual_seed(0)


def ort(path, inputs):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.qdq_matmulnbits_accuracy_level", "1"
    )  # its default rounds activations
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {k: v.numpy() for k, v in inputs.items()})


def reference(path, inputs):
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(str(path)).run(None, {k: v.numpy() for k, v in inputs.items()})


def close(actual, expected, limit=1e-5):
    for a, e in zip(actual, expected, strict=True):
        a = torch.from_numpy(np.asarray(a))
        assert a.shape == e.shape and a.dtype == e.dtype
        if e.dtype.is_floating_point:
            scale = e.abs().max().clamp_min(1e-30)
            assert (a - e).abs().max() / scale <= limit
        else:
            assert torch.equal(a, e)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR)
