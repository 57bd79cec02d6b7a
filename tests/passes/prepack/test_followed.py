"""What tokens are followed through on the way: ids put in the place of others, largest values, scores in fp32."""

import pytest
import torch
from torch import nn

import thresher

LENGTHS = (7, 3, 5)


class Spelled(nn.Module):
    """A layer with attention written out: scores in fp32, and values in the model's own dtype."""

    def __init__(self, pick):
        super().__init__()
        self.pick = pick
        self.table = nn.Embedding(50, 32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, input_ids, attention_mask):
        ids = torch.where(input_ids == 3, 0, input_ids).clamp(min=0)
        x = self.table(ids)
        rows, columns = ids.shape
        q, k, v = (p(x).view(rows, columns, 4, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q.float() @ k.float().transpose(2, 3) * 8**-0.5
        hidden = torch.where(attention_mask[:, None, None, :] > 0, 0.0, torch.finfo(torch.float32).min)
        kept = (scores + hidden).softmax(-1).to(v.dtype)
        x = x + self.o((kept @ v).transpose(1, 2).reshape(rows, columns, 32))
        return x + self.down(self.pick(self.up(x)))


def _largest(x):
    most, place = x.max(dim=-1, keepdim=True)
    return torch.where(torch.arange(64) == place, most, x - x.min(dim=-1).values.unsqueeze(-1))


def _ordered(x):
    order = torch.sort(x, dim=-1, stable=True).values
    return order - x.std(-1, keepdim=True) * x.argmin(-1, keepdim=True) + x.argsort(-1).to(x.dtype) * 0.1


@pytest.mark.parametrize(
    ("pick", "dtype"), [(_largest, torch.float32), (_largest, torch.bfloat16), (_ordered, torch.float32)]
)
def test_they_pack(pick, dtype):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Spelled(pick).to(dtype).eval()
    real = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    given = {"input_ids": torch.randint(1, 50, (3, 7)), "attention_mask": real.long()}
    fast = thresher.compile(model, given, {"prepack": True}, target="reference")
    assert fast.report["prepack"].rewritten, fast.report["prepack"].missed
    with torch.no_grad():
        made, want = fast(**given)[real], model(**given)[real]
    assert made.dtype == want.dtype == dtype
    torch.testing.assert_close(made, want, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-1
                               if dtype is torch.bfloat16 else 1e-4)  # fmt: skip
