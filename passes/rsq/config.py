"""Options of RSQ: what is rotated, which tokens matter, and the grid that weights are rounded to."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch

from thresher.errors import ArgumentError, unknown_key
from thresher.recipe import PassConfig

from ..keep import check_keep
from .rotation import KINDS

BITS = (2, 3, 4, 8)
GROUPS = (-1, 32, 64, 128)
GRIDS = ("integer", "nvfp4")
METHODS = ("gptq", "nearest")
STRATEGIES = ("attncon", "first", "first_last", "tokenfreq", "actnorm", "actdiff", "tokensim", "uniform")
LATENTS = ("none", "queries", "all")
SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NOT_NUMERIC = ("budget",)


@dataclass(frozen=True)
class RSQConfig(PassConfig):
    """Options of RSQ, for `thresher.quantize` and, with the file it saved, for the pass `rsq`.

    bits: 2, 3, 4 or 8. group_size: columns that share a scale: 32, 64, 128, or -1 for a whole row; a linear
        that the group does not divide is left and said. symmetric: the zero point is the middle code.
    grid: "integer", or "nvfp4": 4.5 bits, whatever `bits` and `group_size` say.
    method: "gptq", or "nearest" (no error feedback; with rotation at 3 bits it ruins a model, and says so).
    rotate: the residual stream (R1). rotate_heads: values and attention outputs (R2). rotate_down: the down
        projection's input, by an online Hadamard transform (R4). rotate_inputs: with `rotate`, the inputs of linears
        that none of these reaches, by an online transform too: where norms stand behind the branches, for example.
    latents: with `rotate`, what attention compresses hidden states into (MLA): "queries", of which queries are made;
        "all", also keys and values, for use without a cache, which holds it; or "none".
        rotation: see `rsq_rotation.rotation`.
    importance: which tokens matter: attncon, first, first_last, tokenfreq, actnorm, actdiff, tokensim, or
        uniform (rotate and scale off is plain GPTQ; rotate with uniform is QuaRot). r_min, r_max: weights
        are mapped onto that range, then divided by their mean. power: applied to the raw importance.
        sink: False leaves each sequence's first token out of the range and gives it weight 1.
    expand: use each calibration sequence so many times, shifted (data-set expansion).
    damping: share of the mean diagonal added to the Hessian. activation_order: largest diagonal first.
    clip_search: search each group's range for the least error. scale_dtype: what scales are stored as.
    follow_original: above 0, up to 1: round each linear towards giving the original model's output from the inputs it
        has behind quantized linears, by that share; the original runs beside, which takes half again the time and twice
        the activations.
    average_bits: above 0, each layer gets 2, 3, 4 or 8 bits by its sensitivity so that the mean over all
        weights stays at or below this; `bits` is then not used.
    head_bits: above 0, the head gets so many bits, 8 for example, though `keep` names it: at one row its product reads as
        many bytes as all others of four bits together.
    keep: linears to leave as they are: "head", "router", "embedding", "first:N", "last:N", or a glob on the name.
    seed: of the rotations' signs.
    budget: largest accepted difference of any output on the example, relative to its largest value. What
        low bits cost is measured by perplexity; this guards against a wrong rewrite.
    """

    name = "rsq"
    bits: int = 4
    group_size: int = -1
    symmetric: bool = True
    grid: str = "integer"
    method: str = "gptq"
    rotate: bool = True
    rotate_heads: bool = True
    rotate_down: bool = True
    rotate_inputs: bool = False
    latents: str = "queries"
    rotation: str = "auto"
    importance: str = "attncon"
    r_min: float = 0.01
    r_max: float = 1.0
    power: float = 1.0
    sink: bool = True
    expand: int = 1
    damping: float = 0.01
    activation_order: bool = False
    clip_search: bool = True
    scale_dtype: str = "float32"
    follow_original: float = 0.0
    average_bits: float = 0.0
    head_bits: int = 0
    keep: tuple[str, ...] = ("head", "router")
    seed: int = 0
    budget: float = 1.0

    def validate(self) -> None:
        for field, known in (("grid", GRIDS), ("method", METHODS), ("importance", STRATEGIES),
                             ("rotation", KINDS), ("latents", LATENTS), ("scale_dtype", SCALE_DTYPES)):  # fmt: skip
            if getattr(self, field) not in known:
                raise unknown_key(f"rsq option {field}", str(getattr(self, field)), known)
        for field, widths in (("bits", BITS), ("group_size", GROUPS)):
            if getattr(self, field) not in widths:
                raise ArgumentError(f"rsq option {field}", getattr(self, field),
                                    ", ".join(map(str, widths)), "Choose one of those.")  # fmt: skip
        if self.head_bits not in (0, *BITS) or (self.head_bits and self.grid != "integer"):
            raise ArgumentError("rsq option head_bits", f"{self.head_bits} with grid={self.grid!r}",
                                "0 (as `keep` and `bits` say), or 2, 3, 4 or 8 with grid='integer'",
                                "NVFP4 has one width.")  # fmt: skip
        check_keep("rsq", self.keep)
        if not 0 < self.r_min <= self.r_max:
            raise ArgumentError("rsq option r_min", self.r_min, f"0 < r_min <= r_max = {self.r_max}",
                                "The paper searches 0.005 to 0.1.")  # fmt: skip
        self.within(1e-8, 1, "damping")
        self.within(0, 1, "follow_original")
        self.within(1, 1 << 16, "expand")
        self.within(0, float("inf"), "budget", "power")
        if self.average_bits and not 2 <= self.average_bits <= 8:
            raise ArgumentError("rsq option average_bits", self.average_bits, "0 (off), or 2 to 8",
                                "Widths are 2, 3, 4 and 8 bits.")  # fmt: skip
        if self.average_bits and self.grid != "integer":
            raise ArgumentError("rsq option average_bits", f"{self.average_bits} with grid={self.grid!r}",
                                "grid='integer'", "NVFP4 has one width.")  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RSQConfig:
        fields: dict[str, Any] = json.loads(text)
        fields.setdefault("rotate_inputs", False)  # files from before there was such an option
        fields.setdefault("head_bits", 0)
        fields.setdefault("latents", "none")
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**options)

    def contradictions(self, quantized: RSQConfig) -> list[str]:
        """Options given here (that is, not at their defaults) that differ from what a file was made with."""
        default = type(self)()
        found = []
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(quantized, field.name)
            if field.name not in _NOT_NUMERIC and mine != theirs and mine != getattr(default, field.name):
                found.append(f"{field.name}={mine!r} where the file has {theirs!r}")
        return found


def encode_text(text: str) -> torch.Tensor:
    """uint8 [bytes]: text among a file's tensors."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def decode_text(tensor: torch.Tensor) -> str:
    """The text again, from uint8 [bytes]."""
    return bytes(tensor.tolist()).decode()
