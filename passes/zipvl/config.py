"""The options of ZipVL."""

from __future__ import annotations

from dataclasses import dataclass

from thresher.errors import ArgumentError
from thresher.recipe import PassConfig

MODES = ("protected", "paper")
GATHER = ("projections", "attention")
KV = ("keep", "quantize", "drop")
COUNTS = ("bucketed", "exact")


@dataclass(frozen=True)
class ZipVLConfig(PassConfig):
    """Options of ZipVL.

    keep: share of tokens, beside protected ones, that attend in every layer; None takes each layer's share
        from calibration at `tau`.
    tau: share of the probes' attention that important tokens must hold. quantile: of the shares calibrated.
    counts: "bucketed", fixed when a program is built; or "exact": each layer of each call takes as few tokens as
        hold tau, in one program for all calls. A device is then waited for once a layer, and targets that need
        sizes beforehand (CUDA graphs, files) refuse it.
    mode: "protected", or "paper": nothing is protected. sinks: first tokens protected where all is text.
    recent, spread, seed: probe rows; the recent ones are protected where all is text.
    gather: "projections", or "attention" to choose after the projections, as published.
    kv: "keep" returns all keys and values; "quantize" returns importance with them, for a
        `MixedPrecisionCache`; "drop" returns important ones only (the paper's second version).
    first_layer: layers before it are left alone; they count from one.
    bucket: important tokens are a multiple of it. min_saving: least share of a layer's FLOPs to save.
    image_token_id, image_span: see token pruning. budget: largest relative change of results.
    choice: protected tokens to reckon with; None to count them.
    """

    name = "zipvl"
    keep: float | None = None
    tau: float = 0.975
    counts: str = "bucketed"
    quantile: float = 0.95
    mode: str = "protected"
    sinks: int = 4
    recent: int = 64
    spread: int = 64
    seed: int = 0
    gather: str = "projections"
    kv: str = "keep"
    first_layer: int = 1
    bucket: int = 64
    min_saving: float = 0.03
    image_token_id: int | None = None
    image_span: tuple[int, int] | None = None
    budget: float = float("inf")
    choice: tuple[int, ...] | None = None

    def validate(self) -> None:
        self.one_of(mode=MODES, gather=GATHER, kv=KV, counts=COUNTS)
        self.at_least(recent=1, spread=0, bucket=1, first_layer=1, sinks=0)
        if self.counts == "exact" and self.keep is not None:
            raise ArgumentError(
                "keep",
                self.keep,
                "None with counts='exact'",
                "tau decides how many tokens attend in each call.",
            )
        self.within(float("-inf"), 1, "min_saving")  # below 0: also where it costs
        self.within(0, float("inf"), "budget", "image_token_id")
        shares = {
            "tau": self.tau,
            "quantile": self.quantile,
            **({} if self.keep is None else {"keep": self.keep}),
        }
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ArgumentError(name, share, "a share above 0, at most 1", "ZipVL uses tau .96 to .975.")
