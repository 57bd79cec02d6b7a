"""Run: pip install -e . && pytest"""

import thresher_cheap_gelu
import torch

from thresher import testing

assert thresher_cheap_gelu  # registers the pass; once the package is installed, nobody has to import it


class WithGelu(testing.TinyTransformer):
    """The tiny transformer's MLPs, with GELU for ReLU."""

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids) * attention_mask[..., None]
        for layer in self.layers:
            x = x + layer.down(torch.nn.functional.gelu(layer.up(layer.mlp_norm(x))))
        return torch.nn.functional.linear(self.norm(x), self.embed.weight)


def test_conformance():
    _, inputs = testing.tiny_model()
    testing.check_pass("cheap_gelu", [(WithGelu().eval(), inputs)])
    testing.check_pass("cheap_gelu", rewrites=False)  # ReLU MLPs: each is a miss that says why
