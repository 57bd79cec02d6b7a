"""Files damaged at random, by someone who knows how they are built.

Each mutation either leaves bytes wrong, which a checksum must see, or edits what a file says and makes its
checksums anew, which only a check of the meaning can see.
"""

import copy
import hashlib
import io
import json
import random
import zipfile
from pathlib import Path

import torch

import thresher
from thresher.errors import ArgumentError

ODD = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**40,
    2**70,
    1.5,
    float("nan"),
    "",
    "x",
    "../x",
    [],
    [0],
    {},
    {"a": 1},
    [[]] * 3,
]
MARK = "manifest.json"


def deep(levels=3000):
    return "[" * levels + "]" * levels


def bytes_mutated(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, spans cut, doubled, zeroed or moved; a file cut short or grown."""
    content, size = bytearray(content), len(content)
    at, end = sorted((draw.randrange(size + 1), draw.randrange(size + 1)))
    end = min(end, at + draw.choice((1, 8, 64, size)))
    kind = draw.randrange(7)
    if kind == 0:
        for _ in range(draw.choice((1, 1, 4, 32))):
            content[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at:end]
    elif kind == 3:
        content[at:at] = content[at:end]
    elif kind == 4:
        content[at:end] = bytes(end - at)
    elif kind == 5:
        content[at:end] = draw.randbytes(end - at)
    else:
        content += draw.randbytes(draw.choice((1, 100)))
    return bytes(content)


def places(value, path=()):
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def json_mutated(value, draw: random.Random):
    """A JSON value with one to three places replaced, removed, doubled, nudged or swapped."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        path = draw.choice(list(places(value)))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key, old, kind = path[-1], holder[path[-1]], draw.randrange(6)
        if kind == 0:
            holder[key] = copy.deepcopy(draw.choice(ODD))
        elif kind == 1:
            del holder[key]
        elif kind == 2 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(old))
        elif kind == 3 and type(old) is int:
            holder[key] = old + draw.choice((-2, -1, 1, 2, 1000))
        elif kind == 4 and isinstance(old, str):
            holder[key] = draw.choice(
                (old + "x", old[:-1], old.upper(), "aten.from_file.default", "aten.add.Tensor")
            )
        else:
            other = value
            for step in draw.choice(list(places(value))):
                other = other[step]
            holder[key] = copy.deepcopy(other)
    return value


class Archive:
    """A saved model."""

    def __init__(self, path: Path, model, inputs, recipe):
        self.path, self.inputs = path, inputs
        compiled = thresher.compile(model, inputs, recipe, target="reference", dynamic=True)
        thresher.save(compiled, path, example_inputs=inputs)
        with zipfile.ZipFile(path) as archive:
            self.parts = {name: archive.read(name) for name in archive.namelist()}
        self.content = path.read_bytes()
        self.expected = self.run()

    def run(self, changed=False):
        loaded = thresher.load(self.path, target="reference")
        try:
            return list(loaded(**self.inputs).values())
        except ArgumentError:  # of an input, by its name: the file may say that it takes others
            if not changed:
                raise
            return []

    def mutate(self, draw) -> bool:
        """Write a damaged file; whether what it says may have changed with its checksums."""
        kind = draw.randrange(5)
        if kind == 0:
            self.path.write_bytes(bytes_mutated(self.content, draw))
            return False
        manifest, members = json.loads(self.parts[MARK]), {k: v for k, v in self.parts.items() if k != MARK}
        options = {}
        if kind == 1:
            manifest = json_mutated(manifest, draw)
        elif kind == 2:
            programs = json_mutated(json.loads(members["programs.json"]), draw)
            members["programs.json"] = json.dumps(programs).encode()
        elif kind == 3:
            weights = members["weights.safetensors"]
            length = int.from_bytes(weights[:8], "little")
            header = json.dumps(json_mutated(json.loads(weights[8 : 8 + length]), draw)).encode()
            header += b" " * (-(len(header) + 8) % 64)
            members["weights.safetensors"] = (
                len(header).to_bytes(8, "little") + header + weights[8 + length :]
            )
        else:
            options = {"name": draw.choice([*members, MARK]), "how": draw.randrange(5)}
            if options["how"] == 1:
                members["extra"] = b"extra"
            if options["how"] == 3:
                members[draw.choice([*members])] = (deep() if draw.random() < 0.5 else "[1").encode()
        self._write(manifest, members, draw, **options)
        return True

    def _write(self, manifest, members, draw, name=None, how=None):
        hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
        if isinstance(hashes, dict):
            for member in members:
                if member in hashes:
                    hashes[member] = hashlib.sha256(members[member]).hexdigest()
        text = json.dumps(manifest).encode()
        if name == MARK and how == 3:
            text = deep().encode()
        if name == MARK and how == 2:
            text = text[:-1] + b" " * (1 << 26) + b"}"  # 64 MiB, packed into a few
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for member, data in {**members, MARK: text}.items():
                if how == 0 and member == name:
                    continue
                packed = how == 2 and member == name
                archive.writestr(
                    zipfile.ZipInfo(member), data, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
                )
            archive.comment = hashlib.sha256(text).hexdigest().encode()
        self.path.write_bytes(buffer.getvalue())

    def read(self, changed):
        results = self.run(changed)
        if not changed:
            assert all(map(torch.equal, results, self.expected))


class Plain:
    """A file of one kind: how it is read, and whether that gives what was written. text: it is read as text."""

    def __init__(self, path: Path, read, same, text=False):
        self.path, self._read, self.same, self.text = path, read, same, text
        self.content = path.read_bytes()

    def mutate(self, draw) -> bool:
        content = bytes_mutated(self.content, draw)
        if self.text and draw.random() < 0.6:
            content = self._edited(draw)
        self.path.write_bytes(content)
        return True

    def _edited(self, draw) -> bytes:
        if self.path.suffix == ".json":
            return json.dumps(json_mutated(json.loads(self.content), draw)).encode()
        lines = self.content.decode().splitlines()
        line = draw.randrange(len(lines))
        value = draw.choice(
            ("1", "-1", "1e400", "nan", '""', "[]", "{}", "true", deep(), "1979-05-27", '"x"', "[[1]]")
        )
        lines[line] = lines[line].split("=")[0] + "= " + value
        return "\n".join(lines).encode()

    def read(self, changed):
        found = self._read(self.path)
        assert self.same is None or self.same(found)


class Safetensors(Plain):
    """The same for safetensors files, whose headers are edited too."""

    def mutate(self, draw) -> bool:
        if draw.random() < 0.5:
            return super().mutate(draw)
        length = int.from_bytes(self.content[:8], "little")
        header = json_mutated(json.loads(self.content[8 : 8 + length]), draw)
        text = deep().encode() if draw.random() < 0.05 else json.dumps(header).encode()
        self.path.write_bytes(len(text).to_bytes(8, "little") + text + self.content[8 + length :])
        return True
