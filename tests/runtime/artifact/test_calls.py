"""Saved models whose calls are looked at first: each kind of call runs its own program after loading, bit for bit."""

import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from tiny_llama import IMAGE, SPAN, make, prompt

import thresher
from thresher.graph.call_rules import Rule
from thresher.runtime.artifact.program_json import ArtifactError

PRUNE = dict(image_token_id=IMAGE, min_image_tokens=2, bucket=1, min_saving=-1.0, stages=((1, 0.5),))
ZIP = dict(keep=0.4, recent=4, spread=4, bucket=4, min_saving=-9.0, image_token_id=IMAGE)


def call(image=None, padded=False):
    """A call with so many image tokens; all 32 by default."""
    ids = prompt()
    if image is not None:
        ids[:, SPAN.start + image : SPAN.stop] = 5
    found = dict(input_ids=ids)
    if padded:
        found["attention_mask"] = torch.ones_like(ids)
        found["attention_mask"][1, 40:] = 0
    return found


def compiled(inputs, layers=2, **recipe):
    model = make(num_hidden_layers=layers)
    model.config.use_cache = False
    torch._dynamo.reset()
    return thresher.compile(model, inputs, target="reference", dynamic=True, **recipe)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A model pruned for calls of 32 and 20 image tokens, and its file."""
    model = compiled(call(), transprune=PRUNE)
    model(**call(20))
    return model, thresher.save(model, tmp_path_factory.mktemp("m") / "m.thresher", example_inputs=call())


@torch.no_grad()
def test_a_process_without_the_models_code_runs_the_program_that_fits(pruned, tmp_path):
    model, path = pruned
    given = [call(), call(20), call()]
    torch.save([(c, model(**c).logits) for c in given], tmp_path / "calls")
    script = (
        "import sys, torch, thresher\n"
        "model = thresher.load(sys.argv[1], target='reference')\n"
        "for inputs, expected in torch.load(sys.argv[2]):\n"
        "    assert torch.equal(model(**inputs).logits, expected)\n"
        "assert len(model.session.ran) == 2 and model.counters.lowered == 2\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path), str(tmp_path / "calls")], check=True)
    assert all(not name.endswith((".pkl", ".pt")) for name in zipfile.ZipFile(path).namelist())


def test_a_call_that_raises_while_saving_leaves_no_inputs_behind(pruned, tmp_path):
    model, _ = pruned
    with pytest.raises(IndexError):
        thresher.save(model, tmp_path / "m.thresher", example_inputs=dict(input_ids=prompt() + 10**6))
    assert not any(s.keep_inputs or s.inputs for s in model.sessions)


@torch.no_grad()
def test_a_call_of_another_kind_runs_whole_and_says_so_once(pruned):
    model, path = pruned
    loaded = thresher.load(path, target="reference")
    with pytest.warns(UserWarning, match="no program for that: it runs without leaving tokens out"):
        actual = loaded(**call(11)).logits
    assert torch.equal(actual, model.model(**call(11)).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(**call(11))


def test_a_damaged_file_is_refused(pruned, tmp_path):
    _, path = pruned
    data = bytearray(path.read_bytes())
    for damage in (data[:-100], data[: len(data) // 2] + b"!" + data[len(data) // 2 + 1 :]):
        (tmp_path / "m").write_bytes(damage)
        with pytest.raises(ArtifactError):
            thresher.load(tmp_path / "m")


@torch.no_grad()
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(dict(zipvl=ZIP), id="zipvl"),
        pytest.param(dict(prepack=True, transprune=PRUNE, zipvl=ZIP), id="packed", marks=pytest.mark.slow),
    ],
)
def test_other_token_passes_and_packed_programs(recipe, tmp_path):
    """What a packed program is told with each call is told it after loading too; weights are saved as they are now."""
    packed = "prepack" in recipe
    model = compiled(call(padded=packed), layers=1 + packed, **recipe)
    model.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    calls = [call(padded=packed), call(16, padded=packed)]
    expected = [model(**c).logits for c in calls]
    path = thresher.save(model, tmp_path / "m", example_inputs=calls[0])
    loaded = thresher.load(path, target="reference")
    for inputs, wanted in zip(calls, expected):
        assert torch.equal(loaded(**inputs).logits, wanted)
    ran = [loaded.session, *loaded.session.variants.values()]
    assert sum(s.counters.packed for s in ran) == (2 if packed else 0)


def test_a_rule_that_nobody_registered_is_named():
    with pytest.raises(thresher.ThresherError, match=r"transprune\.drops"):
        Rule("somebody's own")
