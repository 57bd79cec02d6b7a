"""Safetensors files that are larger than memory: read by memory map, written tensor after tensor.

A mapped tensor costs no memory until it is read, and what was read can be dropped again (`release`): the file still
has it. `write` never holds more than a piece of one tensor, where the library's own writer copies all of them.
"""

from __future__ import annotations

import json
import math
import mmap
import shutil
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .errors import ThresherError
from .reading import reading

Failure = Callable[[str], ThresherError]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
_SIZES = {**{name: dtype.itemsize for name, dtype in DTYPES.items()}, "U64": 8, "U32": 4, "U16": 2}
_PIECE = 1 << 24  # bytes written at a time
_LARGEST_HEADER = 100_000_000  # as the safetensors library has it


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: its header fields, and where its bytes begin and end."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


FETCH = "Fetch it again."


def read_header(
    path: Path, error: Failure = ThresherError, fix: str = FETCH
) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of a safetensors file in file order, and its metadata.

    Raises `error`, naming the file and what to do, when it is truncated or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= size - 8:
            raise error(f"{path} is truncated or not a safetensors file ({size} bytes). {fix}")
        with reading(path, "a safetensors header", fix, error):
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            entries = [_entry(name, e, 8 + length, error) for name, e in header.items()]
    entries.sort(key=lambda e: e.begin)
    if entries and entries[-1].end > size:
        raise error(
            f"{path} is truncated: {entries[-1].name} ends at byte {entries[-1].end}, the file at {size}. {fix}"
        )
    for before, after in pairwise(entries):
        if after.begin < before.end:
            raise error(f"{path} is damaged: {before.name} and {after.name} overlap. {fix}")
    return entries, metadata


def _entry(name: str, given: dict[str, Any], start: int, error: Failure) -> Entry:
    """One tensor of a header. Raises `error` where its bytes cannot be what it says."""
    shape, (begin, end) = tuple(given["shape"]), given["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise error(f"{name} has the shape {shape} and lies at {begin} to {end}")
    size = _SIZES.get(given["dtype"])
    if begin > end or (size is not None and math.prod(shape) * size != end - begin):
        raise error(f"{name} is {given['dtype']} {shape} and has {end - begin} bytes")
    return Entry(name, given["dtype"], shape, start + begin, start + end)


_releasable: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


class MappedFile:
    """A safetensors file whose tensors are its own bytes, read when they are used.

    Until `settle` they must not be written to: `release` would undo it. After it, writing changes memory and no file.
    entries: its tensors, by name. metadata: of the file. Raises ThresherError, naming the file, for one that is
    truncated or damaged, and for a tensor of a dtype that torch does not have.
    """

    def __init__(self, path: str | Path, fix: str = FETCH):
        self.path = Path(path)
        with reading(self.path, "tensors", fix):
            found, self.metadata = read_header(self.path, fix=fix)
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            for entry in found:
                if entry.dtype not in DTYPES:
                    raise ThresherError(
                        f"{entry.name} is of the dtype {entry.dtype}, which torch does not have"
                    )
        self.entries = {e.name: e for e in found}
        _releasable.add(self._map)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the file. The file stays mapped as long as one of its tensors is in use."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        raw = torch.frombuffer(
            self._map, dtype=torch.uint8, count=entry.end - entry.begin, offset=entry.begin
        )
        if entry.begin % dtype.itemsize:  # torch reads elements only at multiples of their size
            raw = raw.clone()
        return raw.view(dtype).view(entry.shape)

    def settle(self) -> None:
        """From here on `release` leaves this file's tensors alone, so that they may be written to."""
        _releasable.discard(self._map)


def release() -> None:
    """Give back the memory of what was read of mapped files; it is read again where it is used again. Cheap."""
    for found in list(_releasable):
        if hasattr(mmap, "MADV_DONTNEED"):
            found.madvise(mmap.MADV_DONTNEED)


def write(
    path: Path,
    shapes: Sequence[tuple[str, torch.dtype, Sequence[int]]],
    tensors: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> int:
    """Write a safetensors file tensor after tensor; an old one stays whole until the new one is complete.

    shapes: (name, dtype, shape) of all. tensors: gives one by name when its turn comes. Returns the bytes written.
    Raises ThresherError that names the file where it cannot be written, as on a full disk.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    # Largest elements first, as the library orders them, so that each tensor lies at a multiple of its own.
    ordered = sorted(shapes, key=lambda s: -s[1].itemsize)
    for name, dtype, shape in ordered:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise ThresherError(f"{path} would have a header of {len(text)} bytes, which no reader takes.")
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, dtype, shape in ordered:
                tensor = tensors(name)
                assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), name
                for piece in _bytes(tensor):
                    file.write(piece)
                del tensor
                release()
        partial.replace(path)
    except OSError as reason:
        partial.unlink(missing_ok=True)
        raise ThresherError(
            f"{path} cannot be written: {reason.strerror or reason}. It takes {at / 1e6:.1f} MB; name another folder, "
            "or make room."
        ) from None
    return 8 + len(text) + at


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """`write` for tensors that are all at hand, by name."""
    return write(path, [(n, t.dtype, t.shape) for n, t in tensors.items()], tensors.__getitem__, metadata)


def _bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().contiguous().reshape(-1)
    for piece in flat.split(max(1, _PIECE // flat.element_size())):
        if piece.numel():
            yield memoryview(piece.cpu().view(torch.uint8).numpy())  # type: ignore[arg-type]


def need_room(folder: Path, wanted: int, what: str) -> None:
    """Raise ThresherError where less than `wanted` bytes are free on a folder's disk. The folder may not exist yet."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise ThresherError(
            f"{what} take {_amount(wanted)} in {folder}, and {_amount(free)} are free there. Name another "
            "folder, or make room."
        )


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
