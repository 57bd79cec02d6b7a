"""What a pass may not do to its surroundings: write to the model's weights, or take a compilation down with it."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from thresher.compat import has_values
from thresher.errors import ContractError, DialectError, ThresherError
from thresher.graph.program import Program
from thresher.graph.sharded import group_of
from thresher.graph.stamp import Sample, stamp
from thresher.report import Miss, PassReport

from .base import Pass


class _ReadOnly(TorchDispatchMode):
    """Raises ContractError before an operator writes to memory in which a weight lies, `p.data` and views included."""

    def __init__(self, name: str, program: Program):
        super().__init__()
        self._name = name
        self._held = {_memory(w.tensor): w.fqn for w in program.weights.values() if _memory(w.tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for known, given in zip(func._schema.arguments, [*args, *[None] * 99]):
                given = kwargs.get(known.name, given)
                if known.alias_info is not None and known.alias_info.is_write:
                    for tensor in given if isinstance(given, (list, tuple)) else [given]:
                        if isinstance(tensor, torch.Tensor) and (fqn := self._held.get(_memory(tensor))):
                            raise ContractError(_wrote(self._name, fqn))
        return func(*args, **kwargs)


def _is_foreign(rewriter: Pass) -> bool:
    """Whether a pass is not one of Thresher's."""
    return not type(rewriter).__module__.startswith("thresher.")


def _memory(tensor: torch.Tensor) -> int:
    """Where a tensor's storage begins; 0 for one without values or without such a place."""
    if not has_values(tensor) or tensor.layout is not torch.strided or type(tensor).__torch_dispatch__ is not (
        torch.Tensor.__torch_dispatch__
    ):  # fmt: skip
        return 0
    return tensor.untyped_storage().data_ptr()


def _wrote(name: str, fqn: str) -> str:
    return (
        f"The pass {name!r} writes to {fqn}, which is the user's model's own tensor. A pass adds a weight of its own with "
        "`Program.add_weight` and leaves those it is given as they are."
    )


@contextlib.contextmanager
def weights_kept(rewriter: Pass, program: Program) -> Iterator[None]:
    """Within the context a pass runs that must leave the program's weights as they are; ContractError where it did not.

    A pass from outside of Thresher is stopped before it writes. What another way wrote is noticed afterwards.
    """
    tensors = {w.fqn: w.tensor for w in program.weights.values() if has_values(w.tensor)}
    before = {fqn: (stamp(t), Sample(t)) for fqn, t in tensors.items()}
    with _ReadOnly(rewriter.name, program) if _is_foreign(rewriter) else contextlib.nullcontext():
        yield
    for fqn, (then, sample) in before.items():
        if stamp(tensors[fqn]) != then or sample.changed():
            raise ContractError(f"{_wrote(rewriter.name, fqn)} It did so in a way that could not be stopped.")


@dataclass
class Containment:
    """Runs passes so that one that raises, or breaks its contract, is named, or left out.

    contain: leave it out instead of raising. dropped: why, by the name of each pass left out.
    """

    contain: bool = False
    dropped: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def around(self, rewriter: Pass, program: Program) -> Iterator[None]:
        """Within the context a pass works on a program. Ranks that share a model go on together, so none leaves one out."""
        try:
            with weights_kept(rewriter, program):
                yield
        except Exception as fault:
            if not _is_the_passs(fault):
                raise
            if self.contain and group_of(program) is None:
                self.dropped[rewriter.name] = _sentence(rewriter, fault)
            elif isinstance(fault, ThresherError):
                raise
            else:
                raise ContractError(_sentence(rewriter, fault)) from fault

    def account(self, name: str) -> PassReport:
        """The account of a pass that was left out."""
        reason = self.dropped[name]
        left = Miss("the whole program", f"The pass was left out. {reason}")
        return PassReport(name, missed=[left], dropped=reason)


def _is_the_passs(fault: Exception) -> bool:
    """Whether an error is a pass's own fault, and not something said to the user on purpose or Dynamo's."""
    if isinstance(fault, ThresherError):
        return isinstance(fault, (ContractError, DialectError))
    return not isinstance(fault, torch._dynamo.exc.TorchDynamoException)


def _sentence(rewriter: Pass, fault: Exception) -> str:
    """What to say of a pass that raised: whose it is, what it was, and where."""
    text = (str(fault).strip() or "no message").splitlines()[0]
    if isinstance(fault, ContractError):
        return text
    frames = [f for f in traceback.extract_tb(fault.__traceback__) if "torch" not in Path(f.filename).parts]
    at = (
        f" (in {frames[-1].name}, {Path(frames[-1].filename).name} line {frames[-1].lineno})"
        if frames
        else ""
    )
    whose = "" if _is_foreign(rewriter) else "has a fault of Thresher's own and "
    return f"The pass {rewriter.name!r} {whose}raised {type(fault).__name__}: {text}{at}."
