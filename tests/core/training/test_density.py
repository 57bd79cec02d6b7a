"""The density loss, ReLU swaps and density metrics, on unmodified models and on models with adapters."""

import pytest
import torch
import zoo
from torch import nn

import thresher
from thresher.errors import ArgumentError, ThresherError
from thresher.training.density import soft_density
from thresher.training.mlp_sites import mlps


def hidden_of(model, batch):
    """What each down projection reads, by an independent hook."""
    seen, handles = {}, []
    for site in mlps(model):
        read = lambda _, args, name=site.fqn: seen.__setitem__(name, args[0].detach())  # noqa: E731
        handles.append(model.get_submodule(site.down).register_forward_pre_hook(read))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def test_the_formula():
    h = torch.tensor([[0.0, 1.0], [0.1, 3.0]])
    expected = (h**2 / (h**2 + 0.01)).mean()
    torch.testing.assert_close(soft_density(h, None, 0.01), expected)
    real = torch.tensor([True, False])
    torch.testing.assert_close(soft_density(h, real, 0.01), (h[0] ** 2 / (h[0] ** 2 + 0.01)).mean())
    assert soft_density(h.bfloat16(), None, 1e-7).dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", pytest.param("llama_reglu", marks=pytest.mark.thorough)])
def test_pads_count_neither_in_the_loss_nor_in_the_metrics(name):
    model, batch = zoo.ZOO[name].build()
    real = batch["attention_mask"].bool()
    seen = hidden_of(model, batch)
    density = thresher.density_loss(model, eps=1e-2, weight=2.0)
    model(**batch)
    terms = [soft_density(h, real, 1e-2) for h in seen.values()]
    torch.testing.assert_close(density(), 2.0 * torch.stack(terms).mean())
    density.remove()
    found = thresher.activation_density(model, [batch], thresholds=(0.1,), unions=(4, 25))
    for name, h in seen.items():
        on = h[real] != 0
        assert found[name].tokens == int(real.sum())
        assert found[name].exact == pytest.approx(float(on.float().mean()))
        assert found[name].above[0.1] == pytest.approx(float((h[real].abs() > 0.1).float().mean()))
        assert found[name].union[25] == pytest.approx(float(on.any(0).float().mean()))  # all 25 of them
        assert found[name].exact <= found[name].union[4] <= found[name].union[25]


def test_a_gated_mlp_counts_the_product():
    model, batch = zoo.ZOO["llama_reglu"].build()
    mlp = model.model.layers[0].mlp
    seen = {}
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    with torch.no_grad():
        h = hidden_of(model, batch)["model.layers.0.mlp"]
        handle.remove()
        torch.testing.assert_close(h, mlp.act_fn(mlp.gate_proj(seen["x"])) * mlp.up_proj(seen["x"]))


