"""Files that are damaged, foreign or dangerous are refused, and what cannot be saved is said."""

import hashlib
import json
import sys
import zipfile

import pytest
import torch
from saved_models import compiled, with_manifest

import thresher
from thresher.errors import ArgumentError, ThresherError
from thresher.runtime.artifact import file as artifact
from thresher.runtime.artifact.program_json import ArtifactError


def test_a_truncated_file_is_refused(saved):
    path, _ = saved
    whole = path.read_bytes()
    for share in (0, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ArtifactError, match=r"truncated|damaged|no readable manifest"):
            thresher.load(path)


def test_an_altered_byte_anywhere_is_refused(saved):
    path, _ = saved
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        spots = [i.header_offset + 40 + i.file_size // 2 for i in archive.infolist()]
    for spot in [*spots, len(whole) - 5]:  # the last lies in the manifest's checksum
        path.write_bytes(whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :])
        with pytest.raises(ArtifactError, match=r"altered|damaged|truncated"):
            thresher.load(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 99}, "format 99"),
        ({"operators": {"aten.no_such_operator.default": ""}}, "aten.no_such_operator.default"),
        ({"operators": {"thresher.hadamard.default": "thresher::hadamard(Tensor x) -> Tensor"}}, "Save the model again"),
        ({"machine": {"devices": ["cpu", "cuda"], "byte_order": sys.byteorder}}, "GPU"),
        ({"machine": {"devices": ["cpu"], "byte_order": "big"}}, "endian"),
    ],
)  # fmt: skip
def test_another_version_or_machine_is_refused(saved, changes, message):
    path, _ = saved
    if "GPU" in message and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with_manifest(path, **changes)
    with pytest.raises(ArtifactError, match=message):
        thresher.load(path)


def test_a_member_the_manifest_does_not_list_is_refused(saved):
    path, _ = saved
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("extra.py", "print('never')")
    with pytest.raises(ArtifactError, match="altered"):
        thresher.load(path)


def test_a_graph_may_call_operators_only(saved):
    path, _ = saved
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    programs = members["programs.json"].replace(b'"aten.silu.default"', b'"os.system"')
    manifest = json.loads(members["manifest.json"])
    manifest["sha256"]["programs.json"] = hashlib.sha256(programs).hexdigest()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.safetensors", members["weights.safetensors"])
        archive.writestr("programs.json", programs)
        text = json.dumps(manifest).encode()
        archive.writestr("manifest.json", text)
        archive.comment = hashlib.sha256(text).hexdigest().encode()
    with pytest.raises(ArtifactError, match=r"operator 'os\.system'"):
        thresher.load(path)


def test_code_runs_only_when_allowed_by_name(saved):
    path, _ = saved
    with pytest.raises(ArgumentError, match="allow_compiled=True"):
        thresher.load(path, target="compiled")
    with pytest.raises(ArtifactError, match="holds no machine code"):
        thresher.load(path, target="compiled", allow_compiled=True)
    with pytest.raises(ArgumentError, match="compiled, inductor, reference"):
        thresher.load(path, target="onnx")


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda i: {}, "input_ids"),
        (lambda i: {**i, "labels": i["input_ids"]}, "labels"),
        (lambda i: {**i, "input_ids": i["input_ids"].int()}, "int64"),
        (lambda i: {**i, "input_ids": i["input_ids"].tolist()}, "list"),
        (lambda i: {**i, "attention_mask": i["attention_mask"][:, :-1]}, "sizes"),
    ],
)
def test_wrong_inputs_are_named(saved, call, named):
    path, inputs = saved
    loaded = thresher.load(path, target="reference")
    with pytest.raises(ArgumentError, match=named):
        loaded(**call(inputs))


def test_what_cannot_be_saved_is_said(tmp_path):
    with pytest.raises(ArgumentError, match=r"thresher\.compile"):
        thresher.save(torch.nn.Linear(2, 2), tmp_path / "m")
    model, _ = compiled("llama")
    with pytest.raises(ArgumentError, match="example_inputs"):
        thresher.save(model, tmp_path / "m")

    class Broken(torch.nn.Module):
        def forward(self, x):
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2

    made = thresher.compile(Broken().eval(), (torch.ones(3, 4),), "none", target="reference")
    with pytest.raises(ThresherError, match="2 graphs"):
        thresher.save(made, tmp_path / "m", example_inputs=(torch.ones(3, 4),))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    model, inputs = compiled("llama")
    monkeypatch.setattr(type(model), "__call__", lambda *_, **__: pytest.fail("the model was run first"))
    for path in (tmp_path, tmp_path / "file" / "model"):
        with pytest.raises(ArgumentError, match="path"):
            thresher.save(model, path, example_inputs=inputs)
        with pytest.raises(ArgumentError, match="path"):
            thresher.export_onnx(model.model, inputs, path)


@pytest.mark.parametrize(
    ("current", "serves"),
    [
        ("t::f(Tensor q, int n) -> Tensor", True),
        ("t::f(Tensor q, int n, Tensor? s=None, bool b=True) -> Tensor", True),
        ("t::f(Tensor q, int n, Tensor s) -> Tensor", False),
        ("t::f(Tensor q, int number) -> Tensor", False),
        ("t::f(Tensor q) -> Tensor", False),
        ("t::f(Tensor q, int n) -> (Tensor, Tensor)", False),
    ],
)
def test_an_operator_that_gained_what_may_be_left_out_still_serves(current, serves):
    assert artifact._serves(current, "t::f(Tensor q, int n) -> Tensor") == serves
