"""What a pass settled from one call's inputs, and other calls may settle otherwise.

A pruned program drops a fixed number of tokens. How many may go depends on how many image tokens a
call has, so each call is asked first, and a program is built for each answer (rounded to buckets, so
that there are few). Results beyond the caller's tell what was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ArgumentError
from .packed_layout import Counted
from .program import Program
from .sizes import decided_by_data


@dataclass(frozen=True)
class Choice:
    """One pass's decision.

    made: what the program was built for. inputs: computes what `decide` needs from the caller's inputs, or None.
    decide: from those results, and the caller's inputs, to what such a call should run.
    """

    made: tuple[int, ...]
    inputs: Program | None
    decide: Callable[[Sequence[Any], Sequence[Any]], tuple[int, ...]]


@dataclass(frozen=True)
class Shortened:
    """A result that has values for kept tokens only.

    dim: its sequence dimension. kept: name of the extra result with the kept tokens, int64 [B, L].
    restored: the result has all tokens' places again, and those left out hold nothing of meaning.
    """

    dim: int
    kept: str
    restored: bool


@dataclass
class CallPlan:
    """Held by a Program. choices: by pass. extra_inputs: inputs beyond the caller's, see `thresher.token_types`.
    extra_outputs: names of the trailing results that are not the caller's. shortened: by result.
    scored: result, keys of a layer, -> the extra result with its tokens' importance.
    published: result, an embedding, -> the extra result that tells its image tokens (see `tokens.publish`).
    behind: of a packed program, for each cut in it: (tokens, image tokens) of each sequence -> tokens behind the cut.
    """

    choices: dict[str, Choice] = field(default_factory=dict)
    extra_inputs: list[str] = field(default_factory=list)
    extra_outputs: list[str] = field(default_factory=list)
    shortened: dict[int, Shortened] = field(default_factory=dict)
    scored: dict[int, str] = field(default_factory=dict)
    published: dict[int, str] = field(default_factory=dict)
    behind: list[Callable[[Sequence[int], Sequence[int]], list[int]]] = field(default_factory=list)


def refuse_data_decided(program: Program, what: str) -> None:
    """Raise for a program with sizes that only the data of a call decide: files and fixed graphs have none."""
    node = decided_by_data(program)
    if node is not None:
        raise ArgumentError(
            what,
            f"a program in which each call's data decide how many tokens attend (zipvl's counts='exact', in {node})",
            "a program whose sizes are known before a call",
            "Use counts='bucketed', with keep or with calibrated shares.",
        )


def refuse_to_keep(program: Program, what: str, stated: Collection[str] = ()) -> None:
    """Raise for a program that was built for one call's choices: elsewhere nobody would make them anew.

    stated: passes whose choice the caller gave, and so promised for every call.
    """
    if program.packing is not None and any(isinstance(a, Counted) for a in program.packing.arguments):
        raise ArgumentError(
            what,
            "a packed program (prepack) whose number of attending tokens (zipvl) is counted anew for each call",
            "a program that fits every call as it stands",
            "Leave zipvl or prepack out of the recipe; together they work only in the process that compiled them.",
        )
    refuse_data_decided(program, what)
    choices = program.calls.choices if program.calls is not None else {}
    open_ones = {name: choice.made for name, choice in choices.items() if name not in stated}
    if not open_ones:
        return
    passes, options = ", ".join(open_ones), ", ".join(f"{n}={{'choice': {m}}}" for n, m in open_ones.items())
    fix = f"Leave {passes} out of the recipe; in the process that compiled it, each call gets a program that fits."
    if what == "recipe":
        fix += f" Or, if as much may be left out of every call as of the example, say so: {options}."
    raise ArgumentError(
        what,
        f"a program rewritten by {passes} for calls like the example",
        "a program that fits every call",
        fix,
    )
