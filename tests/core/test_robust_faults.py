"""What goes wrong around a compilation leaves results right, old files whole, and a sentence that says what it was."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each case is a process of its own
SUPPORT = Path(__file__).resolve().parents[1] / "support"
PRELUDE = f"""
import os, resource, signal, sys
sys.path.insert(0, {str(SUPPORT)!r})
import torch, zoo, thresher
torch.set_num_threads(1)
model, inputs = zoo.ZOO["bert"].build()

def compiled(**options):
    return thresher.compile(model, inputs, target="reference", **options)

def check(fast):
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs).last_hidden_state[real], model(**inputs).last_hidden_state[real])
"""


def run(code: str, code_wanted: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == code_wanted, done.stderr[-3000:]
    return done.stdout


def test_a_compiler_that_fails_leaves_the_references_and_says_so(tmp_path):
    run(
        """
        from thresher.tools import doctor
        check(compiled(prepack=True))
        found = {c.name: c for c in doctor.checks()}
        line = next(c for n, c in found.items() if n.startswith("varlen_attention:") and c.found == "cpu")
        assert not line.usable and line.fix, line
        """,
        CXX="/bin/false",
        THRESHER_CACHE_DIR=str(tmp_path),
    )


def test_a_cache_directory_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file, where a directory is wanted")
    run("check(compiled(prepack=True))", THRESHER_CACHE_DIR=str(blocked))
    done = subprocess.run(
        [sys.executable, "-c", "from thresher import cli; from thresher.machine import device_rates, devices\n"
         "device_rates.measure_cpu = lambda: devices.guessed_cpu()\n"
         "import sys; sys.argv = ['thresher', 'doctor', '--calibrate']; cli.main()"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "THRESHER_CACHE_DIR": str(blocked)},
    )  # fmt: skip
    assert done.returncode == 2 and "THRESHER_CACHE_DIR" in done.stderr and "Traceback" not in done.stderr


# no file may grow beyond 20,000 bytes
DISK_FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    thresher.save(fast, "m.thresher", example_inputs=inputs)
except Exception as reason:
    assert isinstance(reason, (thresher.ThresherError, OSError)), reason
    sys.exit(3)
"""
# the process is killed in the middle of writing
KILLED = """
from thresher.runtime.artifact import archive
def torn(file, members, manifest):
    file.write(b"x" * 5000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
archive.write = torn
thresher.save(fast, "m.thresher", example_inputs=inputs)
"""


def test_the_old_artifact_survives_saves_that_fail(tmp_path):
    make = f"os.chdir({str(tmp_path)!r})\nfast = compiled(prepack=True)\n"
    save = "thresher.save(fast, 'm.thresher', example_inputs=inputs)\n"
    keep = "import shutil; shutil.copy('m.thresher', 'before')\n"
    saved = tmp_path / "m.thresher"
    run(make + save + keep + DISK_FULL, code_wanted=3)
    assert saved.read_bytes() == (tmp_path / "before").read_bytes()
    run(make + KILLED, code_wanted=-9)
    assert saved.read_bytes() == (tmp_path / "before").read_bytes()
    run(
        f"os.chdir({str(tmp_path)!r})\nloaded = thresher.load('m.thresher', target='reference')\n"
        "check(loaded)\nassert loaded.manifest['certificate']"
    )
