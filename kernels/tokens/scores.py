"""How much attention each token receives, out of a few query rows: `thresher::probe_scores`.

Token pruning ranks keys by the attention that probe rows pay them. Only the column sums of the
probes' attention map are needed, so the map itself is never written. Which rows to probe comes
from `thresher::probe_positions` (recent and spread rows, ZipVL section 3) or
`thresher::instruction_positions` (the question behind the image: instruction-guided attention).

Both position operators read where each sequence stands: `starts` and `lengths`, int [B, S], give
the first column and the number of real tokens of each of the S sequences in a row. A padded batch
has S = 1; a packed row has its segments. Positions come back as int64 [B, S * P], rising within a
sequence, with -1 where a sequence has fewer tokens than probes.
"""

from __future__ import annotations

import torch

from thresher.errors import ArgumentError
from thresher.ops import Sample, define
from thresher.plain_form import Plain

from .. import arguments
from . import plain

# Sums of up to 64 probabilities in fp32, from dot products in fp32: half types only round inputs.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.float16: 5e-6, torch.bfloat16: 5e-6}


def check_probes(q, k, probes, segments, scale) -> None:
    """Raise ArgumentError unless the tensors fit together; probe positions are read on a CPU."""
    arguments.queries(q, scale)
    arguments.keys(q, k=k)
    batch, rows, keys = q.shape[0], q.shape[2], k.shape[2]
    fix = "Take it from thresher::probe_positions."
    if probes.shape != (batch, rows) or probes.dtype not in arguments.INTEGERS:
        accepted = f"an integer position for each of the [{batch}, {rows}] rows"
        raise ArgumentError("probes", arguments.given(probes), accepted, fix)
    arguments.in_range("probes", probes, -1, keys - 1, fix)
    if segments is not None and (segments.shape != (batch, keys) or segments.dtype not in arguments.INTEGERS):
        fix = "Give each key the number of its sequence, -1 for padding."
        raise ArgumentError("segments", arguments.given(segments), f"integers [{batch}, {keys}]", fix)


def seen_by(probes: torch.Tensor, keys: int, segments: torch.Tensor | None) -> torch.Tensor:
    """bool [B, P, n]: which keys each probe row sees. Row -1 sees nothing."""
    columns = torch.arange(keys, device=probes.device)
    seen = (columns <= probes[..., None]) & (probes >= 0)[..., None]
    if segments is None:
        return seen
    own = segments.gather(1, probes.long().clamp_min(0))
    return seen & (segments[:, None] == own[..., None]) & (own >= 0)[..., None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fake_scores(q, k, probes, segments, scale):
    shape = (k.shape[0], k.shape[2])
    return q.new_empty(shape, dtype=_wide(q.dtype)), q.new_empty(shape, dtype=torch.int32)


def _score_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    cases = [  # label, batch, Hq, Hkv, head_dim, keys, probes, segments
        ("one head", 1, 1, 1, 16, 20, [[3, 19]], None),
        (
            "grouped heads, batch, unused probes",
            2,
            8,
            2,
            64,
            200,
            [[5, 77, 150, 199], [60, 61, -1, -1]],
            None,
        ),
        ("one kv head, odd width", 1, 6, 1, 20, 33, [[0, 1, 32]], None),
        ("packed", 1, 4, 2, 32, 90, [[0, 20, 49, 55, 89, -1]], [0] * 30 + [1] * 20 + [2] * 40),
        ("left padding", 2, 4, 4, 32, 70, [[69, 40], [69, 1]], [[-1] * 30 + [0] * 40, [0] * 70]),
        ("more probes than one block", 1, 4, 2, 64, 300, [list(range(100, 300))], None),
        ("a probe on padding, no probes", 2, 2, 1, 16, 10, [[2], [-1]], [[-1] * 5 + [0] * 5, [0] * 10]),
    ]
    if dtype != torch.float32:
        cases = cases[1:4]
    make = torch.Generator().manual_seed(0)
    samples = []
    for label, batch, heads, kv_heads, dim, keys, probes, segments in cases:
        rows = torch.tensor(probes, device=device)
        q = torch.randn(batch, heads, rows.shape[1], dim, generator=make).to(device, dtype)
        k = torch.randn(batch, keys, kv_heads, dim, generator=make).to(device, dtype).transpose(1, 2)
        groups = None
        if segments is not None:
            groups = torch.tensor(segments, dtype=torch.int32, device=device).view(-1, keys)
        samples.append(Sample(label, (q, k, rows, groups, dim**-0.5)))
    return samples


@define(
    "probe_scores(Tensor q, Tensor k, Tensor probes, Tensor? segments, float scale) -> (Tensor, Tensor)",
    fake=_fake_scores,
    inputs=_score_samples,
    tolerance=TOLERANCE,
    providers=("cuda_triton", "cpu_cpp", "cpu_stripes"),
    plain=Plain(),
    check=check_probes,
)
def probe_scores(q, k, probes, segments, scale):
    """Attention each key receives from the probe rows, and how many of them see it.

    q: [B, Hq, P, D], the probe rows' queries after rotation.
    k: [B, Hkv, n, D], all keys after rotation; Hq a multiple of Hkv.
    probes: int [B, P], the column of each probe row; it sees keys up to its own. -1: no row.
    segments: int [B, n] or None, the sequence each key belongs to. A row sees its own sequence only;
        keys of a negative sequence are padding, which nobody sees.

    Returns sums [B, n] in fp32 (fp64 for fp64), softmax(q k^T * scale) summed over rows and averaged
    over heads, so that a row's sums add up to its number of probes; and seen, int32 [B, n].
    ZipVL chooses by sums / seen (Eq. 9) and counts by sums (Eq. 6); instruction-guided attention is
    sums / number of rows.
    """
    wide = _wide(q.dtype)
    k = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    seen = seen_by(probes, k.shape[2], segments)
    scores = (q.to(wide) * scale) @ k.transpose(-1, -2)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill(~seen[:, None], 0.0)  # a row that sees nothing is NaN before this
    return weights.sum(2).mean(1), seen.sum(1, dtype=torch.int32)


def check_rows(starts: torch.Tensor, lengths: torch.Tensor) -> None:
    """Raise ArgumentError unless starts and lengths are one integer matrix each. Reads metadata only."""
    for name, t in (("starts", starts), ("lengths", lengths)):
        if t.dim() != 2 or t.shape != starts.shape or t.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                name,
                f"{t.dtype} {tuple(t.shape)}",
                "int [batch, sequences in a row], both alike",
                "Give the first column and the number of real tokens of each sequence.",
            )


