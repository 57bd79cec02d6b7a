"""Writes docs/results.md: every claim that the records in benchmarks/results/ test, and how it came out.

python benchmarks/summary.py            # write the page
python benchmarks/summary.py --check    # exit 1 when the page is not what the records say
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
README, MARKS = ROOT / "README.md", ("<!-- results -->\n", "<!-- /results -->")
# (record, claim, as the README says it, how to show the number)
HIGHLIGHTS = (
    ("prepacking", "E, geometric mean over the length sets", "Prepacking: share of the FLOP bound over six length sets", "{:.0%}"),
    ("prepacking", "over padded compile at 81% padding (long-tail)", "Prepacking, 81 % padding: speed over padded `torch.compile`", "{:.1f}x"),
    ("peers", "encode of 5000 mixed texts, second process, over plain's best, one core", "`SentenceTransformer.encode` of 5,000 mixed texts, compile time included, over plain", "{:.2f}x"),
    ("peers", "encode of 5000 mixed texts, second process, over onnx's best, one core", "The same over its ONNX backend (ONNX Runtime)", "{:.2f}x"),
    ("peers", "encode of 5000 mixed texts, second process, over openvino's best, one core", "The same over its OpenVINO backend", "{:.2f}x"),
    ("peers", "vLLM with 4 bits by Thresher over vLLM bf16, SmolLM2, decode of 8 rows", "vLLM with 4 bits by Thresher over vLLM bf16, SmolLM2, decode of 8 rows", "{:.2f}x"),
    ("generate", "decode of 8 rows, best exact form over the best of vLLM", "`generate` of SmolLM2, 8 rows: decode over vLLM", "{:.2f}x"),
    ("compose", "MiniLM: best recipe within 1 % over torchao's best within 1 %", "MiniLM on a mixed-length batch over torchao's best (int8)", "{:.2f}x"),
    ("compose-serve", "SmolLM2, prefill of 16 mixed rows and 64 decode steps: best recipe within 1 % over padded Inductor, each with its better cache", "SmolLM2, a mixed-length batch and 64 decode steps over padded Inductor", "{:.1f}x"),
    ("tokens", "attainable speed-up reached at n = 1024 (2.28x of 2.32x)", "Token pruning to a quarter behind layer 2 of 8: share of the attainable speed-up", "{:.0%}"),
    ("tokens-tiny_vlm", "transprune below dense, 25 % kept, points (3 seeds)", "Tiny vision-language model, a quarter of the image kept: points below dense", "{:.1f}"),
    ("deft", "decode step at 5 %, non-gated: dense Inductor / ours", "Sparse MLPs at 5 % density: decode step of a toy decoder over Inductor", "{:.2f}x"),
    ("deft", "CPU kernel, batch 1 bf16, 5 to 30 %: least fraction of byte-ideal", "The sparse kernel in bf16, one row: least share of the byte-ideal from 5 to 30 %", "{:.0%}"),
    ("nvfp4", "4096x4096, 1 row: exact activations against bf16", "NVFP4 product on a CPU, one row: speed over bf16 `linear`", "{:.1f}x"),
    ("nvfp4", "4096x4096, 512 rows: bf16 time / slowest nvfp4 form", "The same at 512 rows", "{:.2f}x"),
    ("rsq", "3-bit RSQ: KL against rotate + GPTQ, seed 1", "RSQ at 3 bits, SmolLM2-135M: KL to fp32, of rotate + GPTQ's, worst of three seeds", "{:.2f}x"),
    ("rsq", "3-bit RSQ: KL of llm-compressor's GPTQ over its own", "The same: KL of llm-compressor's GPTQ over RSQ's", "{:.1f}x"),
)  # fmt: skip
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


def highlights() -> str:
    """The README's table. Raises KeyError for a highlight whose claim no record makes any more."""
    lines = ["| what | measured | aim | reached |", "|---|---|---|---|"]
    for name, claim, words, shown in HIGHLIGHTS:
        record = RESULTS / f"{name}.json"
        if name == "peers" and not record.exists():
            continue
        found = {c["claim"]: c for c in json.loads(record.read_text())["claims"]}.get(claim)
        if found is None and name == "peers":
            continue  # a peer that was not at hand
        if found is None:
            raise KeyError(claim)
        verdict = "yes" if found["holds"] else "**no**"
        lines.append(f"| {words} | {shown.format(found['value'])} | {found['target']} | {verdict} |")
    return "\n".join(lines) + "\n"


def readme() -> str:
    """The README with the table in its place."""
    before, rest = README.read_text().split(MARKS[0])
    return before + MARKS[0] + highlights() + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(readme())
