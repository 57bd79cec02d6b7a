"""Sparse MLPs from training to a compiled model: swap, fine-tune, save, reload, compile, count."""

import pytest
import torch
import zoo

import thresher
from thresher import site_counts
from thresher.kernels import native


def fine_tuned(directory):
    model, batch = zoo.ZOO["bert"].build()
    thresher.relufy(model)
    density = thresher.density_loss(model, weight=3.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state
    for _ in range(40):
        loss = (model(**batch).last_hidden_state - wanted).square().mean() + density()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    density.remove()
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory).eval(), batch


def check(model, batch, target):
    site_counts.reset()
    measured = thresher.activation_density(model, [batch])
    torch._dynamo.reset()
    options = {"deft": {"min_bytes": 0, "tau": 1.0}, "target": target}
    compiled = torch.compile(model, backend="thresher", options=options, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch)[0], model(**batch)[0], rtol=1e-4, atol=1e-5)
    account = thresher.reports()[-1]["deft"]
    assert set(account.rewritten) == set(measured) and not account.missed
    assert all(d.exact < 0.25 for d in measured.values())
    if native.unavailable() is None:
        for found in account.activity.values():
            assert (found["sparse"], found["dense"]) == (1, 0) and found["union_density"] < 1
    assert "calls sparse" in str(thresher.reports()[-1]) or native.unavailable() is not None


def test_from_training_to_a_compiled_model(tmp_path):
    check(*fine_tuned(tmp_path), "reference")


@pytest.mark.slow
@pytest.mark.thorough
def test_the_same_through_inductor(tmp_path):
    check(*fine_tuned(tmp_path), "inductor")


@pytest.mark.slow
def test_lora_is_merged_and_then_rewritten():
    peft = pytest.importorskip("peft")
    model, batch = zoo.ZOO["llama_reglu"].build()
    config = peft.LoraConfig(r=4, target_modules=["gate_proj", "up_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    torch._dynamo.reset()
    found = thresher.explain(wrapped, batch, deft={"min_bytes": 0}).report["deft"]
    assert not found.rewritten  # the adapter's branch lies between linear and activation
    merged = wrapped.merge_and_unload().eval()
    torch._dynamo.reset()
    found = thresher.explain(merged, batch, deft={"min_bytes": 0}).report["deft"]
    assert len(found.rewritten) == 2 and not found.missed
