"""Programs kept on the disk: taken only for the same everything, said in the report, and equal to those made anew."""

import dataclasses

import masks
import pytest
import torch
import zoo
from own_cache import own_cache

import thresher
from thresher.cache import rewrite_cache, rewrite_key
from thresher.records import html_report


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_REWRITE_CACHE", "1")
    monkeypatch.setenv("THRESHER_CACHE_DIR", own_cache(tmp_path))
    return tmp_path / "rewritten"


class Windowed(torch.nn.Module):
    """One layer of causal attention over a window of 8 tokens: little to trace."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.out = (
            torch.nn.Embedding(96, 32),
            torch.nn.Linear(32, 96),
            torch.nn.Linear(32, 32),
        )

    def forward(self, input_ids, attention_mask):
        x, at = self.embed(input_ids), torch.arange(input_ids.shape[1])
        far = at[:, None] - at[None, :]
        mask = ((far >= 0) & (far < 8))[None, None] & attention_mask[:, None, None, :].bool()
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(seen.transpose(1, 2).flatten(2)) + x


def call(*lengths):
    made = zoo.tokens(masks.right(lengths))
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def build():
    return Windowed().eval(), call(5, 8, 12)


def compiled(model, inputs, **options):
    return thresher.compile(model, inputs, target="reference", dynamic=True, **(options or {"prepack": True}))


def from_cache(model):
    return any("taken from the cache, made at" in note for note in model.report.notes)


def test_the_second_compile_takes_the_program_and_gives_the_same_bits(folder, tmp_path):
    model, inputs = build()
    first, second = compiled(model, inputs), compiled(model, inputs)
    assert not from_cache(first) and from_cache(second)
    assert any("taken from the cache" in note for note in second.certificate.notes)
    for name in ("error", "budget", "program", "weights", "created", "ops", "passes"):
        assert getattr(first.certificate, name) == getattr(second.certificate, name), name
    longer = call(40, 9, 17)  # beyond what was proven
    for given in (inputs, longer):
        assert torch.equal(first(**given), second(**given))
    assert first.counters[0].packed == second.counters[0].packed == 3  # the mask was looked at again
    assert second.sessions[0].captured.fingerprint()
    loaded = thresher.load(thresher.save(second, tmp_path / "m", example_inputs=inputs), target="reference")
    assert torch.equal(loaded(**inputs).output, first(**inputs))
    assert "<html" in html_report.render(second)


def test_nothing_is_taken_for_another_weight_input_recipe_or_version(folder, monkeypatch):
    model, inputs = build()
    compiled(model, inputs)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 0] += 1
    assert not from_cache(compiled(model, other))
    assert not from_cache(compiled(model, inputs, prepack={"min_share": 0.4}))
    with torch.no_grad():
        model.out.weight[3, 5] += 1e-6
    assert not from_cache(compiled(model, inputs))
    monkeypatch.setattr("thresher.cache.rewrite_key._own_source", lambda: "another version")
    assert not from_cache(compiled(model, inputs))
    assert len(list(folder.iterdir())) == 5


def test_a_damaged_entry_is_left_aside_and_made_anew(folder):
    model, inputs = build()
    expected = compiled(model, inputs)(**inputs)
    (path,) = folder.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    again = compiled(model, inputs)
    assert not from_cache(again) and torch.equal(again(**inputs), expected)
    assert from_cache(compiled(model, inputs))


def test_what_was_assumed_of_sizes_is_assumed_again(folder, monkeypatch):
    """A program from the cache must not run at sizes for which the one made anew would have been recompiled."""
    from thresher import backend

    real = backend.run_pipeline

    def assuming(program, *args, **kwargs):
        length = next(s for p in program.placeholders for s in getattr(p.meta["val"], "shape", ())[1:2])
        assert length <= 12
        return real(program, *args, **kwargs)

    model, inputs = build()
    longer = call(20, 9)
    monkeypatch.setattr(backend, "run_pipeline", assuming)
    first = compiled(model, inputs)
    monkeypatch.setattr(backend, "run_pipeline", real)
    second = compiled(model, inputs)
    assert from_cache(second)
    for each in (first, second):
        assert len(each.sessions) == 1
    second(**longer)
    assert len(second.sessions) == 2, "the program from the cache ran beyond what it was made for"


def test_a_prompt_with_a_number_among_its_inputs_is_kept_too(folder):
    """`logits_to_keep` is a number that may be any, without a least."""
    import tiny_llama

    model = tiny_llama.make(num_hidden_layers=1)
    mask = masks.left((5, 8, 12))
    inputs = {"input_ids": torch.randint(1, 90, mask.shape), "attention_mask": mask}
    given = dict(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    expected = model.generate(**given)
    for taken in (False, True):
        fast = thresher.compile(model, inputs, "exact", target="reference", dynamic=True)
        assert torch.equal(fast.generate(**given), expected)
        prompts = [s for s in fast.sessions if "logits_to_keep" in s.captured.input_names]
        assert [any("from the cache" in n for n in s.report.notes) for s in prompts] == [taken, False]


def test_it_can_be_switched_off(folder, monkeypatch):
    monkeypatch.setenv("THRESHER_REWRITE_CACHE", "0")
    compiled(*build())
    assert not folder.exists()


def test_programs_to_which_more_belongs_are_made_anew(folder):
    model, inputs = build()
    session = compiled(model, inputs).sessions[0]
    rewritten, captured = session.program, session.captured
    name, weight = next(iter(rewritten.weights.items()))
    derived = dataclasses.replace(weight, source=(weight.fqn,), derive=torch.clone)
    rewritten.weights[name] = derived
    with pytest.raises(rewrite_key.Unnamed, match="computed from the model's weights"):
        rewrite_cache._check_kind(captured, rewritten)
    with pytest.raises(rewrite_key.Unnamed, match="Only packed programs are kept"):
        rewrite_cache._check_kind(captured, captured)
    for foreign in (lambda x: x, masks.right):
        with pytest.raises(rewrite_key.Unnamed, match="The graph calls"):
            rewrite_key._function(foreign)
