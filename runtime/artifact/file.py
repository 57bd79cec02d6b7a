"""One file that runs a compiled model in a process that never saw its code: write it, read it, call it.

The file is a zip archive, stored uncompressed:

    weights.safetensors   every tensor, once
    programs.json         the graph; for a packed program also what runs before and after it
    compiled.pt2          machine code, only where asked for
    manifest.json         format, versions, machine, inputs and outputs, recipe, report, and the SHA-256 of the rest

The manifest's own SHA-256 is the archive's comment. Reading checks all of them before anything is used.
No member is ever unpickled, and none is executed: `compiled.pt2` alone holds code, and is touched only by a
caller who passes `allow_compiled=True`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import thresher
from thresher import compat
from thresher.errors import ArgumentError, unknown_key
from thresher.graph.call_plan import refuse_data_decided, refuse_to_keep
from thresher.graph.packed_layout import PackedLayout
from thresher.graph.program import Program
from thresher.kernels import catalog
from thresher.lowering import catalog as targets
from thresher.lowering.inductor import aoti
from thresher.reading import reading
from thresher.report import Report

from ..call_session import Key
from . import archive
from .calls_json import decode_all, encode_all
from .layout_json import programs_of, prove
from .loaded import Loaded
from .program_json import ArtifactError, find_target, relations
from .signature import check_described, describe_inputs
from .tensor_file import Pool, parse

FORMATS = (1, 2)  # 2: with programs for calls of several kinds
WEIGHTS, PROGRAMS, COMPILED = "weights.safetensors", "programs.json", "compiled.pt2"


def write(
    program: Program,
    path: str | os.PathLike[str],
    *,
    report: Report | None = None,
    recipe: Mapping[str, Any] | None = None,
    certificate: Mapping[str, Any] | None = None,
    output_names: list[str] | None = None,
    compiled: bool = False,
    longest: int = 2048,
    others: Mapping[Key, Program] | None = None,
    whole: Program | None = None,
) -> Path:
    """Save a program, packed or not. The file at `path` is replaced at once or, when anything fails, not at all.

    report, recipe, certificate: kept as they are, for whoever reads the file.
    output_names: a name for each result; `output_0`, ... by default.
    compiled: also put machine code for this CPU into the file (AOTInductor; takes as long as a compilation).
    longest: the sequence length up to which a packed program's attention masks are proven now; longer
        batches run padded after loading.
    whole, others: for a program whose calls are looked at first (`CallPlan`): what runs for calls that fit no
        program, and the programs for other choices, see `runtime.kv_session`.
    """
    target = Path(path)
    refuse_data_decided(program, "program")
    if whole is None:
        refuse_to_keep(program, "program")
    catalog.load()
    layout: PackedLayout | None = program.packing
    pool = Pool()
    outside = layout.padded if layout is not None else program
    for each in (program, *(others or {}).values(), *([whole] if whole is not None else [])):
        if each.packing is not None:
            prove(each.packing, longest)
    programs = encode_all(program, pool.hold)
    inputs, count = describe_inputs(outside), len(outside.outputs) - len(outside.updates)
    if whole is not None:
        programs["whole"] = encode_all(whole, pool.hold)
        programs["others"] = [
            {"choices": [[name, list(made)] for name, made in key], **encode_all(other, pool.hold)}
            for key, other in (others or {}).items()
        ]
        added = program.calls.extra_inputs if layout is None else []
        inputs = inputs[: len(inputs) - len(added)]
        count -= len(program.calls.extra_outputs) if layout is None else 0
    names = output_names or [f"output_{i}" for i in range(count)]
    manifest = {
        "format": FORMATS[whole is not None],
        "versions": {"thresher": thresher.__version__, "torch": torch.__version__},
        "machine": {"devices": _devices(programs), "byte_order": sys.byteorder},
        "operators": _schemas(programs),
        "inputs": inputs,
        "relations": relations(outside),
        "outputs": names,
        "recipe": dict(recipe or {}),
        "report": report.to_dict() if report is not None else None,
        "certificate": dict(certificate) if certificate is not None else None,
        "strides": pool.strides(),
    }
    with contextlib.ExitStack() as stack:
        members = {WEIGHTS: pool.chunks(), PROGRAMS: iter([memoryview(json.dumps(programs).encode())])}
        if compiled:
            manifest["compiled"] = aoti.machine()
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            members[COMPILED] = _file_chunks(aoti.package(program, folder / COMPILED))
        with archive.replacing(target) as file:
            archive.write(file, members, manifest)
    return target


def read(
    path: str | os.PathLike[str],
    target: str = "inductor",
    *,
    allow_compiled: bool = False,
    options: Mapping[str, Any] | None = None,
    wait: bool = False,
) -> Loaded:
    """Load a saved program. Nothing of the model's own code is needed, and none of the file's is run.

    target: "inductor", "reference" or another that lowers; "compiled" runs the machine code in the file and must be allowed.
    options: the target's own.
    allow_compiled: the caller trusts the file enough to execute the machine code in it.
    wait: the first call waits for the compiler, instead of running the program node by node meanwhile.

    Raises ArtifactError for a file that is truncated, altered, of another version, or for another machine.
    """
    if target != "compiled" and not targets.can_lower(target):
        raise unknown_key("target", target, (*targets.lowering(), "compiled"))
    if target == "compiled" and not allow_compiled:
        raise ArgumentError(
            "target",
            "'compiled' without allow_compiled",
            "'compiled' together with allow_compiled=True",
            "The file's machine code would be executed: allow it only for files you trust.",
        )
    given = dict(options or {})
    own = targets.split_options(target, given) if target != "compiled" else {}
    for name in given:
        raise unknown_key("options", name, targets.runtime(target).options if target != "compiled" else ())
    catalog.load()
    with archive.opened(Path(path)) as (file, found):
        manifest = archive.manifest_of(found, path)
        with reading(path, f"a manifest ({archive.MANIFEST})", archive.SAVE_AGAIN, ArtifactError):
            _check_versions(manifest, path)
        members = {name: archive.member(file, found, manifest, name, path) for name in manifest["sha256"]}
    code = members.get(COMPILED)
    if target == "compiled":
        _check_compiled(manifest, code, path)
    with reading(path, f"tensors as its manifest promises ({WEIGHTS})", archive.SAVE_AGAIN, ArtifactError):
        tensors = parse(members[WEIGHTS], manifest["strides"])
    with reading(path, f"a program ({PROGRAMS})", archive.SAVE_AGAIN, ArtifactError):
        programs = json.loads(members[PROGRAMS].numpy().tobytes())
        program = decode_all(programs, tensors)
        whole = decode_all(programs["whole"], tensors) if "whole" in programs else None
        others = {
            tuple((name, tuple(made)) for name, made in other["choices"]): decode_all(other, tensors)
            for other in programs.get("others", ())
        }
    machine_code = code.numpy().tobytes() if target == "compiled" and code is not None else None
    with reading(path, f"a manifest ({archive.MANIFEST})", archive.SAVE_AGAIN, ArtifactError):
        outside = program.packing.padded if program.packing is not None else program
        symbols = outside.graph_module.meta["symbols"]
        check_described(manifest, symbols, len(outside.placeholders) if whole is None else None)
        return Loaded(program, manifest, target, machine_code, others, whole, path, own, wait)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says about itself, checked, without reading its weights. Raises ArtifactError."""
    with archive.opened(Path(path)) as (_, found):
        return archive.manifest_of(found, path)


