"""Files of every kind, damaged at random: refused by name and place, or read as they were.

300 in a plain run, 10,000 with --thorough.
"""

import json
import random
import resource
import zipfile

import pytest
import torch
from damaged_files import MARK, Archive, Plain, Safetensors
from safetensors.torch import save_file

import thresher
from thresher import testing
from thresher.errors import ThresherError
from thresher.kernels.nvfp4.quantize import quantize
from thresher.passes.calibrate import Statistics
from thresher.passes.rsq.quantizer.files import LayerFiles
from thresher.recipe import Recipe
from thresher.records.certificate import Certificate
from thresher.runtime.checkpoints import low_bit, nvfp4, nvfp4_stream
from thresher.tools import auto


def _same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def _state(path):
    """What a search has measured, written by one and gone on from by another, which chooses and shows all rows."""
    given = {name: Recipe.of(name) for name in ("none", "exact", "serve-latency")}
    names = {recipe.fingerprint(): name for name, recipe in given.items()}
    searched = auto._State(path, "key")
    for fingerprint, name in names.items():
        searched.add(auto.Tried(name, fingerprint, 0.001, 1.5, 1.25, None, 2.0, "program"))
    searched.add(auto.Tried(name, fingerprint, reason="accepted is [batch, sequence]"))

    def read(path):
        rows = auto._State(path, "key").rows
        return rows, auto._choose([row for key, row in rows.items() if key in names], given, 0.01)

    def shown(found):
        return "auto chose" in str(found[1])

    rows, chosen = read(path)
    assert rows == searched.rows and chosen.name == "none" and "[batch, sequence]" in str(chosen)
    return Plain(path, read, shown, text=True)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model, inputs = testing.tiny_model(width=16, layers=1)
    found = {
        "archive": Archive(folder / "plain.thresher", model, inputs, "none"),
        "packed archive": Archive(folder / "packed.thresher", model, inputs, {"prepack": True}),
    }
    tensors = {"codes": torch.arange(32, dtype=torch.int32), "scales": torch.rand(4)}
    layers = LayerFiles(folder / "layers", "stamp")
    layers.write("layer", tensors, {"reports": "[]"})
    found["layer"] = Safetensors(layers.path("layer"), lambda path: layers.read("layer"),
                                 lambda got: got is None or _same(got[0], tensors))  # fmt: skip
    statistics = Statistics("0123", {"rsq": {"a.b": dict(tensors), "c": {"codes": torch.arange(3)}}})
    statistics.save(folder / "statistics.safetensors")
    found["statistics"] = Safetensors(folder / "statistics.safetensors", Statistics.load, None)
    weight = quantize(torch.randn(32, 64))
    save_file(nvfp4.to_tensors("a", weight, "modelopt"), folder / "nvfp4.safetensors")
    found["NVFP4"] = Safetensors(folder / "nvfp4.safetensors", nvfp4.load, None)
    found["header"] = Safetensors(folder / "nvfp4.safetensors", nvfp4_stream.read_header, None)
    linear = low_bit.LowBitLinear(torch.randint(0, 2**31 - 1, (32, 8), dtype=torch.int32), torch.rand(32, 2), None,
                                  torch.rand(32), 4, 32, 64)  # fmt: skip
    for layout in low_bit.FORMATS:
        low_bit.save(folder / f"{layout}.safetensors", {"m": linear}, layout)
        found[layout] = Safetensors(folder / f"{layout}.safetensors", low_bit.load, None)
    recipe = Recipe.of("serve-latency", rsq={"bits": 3}, nvfp4={"min_weights": 0})
    (folder / "recipe.toml").write_text(recipe.to_toml())
    found["recipe"] = Plain(folder / "recipe.toml", lambda path: Recipe.of(str(path)), None, text=True)
    compiled = thresher.compile(model, inputs, {"prepack": True}, target="reference")
    (folder / "certificate.json").write_text(compiled.certificate.to_json())
    found["certificate"] = Plain(folder / "certificate.json",
                                 lambda path: Certificate.from_json(path.read_bytes()), None, text=True)  # fmt: skip
    found["state"] = _state(folder / "state.json")
    return found


def _fuzz(kinds, count, seed):
    """Escapes, as text: what was raised that is no ThresherError, and errors that do not name the file."""
    escapes, refused = [], 0
    for number in range(count):
        draw = random.Random(f"{seed}-{number}")
        name = draw.choice(list(kinds))
        kind = kinds[name]
        changed = kind.mutate(draw)
        try:
            kind.read(changed)
        except ThresherError as error:
            refused += 1
            if name != "certificate" and str(kind.path) not in str(error):  # which is given as text
                escapes.append(f"{seed}-{number} {name}: does not name its file: {error}")
        except Exception as error:
            escapes.append(f"{seed}-{number} {name}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            kind.path.write_bytes(kind.content)
    return escapes, refused


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.thorough)])
def test_a_damaged_file_is_refused_or_read_as_it_was(kinds, count):
    _fuzz(kinds, 60, "warm")
    before = _peak()
    escapes, refused = _fuzz(kinds, count, "file")
    assert not escapes, "\n".join([f"{len(escapes)} escapes", *escapes[:40]])
    assert refused > count // 2
    largest = max(len(kind.content) for kind in kinds.values())
    assert _peak() - before <= 2 * largest + (64 << 20)


def test_a_manifest_that_would_grow_to_gigabytes_is_not_unpacked(kinds):
    """A gigabyte of blanks in a few: memory holds none of it."""
    kind = kinds["archive"]
    manifest = json.loads(kind.parts[MARK])
    with zipfile.ZipFile(kind.path, "w") as archive:
        with archive.open(zipfile.ZipInfo(MARK), "w") as member:
            member.write(json.dumps(manifest).encode()[:-1])
        archive.infolist()[0].compress_type = zipfile.ZIP_DEFLATED
    big = zipfile.ZipInfo(MARK)
    big.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(kind.path, "w") as archive, archive.open(big, "w", force_zip64=True) as member:
        for _ in range(1024):
            member.write(b" " * (1 << 20))
    before = _peak()
    try:
        with pytest.raises(ThresherError, match="is packed"):
            thresher.load(kind.path)
    finally:
        kind.path.write_bytes(kind.content)
    assert _peak() - before <= 64 << 20
