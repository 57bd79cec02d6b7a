"""Quantizes safetensors checkpoints of any size: memory holds one slab of one tensor at a time.

The shapes in the source's header fix the size of everything that will be written, so the target's
header comes first and each slab of rows goes straight to its place. A tensor is read twice, for its
maximum and for its codes. What is not quantized is copied byte for byte, whatever its type.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from thresher import tensor_files
from thresher.errors import ArgumentError, unknown_key
from thresher.formats.nvfp4 import BLOCK
from thresher.kernels.nvfp4 import cpu as nvfp4_cpu
from thresher.kernels.nvfp4.quantize import mode_named, quantize
from thresher.tensor_files import Entry

from .nvfp4 import KEYS, CheckpointError, to_tensors

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SLAB_BYTES = 32 << 20


@dataclass(frozen=True)
class Summary:
    """What `quantize_checkpoint` did: names of the tensors quantized, and bytes before and after."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    bytes_read: int
    bytes_written: int


def read_header(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """See `tensor_files.read_header`. Raises CheckpointError, naming the file."""
    return tensor_files.read_header(path, CheckpointError)


def linear_weights(entry: Entry) -> bool:
    """The default choice: matrices named `*.weight`, embeddings and the head excepted."""
    return entry.name.endswith(".weight") and not any(
        part in entry.name for part in ("embed", "lm_head", "wte")
    )


def quantizable(entry: Entry) -> str | None:
    """Why a tensor cannot be quantized, or None."""
    if len(entry.shape) != 2 or entry.dtype not in _DTYPES:
        return (
            f"{entry.name} is {entry.dtype} {entry.shape}; only F32, BF16 and F16 matrices can be quantized."
        )
    if not entry.name.endswith(".weight") or entry.shape[1] % BLOCK:
        return f"{entry.name} {entry.shape} must be named *.weight and have a multiple of 16 columns."
    return None


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    select: Callable[[Entry], bool] = linear_weights,
    mode: str = "thresher",
    form: str = "modelopt",
    progress: bool = True,
) -> Summary:
    """Quantize `source`, a safetensors file or a directory of them, into the directory `target`.

    select: which tensors to quantize; one it names that cannot be is left as it is and listed as kept.
    mode: whose arithmetic (nvfp4_quantize.MODES); form: whose names (nvfp4_checkpoint.KEYS).
    progress: show a bar. A weight with NaN or infinity is refused by name.
    """
    mode_named(mode)
    if form not in KEYS:
        raise unknown_key("form", form, KEYS)
    source, target = Path(source), Path(target)
    shards = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not shards or not all(shard.is_file() for shard in shards):
        raise ArgumentError("source", source, "a .safetensors file or a directory of them", "Check the path.")
    if target.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise ArgumentError("target", target, "another directory than the source's", "Choose a new one.")
    plans = [(shard, *read_header(shard)) for shard in shards]
    target.mkdir(parents=True, exist_ok=True)
    quantized: list[str] = []
    kept: list[str] = []
    where: dict[str, str] = {}
    total = sum(e.end - e.begin for _, entries, _ in plans for e in entries)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        SpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) if progress else nullcontext() as bar:
        task = bar.add_task("Quantizing to NVFP4", total=total) if bar else None
        for shard, entries, metadata in plans:
            chosen = {e.name for e in entries if select(e) and quantizable(e) is None}
            for entry in _write_shard(
                shard, target / shard.name, entries, metadata, chosen, mode, form, where
            ):
                (quantized if entry.name in chosen else kept).append(entry.name)
                if bar is not None and task is not None:
                    bar.update(task, advance=entry.end - entry.begin, description=entry.name)
    if source.is_dir() and len(shards) > 1:
        size = sum((target / s.name).stat().st_size for s in shards)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    written = sum((target / s.name).stat().st_size for s in shards)
    return Summary(tuple(quantized), tuple(kept), sum(s.stat().st_size for s in shards), written)


