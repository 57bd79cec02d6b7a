"""What a benchmark was measured on: the machine, and the versions of what it ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "torch",
    "thresher",
    "transformers",
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt-rtx",
    "numpy",
)


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory and GPUs."""
    cpu = platform.processor() or platform.machine()
    memory = None
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        cpu = names[0] if names else cpu
        memory = round(
            int(re.findall(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.M)[0]) / 2**20, 1
        )
    except (OSError, IndexError):
        pass  # not Linux
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": cpu,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "memory_gib": memory,
        "system": platform.platform(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
    }


def versions() -> dict[str, str | None]:
    """Python, the packages a result can depend on (None: not installed), and this checkout's commit."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # with the build, which the package's metadata may lack
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        found["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = None
    return found
