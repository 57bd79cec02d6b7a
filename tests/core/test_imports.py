"""Who may import whom: the rooms form a one-way street, and the core is cheap to import."""

import ast
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
    "__init__", "__main__", "api", "auto", "backend", "bench", "certificate", "cli", "demo", "doctor", "export",
    "html_report", "models", "density", "density_metrics", "mlp_sites", "relu_swap", "quantization", "rewrite_cache",
    "rewrite_key", "saving", "testing", "training", "generation",
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
        for path in sorted(folder.glob("*.py")):
            yield room, path


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


def imported(room: str, path: Path):
    """Dotted names a file imports, also inside functions."""
    package = "thresher" if room == "core" else f"thresher.{room}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda p: getattr(p, "stem", p))
def test_imports_go_one_way(room, path):
    me = "face" if room == "core" and path.stem in FACE else room
    wrong = {name for name in imported(room, path) if (to := room_of(name)) and to not in ALLOWED[me]}
    assert not wrong, f"{room}/{path.name} may import {sorted(ALLOWED[me])}, and it imports {sorted(wrong)}"


def test_the_reader_of_imports_sees_what_is_forbidden(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from thresher.kernels import native\n    from ..runtime import session\n")
    assert {room_of(n) for n in imported("passes", bad)} >= {"kernels", "runtime"}


def test_importing_thresher_does_not_import_torch():
    code = "import sys, thresher; assert 'torch' not in sys.modules; assert thresher.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)
