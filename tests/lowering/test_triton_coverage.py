"""Every Triton kernel is compiled ahead of time by some test."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = [p for p in (ROOT / "tests" / "kernels").rglob("*.py") if "triton_aot" in p.read_text()]
TEXTS = {f"{p.parent.name}/{p.name}": p.read_text() for p in TESTS}


def _is_jit(decorator):
    return "jit" in ast.unparse(decorator).split("(")[0].split(".")


def kernels():
    """(family, kernel) of each jitted function that no other jitted function calls: those that are launched."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        functions = [
            n for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.FunctionDef) and any(_is_jit(d) for d in n.decorator_list)
        ]  # fmt: skip
        called = {
            call.func.id
            for f in functions
            for call in ast.walk(f)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        }
        yield from ((path.parent.name, f.name) for f in functions if f.name not in called)


def test_there_are_kernels_and_tests():
    assert len(list(kernels())) >= 10 and len(TESTS) >= 4


@pytest.mark.parametrize("family, kernel", list(kernels()), ids=lambda x: x)
def test_is_compiled_ahead_of_time(family, kernel):
    naming = [
        name
        for name, text in TEXTS.items()
        if f"thresher.kernels.{family}" in text and kernel in text and "compile_for" in text
    ]
    assert naming, f"no test in tests/kernels compiles {family}'s {kernel} with triton_aot.compile_for"
    assert any("TARGETS" in TEXTS[name] or "capability" in TEXTS[name] for name in naming)