def _targets(entry: Entry, form: str) -> list[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, bytes) of a quantized matrix's codes, block scales and tensor scale."""
    layer, (n, k) = entry.name.removesuffix(".weight"), entry.shape
    codes, scales, tensor_scale = (f"{layer}.{key}" for key in KEYS[form][:3])
    scalar = () if form == "modelopt" else (1,)
    return [
        (codes, "U8", (n, k // 2), n * k // 2),
        (scales, "F8_E4M3", (n, k // BLOCK), n * k // BLOCK),
        (tensor_scale, "F32", scalar, 4),
    ]


def _write_shard(
    source: Path,
    target: Path,
    entries: list[Entry],
    metadata: dict[str, str],
    chosen: set[str],
    mode: str,
    form: str,
    where: dict[str, str],
) -> Iterator[Entry]:
    """Write one shard, yielding each source tensor when it is done; `where` collects name -> file."""
    header: dict[str, object] = {"__metadata__": {**metadata, "format": metadata.get("format", "pt")}}
    offset, starts = 0, {}
    for entry in entries:
        plain = [(entry.name, entry.dtype, entry.shape, entry.end - entry.begin)]
        for name, dtype, shape, size in _targets(entry, form) if entry.name in chosen else plain:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            where[name], starts[name] = target.name, offset
            offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = target.with_suffix(".partial")
    try:
        with source.open("rb") as read, partial.open("wb") as write:
            write.write(struct.pack("<Q", len(text)) + text)
            write.truncate(8 + len(text) + offset)
            for entry in entries:
                if entry.name in chosen:
                    at = [8 + len(text) + starts[name] for name, *_ in _targets(entry, form)]
                    _quantize_entry(entry, read, write, at, mode, form)
                else:
                    write.seek(8 + len(text) + starts[entry.name])
                    for slab in _slabs(read, entry, 1):
                        write.write(slab)
                yield entry
        os.replace(partial, target)  # a target file is whole or absent
    finally:
        partial.unlink(missing_ok=True)


def _slabs(read: BufferedReader, entry: Entry, row_bytes: int) -> Iterator[bytearray]:
    """The tensor's bytes in pieces of whole rows."""
    step = max(1, _SLAB_BYTES // max(1, row_bytes)) * max(1, row_bytes)
    for begin in range(entry.begin, entry.end, step):
        read.seek(begin)
        slab = bytearray(min(step, entry.end - begin))
        read.readinto(slab)
        yield slab


def _quantize_entry(
    entry: Entry, read: BufferedReader, write: BufferedWriter, at: list[int], mode: str, form: str
) -> None:
    dtype, columns = _DTYPES[entry.dtype], entry.shape[1]

    def rows() -> Iterator[torch.Tensor]:
        for slab in _slabs(read, entry, columns * dtype.itemsize):
            yield torch.frombuffer(slab, dtype=dtype).view(-1, columns)

    amax = torch.zeros(())
    for slab in rows():
        amax = torch.maximum(
            amax, nvfp4_cpu.amax(slab) if nvfp4_cpu.accepts(slab) else slab.abs().amax().float()
        )
    if not amax.isfinite():
        fix = "Repair the weight, or leave it out with `select`."
        raise ArgumentError(entry.name, "NaN or infinite values", "finite values only", fix)
    q = None
    for slab in rows():
        q = quantize(slab, mode=mode, amax=amax, name=entry.name)
        for i, part in enumerate((q.codes, q.block_scales.view(torch.uint8))):
            write.seek(at[i])
            write.write(part.numpy().data)
            at[i] += part.numel()
    if q is None:  # no rows
        q = quantize(torch.zeros(0, columns), mode=mode)
    layer = entry.name.removesuffix(".weight")
    scale = to_tensors(layer, q, form)[f"{layer}.{KEYS[form][2]}"]
    write.seek(at[2])
    write.write(struct.pack("<f", scale.item()))
