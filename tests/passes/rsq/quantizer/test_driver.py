"""The driver on tiny models: exact rotations, plain GPTQ as a special case, resuming, mixed widths, bad input."""

import captures
import pytest
import torch
import zoo

import thresher.backend  # noqa: F401 (defines the operators)
from thresher.errors import ArgumentError, ThresherError
from thresher.passes.rsq import rewrite as rsq_rewrite
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.plan import make_plan
from thresher.passes.rsq.quantizer.driver import quantise_program
from thresher.passes.rsq.quantizer.hessian import HessianError
from thresher.passes.rsq.quantizer.pieces import Batch
from thresher.passes.rsq.quantizer.sweep import bind, exactness
from thresher.passes.structure.recover import recover

ROTATED = ("llama", "llama_reglu", "mistral", "qwen2", "qwen3", "phi3", "arcee", "gpt2", "opt", "gpt_neox")
UNROTATED = {
    "gemma2": "norm after the branch",
    "gemma3": "norm after the branch",
    "bloom": "norm after the branch or around the embeddings",
    "mpt": "not recovered whole",
    "bert": "norm after the branch or around the embeddings",
    "t5_encoder": "is read by the output",
}
PLAIN = dict(rotate=False, rotate_heads=False, rotate_down=False)


def rotated(program, config):
    after = program.copy()
    structure = recover(after)
    plan = make_plan(after, structure, config)
    rsq_rewrite.rotate(after, plan, lazy=True)
    after.clean()
    return after, plan


def batches(name, rows=12):
    ids = torch.randint(3, 90, (rows, 12), generator=torch.Generator().manual_seed(0))
    entry = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return [
        Batch({k: v[i : i + 3] for k, v in entry.items()}, None, ids[i : i + 3]) for i in range(0, rows, 3)
    ]


def run(name="llama", given=None, folder=None, **options):
    options = {"bits": 3, **options}
    return quantise_program(captures.of_zoo(name), given or batches(name), RSQConfig(**options), folder)


def same_codes(a, b):
    assert a.linears.keys() == b.linears.keys()
    for site, tensors in a.linears.items():
        for part, tensor in tensors.items():
            assert torch.equal(tensor, b.linears[site][part]), (site, part)


CORE = ("llama", "qwen3", "phi3", "gpt2", "gpt_neox", *UNROTATED)


@pytest.mark.parametrize(
    "name", [*CORE, *(pytest.param(n, marks=pytest.mark.thorough) for n in ROTATED if n not in CORE)]
)
def test_rotation_is_exact_in_fp64(name):
    program = captures.of_zoo(name)
    inputs = captures.arguments(program, zoo.ZOO[name].build()[1])
    after, plan = rotated(program, RSQConfig())
    assert exactness(program, after, inputs) <= 1e-9
    assert len(plan.streams) == (name in ROTATED)
    if name in UNROTATED:
        (reason,) = [m.reason for m in plan.missed if "rotation of the residual stream" in m.site]
        assert UNROTATED[name] in reason
    assert plan.quantise, "a model that is not rotated is still quantised"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_large_weights_are_proven_in_parts_only_where_rows_do_not_mix(name, monkeypatch):
    """Every weight of these models is large here: square ones, those that write to the stream, transposed ones, the head."""
    from thresher.passes.rsq.quantizer import sweep

    program = captures.of_zoo(name)
    inputs = captures.arguments(program, zoo.ZOO[name].build()[1])
    after, _ = rotated(program, RSQConfig())
    whole = exactness(program, after, inputs)
    monkeypatch.setattr(sweep, "_CHUNK", 5 * max(w.tensor.shape[-1] for w in program.weights.values()))
    counted, rows = [], sweep.RowWise.rows
    monkeypatch.setattr(sweep.RowWise, "rows", lambda *given: counted.append(1) or rows(*given))
    assert exactness(program, after, inputs) == pytest.approx(whole, rel=1, abs=1e-12)
    assert len(counted) > 10 or name == "gpt2"  # whose weights are stored transposed


