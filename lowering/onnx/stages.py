"""What an export is doing and since when, on a terminal: a large model takes minutes."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Stages:
    """A bar on stderr with the stage of one export and the time since it began; nothing where stderr is no terminal.

    with Stages() as stage:
        stage("writing")
    """

    def __init__(self, console: Console | None = None):
        console = console or Console(stderr=True)
        columns = TextColumn("exporting: {task.description}"), BarColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> Stages:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, name: str) -> None:
        """Begin a stage."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=None)
