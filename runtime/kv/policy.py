"""What a cache keeps of the past, and how."""

from __future__ import annotations

from dataclasses import dataclass

from thresher.errors import ArgumentError


@dataclass(frozen=True)
class KVPolicy:
    """How a layer stores its past.

    important: share of tokens stored as important, above 0, at most 1; or None to take as many as hold
        a share `tau` of the probes' attention (one count for the whole batch, its largest).
    bits: bits of important and of other tokens; None keeps full precision.
    drop: forget the other tokens (ZipVL's second version) instead of storing them at fewer bits.
    block: a tail of so many tokens is compressed; also the slots that share a key's scale.
    recent, spread, seed: the rows whose attention tells what is important (`probe_positions`).
    """

    important: float | None = 0.3
    tau: float = 0.975
    bits: tuple[int, int] | None = (4, 2)
    drop: bool = False
    block: int = 128
    recent: int = 64
    spread: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.important is not None and not 0.0 < self.important <= 1.0:
            raise ArgumentError(
                "important", self.important, "a share above 0, at most 1, or None", "Try 0.3."
            )
        if self.bits is not None and not set(self.bits) <= {2, 4, 8}:
            raise ArgumentError("bits", self.bits, "two of 2, 4 and 8, or None", "Use (4, 2).")
        if self.block < 1:
            raise ArgumentError("block", self.block, "at least 1 token", "128 is usual.")
        if self.bits is None and not self.drop:
            raise ArgumentError(
                "bits",
                None,
                "two bit widths unless drop=True",
                "A cache that neither rounds nor drops is DynamicCache.",
            )

    @property
    def lossless(self) -> bool:
        """Whether every token given is kept as it came: a layer only differs from DynamicCache in what it is given."""
        return self.bits is None and self.important == 1.0
