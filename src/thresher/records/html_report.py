"""The report as one HTML file: the model as layers of coloured sites, the program before and after, three plots.

The file holds everything it shows and asks nothing of the network.
"""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thresher.runtime.artifact.fakes import materialise

from .. import __version__
from ..errors import ArgumentError
from ..gains import mean_gain, speed
from ..graph.program import Program
from ..report import Report
from .html_template import SCRIPT, STYLE

_LAYER = re.compile(r"^(.*?\.?(?:layers?|h|blocks?|block)\.\d+)(?:\.(.+))?$")
_CLAIMED = "is already rewritten by"
_MOST_LINES = 4000


@dataclass(frozen=True)
class View:
    """What is drawn. before, after: None where they are not at hand."""

    report: Report
    before: Program | None = None
    after: Program | None = None
    certificate: Any = None


def write(path: str | Path, what: Any, title: str = "model") -> Path:
    """Write the report of a compiled model, an explanation or a Report. The old file stays until the new is whole."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(what, title), encoding="utf-8")
    partial.replace(path)
    return path


def render(what: Any, title: str = "model") -> str:
    """The HTML text. what: the result of `thresher.compile` or `thresher.explain`, or a Report."""
    view = _view(what)
    body = "\n".join(
        (
            f"<h1>{_e(title)}</h1><p class=dim>{_e(view.report.summary())} Thresher {__version__}, recipe "
            f"{_e(view.report.recipe)}, target {_e(view.report.target)}.</p>",
            _passes(view.report),
            "<h2>Sites</h2>" + _legend() + _layers(view.report),
            '<div id="why" class="dim" aria-live="polite">Point at a site to read what was done there and why.</div>',
            "<h2>Time, memory and error</h2>" + _plots(view),
            _programs(view),
            _notes(view),
        )
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_e(title)}: Thresher report</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>{body}'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _view(what: Any) -> View:
    if isinstance(what, Report):
        return View(what)
    if hasattr(what, "before") and hasattr(what, "after"):  # an Explanation
        if not what.reports:
            raise ArgumentError("what", "an explanation without a captured graph", "one with a report",
                                "; ".join(what.refused) or "Explain a model that can be captured.")  # fmt: skip
        best = max(range(len(what.reports)), key=lambda i: what.reports[i].rewritten)
        return View(what.reports[best], what.before[best], what.after[best])
    if hasattr(what, "sessions") and what.sessions:  # a Compiled
        session = max(what.sessions, key=lambda s: s.report.rewritten)
        captured = session.captured and materialise(session.captured)
        return View(session.report, captured, materialise(session.program), session.certificate)
    raise ArgumentError("what", type(what).__name__, "a Report, or the result of thresher.compile or thresher.explain",
                        "Pass one of those.")  # fmt: skip


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)


def _passes(report: Report) -> str:
    rows = []
    for p in report.passes:
        error = "not measured" if p.error is None else f"{p.error:.1e}"
        share = f"{p.coverage:.0%}" if p.rewritten or p.missed else "no site"
        state = "rolled back" if p.rolled_back else share
        cells = (
            len(p.rewritten),
            len(p.missed),
            state,
            error,
            f"{p.budget:.0e}",
            speed(p.predicted),
            speed(p.measured),
        )
        rows.append(
            f"<tr><td>{_e(p.name)}</td>" + "".join(f"<td class=n>{_e(c)}</td>" for c in cells) + "</tr>"
        )
    heads = (
        "pass",
        "rewritten",
        "missed",
        "coverage",
        "relative error",
        "budget",
        "expected gain",
        "measured gain",
    )
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f"<h2>Passes</h2><div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _legend() -> str:
    kinds = (
        ("rewritten", "rewritten"),
        ("missed", "left alone"),
        ("claimed", "claimed by another pass"),
        ("rolled", "rolled back"),
    )
    return (
        "<p class=legend>" + "".join(f'<span class="site {k}">{words}</span>' for k, words in kinds) + "</p>"
    )


def sites(report: Report) -> dict[str, tuple[str, str]]:
    """Each site's state (rewritten, claimed, rolled or missed) and the sentences about it."""
    found: dict[str, tuple[str, list[str]]] = {}
    rank = {"rewritten": 3, "rolled": 2, "claimed": 1, "missed": 0}

    def add(site: str, state: str, why: str) -> None:
        old, sentences = found.get(site, (state, []))
        found[site] = (max(old, state, key=lambda s: rank[s]), [*sentences, why])

    for p in report.passes:
        for site in p.rewritten:
            gain = f" The cost model expects {p.predicted[site]:.2f}x." if site in p.predicted else ""
            add(site, "rewritten", f"Rewritten by {p.name}.{gain}")
        for miss in p.missed:
            state = (
                "rolled" if p.rolled_back and miss.reason.startswith("The pass was rolled back") else "missed"
            )
            state = "claimed" if _CLAIMED in miss.reason else state
            add(miss.site, state, f"{p.name}: {p.rolled_back if state == 'rolled' else miss.reason}")
    return {site: (state, "\n".join(why)) for site, (state, why) in found.items()}


