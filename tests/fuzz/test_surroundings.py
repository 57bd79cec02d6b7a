"""What goes wrong around a compilation leaves results right, old files whole, and a sentence that says what it was."""

import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
from forked import Forks
from own_cache import own_cache

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


@pytest.fixture(scope="module")
def forks():
    made = Forks.of(PRELUDE, {**os.environ, "OMP_NUM_THREADS": "1"})
    yield made
    made.close()


@pytest.fixture
def run(forks, tmp_path_factory):
    """Run code in a process of its own, which has to end with `code_wanted`."""

    def run(code: str, code_wanted: int = 0, **environment: str) -> None:
        said = tmp_path_factory.mktemp("said") / "said"
        found = forks.run(textwrap.dedent(code), str(said), environment)
        assert found == code_wanted, said.read_text()[-3000:]

    return run


def test_a_compiler_that_fails_leaves_the_references_and_says_so(run, tmp_path):
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


def test_a_cache_directory_that_cannot_be_written(run, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file, where a directory is wanted")
    run("check(compiled(prepack=True))", THRESHER_CACHE_DIR=str(blocked))
    calibrate = """
        import io, contextlib
        from thresher import cli
        from thresher.machine import device_rates, devices
        device_rates.measure_cpu = lambda: devices.guessed_cpu()
        sys.argv = ["thresher", "doctor", "--calibrate"]
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                cli.main()
        except SystemExit as stopped:
            said = errors.getvalue()
            assert stopped.code == 2 and "THRESHER_CACHE_DIR" in said and "Traceback" not in said, said
        else:
            raise SystemExit("it calibrated")
    """
    run(calibrate, THRESHER_CACHE_DIR=str(blocked))


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


def test_the_old_artifact_survives_saves_that_fail(run, tmp_path):
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


@pytest.fixture(params=["full", "read-only"])
def spoiled_disk(request, tmp_path):
    """A file system of its own, of a megabyte, on which nothing more can be written once a file `spoil` is run."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip(
            "This user may mount nothing; a limit on the size of files stands for it in the test above."
        )
    yield place, request.param
    subprocess.run(["umount", str(place)], check=True)


SPOIL = {
    "full": """
rest = open(disk + "/rest", "wb", buffering=0)
for size in (4096, 64):
    try:
        while True:
            rest.write(b"x" * size)
    except OSError:
        pass
""",
    "read-only": "os.system(f'mount -o remount,ro {disk}')",
}


def test_a_disk_that_takes_nothing_more(run, spoiled_disk, tmp_path):
    """Compiling needs no disk, what stood on it stays whole, and a save that fails says so and leaves nothing behind."""
    disk, how = spoiled_disk
    code = f"disk = {str(disk)!r}\n" + """
from thresher.passes.calibrate import Statistics
first = compiled(prepack=True)
check(first)
thresher.save(first, disk + "/m.thresher", example_inputs=inputs)
statistics = Statistics("0", {"a": {"b": {"c": torch.zeros(3000)}}})
before = {f: open(os.path.join(disk, f), "rb").read() for f in os.listdir(disk) if f.endswith("thresher")}
""" + SPOIL[how] + """
torch._dynamo.reset()
os.environ["THRESHER_CACHE_DIR"] = disk + "/cache"
os.environ["THRESHER_REWRITE_CACHE"] = "1"
check(compiled(prepack=True, nvfp4={"min_weights": 0, "budget": 2.0, "keep": ["*"]}))
for write in (lambda: thresher.save(first, disk + "/m.thresher", example_inputs=inputs),
              lambda: thresher.save(first, disk + "/other.thresher", example_inputs=inputs),
              lambda: statistics.save(disk + "/s.safetensors")):
    try:
        write()
    except (thresher.ThresherError, OSError) as reason:
        assert disk in str(reason) or "space" in str(reason) or "Read-only" in str(reason), reason
    else:
        raise SystemExit("was written")
left = sorted(f for f in os.listdir(disk) if f not in ("rest", "cache", ".cache"))
assert left == ["m.thresher"], left
assert all(open(os.path.join(disk, f), "rb").read() == b for f, b in before.items())
check(thresher.load(disk + "/m.thresher", target="reference"))
"""  # fmt: skip
    run(code, HOME=str(disk), THRESHER_CACHE_DIR=own_cache(tmp_path / "cache"))
