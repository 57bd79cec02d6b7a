"""Reads and writes safetensors data inside a larger file.

The format is safetensors' own (an 8-byte length, a JSON header, the bytes), so that its library reads
the member too. Two things are added: the header is padded so that the data starts at a multiple of 64
bytes, and larger tensors come first, which keeps them aligned as torch's own memory is. A kernel may
round differently on unaligned memory, and a loaded model must give the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch

ALIGNMENT = 64
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_CHUNK = 1 << 24


class Pool:
    """The tensors of one file, each once however often it is used.

    A tensor is stored in the order of its memory and keeps its strides where it fills that memory.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def hold(self, tensor: torch.Tensor) -> int:
        """Keep a tensor; returns its number."""
        if tensor.dtype not in _NAMES:
            raise ValueError(f"A weight has the dtype {tensor.dtype}, which safetensors cannot store.")
        tensor = tensor.detach()
        key: tuple[Any, ...] = (
            tensor.data_ptr(),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            str(tensor.device),
        )
        key += (id(tensor),) if tensor.numel() == 0 else ()
        if key not in self._known:
            self._known[key] = len(self.tensors)
            self.tensors.append(tensor)
        return self._known[key]

    def strides(self) -> list[list[int] | None]:
        """Strides of each tensor that is not contiguous but fills its memory; None for the rest."""
        return [list(t.stride()) if _dense(t) and not t.is_contiguous() else None for t in self.tensors]

    def layout(self) -> tuple[bytes, list[int]]:
        """The header, padded, and the tensors' numbers in the order of their bytes."""
        order = sorted(range(len(self.tensors)), key=lambda i: (-_alignment(self.tensors[i]), i))
        entries: dict[str, Any] = {}
        at = 0
        for number in order:
            tensor = self.tensors[number]
            size = tensor.numel() * tensor.element_size()
            entries[str(number)] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + size],
            }
            at += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text, order

    def chunks(self) -> Iterator[memoryview]:
        """The member's bytes, piece by piece."""
        header, order = self.layout()
        yield memoryview(header)
        for number in order:
            tensor = self.tensors[number]
            flat = _memory_order(tensor).cpu().reshape(-1)
            if flat.numel():
                data = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
                for start in range(0, len(data), _CHUNK):
                    yield data[start : start + _CHUNK]

    def bytes(self) -> int:
        """Bytes of the member that the tensors make, with its header."""
        return len(self.layout()[0]) + sum(t.numel() * t.element_size() for t in self.tensors)


def parse(data: torch.Tensor, strides: Sequence[Sequence[int] | None]) -> list[torch.Tensor]:
    """Tensors that share the memory of `data`, uint8 [n], the member's bytes; in the order of their numbers.

    Raises ValueError for a header that does not fit the data.
    """
    if data.numel() < 8:
        raise ValueError("it has no header")
    length = int.from_bytes(data[:8].numpy().tobytes(), "little")
    if not 0 < length <= data.numel() - 8:
        raise ValueError(f"its header says {length} bytes, and the file has {data.numel() - 8}")
    entries = json.loads(data[8 : 8 + length].numpy().tobytes())
    if not isinstance(entries, dict) or entries.keys() != {str(i) for i in range(len(strides))}:
        raise ValueError(f"its header does not list the tensors 0 to {len(strides) - 1}")
    body = data[8 + length :]
    ends = sorted(_range(n, entries[n], body.numel()) for n in entries)
    for (_, end, number), (begin, _, other) in pairwise(ends):
        if begin < end:
            raise ValueError(f"tensors {number} and {other} overlap")
    return [_tensor(str(number), entries[str(number)], stride, body) for number, stride in enumerate(strides)]


def _range(number: str, entry: Any, size: int) -> tuple[int, int, str]:
    """(first byte, end, number) of a tensor. Raises ValueError where that is not in the data."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        raise ValueError(f"tensor {number} has no place in the data")
    if not 0 <= offsets[0] <= offsets[1] <= size:
        raise ValueError(f"tensor {number} lies outside the data")
    return offsets[0], offsets[1], number


def _tensor(number: str, entry: dict[str, Any], stride: Any, body: torch.Tensor) -> torch.Tensor:
    """One tensor over its bytes. Raises ValueError where its dtype, shape or strides do not fill them exactly."""
    begin, end, _ = _range(number, entry, body.numel())
    dtype, shape = (
        _DTYPES.get(str(entry.get("dtype"))),
        cast(list[int], entry.get("shape")),
    )  # looked at below
    if dtype is None:
        raise ValueError(f"tensor {number} has the dtype {entry.get('dtype')!r}")
    for what, sizes in (("shape", shape), ("strides", stride if stride is not None else [])):
        if not isinstance(sizes, list) or not all(type(s) is int and 0 <= s < 1 << 62 for s in sizes):
            raise ValueError(f"tensor {number} has the {what} {str(sizes)[:80]}")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"tensor {number} is {dtype} {shape} and has {end - begin} bytes")
    if stride is not None and (len(stride) != len(shape) or not fills(shape, stride)):
        raise ValueError(f"tensor {number}'s strides {stride} do not fill its shape {shape}")
    piece = body[begin:end]
    if piece.data_ptr() % ALIGNMENT:
        piece = piece.clone()
    flat = piece.view(dtype)
    return flat.as_strided(shape, stride) if stride is not None else flat.reshape(shape)


def _alignment(tensor: torch.Tensor) -> int:
    """The largest power of two, up to 64, that divides a tensor's size in bytes; empty ones come last."""
    size = tensor.numel() * tensor.element_size()
    return min(size & -size, ALIGNMENT)


def _dense(tensor: torch.Tensor) -> bool:
    return fills(tensor.shape, tensor.stride())


def fills(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor fills one stretch of memory without gaps or overlap."""
    at = 1
    for size, stride in sorted(zip(shape, strides), key=lambda p: (p[1], p[0])):
        if size != 1 and stride != at:
            return False
        at *= size
    return True


def _memory_order(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)) if _dense(tensor) else tensor.contiguous()
