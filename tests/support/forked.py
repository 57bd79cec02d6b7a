"""Processes for tests of what surrounds a compilation, each forked from one that has imported torch and Thresher already.

A process of its own takes five seconds of imports; a fork of a process that has them, none. What a child does to its
environment, its limits and its files reaches no other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

_PARENT = """
import json, os, sys
names = {}
exec(sys.argv[1], names)
answers = os.fdopen(os.dup(1), "w", buffering=1)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(asked["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.environ.update(asked["environment"])
        left = 0
        try:
            exec(compile(asked["code"], "<forked>", "exec"), names)
        except SystemExit as stopped:
            left = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
            print(stopped.code)
        except BaseException:
            import traceback
            traceback.print_exc()
            left = 1
        sys.stdout.flush()
        os._exit(left)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)
"""


@dataclass
class Forks:
    """A process that waits, and forks a child for each `run`."""

    parent: subprocess.Popen[str]

    @classmethod
    def of(cls, prelude: str, environment: Mapping[str, str]) -> Forks:
        """prelude: Python that the parent runs, whose names children see."""
        command = [sys.executable, "-c", _PARENT, prelude]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return cls(subprocess.Popen(command, env=dict(environment), **pipes))  # type: ignore[call-overload]

    def run(self, code: str, said: str, environment: Mapping[str, str] | None = None) -> int:
        """The exit code of a child that runs `code`, or minus the signal that ended it. said: a path, where its standard
        output and errors go."""
        asked = {"code": code, "said": said, "environment": dict(environment or {})}
        assert self.parent.stdin and self.parent.stdout
        self.parent.stdin.write(json.dumps(asked) + "\n")
        self.parent.stdin.flush()
        answer = self.parent.stdout.readline()
        assert answer, f"the parent ended with {self.parent.wait()}"
        return int(answer)

    def close(self) -> None:
        self.parent.communicate()