def test_a_huge_head_is_multiplied_in_parts_in_its_own_type(monkeypatch):
    from thresher.passes.rsq.quantizer import sweep

    program = captures.of_zoo("llama")
    given = bind(program, batches("llama")[0].inputs)

    def logits():
        *_, (_, last) = sweep.Sweep(program).steps(given)
        return last

    whole = logits()
    parts, cat = [], torch.cat
    monkeypatch.setattr(sweep, "_HUGE", 1)
    monkeypatch.setattr(sweep, "_CHUNK", 1)
    monkeypatch.setattr(sweep, "_PART", 40 * 32)
    monkeypatch.setattr(torch, "cat", lambda found, *rest: parts.append(len(found)) or cat(found, *rest))
    torch.testing.assert_close(logits(), whole)
    assert max(parts) > 2


def test_an_inexact_rotation_is_noticed(monkeypatch):
    from thresher.passes.rsq import edits

    real = edits.rotate_reader
    monkeypatch.setattr(edits, "rotate_reader", lambda w, r: real(w, r) * (1 + 1e-6))
    with pytest.raises(ThresherError, match="differs from the original by"):
        run()


def test_odd_widths_fall_back_and_say_so():
    program = captures.of_zoo("llama")
    for kind, said in (("orthogonal", "Random orthogonal"), ("block", "Hadamard matrix of order 32")):
        after, plan = rotated(program, RSQConfig(rotation=kind))
        assert any(said in note for note in plan.notes)
        inputs = captures.arguments(program, zoo.ZOO["llama"].build()[1])
        assert exactness(program, after, inputs) <= 1e-9
    assert any(
        "cannot run online" in m.reason for m in rotated(program, RSQConfig(rotation="orthogonal"))[1].missed
    )


def test_a_tied_head_is_untied_with_a_note():
    program = captures.of_zoo("gpt2")
    after, plan = rotated(program, RSQConfig())
    assert any("share transformer.wte.weight" in note and "MB more" in note for note in plan.notes)
    names = [w.fqn for w in after.weights.values()]
    assert "transformer.wte.rotated.weight" in names and "lm_head.rotated.weight" in names


def test_equal_importance_is_plain_gptq_bit_for_bit():
    same_codes(run(importance="uniform"), run(r_min=1.0))
    uniform, first = run(importance="uniform"), run()
    assert any(not torch.equal(t["codes"], uniform.linears[s]["codes"]) for s, t in first.linears.items())


@pytest.mark.parametrize("strategy", ["first", "first_last", "tokenfreq", "actnorm", "actdiff", "tokensim"])
def test_every_strategy_runs(strategy):
    found = run(importance=strategy)
    assert len(found.importance) == 2 and all(len(s) == 144 for s in found.importance.values())


def test_interrupted_run_gives_the_same_codes(tmp_path, monkeypatch):
    from thresher.passes.rsq.quantizer import driver as rsq_driver

    whole, saved, calls = run(), rsq_driver.Driver._save, []

    def save_once(self, piece):
        if calls:
            raise KeyboardInterrupt
        calls.append(piece.name)
        saved(self, piece)

    monkeypatch.setattr(rsq_driver.Driver, "_save", save_once)
    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path)
    monkeypatch.undo()
    (kept,) = tmp_path.glob("*.safetensors")
    before = kept.read_bytes()
    again = run(folder=tmp_path)
    same_codes(whole, again)
    assert kept.read_bytes() == before and not list(tmp_path.glob("*.partial"))
    assert again.reports.keys() == whole.reports.keys()
    different = run(folder=tmp_path, bits=4)  # another run's files are not taken for its own
    assert int(different.linears["model.layers.0.mlp.up_proj"]["bits"]) == 4


def test_seeds_differ_and_errors_do_not():
    a, b = run(seed=0), run(seed=1)
    assert not torch.equal(
        a.linears["model.layers.0.mlp.up_proj"]["codes"], b.linears["model.layers.0.mlp.up_proj"]["codes"]
    )
    mean = [sum(r.quantized for r in o.reports.values()) / len(o.reports) for o in (a, b)]
    assert abs(mean[0] - mean[1]) < 0.5 * max(mean)


def test_gptq_beats_rounding_on_every_linear():
    for report in run().reports.values():
        assert report.quantized < report.nearest


def test_pads_do_not_count():
    ids = batches("llama")[0].inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    other = ids.clone()
    other[:, 8:] = 5
    outcomes = [
        run(given=[Batch({"input_ids": i, "attention_mask": mask}, mask.bool(), i)]) for i in (ids, other)
    ]
    same_codes(*outcomes)