def _check_count(argument: str, count: int, least: int) -> None:
    if count < least:
        raise ArgumentError(argument, count, f"at least {least}", "Ask for that many rows.")


def _check_probing(starts, lengths, recent, spread, seed) -> None:
    check_rows(starts, lengths)
    _check_count("recent", recent, 1)
    _check_count("spread", spread, 0)


def _check_instruction(token_types, starts, lengths, count) -> None:
    check_rows(starts, lengths)
    _check_count("count", count, 1)
    whole = not token_types.is_floating_point() and not token_types.is_complex()
    if (
        token_types.dim() != 2
        or not token_types.shape[1]
        or token_types.shape[0] != starts.shape[0]
        or not whole
    ):
        accepted = f"integers [{starts.shape[0]}, tokens], one or more"
        raise ArgumentError(
            "token_types", arguments.given(token_types), accepted, "Give each token its kind."
        )


def _rows_samples(device, dtype, *rest):
    def one(label, starts, lengths):
        ints = [torch.tensor(t, device=device) for t in (starts, lengths)]
        return Sample(label, (*ints, *rest))

    return [
        one("left padding, short, empty", [[10], [58], [60]], [[50], [2], [0]]),
        one("packed", [[0, 30, 30, 37]], [[30, 0, 7, 40]]),
        one("exactly enough", [[3]], [[7]]),
    ]


def _fake_probe_positions(starts, lengths, recent, spread, seed):
    return starts.new_empty((starts.shape[0], starts.shape[1] * (recent + spread)), dtype=torch.int64)


@define(
    "probe_positions(Tensor starts, Tensor lengths, int recent, int spread, int seed) -> Tensor",
    fake=_fake_probe_positions,
    inputs=lambda device, dtype: _rows_samples(device, dtype, 4, 3, 0),
    tolerance={torch.float32: 0.0},
    plain=plain.PROBE,
    check=_check_probing,
)
def probe_positions(starts, lengths, recent, spread, seed):
    """Rows to probe: the last `recent` tokens of each sequence, and `spread` drawn from those before.

    The draw is stratified, one row from each of `spread` equal stretches, so none repeats; it depends
    on the seed and the sequence's own length alone, not on the batch or the slot. A sequence with
    less than one token a stretch gives each of its tokens once.
    """
    lengths = lengths.long()[..., None]
    earlier = (lengths - recent).clamp_min(0)
    draw = torch.rand(spread, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        starts.device
    )
    stretch = torch.arange(spread, device=starts.device)
    low, high = stretch * earlier // max(spread, 1), (stretch + 1) * earlier // max(spread, 1)
    rows = low + torch.minimum((draw * (high - low)).long(), (high - low - 1).clamp_min(0))
    rows = torch.where(high > low, rows, -1)
    last = lengths - recent + torch.arange(recent, device=starts.device)
    rows = torch.cat([rows, torch.where(last >= 0, last, -1)], dim=-1)
    return torch.where(rows >= 0, rows + starts.long()[..., None], -1).flatten(1)


def _instruction_samples(device, dtype):
    make = torch.Generator().manual_seed(0)
    types = (torch.rand(3, 80, generator=make) < 0.5).to(torch.int8)
    types[:, 60:66] = torch.tensor([1, 0, 1, 0, 0, 0], dtype=torch.int8)
    samples = _rows_samples(device, dtype, 5)
    return [Sample(s.label, (types[: s.args[0].shape[0]].to(device), *s.args)) for s in samples]


def _fake_instruction(token_types, starts, lengths, count):
    return starts.new_empty((starts.shape[0], starts.shape[1] * count), dtype=torch.int64)


@define(
    "instruction_positions(Tensor token_types, Tensor starts, Tensor lengths, int count) -> Tensor",
    fake=_fake_instruction,
    inputs=_instruction_samples,
    tolerance={torch.float32: 0.0},
    plain=Plain(),
    check=_check_instruction,
)
def instruction_positions(token_types, starts, lengths, count):
    """The last `count` tokens behind a sequence's last image or video token.

    token_types: integers [B, n]; 0 text, 1 image, 2 video, -1 padding. Where nothing stands behind the
    image there is no instruction to read, and the last `count` tokens are taken as they are.
    """
    columns = torch.arange(token_types.shape[1], device=starts.device)
    begin = starts.long()[..., None]
    end = begin + lengths.long()[..., None]
    inside = (columns >= begin) & (columns < end)  # [B, S, n]
    visual = inside & (token_types > 0)[:, None]
    behind = torch.where(visual, columns + 1, begin).amax(-1, keepdim=True)
    behind = torch.where(behind == end, begin, behind)
    rows = end - count + torch.arange(count, device=starts.device)
    return torch.where(rows >= behind, rows, -1).flatten(1)
