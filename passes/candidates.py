"""The sites a pass may rewrite in a program, after what holds for a program as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from thresher.errors import ContractError
from thresher.graph.program import Program
from thresher.graph.snapshot import Snapshot
from thresher.report import Miss

from .base import Context, Match, Pass

ONE_RANK = (
    "The graph is one rank's part of a tensor-parallel model, and {name} decides from activations, of which each rank "
    "has its own: their results would not fit together."
)
WRITES = (
    "The model writes to {names}, as it does to a static cache, where every token has its place, and {name} gives tokens "
    "other places. Call the model with a cache that it hands back, such as DynamicCache, or without one."
)


def check_untouched(name: str, did: str, before: Snapshot, program: Program) -> None:
    """Raise ContractError where the method `did` of a pass, which may only look, edited the program."""
    edit = before.edit(program)
    if edit is not None:
        raise ContractError(
            f"`{did}` of the pass {name!r} edited the program: {edit}. A pass edits in `rewrite`, or exactly in `prepare`."
        )


def candidates(rewriter: Pass, program: Program, context: Context) -> Sequence[Match | Miss]:
    """What a pass matches, or for each of its sites the reason why it may not rewrite this program.

    Raises ContractError where `match` edits the program or gives something else than Match and Miss.
    """
    if not rewriter.per_rank and any("_c10d_functional" in str(n.target) for n in program.nodes()):
        return [Miss("the whole program", ONE_RANK.format(name=rewriter.name))]
    before = Snapshot(program)
    found = list(rewriter.match(program, context))
    check_untouched(rewriter.name, "match", before, program)
    for one in found:
        if not isinstance(one, (Match, Miss)):
            raise ContractError(
                f"`match` of the pass {rewriter.name!r} gave a {type(one).__name__}; it gives Match and Miss only."
            )
    if not rewriter.moves_tokens or rewriter.sees_writes or not program.updates:
        return found
    reason = of_writes(rewriter.name, program, list(program.updates))
    return [Miss(m.site, reason) if isinstance(m, Match) else m for m in found]


def of_writes(name: str, program: Program, results: Sequence[int]) -> str:
    """Why a pass leaves tokens where they are: the program writes these results to tensors of its caller."""
    names = ", ".join(dict.fromkeys(program.input_names[program.updates[i]] for i in results))
    return WRITES.format(names=names, name=name)
