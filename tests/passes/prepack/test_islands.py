"""Parts that mix positions run on padded rows inside a packed program, where that is shown to be right."""

import masks
import pytest
import torch
from torch import nn

import thresher

LENGTHS = (11, 4, 7)


class Mixes(nn.Module):
    """Embeds, mixes positions in the way `kind` says, and goes on token by token."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(64, 16)
        self.project, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.conv = nn.Conv1d(16, 16, 3, groups=16)
        self.decay = nn.Parameter(torch.rand(16) * 0.2)

    def mix(self, x, real):
        if self.kind == "batch":
            return x - x.mean(0, keepdim=True)
        if self.kind == "mean":  # of pads too
            return x + x.mean(1, keepdim=True)
        if self.kind == "mean of real tokens":
            return x + (x * real[..., None]).sum(1, keepdim=True) / real.sum(1)[:, None, None]
        if self.kind == "causal convolution of masked tokens":
            x = (x * real[..., None]).transpose(1, 2)
            return self.conv(nn.functional.pad(x, (2, 0))).transpose(1, 2)
        if self.kind == "convolution that reads what follows":
            return self.conv(nn.functional.pad(x.transpose(1, 2), (1, 1))).transpose(1, 2)
        # a scan whose state decays at pads as well, by what stands there
        steps, state = [], torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = state * torch.exp(-self.decay * x[:, t].abs()) + x[:, t] * real[:, t, None]
            steps.append(state)
        return torch.stack(steps, 1)

    def forward(self, input_ids, attention_mask):
        x = self.project(self.embed(input_ids))
        x = x + self.down(torch.relu(self.up(self.mix(x, attention_mask.to(x.dtype)))))
        return self.down(torch.relu(self.up(x)))


def given(mask):
    return {"input_ids": torch.randint(1, 64, mask.shape), "attention_mask": mask}


def compiled(kind, **options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Mixes(kind).eval()
    return model, thresher.compile(
        model, given(masks.right(LENGTHS)), {"prepack": True}, target="reference", **options
    )


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", ["mean of real tokens", "causal convolution of masked tokens", "scan"])
def test_what_reads_no_pads_is_packed(kind, dynamic):
    if kind == "scan" and dynamic:
        pytest.skip("it is unrolled: its length is fixed")
    model, fast = compiled(kind, dynamic=dynamic)
    assert fast.report["prepack"].rewritten
    assert any("run on padded rows inside" in n for n in fast.report["prepack"].notes)
    tried = [masks.right(LENGTHS), masks.left(LENGTHS), masks.holed(LENGTHS)]
    tried += [masks.right((3, 9, 2, 5)), masks.left((13, 5))] if dynamic else []
    for mask in tried:
        batch = given(mask)
        torch.testing.assert_close(
            fast(**batch)[mask.bool()], model(**batch)[mask.bool()], atol=1e-5, rtol=1e-5
        )
    (counters,) = fast.counters
    holes = "A row has holes in its mask, and a part of the model that mixes positions goes on over them."
    assert dict(counters.padded) == ({holes: 1} if kind == "scan" else {})


@pytest.mark.parametrize("kind", ["batch", "mean", "convolution that reads what follows"])
@pytest.mark.filterwarnings("ignore::thresher.ThresherWarning")
def test_what_reads_pads_or_other_rows_is_not(kind):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Mixes(kind).eval()
    batch = given(masks.left(LENGTHS))
    fast = torch.compile(model, backend="thresher", options={"prepack": True, "target": "reference"})
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch), model(**batch))
    report = thresher.reports()[-1]["prepack"]
    assert not report.rewritten and not report.rolled_back and report.missed


class Decodes(nn.Module):
    """Other tokens read the padded ones, and there are as many of them."""

    def __init__(self):
        super().__init__()
        self.embed, self.other = nn.Embedding(64, 16), nn.Embedding(64, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        x, y = self.embed(input_ids), self.other(decoder_input_ids)
        scores = self.q(y) @ self.k(x).transpose(1, 2)
        shown = scores.masked_fill(attention_mask[:, None] == 0, -1e9).softmax(-1)
        return self.o(shown @ self.v(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::thresher.ThresherWarning")
def test_a_decoder_of_the_same_length_is_not_taken_for_the_padded_tokens():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, mask = Decodes().eval(), masks.right(LENGTHS)
    batch = {**given(mask), "decoder_input_ids": torch.randint(1, 64, mask.shape)}
    fast = torch.compile(
        model, backend="thresher", options={"prepack": {"min_share": 0.0}, "target": "reference"}
    )
    torch.testing.assert_close(fast(**batch), model(**batch))


def test_layers_alike_are_proven_once(monkeypatch):
    from thresher.passes.prepack import island_proof

    asked = []
    holds = island_proof.Proof.holds
    monkeypatch.setattr(
        island_proof.Proof, "holds", lambda self, holed: asked.append(holed) or holds(self, holed)
    )
    import transformers as hf

    torch._dynamo.reset()
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                 max_position_embeddings=32, pad_token_id=0)  # fmt: skip
    rest = dict(relative_attention=True, position_buckets=8, pos_att_type=["c2p", "p2c"], norm_rel_ebd="layer_norm",
                share_att_key=True, type_vocab_size=0, position_biased_input=False)  # fmt: skip
    model = hf.DebertaV2Model(hf.DebertaV2Config(**sizes, **rest)).eval()
    batch = given(masks.left(LENGTHS))
    fast = thresher.compile(model, batch, {"prepack": True}, target="reference")
    assert fast.report["prepack"].rewritten and asked == [False, True] * 2  # the first layer, and two
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch)[0][real], model(**batch)[0][real], atol=1e-5, rtol=1e-5)
