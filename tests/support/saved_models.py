"""Models saved for tests of artifacts: compiled once a process."""

import functools
import hashlib
import json
import zipfile

import zoo

import thresher


@functools.cache
def compiled(name, recipe="exact", dynamic=True):
    model, inputs = zoo.ZOO[name].build()
    return thresher.compile(model, inputs, recipe, target="reference", dynamic=dynamic), inputs


def with_manifest(path, **changes):
    """Rewrite the manifest, checksum and all: what a newer writer would have written."""
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    text = json.dumps({**json.loads(members.pop("manifest.json")), **changes}).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, "manifest.json": text}.items():
            archive.writestr(name, data)
        archive.comment = hashlib.sha256(text).hexdigest().encode()
