"""The cache is a folder of the user's own; whatever is wrong with it means no cache and one warning."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings

import pytest

from thresher import files
from thresher.kernels import native
from thresher.kernels.sparse import tune
from thresher.machine import devices

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
needs_compiler = pytest.mark.skipif(native.unavailable() is not None, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("THRESHER_CACHE_DIR", str(folder))
    monkeypatch.setattr(files, "_warned", False)
    monkeypatch.setattr(files, "_swept", set())
    return folder


@pytest.mark.parametrize("value", ["", "relative/folder", "."])
def test_an_empty_or_relative_shared_folder_counts_as_unset(monkeypatch, tmp_path, value):
    monkeypatch.delenv("THRESHER_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / "thresher"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert files.cache_dir() == tmp_path / "shared" / "thresher"
    monkeypatch.setenv("THRESHER_CACHE_DIR", "here")
    assert files.cache_dir().is_absolute()


def test_folders_are_made_for_their_user_alone(cache):
    os.umask(os.umask(0))
    folder = files.cache_folder("native")
    assert folder == cache / "native"
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_folder_that_others_may_write_to_is_closed(cache):
    cache.mkdir()
    cache.chmod(0o777)
    assert files.cache_folder() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def _blocked(cache):
    cache.write_text("a file, where a folder is wanted")


def _foreign(cache):
    cache.mkdir()
    os.chown(cache, 12345, 12345)


def _open_parent(cache):
    cache.parent.chmod(0o777)


@pytest.mark.parametrize("spoil", [_blocked, _open_parent, pytest.param(_foreign, marks=pytest.mark.skipif(
    not ROOT, reason="only root can give files away"))])  # fmt: skip
def test_what_cannot_be_trusted_is_no_cache_and_one_warning(cache, spoil):
    spoil(cache)
    with pytest.warns(UserWarning, match="cannot be used as a cache") as seen:
        assert files.cache_folder("native") is None
        assert files.cache_folder("rewritten") is None
    assert len(seen) == 1 and "THRESHER_CACHE_DIR" in str(seen[0].message)


def test_a_file_is_trusted_that_only_its_user_can_have_written(cache, tmp_path):
    file = files.cache_folder() / "file"
    assert not files.trusted(file)
    files.keep(file, b"content")
    assert files.trusted(file) and file.read_bytes() == b"content"
    for mode in (0o666, 0o620, 0o602):
        file.chmod(mode)
        assert not files.trusted(file)
    file.chmod(0o600)
    link = cache / "link"
    link.symlink_to(file)
    assert not files.trusted(link) and not files.trusted(cache)
    if ROOT:
        os.chown(file, 12345, 12345)
        assert not files.trusted(file)


def test_a_file_that_cannot_be_kept_is_one_warning(cache):
    folder = files.cache_folder()
    (folder / "taken").mkdir()
    (folder / "taken" / "inside").write_text("")
    with pytest.warns(UserWarning, match="taken cannot be used as a cache"):
        files.keep(folder / "taken", b"a folder stands there")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.keep(folder / "taken", b"and the second time")
    assert [p.name for p in folder.iterdir()] == ["taken"]


def test_what_killed_processes_leave_behind_is_removed(cache, monkeypatch):
    folder = files.cache_folder("native")
    code = (
        "import sys, time; from pathlib import Path; from thresher.files import scratch\n"
        "with scratch(Path(sys.argv[1])) as made:\n"
        "    (made / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline()
        old, young = folder / "tmpold.so", folder / "tmpyoung.so"  # as earlier versions named them
        old.touch(), young.touch()
        os.utime(old, (time.time() - 7200,) * 2)
        left = folder / ".scratch-left"  # killed before it had a lock
        left.mkdir()
        os.utime(left, (time.time() - 7200,) * 2)

        def swept():
            monkeypatch.setattr(files, "_swept", set())
            files.cache_folder("native")
            return sorted(p.name for p in folder.iterdir())

        held = swept()
        assert len(held) == 2 and "tmpyoung.so" in held, "a folder somebody works in stays"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert swept() == ["tmpyoung.so"]


def _fresh():
    native.load.cache_clear()
    return native.load("token_transition")


def _cut(library):
    library.write_bytes(b"")


def _half(library):
    library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])


def _flip(library):
    content = bytearray(library.read_bytes())
    content[len(content) // 3] ^= 4
    library.write_bytes(content)


def _planted(library):
    library.write_bytes(b"code of somebody else's")
    library.chmod(0o666)


def _folder(library):
    library.unlink()
    library.mkdir()


@needs_compiler
@pytest.mark.parametrize("spoil", [_cut, _half, _flip, _planted])
def test_a_damaged_library_is_built_again(cache, monkeypatch, spoil):
    monkeypatch.setattr(native, "_FLAGS", ("-O0", *native._FLAGS[2:]))  # quick to build
    try:
        _fresh()
        (library,) = (cache / "native").glob("*.so")
        good = library.read_bytes()
        library.unlink()  # not written in place: this process has it mapped
        shutil.copyfile(os.devnull, library)
        library.write_bytes(good)
        spoil(library)
        assert not native._whole(library)
        assert _fresh()._name == str(library)
        assert native._whole(library) and stat.S_IMODE(library.stat().st_mode) == 0o700
    finally:
        native.load.cache_clear()


@needs_compiler
def test_a_kernel_is_built_for_this_process_where_there_is_no_cache(cache, monkeypatch):
    monkeypatch.setattr(native, "_FLAGS", ("-O0", *native._FLAGS[2:]))
    try:
        _fresh()
        (library,) = (cache / "native").glob("*.so")
        _folder(library)
        (library / "inside").touch()
        with pytest.warns(UserWarning, match="cannot be used as a cache"):
            built = _fresh()
        assert not built._name.startswith(str(cache)) and os.path.exists(built._name)
    finally:
        native.load.cache_clear()


@pytest.mark.parametrize("text", ["", "[", "[]", "null", '{"key": "text"}', "[" * 100_000, '{"key": [1]}'])
def test_damaged_numbers_are_measured_again(cache, text):
    (files.cache_folder() / tune._FILE).write_text(text)
    assert tune.remembered("key", lambda: 0.25) == 0.25
    assert json.loads((cache / tune._FILE).read_text())["key"] == 0.25
    assert tune.remembered("key", lambda: 0.5) == 0.25


@pytest.mark.parametrize("text", ["", "[", "[]", "null", "{}", '{"flops": 3}', "[" * 100_000])
def test_a_damaged_calibration_is_a_guess(cache, text):
    devices.this_cpu.cache_clear()
    path = devices.cpu_path(files.cache_folder())
    path.parent.mkdir()
    path.write_text(text)
    try:
        assert devices.this_cpu(cache).source == devices.guessed_cpu().source
    finally:
        devices.this_cpu.cache_clear()
