"""A zip archive, stored uncompressed, whose manifest holds the SHA-256 of every other member.

The manifest's own SHA-256 is the archive's comment. What is read is checked before anybody uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from thresher.reading import reading

from .program_json import ArtifactError

MANIFEST = "manifest.json"
SAVE_AGAIN = "Save the model again."
_PIECE = 1 << 23
_MOST_TEXT = 1 << 28


def write(file: Any, members: Mapping[str, Iterable[memoryview]], manifest: dict[str, Any]) -> None:
    """Write members from their pieces, and the manifest, to which their hashes are added."""
    hashes = manifest["sha256"] = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, chunks in members.items():
            digest = hashlib.sha256()
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                for chunk in chunks:
                    digest.update(chunk)
                    member.write(chunk)
            hashes[name] = digest.hexdigest()
        text = json.dumps(manifest, indent=1, default=str).encode()
        archive.writestr(zipfile.ZipInfo(MANIFEST), text)
        archive.comment = hashlib.sha256(text).hexdigest().encode()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A new file beside `path` that takes its place only when it is complete and on the disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise ArtifactError(f"Cannot write into {path.parent}: {error.strerror}.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise ArtifactError(
                f"{path} was not written: {error.strerror}. A file that was there before is unchanged."
            ) from error
        raise


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, zipfile.ZipFile]]:
    """The file and its archive, open within the context. Raises ArtifactError for what is not one."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise ArtifactError(f"{path} cannot be opened: {error.strerror}.") from error
    with file:
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError, ...
            raise ArtifactError(
                f"{path} is truncated or not a Thresher artifact: its table of contents is missing. Copy it again."
            ) from error
        with archive:
            _check_places(file, archive, path)
            yield file, archive


def _check_places(file: Any, archive: zipfile.ZipFile, path: Any) -> None:
    """Raise ArtifactError unless every member lies in the file as it is, apart from the others.

    A member that is packed can grow to any size, and members that overlap to many times the file's.
    """
    size, end = file.seek(0, os.SEEK_END), 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not stored or info.flag_bits & 1 or info.header_offset < end:
            raise ArtifactError(
                f"{path} was altered: {info.filename!r} is packed, encrypted or overlaps another."
            )
        end = _start(file, info) + info.file_size
        if end > size:
            raise ArtifactError(f"{path} is truncated: {info.filename!r} goes beyond its end. Copy it again.")


def _start(file: Any, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind a header whose length it says itself."""
    file.seek(info.header_offset)
    header = file.read(30)
    return info.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))


def manifest_of(archive: zipfile.ZipFile, path: Any) -> dict[str, Any]:
    """The manifest, checked against its checksum and the archive's members. Raises ArtifactError."""
    try:
        if archive.getinfo(MANIFEST).file_size > _MOST_TEXT:
            raise ArtifactError(f"{path} was altered: its manifest is larger than {_MOST_TEXT} bytes.")
        text = archive.read(MANIFEST)
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"{path} is not a Thresher artifact, or is damaged: it has no readable manifest."
        ) from error
    if hashlib.sha256(text).hexdigest().encode() != archive.comment:
        raise ArtifactError(f"{path} was altered: its manifest does not match its checksum.")
    with reading(path, f"a manifest ({MANIFEST})", SAVE_AGAIN, ArtifactError):
        manifest = json.loads(text)
        _check_manifest(manifest)
    extra = set(archive.namelist()) - {MANIFEST, *manifest["sha256"]}
    if extra or len(archive.namelist()) != len(set(archive.namelist())):
        raise ArtifactError(f"{path} was altered: it holds members its manifest does not list.")
    return manifest


def _check_manifest(manifest: Any) -> None:
    """Raise ArtifactError unless the manifest is a table with a hash for each member."""
    hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(hashes, dict) or not all(isinstance(h, str) for h in hashes.values()):
        raise ArtifactError("it lists no checksums")


def member(file: Any, archive: zipfile.ZipFile, manifest: Any, name: str, path: Any) -> torch.Tensor:
    """A member's bytes, uint8 [n], checked against the manifest."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ArtifactError(f"{path} is damaged: it has no {name}.") from None
    start = _start(file, info)
    data = torch.empty(info.file_size, dtype=torch.uint8)
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    file.seek(start)
    if _read(file, view) != manifest["sha256"].get(name):
        raise ArtifactError(
            f"{path} was altered or truncated: {name} does not match its checksum. Copy it again."
        )
    return data


def _read(file: Any, into: memoryview) -> str | None:
    """Fill `into`, and give its SHA-256; None where the file ends too soon.

    A second thread hashes what is there while the next piece is read: both take about as long.
    """
    digest, pieces = hashlib.sha256(), queue.SimpleQueue[memoryview | None]()

    def hash_all() -> None:
        while (piece := pieces.get()) is not None:
            digest.update(piece)

    hashing = threading.Thread(target=hash_all)
    hashing.start()
    try:
        for at in range(0, len(into), _PIECE):
            piece = into[at : at + _PIECE]
            if file.readinto(piece) != len(piece):
                return None
            pieces.put(piece)
    finally:
        pieces.put(None)
        hashing.join()
    return digest.hexdigest()
