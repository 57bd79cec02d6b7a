"""What the ahead-of-time record says of every kernel, and that it is about the kernels there are.

python benchmarks/gpu_kernels.py --json benchmarks/results/gpu_kernels.json
THRESHER_UPDATE_DOCS=1 python -m pytest tests/kernels/test_compiled_for_gpus.py     # writes the table in docs/gpu.md
"""

import ast
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

import launches
import triton_aot as aot
import written_tables

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "gpu_kernels.json"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- kernels: written by tests/kernels/test_compiled_for_gpus.py -->", "<!-- end of kernels -->"


def rows():
    if not RECORD.exists():
        pytest.skip(
            "there is no record: python benchmarks/gpu_kernels.py --json benchmarks/results/gpu_kernels.json"
        )
    return json.loads(RECORD.read_text())["rows"]


def table() -> str:
    """One line for each kernel: its configurations, and the worst of each figure over all architectures."""
    lines = [
        "| kernel | configurations | architectures | registers | shared memory, KiB | warps held | passes |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {}
    for row in rows():
        found.setdefault(row["kernel"], []).append(row)
    for kernel, its in found.items():
        registers, shared, warps = ([r[key] for r in its] for key in ("registers", "shared", "warps"))
        good = sum(not r["wrong"] for r in its)
        lines.append(
            f"| `{kernel}` | {len({r['configuration'] for r in its})} | {len({r['sm'] for r in its})} "
            f"| {min(registers)} to {max(registers)} | {min(shared) / 1024:.0f} to {max(shared) / 1024:.0f} "
            f"| {min(warps)} to {max(warps)} | {good} of {len(its)} |"
        )
    wrong = [r for r in rows() if r["wrong"]]
    total = len(rows())
    lines.append("")
    lines.append(
        f"{total - len(wrong)} of {total} pass." + ("" if wrong else " None spills, on any of the six.")
    )
    lines += [f"- `{r['kernel']}` on sm_{r['sm']}, {r['configuration']}: {r['wrong']}." for r in wrong]
    return "\n".join(lines)


def test_the_page_has_the_records_table():
    written_tables.is_up_to_date(PAGE, BEGIN, END, table(), "tests/kernels/test_compiled_for_gpus.py")


def jitted():
    """The names of the kernels that are launched."""
    found = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        functions = [
            n for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in n.decorator_list)
        ]  # fmt: skip
        found |= {f.name for f in functions if not f.name.startswith("_")}
    return found


@pytest.mark.parametrize("capability", launches.ARCHITECTURES)
def test_every_kernel_is_among_the_launches_that_models_lead_to(capability):
    found = launches.recorded(capability)
    assert {c.name for c in found} == jitted() - ({"gemm_w4a4"} if capability < 100 else set())
    assert len(found) >= 80 and all(c.options or c.name == "tail_part" or c.constants for c in found)


def test_every_kernel_that_is_launched_is_recorded_for_every_architecture():
    assert jitted() == {r["kernel"].split(": ")[1] for r in rows()}
    for kernel in {r["kernel"] for r in rows()}:
        seen = {r["sm"] for r in rows() if r["kernel"] == kernel}
        most = {100, 120} if "w4a4" in kernel else set(launches.ARCHITECTURES)
        assert seen == most, kernel


@pytest.mark.parametrize("capability", launches.ARCHITECTURES)
def test_what_is_launched_today_is_what_was_compiled(capability):
    """A change to a tile, a kernel's arguments or who is chosen makes the record old."""
    now = {(f"{c.operator}: {c.name}", c.configuration) for c in launches.recorded(capability)}
    then = {(r["kernel"], r["configuration"]) for r in rows() if r["sm"] == capability}
    assert then <= now, "run: python benchmarks/gpu_kernels.py --json benchmarks/results/gpu_kernels.json"
    assert {kernel for kernel, _ in now} == {kernel for kernel, _ in then}


@pytest.mark.thorough
@pytest.mark.parametrize("capability", launches.ARCHITECTURES)
def test_every_configuration_passes(capability):
    for launch in launches.recorded(capability):
        found = launch.compile()
        found.require_fit(capability, tensor_cores=launch.products)
        assert found.wide_loads() or not launch.wide, (launch.name, launch.configuration)
        assert not found.divisions_in_loops(), (launch.name, launch.configuration)


def test_divisions_in_loops_are_found_in_assembly():
    call = "        /*0100*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;"
    loop = [".L_x_1:", call, "        /*0200*/               @P0 BRA `(.L_x_1) ;", ".L_x_2:"]
    about = dict(registers=32, stack=0, spills=0, shared=0, mma={})
    assert aot.Resources(**about, sass="\n".join(loop)).divisions_in_loops() == 1
    assert aot.Resources(**about, sass="\n".join([call, *loop[::2]])).divisions_in_loops() == 0


def test_loads_and_blocks_are_counted():
    about = dict(stack=0, spills=0, mma={})
    wide = "LDG.E.128.CONSTANT R4, [R2.64] ;\nLDGSTS.E.BYPASS.128 [R1], [R2] ;\nUTMALDG.2D [UR8] ;\nLDG.E.64 R2 ;"
    found = aot.Resources(registers=128, shared=40_000, sass=wide, **about)
    assert found.wide_loads() == 3
    assert found.blocks(90, 8) == 2  # 65,536 registers for 128 x 256
    assert aot.Resources(registers=32, shared=100_000, sass="", **about).blocks(120, 4) == 1
    assert re.search("occupan|blocks", aot.Resources.blocks.__doc__)
