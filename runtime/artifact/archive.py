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

from .program_json import ArtifactError

MANIFEST = "manifest.json"
_PIECE = 1 << 23


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
        except zipfile.BadZipFile as error:
            raise ArtifactError(
                f"{path} is truncated or not a Thresher artifact: its table of contents is missing. Copy it again."
            ) from error
        with archive:
            yield file, archive


def manifest_of(archive: zipfile.ZipFile, path: Any) -> dict[str, Any]:
    """An archive's manifest. Raises ArtifactError where it cannot be read. path: for the error."""
    try:
        text = archive.read(MANIFEST)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise ArtifactError(
            f"{path} is not a Thresher artifact, or is damaged: it has no readable manifest."
        ) from error
    if hashlib.sha256(text).hexdigest().encode() != archive.comment:
        raise ArtifactError(f"{path} was altered: its manifest does not match its checksum.")
    manifest = json.loads(text)
    extra = set(archive.namelist()) - {MANIFEST, *manifest["sha256"]}
    if extra or len(archive.namelist()) != len(set(archive.namelist())):
        raise ArtifactError(f"{path} was altered: it holds members its manifest does not list.")
    return manifest


def member(file: Any, archive: zipfile.ZipFile, manifest: Any, name: str, path: Any) -> torch.Tensor:
    """A member's bytes, uint8 [n], checked against the manifest."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ArtifactError(f"{path} is damaged: it has no {name}.") from None
    file.seek(info.header_offset)
    header = file.read(30)
    start = (
        info.header_offset
        + 30
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )
    data = torch.empty(info.file_size, dtype=torch.uint8)
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    file.seek(start)
    whole = info.compress_type == zipfile.ZIP_STORED and _read(file, view) == manifest["sha256"][name]
    if not whole:
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
