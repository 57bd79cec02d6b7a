"""`keep`: which linears a pass that rounds weights leaves as they are, in words that all of them share."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from thresher.errors import ArgumentError

from .structure.recover import ExpertSite, LinearSite, Structure


def check_keep(method: str, keep: Sequence[str]) -> None:
    """Raise ArgumentError for a `keep` that is no list of words, or a count that is no number."""
    if isinstance(keep, str):
        raise ArgumentError(
            f"{method} option keep", repr(keep), "a list of words or globs", f"Write keep=[{keep!r}]."
        )
    for word in keep:
        kind, _, count = word.partition(":")
        if kind in ("first", "last") and count and not count.isdigit():
            raise ArgumentError(f"{method} option keep", repr(word), "'first:N' or 'last:N'", "Give a count.")


def unnamed(word: str) -> str:
    """What is noted of a word of `keep` that names nothing."""
    return f"keep={word!r} names no linear of this model."


def kept_layers(
    structure: Structure, keep: Sequence[str], notes: list[str] | None = None
) -> dict[LinearSite, str]:
    """The linears that `keep` names, each with the sentence that says so. A word that names none is noted."""
    towers = [t.layers for t in structure.towers]
    kept: dict[LinearSite, str] = {}
    for word in keep:
        kind, _, count = word.partition(":")
        if kind == "head":
            chosen = [] if structure.head is None else [structure.head]
        elif kind in ("embedding", "router"):
            chosen = [s for s in structure.linears if s.role == kind]
        elif kind in ("first", "last"):
            number = int(count or 1)
            ends = [layers[:number] if kind == "first" else layers[-number:] for layers in towers]
            chosen = [s for layers in ends for l in layers for b in l.branches for s in b.site.linears]
        else:
            chosen = [s for s in structure.linears if fnmatch.fnmatchcase(s.fqn, word)]
        named = any(fnmatch.fnmatchcase(s.fqn, word) for s in structure.experts)
        if not chosen and not named and notes is not None and word not in ("head", "router"):
            notes.append(unnamed(word))
        for site in chosen:
            kept.setdefault(site, f"It is kept in high precision by keep={word!r}.")
    return kept


def kept_experts(structure: Structure, keep: Sequence[str]) -> dict[ExpertSite, str]:
    """The experts that `keep` names, by a glob or by their layer, each with the sentence that says so."""
    kept: dict[ExpertSite, str] = {}
    for word in keep:
        kind, _, count = word.partition(":")
        if kind in ("first", "last"):
            number = int(count or 1)
            layers = [t.layers[:number] if kind == "first" else t.layers[-number:] for t in structure.towers]
            inside = tuple(f"{layer.fqn}." for some in layers for layer in some if layer.fqn)
            chosen = [s for s in structure.experts if s.fqn.startswith(inside)]
        else:
            chosen = [s for s in structure.experts if fnmatch.fnmatchcase(s.fqn, word)]
        for site in chosen:
            size = f"{site.count} matrices of {site.out_features} x {site.in_features} weights"
            kept.setdefault(site, f"Its {size} are kept in high precision by keep={word!r}.")
    return kept
