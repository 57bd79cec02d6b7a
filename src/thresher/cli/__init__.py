"""The `thresher` command.

Exit codes: 0 when what was asked for was done and holds; 1 when it was done and a check failed (nothing
rewritten, slower than Inductor, outside the budget); 2 for wrong input, with a message that names the fix;
3 for an error that Thresher did not expect, with its traceback; 130 when it was interrupted.
"""

from __future__ import annotations

import sys
import traceback

from rich.console import Console
from rich.markup import escape

from ..errors import NothingRewrittenError, ThresherError
from . import look, make, show
from .app import app

__all__ = ["app", "main"]
assert look and make and show  # their commands are the app's


def main() -> None:
    """Entry point: a ThresherError is a message and exit code 2; a defect is never exit code 1, a failed check's."""
    try:
        app()
    except NothingRewrittenError as error:  # asked for rightly, and a check failed
        Console(stderr=True).print("[red]failed:[/red]", escape(str(error)))
        raise SystemExit(1) from None
    except ThresherError as error:
        _stop(str(error))
    except OSError as error:  # a full disk, a file taken away meanwhile
        if error.strerror is None:
            raise
        _stop(f"{error.filename or 'The system'}: {error.strerror}. Free the space, or correct the path.")
    except MemoryError:
        _stop("There is not enough memory. Take fewer --rows, a shorter --longest or a smaller --dtype.")
    except Exception:
        traceback.print_exc()
        print("Thresher did not expect this error: please report it with the lines above.", file=sys.stderr)
        raise SystemExit(3) from None


def _stop(said: str) -> None:
    Console(stderr=True).print("[red]error:[/red]", escape(said))  # escaped: `thresher[demo]` is no colour
    raise SystemExit(2) from None