def _layers(report: Report) -> str:
    groups: dict[str, list[str]] = {}
    for site, (state, why) in sites(report).items():
        chip = f'<button class="site {state}" title="{_e(why)}" data-fqn="{_e(site)}" data-why="{_e(why)}">'
        for part in site.split(", "):  # passes over tokens rewrite several layers as one site
            match = _LAYER.match(part)
            layer, name = (match[1], match[2] or "the layer") if match else ("the model", part)
            groups.setdefault(layer, []).append(f"{chip}{_e(name)}</button>")
    lines = [f'<div class="layer"><b>{_e(layer)}</b><div class="sites">{"".join(chips)}</div></div>'
             for layer, chips in sorted(groups.items(), key=lambda g: _natural(g[0]))]  # fmt: skip
    return "".join(lines) or "<p>No pass looked at a site.</p>"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _plots(view: View) -> str:
    means = {p.name: mean_gain(p.predicted) for p in view.report.passes}
    expected = {f"{name}, expected": mean for name, mean in means.items() if mean is not None}
    if view.report.predicted is not None:
        expected["whole, expected"] = view.report.predicted
    if view.report.measured is not None:
        expected["whole, measured"] = view.report.measured
    memory = {
        name: _bytes(program) / 2**20
        for name, program in (("before", view.before), ("after", view.after))
        if program
    }
    errors: dict[str, float] = {}
    for p in view.report.passes:
        if p.error is not None:
            errors[p.name] = p.error / p.budget if p.budget else 0.0
    if view.report.error is not None and view.report.budget:
        errors["all passes"] = view.report.error / view.report.budget
    return (
        '<div class="plots">'
        + _bars(expected, "time: speed over what it was", "x", 1.0)
        + _bars(memory, "memory: weights held by the program", " MiB", None)
        + _bars(errors, "error: share of the budget that was used", "", 1.0)
        + "</div>"
    )


def _bytes(program: Program) -> int:
    seen = {id(w.tensor): w.tensor.numel() * w.tensor.element_size() for w in program.weights.values()}
    return sum(seen.values())


def _bars(values: Mapping[str, float], caption: str, unit: str, line: float | None) -> str:
    """Horizontal bars as SVG; a vertical line at `line`."""
    if not values:
        return f"<figure><p class=dim>not measured</p><figcaption>{_e(caption)}</figcaption></figure>"
    known = {k: v for k, v in values.items() if v == v}
    top = max([*known.values(), line or 0.0, 1e-12]) * 1.05
    height = 26 * len(values) + 8
    parts = []
    for i, (name, value) in enumerate(values.items()):
        width = 0 if value != value else 190 * value / top
        over = line is not None and caption.startswith("error") and not value <= line
        kind = "c" if over else "a" if name.startswith(("before", "whole")) else "b"
        parts.append(f'<text x="0" y="{i * 26 + 20}">{_e(name[:22])}</text>'
                     f'<rect class="{kind}" x="140" y="{i * 26 + 6}" width="{width:.1f}" height="18" rx="2"/>'
                     f'<text x="{145 + width:.0f}" y="{i * 26 + 20}">{value:.3g}{unit}</text>')  # fmt: skip
    if line is not None:
        at = 140 + 190 * line / top
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="2" y2="{height - 2}" stroke="currentColor" stroke-dasharray="3 3"/>'
        )
    svg = f'<svg viewBox="0 0 400 {height}" role="img" aria-label="{_e(caption)}">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{_e(caption)}</figcaption></figure>"


def _programs(view: View) -> str:
    if view.before is None or view.after is None:
        return ""
    lines = list(_aligned(view.before.text().splitlines(), view.after.text().splitlines()))
    rows = [f'<div class="{l}">{_e(a)}</div><div class="{r}">{_e(b)}</div>' for l, a, r, b in lines]
    first = " checked" if any(l != "same" for l, *_ in lines) else ""  # the script hides the others at once
    cut = f"<p class=dim>The first {_MOST_LINES} of {len(rows)} lines.</p>" if len(rows) > _MOST_LINES else ""
    rows = rows[:_MOST_LINES]
    return (
        f'<h2>Program</h2><p><label><input type="checkbox" id="changed"{first}> changed lines only</label></p>'
        f'<div class="ir"><div class="head">before</div><div class="head">after</div>{"".join(rows)}</div>{cut}'
    )


def _aligned(before: list[str], after: list[str]) -> Iterable[tuple[str, str, str, str]]:
    """(left class, left line, right class, right line), equal lines side by side."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, i, j, k, l in matcher.get_opcodes():
        if kind == "equal":
            yield from (("same", a, "same", a) for a in before[i:j])
            continue
        left, right = before[i:j], after[k:l]
        for n in range(max(len(left), len(right))):
            a, b = (part[n] if n < len(part) else "" for part in (left, right))
            yield "gone" if a else "", a, "new" if b else "", b


def _notes(view: View) -> str:
    sentences = [f"{p.name}: {n}" for p in view.report.passes for n in p.sentences] + list(view.report.notes)
    sentences += [f"{p.name} was not verified: {p.unverified}" for p in view.report.passes if p.unverified]
    shown = "".join(f"<li>{_e(s)}</li>" for s in sentences)
    parts = f"<h2>Notes</h2><ul>{shown}</ul>" if shown else ""
    if view.certificate is not None:
        parts += (
            f"<details><summary>Certificate</summary><pre>{_e(view.certificate.to_json())}</pre></details>"
        )
    return parts
