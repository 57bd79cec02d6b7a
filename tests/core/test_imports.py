"""Who may import whom: the rooms form a one-way street, and the core is cheap to import."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "core": ROOT / "src" / "thresher",
    **{r: ROOT / r for r in ("passes", "kernels", "lowering", "runtime")},
}
# The face joins the rooms; the rest of src/thresher is the core that every room may use.
FACE = {
    "__init__", "__main__", "api", "compiled", "strict", "model_capture", "backend", "entry", "cli", "export",
    "export_example", "calibration_data", "mapped_model", "saving",
    "quantization", "low_bit", "generation", "alike", "testing",
    "records", "cache", "training", "tools", "integrations",
}  # fmt: skip
ALLOWED = {
    "core": {"core"},
    "passes": {"core", "passes"},
    "kernels": {"core", "kernels"},
    "lowering": {"core", "kernels", "lowering"},
    "runtime": {"core", "kernels", "lowering", "runtime"},
    "face": {"core", "passes", "kernels", "lowering", "runtime", "face"},
}


def modules():
    for room, folder in ROOMS.items():
        for path in sorted(folder.rglob("*.py")):
            yield room, path


def module_of(room: str, path: Path) -> str:
    """The dotted name of a file of ours; a package's is that of its folder."""
    root = "thresher" if room == "core" else f"thresher.{room}"
    parts = path.relative_to(ROOMS[room]).with_suffix("").parts
    return ".".join([root, *(p for p in parts if p != "__init__")])


def room_of(module: str) -> str | None:
    """The room of a dotted name below `thresher`, or None for other packages."""
    parts = module.split(".")
    if parts[0] != "thresher":
        return None
    if len(parts) == 1:
        return "core"
    if parts[1] in ROOMS:
        return parts[1]
    return "face" if parts[1] in FACE else "core"


def imported(room: str, path: Path, tree: ast.AST | None = None):
    """Dotted names a file imports, also inside functions; relative ones start at the file's own package."""
    package = module_of(room, path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda p: str(p).removeprefix(f"{ROOT}/"))
def test_imports_go_one_way(room, path):
    me = room_of(module_of(room, path)) if room == "core" and path.parent.name != "thresher" else room
    me = "face" if room == "core" and path.parent.name == "thresher" and path.stem in FACE else me
    wrong = {name for name in imported(room, path) if (to := room_of(name)) and to not in ALLOWED[me]}
    assert not wrong, f"{room}/{path.name} may import {sorted(ALLOWED[me])}, and it imports {sorted(wrong)}"


def needed(room: str, path: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports, also inside functions; those for type annotations only are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = {n for n in imported(room, path, tree) if n in known}
    return {n for n in names if not any(other.startswith(f"{n}.") for other in names)} - {
        module_of(room, path)
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that need each other: the strongly connected parts of more than one name."""
    reach = {name: set(graph[name]) for name in graph}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    found = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return sorted(list(group) for group in found)


def test_no_files_import_each_other():
    known = {module_of(room, path): (room, path) for room, path in modules()}
    assert not circles({name: needed(*place, set(known)) for name, place in known.items()})


def folder_of(room: str, path: Path) -> str:
    """A package's name; a file that lies in no package of a room stands for itself."""
    name = module_of(room, path)
    return name.rpartition(".")[0] if path.parent != ROOMS[room] and path.name != "__init__.py" else name


def test_no_folders_need_each_other():
    known = {module_of(room, path): (room, path) for room, path in modules()}
    graph: dict[str, set[str]] = {folder_of(*place): set() for place in known.values()}
    for place in known.values():
        mine = folder_of(*place)
        graph[mine] |= {folder_of(*known[name]) for name in needed(*place, set(known))} - {mine}
    assert not circles(graph)


def test_the_page_on_architecture_has_every_folder():
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = page.split("## The tree")[1].split("```")[1]
    folders = {path.parent.relative_to(ROOT).as_posix() for _, path in modules()} - {"src/thresher"}
    inner = {
        name.removeprefix("src/thresher/").partition("/")[2] or name.rpartition("/")[2] for name in folders
    }
    missing = {name for name in inner if f"{name}/" not in tree.split()}
    assert not missing, "name these folders in the tree of docs/architecture.md, with what they are for"


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_reader_of_imports_sees_what_is_forbidden(tmp_path, monkeypatch, depth):
    """Also in sub-folders, where one dot more leads to the same place."""
    monkeypatch.setitem(ROOMS, "passes", tmp_path)
    bad = tmp_path.joinpath(*["sub"] * depth, "bad.py")
    bad.parent.mkdir(parents=True, exist_ok=True)
    dots = "." * (depth + 2)
    bad.write_text(
        f"def f():\n    from thresher.kernels import native\n    from {dots}runtime import session\n"
    )
    assert [path for room, path in modules() if room == "passes"] == [bad]
    assert {room_of(n) for n in imported("passes", bad)} >= {"kernels", "runtime"}


def test_a_wheel_holds_every_module(tmp_path):
    """An editable install finds sub-packages that `pyproject.toml` forgot to list; a wheel does not."""
    tree = tmp_path / "tree"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(tree)]
    subprocess.run(pip, check=True)
    held = {p.relative_to(target).as_posix() for p in target.rglob("thresher/**/*.py")}
    ours = {path.relative_to(ROOMS[room]) for room, path in modules() if room == "core"}
    assert held == {f"thresher/{p.as_posix()}" for p in ours} | {
        f"thresher/{room}/{path.relative_to(ROOMS[room]).as_posix()}"
        for room, path in modules()
        if room != "core"
    }
    wanted = sorted(module_of(room, path) for room, path in modules() if path.stem != "__main__")
    code = (
        f"import sys, importlib; sys.path.insert(0, {str(target)!r})\n"
        "missing = []\n"
        f"for name in {wanted!r}:\n"
        "    try: module = importlib.import_module(name)\n"
        "    except ModuleNotFoundError as fault:\n"
        "        if (fault.name or '').startswith('thresher'): raise\n"
        "        missing.append(f'{name}: {fault.name}')\n"
        f"    else: assert module.__file__.startswith({str(target)!r}), module.__file__\n"
        "print(*missing, sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    optional = ("triton", "tensorrt", "onnx", "torch_tensorrt", "transformers", "vllm")
    assert all(line.rpartition(": ")[2].startswith(optional) for line in done.stdout.split("\n") if line), (
        done.stdout
    )


def test_importing_thresher_does_not_import_torch():
    code = "import sys, thresher; assert 'torch' not in sys.modules; assert thresher.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_pass_rsq_needs_nothing_of_what_makes_its_codes():
    """`thresher.quantize` runs the quantizer; a program is rewritten without it."""
    for room, path in modules():
        if room == "passes" and path.parent != ROOT / "passes" / "rsq" / "quantizer":
            wrong = [n for n in imported(room, path) if n.startswith("thresher.passes.rsq.quantizer")]
            assert not wrong, f"{path.name} imports {wrong}"
