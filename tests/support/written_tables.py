"""Tables that tests write into pages: between two marks a page has what was made last."""

import os
from pathlib import Path


def is_up_to_date(page: Path, begin: str, end: str, table: str, command: str) -> None:
    """Assert that a page has the table between its marks; THRESHER_UPDATE_DOCS=1 writes it there anew instead.

    command: the test file that writes it, for the message.
    """
    written = page.read_text()
    before, _, rest = written.partition(begin)
    expected = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    if os.environ.get("THRESHER_UPDATE_DOCS"):
        page.write_text(expected)
        return
    assert written == expected, f"run: THRESHER_UPDATE_DOCS=1 python -m pytest {command}"
