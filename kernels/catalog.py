"""Imports every operator family, so that `torch.ops.thresher` is complete.

A saved program or a compiled artifact can only be loaded once the operators it holds are defined.
"""

from __future__ import annotations

import importlib

FAMILIES: tuple[str, ...] = (
    # one name a line, sorted
    "few_linear",
    "hadamard",
    "hadamard_cpu",
    "hadamard_cuda",
    "kv_attention",
    "kv_cpu",
    "kv_cuda",
    "kv_format",
    "nvfp4",
    "sparse_cpu",
    "sparse_cuda",
    "sparse_down",
    "sparse_mlp",
    "token_attention",
    "token_cuda",
    "token_scores",
    "token_scores_cpu",
    "token_select",
    "token_transition",
    "token_transition_cpu",
    "varlen_attention",
    "varlen_cpu",
    "varlen_cuda",
    "wna16",
    "wna16_cpu",
    "wna16_cuda",
)


def load() -> None:
    """Define all operators. Cheap: no kernel is built until one is first asked for."""
    for family in FAMILIES:
        importlib.import_module(f"thresher.kernels.{family}")
