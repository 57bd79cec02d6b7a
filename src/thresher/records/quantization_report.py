"""What quantizing cost and saved: errors by linear, importance by layer, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import MissingDependencyError
from ..report import Miss


@dataclass
class QuantizeReport:
    """linears: one `LinearReport` each. importance: raw scores of the calibration tokens by layer.
    bits, sensitivity: by layer, where they are mixed. exact: fp64 error of the rotation alone.
    model_bytes: of all parameters. tokens: calibration tokens. seconds: the whole call.
    file_bytes: of the saved file, once there is one.
    """

    linears: list[Any]
    importance: dict[str, torch.Tensor]
    bits: dict[str, int]
    sensitivity: dict[str, float]
    notes: list[str]
    missed: list[Miss]
    exact: float
    model_bytes: int
    tokens: int
    seconds: float
    file_bytes: int | None = field(default=None)

    @property
    def bytes_before(self) -> int:
        """Of the quantized linears' weights in the model."""
        return sum(r.bytes_before for r in self.linears)

    @property
    def bytes_after(self) -> int:
        """Of their codes, scales and zero points."""
        return sum(r.bytes_after for r in self.linears)

    @property
    def average_bits(self) -> float:
        """Bits a weight, scales and zero points included."""
        weights = sum(8 * r.bytes_after / r.bits for r in self.linears)
        return 8 * self.bytes_after / weights if weights else 0.0

    @property
    def predicted_speed(self) -> float:
        """Decode speed-up expected where reading weights is all that takes time: bytes before over after."""
        return self.model_bytes / max(1, self.model_bytes - self.bytes_before + self.bytes_after)

    def __str__(self) -> str:
        lines = [
            f"quantized {len(self.linears)} linears on {self.tokens} tokens in {self.seconds:.0f} s: "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB, {self.average_bits:.2f} bits a weight",
            f"the whole model: {self.model_bytes / 1e6:.1f} MB -> "
            f"{(self.model_bytes - self.bytes_before + self.bytes_after) / 1e6:.1f} MB predicted"
            + (f"; the file has {self.file_bytes / 1e6:.1f} MB" if self.file_bytes else "")
            + f"; decoding, where reading weights takes the time, should be {self.predicted_speed:.2f} times as fast",
            f"the rotation alone changes an fp64 output by {self.exact:.1e}",
            *self.notes,
        ]
        width = max((len(r.site) for r in self.linears), default=4)
        lines.append(f"{'linear':<{width}}  bits  nearest  quantized  damping")
        for r in self.linears:
            lines.append(
                f"{r.site:<{width}}  {r.bits:4.2f}  {r.nearest:7.4f}  {r.quantized:9.4f}  {r.damping:7.3g}"
            )
        lines += [f"missed {m.site}: {m.reason}" for m in self.missed]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Importance by layer (the share of tokens at each score relative to the layer's largest) and the
        errors before and after, as one picture. Needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingDependencyError("matplotlib", "bench", "QuantizeReport.plot") from None
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        self._plot_importance(left)
        index = range(len(self.linears))
        right.semilogy(
            index, [r.nearest for r in self.linears], ".", label="rounded to nearest", color="#c44"
        )
        right.semilogy(index, [r.quantized for r in self.linears], ".", label="as quantized", color="#248")
        right.set(
            xlabel="linear, in graph order",
            ylabel="relative squared output error",
            title="Error of each linear",
        )
        right.legend()
        figure.savefig(path)
        return Path(path)

    def _plot_importance(self, axes: Any) -> None:
        if not self.importance:
            axes.set(title="All tokens count alike")
            return
        rows = torch.stack([_histogram(scores) for scores in self.importance.values()])
        shown = axes.imshow(
            rows.clamp_min(1e-5).log10(), aspect="auto", origin="lower", extent=(-5, 0, 0, len(rows))
        )
        axes.set(xlabel="log10 of importance over the layer's largest", ylabel="layer",
                 title="Token importance: log10 of the share of tokens")  # fmt: skip
        axes.figure.colorbar(shown, ax=axes)


def _histogram(scores: torch.Tensor) -> torch.Tensor:
    low = float(scores.min())
    unit = (scores - min(low, 0.0)) / (scores.max() - min(low, 0.0)).clamp_min(1e-30)
    counts = torch.histc(unit.clamp_min(1e-5).log10(), 50, -5, 0)
    return counts / counts.sum()


def summary(report: QuantizeReport) -> Mapping[str, float]:
    """A few numbers for a table."""
    return {
        "bits": round(report.average_bits, 3),
        "mb": round(report.bytes_after / 1e6, 2),
        "error": sum(r.quantized for r in report.linears) / max(1, len(report.linears)),
        "seconds": round(report.seconds, 1),
    }
