"""A program that runs as PyTorch runs it until its compiled form is there, which a thread in the background makes.

The background begins when somebody says so (`begin`), between calls: compiling takes torch's one lock, and whoever has to
trace the next program would wait for it. Calls that do not ask for a result at once (`waiting`) compile first.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from thresher import waiting
from thresher.graph.tracing import compiling
from thresher.phases import LOWERING, phase
from thresher.report import Report

EARLY = (
    "The first calls did not wait for the compiler: they ran the rewritten program node by node, while it was compiled in "
    "the background. THRESHER_WAIT=1 waits."
)
_log = logging.getLogger(__name__)
_PENDING: deque[weakref.ref[Later]] = deque()
_LOCK = threading.Lock()
_RUNNING: list[threading.Thread] = []


class Ends(Exception):
    """The process waits for the background alone, and nothing needs what it compiles."""


def still_wanted() -> None:
    """Raise Ends in the background's thread once the main thread is done: asked between a compiler's steps."""
    if threading.current_thread() in _RUNNING and not threading.main_thread().is_alive():
        raise Ends


class Later:
    """Called with the values of a graph's placeholders.

    plain: runs the graph node by node. compile: gives what runs it compiled. early: calls that ran plainly so far.
    ready: whether it is done with compiling. failed: why there is no compiled form; None else. phases: where the seconds
    of compiling are added.
    """

    def __init__(self, plain: Callable[..., Any], compile: Callable[[], Callable[..., Any]]):
        self._call, self._compile = plain, compile
        self._lock = threading.Lock()
        self.early = 0
        self.ready, self.phases = False, dict[str, float]()
        self.failed: str | None = None
        self._pending = False

    def __call__(self, *given: Any) -> Any:
        if not self.ready:
            if not waiting.is_at_once():
                self.finish(raises=True)
            else:
                self.early += 1
                self._ask()
        return self._call(*given)

    def told(self, report: Report) -> Later:
        """Itself, after a note in the report, where the seconds of compiling will be added."""
        self.phases = report.phases
        if EARLY not in report.notes:
            report.notes.append(EARLY)
        return self

    def _ask(self) -> None:
        """Have it compiled in the background, where the call wants that."""
        with _LOCK:
            if not self._pending and waiting.is_soon():
                self._pending = True
                _PENDING.append(weakref.ref(self))

    def finish(self, raises: bool = False) -> None:
        """Compile it, unless that is done. raises: hand on what the compiler raises, instead of running plainly."""
        with compiling(), self._lock:
            if self.ready:
                return
            try:
                with phase(LOWERING, self.phases):
                    self._call = self._compile()
            except Ends:
                return
            except Exception as reason:
                if raises:
                    raise
                self.failed = f"{type(reason).__name__}: {reason}"
                _log.warning(
                    "a program goes on as PyTorch runs it, since it could not be compiled: %s", self.failed
                )
            self.ready = True


def begin() -> threading.Thread | None:
    """Have what is pending compiled in the background; the thread that does it, None where nothing is pending."""
    with _LOCK:
        if not _PENDING:
            return _RUNNING[0] if _RUNNING else None
        if not _RUNNING:
            _RUNNING.append(threading.Thread(target=_work, name="thresher-compiles"))
            _RUNNING[0].start()
        return _RUNNING[0]


def _work() -> None:
    while True:
        with _LOCK:
            if not _PENDING or not threading.main_thread().is_alive():
                _RUNNING.clear()
                return
            one = _PENDING.popleft()()
        if one is not None:
            one.finish()
