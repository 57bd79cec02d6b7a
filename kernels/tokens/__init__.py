"""Attention that scores tokens, and the choice of those that stay."""

from . import attention, cuda, scores, scores_cpu, select, transition, transition_cpu

__all__ = ["attention", "cuda", "scores", "scores_cpu", "select", "transition", "transition_cpu"]
