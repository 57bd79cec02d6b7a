"""One transformer layer in the forms that TensorRT is built for."""

from __future__ import annotations

import functools

import captures
import torch
import transformers as hf

from thresher import backend
from thresher.formats import bitpack
from thresher.graph.nodes import fake_like, value
from thresher.graph.program import Program, Weight
from thresher.kernels import catalog
from thresher.kernels.nvfp4 import quantize as nvfp4_quantize
from thresher.recipe import Recipe

catalog.load()
aten = torch.ops.aten
SIZES = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2,
             num_hidden_layers=1, max_position_embeddings=512)  # fmt: skip


@functools.cache
def half() -> tuple[Program, dict[str, torch.Tensor]]:
    """A Llama layer with its head in fp16, and inputs."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).half().eval()
    ids = torch.randint(3, 500, (3, 24))
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return captures.export(model, inputs, dynamic=True), inputs


def packed() -> Program:
    program, inputs = half()
    rewritten, _ = backend.run_pipeline(program, Recipe.of("exact", verify=False), list(inputs.values()))
    return rewritten


def _replace_linears(program: Program, make) -> Program:
    """Replace each linear inside a layer by what `make(program, node, weight)` builds in its place."""
    program = program.copy()
    for node in program.nodes(aten.linear.default):
        weight = program.weight(node.args[1])
        if weight is None or "layers" not in weight.fqn:
            continue
        with program.graph.inserting_before(node):
            made = make(program, node, weight)
        made.meta = {**node.meta, "val": node.meta["val"]}
        node.replace_all_uses_with(made)
        program.graph.erase_node(node)
    program.clean()
    return program


def _hold(program, node, fqn, tensor):
    place = program.get_weight(Weight(fqn, tensor), node)
    place.meta["val"] = fake_like(tensor, node)
    return place


def int4(program: Program, group: int = 64) -> Program:
    def make(program, node, weight):
        w = weight.tensor.detach().float()
        blocks = w.unflatten(1, (-1, group))
        scales = blocks.abs().amax(-1) / 7
        codes = ((blocks / scales[..., None]).round() + 8).clamp(0, 15).int().flatten(1)
        held = [
            _hold(program, node, f"{weight.fqn}.{n}", t)
            for n, t in (("codes", bitpack.pack(codes, 4)), ("scales", scales.half()))
        ]
        return program.graph.call_function(
            torch.ops.thresher.wna16_linear.default, (node.args[0], *held, None, None, 4, group)
        )

    return _replace_linears(program, make)


def nvfp4(program: Program, activations: str = "nvfp4") -> Program:
    def make(program, node, weight):
        q = nvfp4_quantize.quantize(weight.tensor.detach())
        parts = {"codes": q.codes, "scales": q.block_scales.view(torch.uint8), "scale": q.global_scale}
        held = [_hold(program, node, f"{weight.fqn}.{n}", t) for n, t in parts.items()]
        given = (
            _hold(program, node, f"{weight.fqn}.input", torch.tensor(6.0 / 2688))
            if activations == "nvfp4"
            else None
        )
        return program.graph.call_function(
            torch.ops.thresher.nvfp4_linear.default, (node.args[0], *held, given, None, activations)
        )

    return _replace_linears(program, make)


def pruned() -> tuple[Program, dict[str, torch.Tensor]]:
    """Two linears around an attention-like score, half of the tokens kept in between."""
    import small_programs

    o = torch.ops.thresher

    def layer(x, w1, w2, w3, wq, wk, wv):
        h = torch.nn.functional.linear(x, w1)
        scores = (h * x).float().sum(-1)
        kept = o.topk_sorted(scores, None, None, 16, None)
        x = (x + h).gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        q, k, v = (
            torch.nn.functional.linear(x, w).unflatten(2, (4, -1)).transpose(1, 2) for w in (wq, wk, wv)
        )
        a = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + torch.nn.functional.linear(a.transpose(1, 2).flatten(2), w2)
        return torch.nn.functional.linear(x, w3), kept

    make = torch.Generator().manual_seed(0)
    weights = {f"w{i}": (torch.randn(256, 256, generator=make) / 16).half() for i in "123qkv"}
    x = torch.randn(2, 48, 256, generator=make).half()
    return small_programs.program(layer, {"x": x}, weights, {"x": {0: torch.export.Dim.DYNAMIC}}), {"x": x}


def shape_ranges(program: Program, small: int, usual: int, large: int) -> dict[str, list[list[int]]]:
    """A range for each input with varying sizes: tokens by the three numbers, everything else small."""
    found = {}
    for place, name in zip(program.placeholders, program.input_names):
        known = value(place)
        if isinstance(known, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in known.shape):
            found[name] = [
                [
                    s if isinstance(s, int) else (n if known.dim() > 1 and i > 0 else k)
                    for i, s in enumerate(known.shape)
                ]
                for n, k in ((small, 1), (usual, 4), (large, 8))
            ]
    return found
