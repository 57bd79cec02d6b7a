"""The command's root, and how a subcommand speaks: results on stdout, phases and warnings on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Graph rewrites that take the waste out of transformer inference.")  # fmt: skip
_SHOWN = 2.0  # seconds, from which on it is worth a line how long a phase took


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"thresher {__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


class Say:
    """What one run of a subcommand prints. as_json: stdout holds JSON alone. quiet: nothing but that, and errors."""

    def __init__(self, as_json: bool, quiet: bool):
        self.as_json, self.quiet = as_json, quiet
        self.results = Console(quiet=as_json or quiet)
        self.aside = Console(stderr=True, quiet=quiet)
        if quiet:
            from ..progress import no_progress

            no_progress()
            warnings.simplefilter("ignore")

    def json(self, payload: Any) -> None:
        """Print the result where JSON was asked for."""
        if self.as_json:
            from ..records.certificate import plain

            print(json.dumps(plain(payload), indent=2, allow_nan=False))

    @contextlib.contextmanager
    def heard(self, name: str) -> Iterator[None]:
        """What a logger of ours says meanwhile, from INFO on, is said here."""
        logger, was = logging.getLogger(name), logging.getLogger(name).level
        handler = _Aside(self.aside)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(was)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the work, in words: with a clock on a terminal, as a line elsewhere."""
        started = time.monotonic()
        if self.aside.is_terminal and not self.quiet:
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
            with Progress(*columns, console=self.aside, transient=True) as bar:
                bar.add_task(name, total=None)
                yield
        else:
            self.aside.print(f"{name} ...", markup=False, highlight=False)
            yield
        taken = time.monotonic() - started
        if taken >= _SHOWN:
            self.aside.print(f"{name}: {taken:.1f} s", markup=False, highlight=False)


class _Aside(logging.Handler):
    """Prints records as lines on stderr."""

    def __init__(self, console: Console):
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(record.getMessage(), markup=False, highlight=False)
