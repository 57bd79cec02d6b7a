"""Errors that say which argument was wrong, what was given, what is accepted and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ThresherError(Exception):
    """Base class of every error Thresher raises on purpose."""


class ArgumentError(ThresherError, ValueError):
    """An argument is not acceptable.

    The message always has the same four parts, so that it can be acted on without reading code:
    the argument's name, what was given, what is accepted, and the fix.
    """

    def __init__(self, argument: str, given: object, accepted: str, fix: str):
        self.argument, self.given, self.accepted, self.fix = argument, given, accepted, fix
        super().__init__(f"{argument}: got {given}; accepted is {accepted}. {fix}")


class CaptureError(ThresherError):
    """A model could not be turned into a Program."""


class DialectError(ThresherError):
    """A graph holds something the dialect does not allow; names the node and the rule."""


class ContractError(ThresherError):
    """A pass did what a pass may not do, such as editing the program where it may only look; names the pass."""


class NothingRewrittenError(ThresherError):
    """No pass of the recipe rewrote anything in the model; says why for each of them."""


class CoverageError(ThresherError):
    """`require={...}` asked for more rewritten sites than there are."""


class StaleWeightsError(ThresherError):
    """A weight was replaced or edited after another was computed from it, and that one cannot be computed anew."""


class MissingDependencyError(ThresherError, ImportError):
    """An optional package is needed; names the extra that brings it."""

    def __init__(self, package: str, extra: str, needed_for: str):
        self.package, self.extra = package, extra
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'thresher[{extra}]'"
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown_key(argument: str, key: str, known: Iterable[str]) -> ArgumentError:
    """The error for a name that is not among `known`."""
    names = sorted(known)
    return ArgumentError(
        argument,
        repr(key),
        "one of " + ", ".join(names),
        f"Use a name from that list.{did_you_mean(key, names)}",
    )
