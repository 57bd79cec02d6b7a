"""docs/structure.md says what is recovered in each architecture, and this test writes that table.

THRESHER_UPDATE_DOCS=1 python -m pytest tests/passes/structure/test_table.py   # writes the page anew
"""

import os
from pathlib import Path

import captures
import pytest
import zoo

from thresher.passes.structure.recover import recover

PAGE = Path(__file__).resolve().parents[3] / "docs" / "structure.md"
BEGIN, END = "<!-- table: written by tests/passes/structure/test_table.py -->", "<!-- end of table -->"
NAMES = [n for n in zoo.ZOO if n not in ("llava", "qwen2_vl")]  # these two are several graphs


def table() -> str:
    rows, missed = [], []
    for name in NAMES:
        structure = recover(captures.of_zoo(name))
        model = type(zoo.ZOO[name].build()[0]).__name__
        rows.append(
            {"model": f"{model}" + (f" ({name})" if name == "llama_reglu" else ""), **structure.summary()}
        )
        missed += [f"- {model}, `{m.site}`: {m.reason}" for m in structure.missed]
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    lines += ["| " + " | ".join(str(row[h]) for h in heads) + " |" for row in rows]
    return "\n".join([*lines, "", "What was not recovered, and why:", "", *missed])


@pytest.fixture(scope="module")
def page() -> tuple[str, str]:
    written = PAGE.read_text()
    before, _, rest = written.partition(BEGIN)
    _, _, after = rest.partition(END)
    return written, f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def test_the_page_is_up_to_date(page):
    written, expected = page
    if os.environ.get("THRESHER_UPDATE_DOCS"):
        PAGE.write_text(expected)
        return
    assert written == expected, (
        "run: THRESHER_UPDATE_DOCS=1 python -m pytest tests/passes/structure/test_table.py"
    )
