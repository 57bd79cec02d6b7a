"""What a user can say about engines, checked before anything is captured."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from thresher.errors import ArgumentError, MissingDependencyError, ThresherError

from . import engine
from .profiles import checked

BUILDERS = ("auto", "torch-tensorrt", "onnx")


@dataclass(frozen=True)
class Options:
    """build_only: the GPU to build for, as "SM89" or "SM120", by TensorRT-RTX, which needs none; calls then run the cut
        program in PyTorch. None: build for the GPU at hand, and run.
    profiles: for each input of the model with sizes that vary its smallest, usual and largest shape; without, a size
        may be from the least that the graph takes to four times the example's.
    builder: "torch-tensorrt" (its converters), "onnx" (TensorRT's own parser, with NVFP4 and INT4 inside the engines),
        or "auto", torch-tensorrt where it is installed.
    """

    build_only: str | None = None
    profiles: Mapping[str, Any] = field(default_factory=dict)
    builder: str = "auto"

    @classmethod
    def of(cls, given: Mapping[str, Any], mode: str | None = None) -> Options:
        """From the options of a call. Raises ArgumentError for what cannot be, naming the option."""
        if mode not in (None, "default"):
            raise ArgumentError(
                "mode", repr(mode), "no mode for target='tensorrt': an engine is tuned when it is built",
                "Leave it out.",
            )  # fmt: skip
        for name in given:
            if name not in ("build_only", "profiles", "builder"):
                raise ArgumentError(
                    name, repr(given[name]), "an option of Inductor's for target='inductor'", "Leave it out."
                )
        found = cls(
            given.get("build_only"), checked(given.get("profiles") or {}), given.get("builder") or "auto"
        )
        sm = found.build_only
        if sm is not None and not (isinstance(sm, str) and re.fullmatch(r"SM\d{2,3}", sm)):
            raise ArgumentError(
                "build_only", repr(sm), "a compute capability such as 'SM89' or 'SM120'", "Name one."
            )
        if found.builder not in BUILDERS:
            raise ArgumentError(
                "builder", repr(found.builder), f"one of {', '.join(BUILDERS)}", "Use one of them."
            )
        return found

    def way(self) -> str:
        """ "torch-tensorrt" or "onnx": how engines are made here. Raises ThresherError, naming the extra to install."""
        if self.build_only is not None:
            if self.builder == "torch-tensorrt":
                raise ArgumentError("builder", "'torch-tensorrt' with build_only", "'onnx' or 'auto': torch-tensorrt "
                                    "builds on the GPU it builds for", "Leave it out.")  # fmt: skip
            engine.builder()
            return "onnx"
        converters, own = installed("torch_tensorrt"), any(map(installed, ("tensorrt_rtx", "tensorrt")))
        if (self.builder == "torch-tensorrt" and not converters) or not (converters or own):
            raise MissingDependencyError("torch-tensorrt", "tensorrt", f"target='tensorrt' {HERE}")
        if self.builder == "onnx" and not own:
            raise MissingDependencyError(
                "tensorrt-rtx", "tensorrt-rtx", "builder='onnx' for target='tensorrt'"
            )
        if not has_gpu():
            raise ThresherError(
                f"target='tensorrt' runs engines on a CUDA GPU, and torch sees none. {ELSEWHERE}"
            )
        return "torch-tensorrt" if converters and self.builder != "onnx" else "onnx"


ELSEWHERE = (
    "build_only='SM120' builds them here for such a GPU without one, and needs thresher[tensorrt-rtx] in this Python or "
    f"in one that {engine.PYTHON} names."
)
HERE = f"({ELSEWHERE})"


def installed(name: str) -> bool:
    """Whether a package can be imported here."""
    return importlib.util.find_spec(name) is not None


def has_gpu() -> bool:
    """Whether torch sees a CUDA GPU."""
    return torch.cuda.is_available()
