"""What a file makes a process do: compute. Files altered by hand, hashes and all, that would do more are refused."""

import hashlib
import json
import zipfile

import pytest
import torch

import thresher
from thresher.graph import pure_ops
from thresher.kernels import catalog
from thresher.runtime.artifact.program_json import ArtifactError, decode


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.lin = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.lin(self.norm(x)) * 2


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "m.thresher"
    x = torch.randn(3, 4)
    compiled = thresher.compile(Net().eval(), (x,), "none", target="reference", dynamic=True)
    thresher.save(compiled, path, example_inputs=(x,))
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def altered(parts, path, edit):
    """The file with its graph edited and every hash made anew."""
    manifest, programs = json.loads(parts["manifest.json"]), json.loads(parts["programs.json"])
    edit(programs["body"])
    members = {**parts, "programs.json": json.dumps(programs).encode()}
    manifest["sha256"]["programs.json"] = hashlib.sha256(members["programs.json"]).hexdigest()
    text = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if name != "manifest.json":
                archive.writestr(zipfile.ZipInfo(name), data)
        archive.writestr(zipfile.ZipInfo("manifest.json"), text)
        archive.comment = hashlib.sha256(text).hexdigest().encode()
    return path


def call(name, target, args, kwargs=None, place=""):
    return ["call", name, target, args, kwargs or {}, place]


def before_output(*nodes):
    return lambda body: body["nodes"].__setitem__(slice(-1, -1), nodes)


def renamed(kind, new):
    """Give the first node of a kind another name, wherever it is read."""

    def edit(body):
        old = next(n[1] for n in body["nodes"] if n[0] == kind)
        body["nodes"] = json.loads(json.dumps(body["nodes"]).replace(json.dumps(old), json.dumps(new)))

    return edit


def weight_named(new):
    def edit(body):
        old = next(n[2] for n in body["nodes"] if n[0] == "weight")
        body["weights"][new] = body["weights"].pop(old)
        for node in body["nodes"]:
            node[2:3] = [new] if node[0] == "weight" and node[2] == old else node[2:3]

    return edit


X = {"node": "x"}
REST = [0.1, 1e-5, False]
TRAINING = dict(running_mean=X, running_var=X, training=True, momentum=1, eps=1)
EDITS = {
    "reads a file": before_output(call("a", "aten.from_file.default", ["{path}", False, 8], {"dtype": {"dtype": "uint8"}})),
    "writes a file": before_output(call("a", "aten.from_file.default", ["{path}", True, 8])),
    "writes to an input": before_output(call("a", "aten.fill_.Scalar", [X, 7])),
    "writes into an out argument": before_output(call("a", "aten.add.out", [X, X], {"out": X})),
    "sets an input": before_output(call("a", "aten.set_.source_Tensor", [X, X])),
    "trains a norm on an input": before_output(call("a", "aten.batch_norm.default", [X, None, None, X, X, True, *REST])),
    "trains by name": before_output(
        call("a", "aten.native_batch_norm.default", [X, None, None], TRAINING)
    ),
    "prints": before_output(call("a", "aten._print.default", ["hello"])),
    "clears a cache of the process": before_output(call("a", "aten._cufft_clear_plan_cache.default", [0])),
    "strides without a check": before_output(call("a", "aten._reshape_alias.default", [X, [10**6], [1]])),
    "calls another namespace": before_output(call("a", "_c10d_functional.wait_tensor.default", [X])),
    "calls Python": before_output(call("a", "operator.setitem", [X, 0, 1])),
    "calls builtins": before_output(call("a", "builtins.exec", ["pass"])),
    "code as an input's name": renamed("placeholder", "x = __import__('os').system('touch {path}')"),
    "code as a call's name": renamed("call", "a = __import__('os').system('touch {path}')"),
    "code as a weight's name": weight_named("w\"), __import__('os')"),
    "code as an argument's name": before_output(call("a", "aten.add.Tensor", [X, X], {"alpha=open('{path}', 'w'), x": 1})),
    "a keyword as a name": renamed("placeholder", "lambda"),
    "code behind a comment": before_output(call("a", "aten.neg.default", [X], place="place\nimport os")),
    "a weight it does not hold": lambda body: body["nodes"].__setitem__(
        slice(1, 1), [["weight", "other", "forward"]]
    ),
    "an update of no input": lambda body: body.__setitem__("updates", [[0, 99]]),
    "an update of a module's attribute": lambda body: body.__setitem__("updates", [[0, "x"]]),
    "code as a size's name": lambda body: body["symbols"].__setitem__("s); import os", {"hint": 3, "min": 2, "max": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("target", ["reference", "inductor"])
def test_an_altered_graph_that_would_do_more_is_refused_and_does_nothing(name, target, parts, tmp_path):
    touched, x = tmp_path / "touched", torch.ones(3, 4)

    def edit(body):
        EDITS[name](body)
        text = (
            json.dumps(body).replace("{path}", str(touched)).replace(json.dumps(X), json.dumps(first(body)))
        )
        body.clear()
        body.update(json.loads(text))

    path = altered(parts, tmp_path / "evil.thresher", edit)
    with pytest.raises(ArtifactError):
        thresher.load(path, target=target)(x)
    assert not touched.exists() and torch.equal(x, torch.ones(3, 4))


def first(body):
    """The name of the first tensor that the graph takes."""
    places = (n for n in body["nodes"] if n[0] == "placeholder")
    return {"node": next(n[1] for n in places if isinstance(n[2], dict) and "shape" in n[2])}


def test_an_unaltered_graph_written_by_hand_still_loads(parts, tmp_path):
    x = torch.randn(3, 4)
    loaded = thresher.load(altered(parts, tmp_path / "same.thresher", lambda body: None), target="reference")
    with torch.no_grad():
        assert torch.equal(loaded(x)["output"], Net().eval()(x))


def test_a_program_from_the_rewrite_cache_is_read_by_the_same_rules(parts):
    body = json.loads(parts["programs.json"])["body"]
    before_output(call("a", "aten.from_file.default", ["/nowhere", True, 8]))(body)
    with pytest.raises(ArtifactError, match="from_file"):
        decode(body, [torch.zeros(4)] * 9)


def test_no_operator_on_the_list_writes_or_takes_a_path():
    for namespace, names in pure_ops.PURE.items():
        for name in names:
            packet = getattr(getattr(torch.ops, namespace), name, None)
            overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
            for found in overloads:
                if pure_ops.refusal(found) is None:
                    taken = {
                        a.name for a in found._schema.arguments if "int" not in str(a.type)
                    }  # einsum's path
                    assert not taken & {"filename", "path", "file", "data_ptr", "storage"}, found


def test_the_list_holds_every_operator_of_ours_and_what_models_are_made_of():
    catalog.load()
    aten = torch.ops.aten
    for target in (aten.linear.default, aten.scaled_dot_product_attention.default, aten.to.dtype, aten.cat.default,
                   aten.embedding.default, aten.layer_norm.default, aten.gelu.default, aten.index_put.default,
                   torch.ops.thresher.varlen_attention.default, torch.ops.thresher.nvfp4_linear.default):  # fmt: skip
        assert pure_ops.refusal(target) is None