def test_mixed_widths_keep_the_budget():
    found = run(average_bits=3.0)
    sizes = {s.fqn: s.in_features * s.out_features for s in found.plan.quantise}
    spent = sum(int(found.linears[s]["bits"]) * n for s, n in sizes.items())
    assert spent <= 3.0 * sum(sizes.values()) and set(found.bits.values()) <= {2, 3, 4, 8}
    assert all(v > 0 for v in found.sensitivity.values())


def test_a_dead_channel_and_one_token_sequences():
    model, _ = zoo.ZOO["llama"].build()
    ids = torch.randint(3, 90, (8, 1), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = captures.export(model, {k: v[:3].repeat(1, 12) for k, v in given.items()}, dynamic=True)
    found = quantise_program(program, [Batch(given, None, ids)], RSQConfig(bits=4))
    assert all(torch.isfinite(torch.tensor(r.quantized)) for r in found.reports.values())
    dead = {"input_ids": torch.full((3, 12), 7), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    run(given=[Batch(dead, None, dead["input_ids"])])  # X^T X of one direction: singular, damped


def test_bad_input_is_named():
    with pytest.raises(ThresherError, match="not a single calibration"):
        quantise_program(captures.of_zoo("llama"), [], RSQConfig())
    ids = batches("llama")[0].inputs["input_ids"]
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    with pytest.raises(HessianError, match=r"self_attn.q_proj.*No calibration token"):
        run(
            given=[Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, nothing, ids)],
            importance="uniform",
        )
    model, inputs = zoo.ZOO["llama"].build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    program = captures.export(model, inputs)
    with pytest.raises(ThresherError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 NaN"):
        quantise_program(program, [Batch(inputs)], RSQConfig())
    with pytest.raises(ArgumentError, match="an input named"):
        bind(program, {"tokens": ids})
    plan = rotated(captures.of_zoo("llama"), RSQConfig(group_size=32))[1]
    assert any("Groups of 32 do not divide its 48 inputs" in m.reason for m in plan.missed)


def test_what_waits_between_groups_does_not_change_codes(monkeypatch):
    """Wide values may be kept or computed again: never those that came of weights not yet quantized."""
    from thresher.passes.rsq.quantizer import driver as rsq_driver

    kept = run()
    monkeypatch.setattr(rsq_driver, "_ROOM", 0)
    same_codes(kept, run())


@pytest.mark.parametrize("name", ["gemma3", "bert"])
def test_where_no_stream_is_rotated_inputs_are_turned_once_for_all_that_read_them(name):
    after, plan = rotated(captures.of_zoo(name), RSQConfig(rotate_inputs=True))
    turned = [e for e in plan.edits.values() if e.online is not None]
    transforms = after.nodes(torch.ops.thresher.hadamard.default)
    readers = [s for s in plan.quantise if s.role in ("q", "k", "v", "gate", "up")]
    assert readers and all(plan.edits[s].online is not None for s in readers)
    assert len(transforms) < len(turned), "q, k and v share one"
    q, k = (next(s for s in readers if s.role == role) for role in "qk")
    assert q.x is k.x and q.x.target is torch.ops.thresher.hadamard.default
    plain = rotated(captures.of_zoo(name), RSQConfig())[1]
    assert all(plain.edits[s].online is None for s in plain.quantise if s.role != "down")


def test_files_from_before_inputs_were_turned_are_read_as_they_were_made():
    import json

    fields = json.loads(RSQConfig(bits=3).to_json())
    del fields["rotate_inputs"]
    assert RSQConfig.from_json(json.dumps(fields)) == RSQConfig(bits=3, rotate_inputs=False)


def test_a_model_of_which_nothing_is_quantized_is_no_error():
    found = run(keep=("head", "model.*"))
    assert not found.linears and not found.reports


def test_the_head_has_a_width_of_its_own():
    found = run(bits=4, head_bits=8, method="nearest")
    widths = {site: int(tensors["bits"]) for site, tensors in found.linears.items()}
    assert widths.pop("lm_head") == 8 and set(widths.values()) == {4} and len(widths) == 14
    assert "lm_head" not in run(bits=4, method="nearest").linears
    mixed = run(average_bits=3.0, head_bits=8)
    assert int(mixed.linears["lm_head"]["bits"]) == 8 == mixed.bits["lm_head"]
    assert "lm_head" not in mixed.sensitivity or mixed.bits["lm_head"] == 8
    none = run("bert", head_bits=8, method="nearest")
    assert any("changes nothing" in note for note in none.plan.notes)