def train(model, batch, density, parameters, steps=20):
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    values = []
    for _ in range(steps):
        model(**batch)
        loss = density()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def test_full_fine_tuning_lowers_exact_density():
    model, batch = zoo.ZOO["opt"].build()
    before = thresher.activation_density(model, [batch])
    density = thresher.density_loss(model)
    train(model, batch, density, model.parameters())
    density.remove()
    after = thresher.activation_density(model, [batch])
    assert all(after[s].exact < before[s].exact / 2 for s in before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_lora_trains_adapters_only_and_finds_the_sites():
    peft = pytest.importorskip("peft")
    model, batch = zoo.ZOO["llama_reglu"].build()
    plain = {s.down for s in mlps(model)}
    config = peft.LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"])
    wrapped = peft.get_peft_model(model, config)
    assert {
        s.down.removeprefix("base_model.model.").removesuffix(".base_layer") for s in mlps(wrapped)
    } == plain
    frozen = {n: p.clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    density = thresher.density_loss(wrapped)
    values = train(wrapped, batch, density, [p for p in wrapped.parameters() if p.requires_grad])
    assert values[-1] < 0.8 * values[0]
    assert all(torch.equal(p, frozen[n]) for n, p in wrapped.named_parameters() if n in frozen)


class Adapted(nn.Module):
    """An MLP with a bottleneck adapter behind it, as Houlsby's and Pfeiffer's place them."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(16, 64), nn.Linear(64, 16), nn.GELU()
        self.squeeze, self.widen, self.adapter_act = nn.Linear(16, 4), nn.Linear(4, 16), nn.GELU()

    def forward(self, x):
        y = self.down(self.act(self.up(x)))
        return x + y + self.widen(self.adapter_act(self.squeeze(y)))


def test_bottleneck_adapters_are_trained_and_are_no_mlps():
    torch.manual_seed(0)
    model, x = nn.Sequential(Adapted(), Adapted()), torch.randn(2, 5, 16)
    assert [s.down for s in mlps(model, {"input": x})] == ["0.down", "1.down"]
    thresher.relufy(model, {"input": x})
    assert isinstance(model[1].act, nn.ReLU) and isinstance(model[1].adapter_act, nn.GELU)
    density = thresher.density_loss(model, {"input": x})
    adapters = [p for n, p in model.named_parameters() if "squeeze" in n or "widen" in n]
    before = [p.clone() for p in adapters]
    model(x)
    density().backward()
    torch.optim.SGD(adapters, 0.1).step()
    assert not torch.equal(
        model[0].squeeze.weight, before[0]
    )  # the second MLP's term reaches the first's adapter


def test_layer_weights_given_and_learned():
    model, batch = zoo.ZOO["opt"].build()
    density = thresher.density_loss(model, layers=[1.0, 3.0])
    model(**batch)
    first, second = density.per_layer().values()
    assert density().item() == pytest.approx((first + 3 * second) / 4, rel=1e-5)
    density.remove()
    learned = thresher.density_loss(model, layers="learned")
    assert learned.layer_weights().tolist() == [1.0, 1.0]
    train(model, batch, learned, [*model.parameters(), *learned.parameters()], steps=5)
    weights = learned.layer_weights()
    assert weights[0] != weights[1] and float(weights.sum()) == pytest.approx(2.0)


def test_gradient_checkpointing_counts_once():
    model, batch = zoo.ZOO["opt"].build()
    density = thresher.density_loss(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.dropout = model.config.attention_dropout = 0.0
    for layer in model.model.decoder.layers:
        layer.dropout = 0.0
        layer.self_attn.dropout = 0.0
    grads = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch, use_cache=False)
        density().backward()
        grads.append(model.model.decoder.layers[0].fc1.weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", [pytest.param("bert", marks=pytest.mark.thorough), "gpt2"])
def test_relufy_swaps_every_mlp_and_survives_saving(name, tmp_path):
    model, batch = zoo.ZOO[name].build()
    assert thresher.relufy(model) is model
    assert {s.activation for s in mlps(model)} == {"relu"}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch)[0], model(**batch)[0])


def test_relufy_leaves_relu_and_squared_relu():
    model, _ = zoo.ZOO["arcee"].build()
    thresher.relufy(model)
    assert model.config.hidden_act == "relu2" and {s.activation for s in mlps(model)} == {"relu2"}


class Inline(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


def test_what_cannot_be_done_says_so():
    model, x = Inline(), {"x": torch.randn(2, 8)}
    with pytest.raises(ThresherError, match="in its own forward"):
        thresher.relufy(model, x)
    with pytest.raises(ArgumentError, match="example_inputs"):
        thresher.density_loss(model)
    with pytest.raises(ArgumentError, match="eps"):
        thresher.density_loss(model, x, eps=0)
    with pytest.raises(ArgumentError, match="layers"):
        thresher.density_loss(model, x, layers=[1.0, 2.0])
    with pytest.raises(ArgumentError, match="only"):
        thresher.density_loss(model, x, only=["up"])
    with pytest.raises(ThresherError, match="before a forward pass"):
        thresher.density_loss(model, x)()
    with pytest.raises(ThresherError, match="No MLP was found"):
        thresher.density_loss(nn.Linear(8, 8), {"input": torch.randn(2, 8)})
    with pytest.raises(ThresherError, match="not a single batch"):
        thresher.activation_density(model, [], example_inputs=x)


class Packed(nn.Module):
    """A linear whose weight is stored as bytes, as quantized ones of QLoRA are."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features, self.bias = inputs, outputs, None
        self.weight = nn.Parameter(torch.randint(0, 255, (inputs * outputs, 1), dtype=torch.uint8), False)

    def forward(self, x):
        return x @ (self.weight.view(self.in_features, self.out_features).float() / 255 - 0.5)


def test_quantized_linears_are_found_and_keep_their_weights():
    model, x = Inline(), torch.randn(4, 8)
    model.up, model.down = Packed(8, 16), Packed(16, 8)
    density = thresher.density_loss(model, {"x": x})
    assert [s.down for s in density.sites] == ["down"] and isinstance(model.up, Packed)
    model(x)
    torch.testing.assert_close(density(), soft_density(nn.functional.gelu(model.up(x)), None, 1e-2))


def test_positional_inputs_and_a_model_of_ones_own():
    model, x = Inline(), torch.randn(4, 8)
    density = thresher.density_loss(model, {"x": x})
    model(x)
    expected = soft_density(nn.functional.gelu(model.up(x)), None, 1e-2)
    torch.testing.assert_close(density(), expected)