def _file_chunks(path: Path) -> Iterator[memoryview]:
    with open(path, "rb") as file:
        while data := file.read(1 << 24):
            yield memoryview(data)


def _check_versions(manifest: Mapping[str, Any], path: Any) -> None:
    if manifest["format"] not in FORMATS:
        raise ArtifactError(
            f"{path} has format {manifest['format']}, written by thresher {manifest['versions']['thresher']}; this "
            f"thresher {thresher.__version__} reads formats {FORMATS[0]} to "
            f"{FORMATS[-1]}. Save the model again with this version."
        )
    reason = compat.unsupported_torch()
    if reason is not None:
        raise ArtifactError(f"{path} was saved with torch {manifest['versions']['torch']}. {reason}")
    if manifest["machine"]["byte_order"] != sys.byteorder:
        raise ArtifactError(
            f"{path} was saved on a {manifest['machine']['byte_order']}-endian machine; this one is not."
        )
    if "cuda" in manifest["machine"]["devices"] and not torch.cuda.is_available():
        raise ArtifactError(
            f"{path} was saved from a model on a GPU, and torch sees none here. Save it from a model on the CPU."
        )
    for name, schema in manifest["operators"].items():
        current = str(find_target(name)._schema)  # type: ignore[attr-defined]
        if name.startswith("thresher.") and not _serves(current, schema):
            raise ArtifactError(
                f"{path} calls {schema}, written by thresher {manifest['versions']['thresher']}; in this thresher "
                f"{thresher.__version__} the operator is {current}. Save the model again with this version."
            )


def _serves(current: str, written: str) -> bool:
    """Whether a call of an operator as it was written means the same now: what it gained has defaults and stands last."""
    (now, _, gives), (then, _, gave) = current.rpartition(") -> "), written.rpartition(") -> ")
    more = now.removeprefix(then + ", ").split(", ") if now != then else []
    return gives == gave and now.startswith(then) and all("=" in argument for argument in more)


def _check_compiled(manifest: Mapping[str, Any], code: torch.Tensor | None, path: Any) -> None:
    if code is None:
        raise ArtifactError(
            f"{path} holds no machine code. Save it with compiled=True, or load it for 'inductor'."
        )
    here, there = aoti.machine(), manifest["compiled"]
    for key, expected in there.items():
        if here.get(key) != expected:
            raise ArtifactError(
                f"The machine code in {path} is for {key} {expected}, and this is {here.get(key)} ({platform.node()}). "
                "Load it with target='inductor', which compiles the same graph here."
            )


def _calls(programs: Mapping[str, Any]) -> Iterator[list[Any]]:
    for program in programs_of(programs):
        yield from (n for n in program["nodes"] if n[0] == "call")


def _schemas(programs: Mapping[str, Any]) -> dict[str, str]:
    names = sorted({n[2] for n in _calls(programs) if not n[2].startswith(("operator.", "torch."))})
    return {name: str(find_target(name)._schema) for name in names}  # type: ignore[attr-defined]


def _devices(programs: Mapping[str, Any]) -> list[str]:
    found = {"cpu"}
    for program in programs_of(programs):
        text = json.dumps(program["nodes"])
        found |= {"cuda"} if '"device": "cuda' in text else set()
    return sorted(found)
