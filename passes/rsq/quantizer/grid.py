"""The grids that weights are rounded to: uniform integers of any width, and NVFP4.

A grid turns columns of a weight into codes. `bind` sees the whole weight once (NVFP4 takes its tensor scale
from it); `fit` then gives the parameters of one group of columns, and `encode` / `decode` map values to codes
and back under them. GPTQ asks for parameters group by group, as late as it can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from thresher.errors import ArgumentError
from thresher.formats.nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, decode_e2m1

# The clip search minimises sum |error|^2.5, between squared error and the outliers' interest; GPTQ takes 2.4, which
# costs a power where this costs a root. Shares of the range: coarse first, then around the best one.
_CLIP_COARSE = tuple(range(95, 20, -5))
_CLIP_FINE = (-4, -3, -2, -1, 1, 2, 3, 4)
# Multipliers of the scale that puts a block's largest weight on 6; 1.5 puts it on 4, with closer neighbours.
_NVFP4_SEARCH = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5)


class Parameters(tuple):
    """A group's parameters: tensors [N], one entry a row, in the order that the grid defines."""


class Grid(Protocol):
    """What GPTQ needs to know about a set of representable weights.

    group: how many consecutive columns share parameters; -1 for a whole row.
    """

    @property
    def group(self) -> int: ...

    def bind(self, weight: torch.Tensor) -> Grid: ...
    def fit(self, columns: torch.Tensor) -> Parameters: ...
    def encode(self, values: torch.Tensor, parameters: Parameters) -> torch.Tensor: ...
    def decode(self, codes: torch.Tensor, parameters: Parameters) -> torch.Tensor: ...


@dataclass(frozen=True)
class IntegerGrid:
    """(code - zero) * scale with `bits`-bit codes; parameters are (scale, zero).

    symmetric: the zero point is 2 ** (bits - 1), else chosen to cover [min, max]. search: shrink the range
    where that lowers the error. scale_dtype: the dtype that scales are stored in; they are rounded to it
    before any weight is, so that stored and simulated weights are the same.
    """

    bits: int
    group: int = -1
    symmetric: bool = True
    search: bool = True
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self):
        if self.bits not in (2, 3, 4, 8):
            raise ArgumentError("bits", self.bits, "2, 3, 4 or 8", "Choose one of those widths.")
        if self.group not in (-1, 32, 64, 128):
            raise ArgumentError(
                "group", self.group, "-1 (a whole row), 32, 64 or 128", "Choose one of those."
            )

    def bind(self, weight: torch.Tensor) -> IntegerGrid:
        """The grid itself: nothing is shared between groups."""
        return self

    def fit(self, columns: torch.Tensor) -> Parameters:
        """(scale, zero), each fp32 [N], for fp32 columns [N, group]."""
        top = (1 << self.bits) - 1
        low, high = columns.amin(1).clamp_max(0), columns.amax(1).clamp_min(0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        empty = high == low
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        best = self._range(low, high, top)
        if not self.search:
            return best
        least = self._error(columns, best)
        share = torch.full_like(low, 100.0)
        for coarse in _CLIP_COARSE:
            best, least, share = self._better(
                columns, low, high, torch.full_like(low, coarse), best, least, share
            )
        around = share
        for step in _CLIP_FINE:
            trial = (around + step).clamp_max(100.0)
            best, least, share = self._better(columns, low, high, trial, best, least, share)
        return best

    def _better(
        self,
        columns: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        percent: torch.Tensor,
        best: Parameters,
        least: torch.Tensor,
        share: torch.Tensor,
    ) -> tuple[Parameters, torch.Tensor, torch.Tensor]:
        """(parameters, error, share of the range) of each row, the trial's where it is better."""
        part = percent / 100
        trial = self._range(low * part, high * part, (1 << self.bits) - 1)
        error = self._error(columns, trial)
        better = error < least
        chosen = Parameters(torch.where(better, t, b) for t, b in zip(trial, best))
        return chosen, torch.where(better, error, least), torch.where(better, percent, share)

    def _range(self, low: torch.Tensor, high: torch.Tensor, top: int) -> Parameters:
        tiny = torch.finfo(self.scale_dtype).tiny
        scale = ((high - low) / top).clamp_min(tiny).to(self.scale_dtype).float()
        if self.symmetric:
            return Parameters((scale, torch.full_like(scale, float(1 << (self.bits - 1)))))
        return Parameters((scale, (-low / scale).round().clamp(0, top)))

    def _error(self, columns: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        wide = Parameters(p[:, None] for p in parameters)
        off = self.decode(self.encode(columns, wide), wide).sub_(columns).abs_()
        return (off.sqrt() * off).mul_(off).sum(1)

    def encode(self, values: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """fp32 codes, whole numbers in [0, 2 ** bits)."""
        scale, zero = parameters
        return (values / scale).round_().add_(zero).clamp_(0, (1 << self.bits) - 1)

    def decode(self, codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """(code - zero) * scale."""
        scale, zero = parameters
        return (codes - zero).mul_(scale)


@dataclass(frozen=True)
class NVFP4Grid:
    """E2M1 codes times an E4M3 scale per 16 columns times one fp32 scale a tensor; parameters are (scale,).

    search: choose each block's E4M3 scale by squared error, else from its largest weight. tensor_scale: as
    bound; NVFP4's own choice is the largest weight / (6 * 448).
    """

    search: bool = True
    tensor_scale: float = 0.0
    group: int = BLOCK

    def bind(self, weight: torch.Tensor) -> NVFP4Grid:
        """The grid with the tensor scale of this weight; itself where it has one already."""
        if self.tensor_scale:
            return self
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        return NVFP4Grid(self.search, largest / (E2M1_MAX * E4M3_MAX) or 1.0, self.group)

    def fit(self, columns: torch.Tensor) -> Parameters:
        """(E4M3 scale * tensor scale,), fp32 [N], for fp32 columns [N, 16]."""
        exact = columns.abs().amax(1) / 6
        best = self._scale(exact)
        if not self.search:
            return best
        least = self._error(columns, best)
        for factor in _NVFP4_SEARCH:
            trial = self._scale(exact * factor)
            error = self._error(columns, trial)
            best = Parameters((torch.where(error < least, trial[0], best[0]),))
            least = torch.minimum(error, least)
        return best

    def _scale(self, wanted: torch.Tensor) -> Parameters:
        # 2^-9 is the least E4M3 number: a scale of zero would lose the block.
        stored = (wanted / self.tensor_scale).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)
        return Parameters((stored.float() * self.tensor_scale,))

    def _error(self, columns: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        wide = Parameters(p[:, None] for p in parameters)
        return (self.decode(self.encode(columns, wide), wide) - columns).square_().sum(1)

    def encode(self, values: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """fp32 E2M1 codes 0 .. 15: bit 3 is the sign, ties go to the even code."""
        scaled = values / parameters[0]
        size = scaled.abs()
        # Within each run of equal spacing, `round` halves to even as E2M1 does: steps 1/2, 1 and 2.
        code = torch.where(
            size < 1.75, (size * 2).round(), torch.where(size < 3.5, size.round() + 2, (size / 2).round() + 4)
        )
        code = code.clamp_max_(7)
        return torch.where((scaled < 0) & (code > 0), code + 8, code)

    def decode(self, codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """The values of E2M1 codes times the scale."""
        return decode_e2m1(codes) * parameters[0]

    def stored_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """float8_e4m3fn, from fitted scales [N, groups] of this bound grid; exact."""
        return (scales / self.tensor_scale).to(torch.float8_e4m3fn)
