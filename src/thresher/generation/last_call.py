"""What the last `generate` did: tokens in and kept, what that saved by estimate, and the seconds it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class LastCall:
    """One call of `generate`.

    tokens_in: real tokens of each row of the prompt. new: tokens a row that were made, at most.
    kept: for each layer with keys and values, how many of the prompt's real tokens each row keeps there.
    at: for each such layer, which ones: int64 [rows, slots], columns of the padded prompt, -1 in slots of none.
    tau: the share of attention that each layer rewritten by ZipVL held in the prompt, smallest of the rows; else empty.
    flops, dense_flops: what the layers compute on the prompt, by estimate, pruned and whole. None where the model's layers
        are not found by name.
    bytes, dense_bytes: of keys and values behind the prompt, held and as the whole prompt would need.
    prefill_seconds, step_seconds: measured, in the compiled model. seconds: in all.
    steps: calls behind the prompt's. programs: made during the call. early: calls that ran a program node by node,
        since it was not compiled yet.
    """

    tokens_in: list[int]
    new: int = 0
    kept: list[list[int]] = field(default_factory=list)
    at: list[torch.Tensor] = field(default_factory=list, repr=False, compare=False)
    tau: list[float] = field(default_factory=list)
    flops: float | None = None
    dense_flops: float | None = None
    bytes: int = 0
    dense_bytes: int = 0
    prefill_seconds: float = 0.0
    step_seconds: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    programs: int = 0
    early: int = 0

    def __str__(self) -> str:
        left = sum(map(sum, self.kept)) / max(1, sum(self.tokens_in) * len(self.kept))
        parts = [f"{sum(self.tokens_in)} tokens in {len(self.tokens_in)} rows, {self.new} new a row"]
        if self.kept:
            parts.append(f"{left:.0%} of tokens times layers remembered")
        if self.flops is not None and self.dense_flops:
            parts.append(f"{self.flops / self.dense_flops:.0%} of the layers' FLOPs on the prompt")
        if self.dense_bytes:
            parts.append(f"{self.bytes / self.dense_bytes:.0%} of the cache's bytes")
        if self.tau:
            parts.append(f"at least {min(self.tau):.3f} of attention held")
        parts.append(f"{self.prefill_seconds:.2f} s prompt, {self.step_seconds:.2f} s in {self.steps} steps")
        parts.append(f"{self.programs} programs made")
        if self.early:
            parts.append(f"{self.early} calls ran before their program was compiled")
        return "; ".join(parts)

    def prompt(self, model: Any, cache: Any, real: torch.Tensor, ran: Sequence[Any]) -> None:
        """Take note of the prompt: what the cache holds behind it, and what the sessions that ran say.

        real: bool [B, tokens]. ran: sessions whose calls were the prompt's.
        """
        from thresher.runtime.kv.layer import KVLayer

        self.kept, self.at, self.bytes, self.dense_bytes = [], [], 0, 0
        tokens = real.shape[1]
        for layer in getattr(cache, "layers", ()):
            keys = getattr(layer, "keys", None)
            if not isinstance(keys, torch.Tensor) or keys.dim() != 4:
                continue
            each = keys.shape[1] * (keys.shape[3] + layer.values.shape[3]) * keys.element_size()
            self.dense_bytes += keys.shape[0] * tokens * each
            if isinstance(layer, KVLayer):
                self.bytes += layer.bytes
                at = layer.positions.long()
                held = (at >= 0) & real.to(at.device).gather(1, at.clamp_min(0))
                self.kept.append(held.sum(1).tolist())
                self.at.append(at.masked_fill(~held, -1))
            else:
                self.bytes += keys.shape[0] * min(tokens, keys.shape[2]) * each
                self.kept.append(real.sum(1).tolist())
                place = torch.arange(tokens, device=real.device)
                self.at.append(torch.where(real, place, -1))
        for session in ran:
            tau = getattr(session, "extras", {}).get("realised_tau")
            if tau is not None:
                self.tau = tau.float().flatten(1).amin(1).tolist()
        self._estimate(model, ran)

    def _estimate(self, model: Any, ran: Sequence[Any]) -> None:
        """FLOPs of the layers' linears and causal attention, a multiply-add counting as two."""
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        layers = getattr(decoder, "layers", None)
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", None)
        if layers is None or not heads or len(layers) != len(self.kept):
            return
        width = 2 * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.flops = self.dense_flops = 0.0
        for layer, kept in zip(layers, self.kept):
            weights = sum(m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear))
            self.dense_flops += sum(2 * weights * n + n * n * width for n in self.tokens_in)
            self.flops += sum(2 * weights * n + n * n * width for n in kept)
        for session in ran:
            report = getattr(session, "last", session).report
            for one in report.passes:
                if one.name == "zipvl" and one.flops_left is not None:
                    self.flops *= one.flops_left
