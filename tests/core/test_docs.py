"""docs/api.md is the public names with their docstrings; every page's links and option names exist.

THRESHER_UPDATE_DOCS=1 python -m pytest tests/core/test_docs.py   # writes the reference anew
"""

import dataclasses
import inspect
import os
import re
from pathlib import Path

import pytest

import thresher
from thresher import backend
from thresher.recipe import CONFIGS, PRESETS, Recipe

assert backend
DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "api.md"
UPDATE = "run: THRESHER_UPDATE_DOCS=1 python -m pytest tests/core/test_docs.py"
BEGIN, END = "<!-- reference: written by tests/core/test_docs.py -->", "<!-- end of reference -->"
OURS = ("prepack", "causal_mask", "decode_attention", "transprune", "zipvl", "deft", "rsq", "nvfp4", "bf16")


def reference() -> str:
    parts = []
    for name in sorted(thresher._PUBLIC, key=str.lower):
        found = getattr(thresher, name)
        text = inspect.getdoc(found) or ""
        kind = "class" if inspect.isclass(found) else "function"
        signature = "" if inspect.isclass(found) else _signature(found)
        parts.append(f"## `{name}{signature}` ({kind})\n\n```text\n{text}\n```")
    parts.append("## Options of passes\n")
    for name in OURS:
        if name in CONFIGS:
            fields = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(CONFIGS[name]))
            parts.append(f"### `{name}`\n\n`{fields}`\n\n```text\n{inspect.getdoc(CONFIGS[name])}\n```")
    return "\n\n".join(parts)


def _signature(found) -> str:
    """Names and defaults; types stand in the docstrings."""
    shown = []
    for p in inspect.signature(found).parameters.values():
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        shown.append(f"{star}{p.name}" + ("" if p.default is p.empty else f"={p.default!r}"))
    return f"({', '.join(shown)})"


def test_the_reference_is_up_to_date():
    written = PAGE.read_text()
    before, _, rest = written.partition(BEGIN)
    after = rest.partition(END)[2]
    expected = f"{before}{BEGIN}\n\n{reference()}\n\n{END}{after}"
    if os.environ.get("THRESHER_UPDATE_DOCS"):
        PAGE.write_text(expected)
        return
    headings = re.findall(r"^#+ `(\w+)", written, re.M)
    assert headings == re.findall(r"^#+ `(\w+)", expected, re.M), UPDATE
    for name in OURS:  # the sentences may lag behind; a name that is missing or gone may not
        section = written.partition(f"### `{name}`")[2].partition("```")[0]
        missing = [f.name for f in dataclasses.fields(CONFIGS[name]) if f"{f.name}=" not in section]
        assert not missing, (name, missing, UPDATE)


def test_every_public_name_has_a_docstring():
    assert not [n for n in thresher._PUBLIC if not inspect.getdoc(getattr(thresher, n))]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_recipes_page_names_every_preset():
    text = (DOCS / "recipes.md").read_text()
    assert all(f"`{name}`" in text for name in PRESETS)
    assert all(f"`{f.name}`" in text for f in dataclasses.fields(Recipe) if f.name != "passes")
