"""Runs an exported model and compares it with what the Program gave."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thresher.errors import ThresherError

_GPU_ALONE = ("PackedMultiHeadAttention",)
_MOST = 1 << 28  # bytes of a model that the reference evaluator, which is slow, is still tried on


def runner(path: str | Path) -> tuple[str, Callable[[Mapping[str, torch.Tensor]], Any]] | str:
    """What can run a model here, ONNX Runtime before ONNX's own reference, or why nothing can.

    Of an operator that has a kernel for GPUs alone, its documented meaning runs, and the name says so.
    """
    with _without_gpu_operators(Path(path)) as (runnable, replaced):
        found = _runner(runnable)
    if isinstance(found, str) or not replaced:
        return found
    return f"{found[0]}, {replaced} as documented", found[1]


@contextlib.contextmanager
def _without_gpu_operators(path: Path) -> Iterator[tuple[Path, str]]:
    """The model, or a copy in which functions stand for operators that no CPU runs; and which operators those are."""
    import onnx
    import onnx_ir as ir

    from .functions import add_functions

    model = onnx.load(str(path), load_external_data=False)
    names = set()
    for function in model.functions:
        for node in function.node:
            if node.op_type in _GPU_ALONE:
                names.add(node.op_type)
                node.domain = "thresher"
                function.opset_import.append(onnx.helper.make_opsetid("thresher", 1))
    if not names:
        yield path, ""
        return
    changed = ir.from_proto(model)
    add_functions(changed, names)
    copy = path.with_name(path.name + ".check")  # beside it, where its external data is
    try:
        ir.save(changed, str(copy))
        yield copy, " and ".join(sorted(names))
    finally:
        copy.unlink(missing_ok=True)


_ABSENT = "onnxruntime is not installed"


def _opened(path: Path) -> Any:
    """A session of ONNX Runtime on the CPU, or why there is none."""
    try:
        import onnxruntime
    except ImportError:
        return _ABSENT
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # where it fuses blocked DequantizeLinear with MatMul it would round activations to int8 by default
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as reason:
        return f"ONNX Runtime on the CPU: {str(reason).splitlines()[0]}"


def _runner(path: Path) -> tuple[str, Callable[[Mapping[str, torch.Tensor]], Any]] | str:
    session = _opened(path)
    if not isinstance(session, str):
        return "onnxruntime", lambda inputs: _in_onnxruntime(session, inputs)
    reasons = [session]
    if path.stat().st_size > _MOST:
        return f"{'; '.join(reasons)}; onnx.reference: the model is too large to be run in Python"
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(str(path))
    except Exception as reason:
        return f"{'; '.join(reasons)}; onnx.reference: {reason}"
    return "onnx.reference", lambda inputs: evaluator.run(None, {k: _array(v) for k, v in inputs.items()})


def _in_onnxruntime(session: Any, inputs: Mapping[str, torch.Tensor]) -> list[Any]:
    """The results of a call as arrays, those in bf16 as tensors: NumPy has no bf16."""
    import onnx
    from onnxruntime import OrtValue

    narrow = {i.name for i in session.get_inputs() if i.type == "tensor(bfloat16)"}

    def given(name: str, tensor: torch.Tensor) -> Any:
        if name not in narrow:
            return OrtValue.ortvalue_from_numpy(_array(tensor))
        bits = tensor.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
        return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)

    found = session.run_with_ort_values(None, {name: given(name, tensor) for name, tensor in inputs.items()})
    half = onnx.TensorProto.BFLOAT16
    return [
        v.numpy() if not v.is_tensor() or v.element_type() != half else torch.from_dlpack(v).clone()
        for v in found
    ]


def compare(
    path: str | Path, calls: Sequence[tuple[Mapping[str, torch.Tensor], Sequence[Any], torch.Tensor | None]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """One record for each call, and notes about what could not be run.

    Raises ThresherError where ONNX Runtime takes the file and fails on the first call, its own example.

    calls: inputs by name, the Program's results, and a bool [B, S] mask of real tokens: results of a packed
    program are undefined elsewhere. None compares all.
    """
    found = runner(path)
    if isinstance(found, str):
        return [], [f"The file was checked but not run. {found}."]
    engine, run = found
    records: list[dict[str, Any]] = []
    for inputs, expected, real in calls:
        sizes = {name: list(t.shape) for name, t in inputs.items()}
        try:
            actual = run(inputs)
        except Exception as reason:
            said = f"{engine} failed at sizes {sizes}: {str(reason).splitlines()[0]}"
            if not records and engine.startswith("onnxruntime"):
                raise ThresherError(
                    f"The file does not run on its own example: {said}. It is left at {path}."
                ) from None
            return records, [said]
        worst = (0.0, 0.0)
        for a, e in zip(actual, expected, strict=True):
            if isinstance(e, torch.Tensor) and e.numel():
                worst = max(worst, difference(_tensor(a), e, real), key=lambda w: w[1])
        records.append({"engine": engine, "sizes": sizes, "absolute": worst[0], "relative": worst[1]})
    return records, []


def difference(
    actual: torch.Tensor, expected: torch.Tensor, real: torch.Tensor | None
) -> tuple[float, float]:
    """Largest difference, absolute and relative to the largest expected value; infinite where shapes differ."""
    if actual.shape != expected.shape:
        return float("inf"), float("inf")
    if real is not None:
        for batch, sequence in ((0, 1), (0, 2)):  # [B, S, ...], or keys and values [B, H, S, D]
            if (
                expected.dim() > max(2, sequence)
                and expected.shape[sequence] == real.shape[1]
                and expected.shape[batch] == real.shape[0]
            ):
                actual, expected = (t.movedim((batch, sequence), (0, 1))[real] for t in (actual, expected))
                break
        else:
            actual, expected = actual[real[:, 0]], expected[real[:, 0]]
    actual, expected = actual.double(), expected.double()
    if not expected.numel():
        return 0.0, 0.0
    gap = (actual - expected).abs()
    gap = torch.where(actual == expected, 0.0, gap)  # equal infinities
    largest = expected[expected.isfinite()].abs().max().clamp_min(1e-30) if expected.isfinite().any() else 1.0
    worst = float(gap.max())
    return worst, float(gap.max() / largest)


def _tensor(found: Any) -> torch.Tensor:
    if isinstance(found, torch.Tensor):
        return found
    array = np.asarray(found)
    if array.dtype.name == "bfloat16":  # of ml_dtypes, which torch does not know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: torch.Tensor) -> np.ndarray:
    with contextlib.suppress(TypeError):
        return tensor.detach().cpu().numpy()
    return tensor.detach().float().cpu().numpy()
