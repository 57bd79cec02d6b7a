"""Every public definition says what it is, and files are short enough to be read at one sitting."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("src", "passes", "kernels", "lowering", "runtime")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def files(*suffixes: str, rooms=ROOMS):
    return sorted(p for room in rooms for p in (ROOT / room).rglob("*") if p.suffix in suffixes)


def silent(tree: ast.Module) -> list[str]:
    """Public functions, classes and methods without a docstring, as `Class.method`.

    A method that fulfils what a base class declares, and says there, needs none; nor does an operator's fake or sample,
    or an overload.
    """
    found = []
    for node in tree.body:
        if not isinstance(node, DEFINITIONS) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None and "overload" not in map(ast.unparse, node.decorator_list):
            found.append(node.name)
        if isinstance(node, ast.ClassDef):
            bases = bool(node.bases)
            for method in node.body:
                if not isinstance(method, DEFINITIONS[:2]) or method.name.startswith("_") or bases:
                    continue
                if ast.get_docstring(method) is None and not _plain(method):
                    found.append(f"{node.name}.{method.name}")
    return found


def _plain(method: ast.FunctionDef) -> bool:
    """A property of a few lines, whose name says it."""
    names = {ast.unparse(d) for d in method.decorator_list}
    return (
        bool(names & {"property", "cached_property", "functools.cached_property"}) and len(method.body) == 1
    )


@pytest.mark.parametrize("path", files(".py"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_public_definitions_have_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.name in ("__init__.py", "__main__.py"), "the module says nothing"
    assert not silent(tree)


LIMITS = {".py": 300, ".cpp": 400, ".h": 400, ".cu": 400}


def test_files_are_short():
    all_rooms = (*ROOMS, "tests", "benchmarks", "examples")
    length = {
        p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines())
        for p in files(*LIMITS, rooms=all_rooms)
    }
    wrong = {name: n for name, n in length.items() if n > LIMITS[Path(name).suffix]}
    assert not wrong, "split these; 300 lines of Python and 400 of C++ are read at one sitting"


def test_what_says_nothing_is_found():
    source = '''
def said():
    """Says."""
def unsaid(): pass
def _private(): pass
class Silent:
    def method(self): pass
    @property
    def name(self): return 1
'''
    assert silent(ast.parse(source)) == ["unsaid", "Silent", "Silent.method"]
