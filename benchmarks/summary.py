"""Writes docs/results.md: every claim that the records in benchmarks/results/ test, and how it came out.

python benchmarks/summary.py            # write the page
python benchmarks/summary.py --check    # exit 1 when the page is not what the records say
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
_HEAD = """# Results

Every claim with its target, measured or not, as `benchmarks/results/*.json` has it. This page is written by
`python benchmarks/summary.py`. A target that was not reached stays in the table.
"""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def section(record: dict[str, Any]) -> str:
    """One record as a heading, what it was measured with, and a table of claims."""
    machine, versions = record["machine"], record["versions"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    known = [f"{name} {versions[name]}" for name in ("torch", "transformers", "triton") if versions.get(name)]
    lines = [
        f"## {record['benchmark']}",
        "",
        f"`{record['command']}` on {machine['cpu']} ({machine['isa']}, {machine['cores']} cores, {gpus}), "
        f"{record['threads']} thread(s), {', '.join(known)}, {record['started'][:10]}.",
        "",
        "| claim | measured | target | reached |",
        "|---|---|---|---|",
    ]
    for claim in record["claims"]:
        verdict = "yes" if claim["holds"] else "**no**"
        lines.append(f"| {claim['claim']} | {_number(claim['value'])} | {claim['target']} | {verdict} |")
    for claim in record["not_measured"]:
        lines.append(f"| {claim['claim']} | not measured: {claim['reason']} | | |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page, records in the order of their names."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return "\n".join([_HEAD, *(section(r) for r in records if "claims" in r)])


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
