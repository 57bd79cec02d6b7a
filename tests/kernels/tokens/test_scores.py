"""Probe scores against a written-out attention map, and the rows that are probed."""

import pytest
import torch

from thresher import ops
from thresher.errors import ArgumentError
from thresher.kernels import catalog

catalog.load()
probe_scores, probe_positions = ops.get("probe_scores"), ops.get("probe_positions")
instruction_positions = ops.get("instruction_positions")


def _qk(batch, heads, kv_heads, rows, keys, dim=16, seed=0):
    make = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, rows, dim, generator=make)
    return q, torch.randn(batch, kv_heads, keys, dim, generator=make)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_all_rows_probed_gives_the_column_sums_of_causal_attention(heads, kv_heads):
    q, k = _qk(2, heads, kv_heads, 30, 30)
    sums, seen = probe_scores(q, k, torch.arange(30).expand(2, -1), None, 0.25)
    wide = k.repeat_interleave(heads // kv_heads, 1)
    full = (q @ wide.mT * 0.25).masked_fill(~torch.ones(30, 30).tril().bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(sums, full.mean(1).sum(1))
    assert seen.tolist() == [list(range(30, 0, -1))] * 2


def test_sums_add_up_to_the_number_of_probes():
    q, k = _qk(2, 4, 2, 5, 50)
    probes = torch.tensor([[0, 7, 49, -1, -1], [3, 4, 5, 6, 49]])
    sums, _ = probe_scores(q, k, probes, None, 0.25)
    torch.testing.assert_close(sums.sum(1), torch.tensor([3.0, 5.0]))


def test_packed_sequences_do_not_see_each_other():
    q, k = _qk(1, 4, 2, 4, 40)
    segments = torch.tensor([[0] * 15 + [1] * 25], dtype=torch.int32)
    probes = torch.tensor([[3, 14, 20, 39]])
    sums, seen = probe_scores(q, k, probes, segments, 0.25)
    first = probe_scores(q[:, :, :2], k[:, :, :15], probes[:, :2], None, 0.25)
    second = probe_scores(q[:, :, 2:], k[:, :, 15:], probes[:, 2:] - 15, None, 0.25)
    torch.testing.assert_close(sums, torch.cat([first[0], second[0]], 1))
    assert torch.equal(seen, torch.cat([first[1], second[1]], 1))
    k[:, :, :15] = torch.nan  # a neighbour's numbers must not reach this sequence
    assert torch.equal(probe_scores(q, k, probes, segments, 0.25)[0][:, 15:], sums[:, 15:])


def test_padding_and_batch_slot_do_not_matter():
    q, k = _qk(1, 4, 2, 3, 20)
    probes = torch.tensor([[5, 12, 19]])
    alone, _ = probe_scores(q, k, probes, None, 0.25)
    wide = torch.cat([torch.full((1, 2, 9, 16), 7.0), k], dim=2)
    segments = torch.tensor([[-1] * 9 + [0] * 20, [0] * 29], dtype=torch.int32)
    both, seen = probe_scores(
        torch.cat([q, q]), torch.cat([wide, wide]), torch.cat([probes + 9, probes]), segments, 0.25
    )
    torch.testing.assert_close(both[0, 9:], alone[0])
    assert both[0, :9].eq(0).all() and seen[0, :9].eq(0).all()


def test_sees_only_the_kept_stripe_of_a_large_map():
    rows, keys = 64, 20_000  # the map would take 20 MB a head
    q, k = _qk(1, 2, 1, rows, keys, dim=8)
    probes = torch.arange(keys - rows, keys)[None]
    with ops.get("probe_scores").force("cpu_stripes"):
        actual = probe_scores(q, k, probes, None, 0.3)
    torch.testing.assert_close(actual, probe_scores.reference(q, k, probes, None, 0.3))


@pytest.mark.parametrize(
    "change, argument",
    [
        (dict(q=torch.zeros(1, 3, 2, 16)), "k"),
        (dict(q=torch.zeros(1, 2, 16)), "q"),
        (dict(probes=torch.zeros(1, 2)), "probes"),
        (dict(probes=torch.zeros(1, 3, dtype=torch.int64)), "probes"),
        (dict(segments=torch.zeros(1, 9, dtype=torch.int32)), "segments"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, argument):
    q, k = _qk(1, 4, 2, 2, 10)
    call = dict(q=q, k=k, probes=torch.tensor([[1, 9]]), segments=None) | change
    with pytest.raises(ArgumentError) as error:
        probe_scores(*call.values(), 0.25)
    assert error.value.argument == argument


def test_probe_positions_are_recent_and_spread():
    rows = probe_positions(torch.tensor([[0]]), torch.tensor([[1000]]), 64, 64, 3)[0]
    assert torch.equal(rows[64:], torch.arange(936, 1000))
    early = rows[:64]
    assert early.unique().numel() == 64 and early.min() >= 0 and early.max() < 936
    assert torch.equal(early, early.sort().values)
    assert (early // 15).unique().numel() > 50, "drawn from the whole prompt"


def test_probe_positions_do_not_depend_on_the_slot():
    both = probe_positions(torch.tensor([[0], [30], [70]]), torch.tensor([[100], [70], [30]]), 8, 8, 0)
    alone = probe_positions(torch.tensor([[30]]), torch.tensor([[70]]), 8, 8, 0)
    assert torch.equal(both[1], alone[0])
    packed = probe_positions(torch.tensor([[0, 100]]), torch.tensor([[100, 70]]), 8, 8, 0)
    assert torch.equal(packed[0, 16:] - 100, alone[0] - 30)
    other_seed = probe_positions(torch.tensor([[30]]), torch.tensor([[70]]), 8, 8, 1)
    assert not torch.equal(alone, other_seed)


@pytest.mark.parametrize("length", [0, 1, 5, 8, 9, 12, 16])
def test_short_sequences_are_probed_once_each(length):
    rows = probe_positions(torch.tensor([[4]]), torch.tensor([[length]]), 8, 8, 0)[0]
    used = rows[rows >= 0]
    assert used.numel() == used.unique().numel() == length
    assert length == 0 or (used.min() == 4 and used.max() == 3 + length)


def test_instruction_is_what_stands_behind_the_last_image():
    types = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 0], [-1, -1, 0, 0, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, -1, -1]])
    starts, lengths = torch.tensor([[0], [2], [0]]), torch.tensor([[8], [6], [6]])
    rows = instruction_positions(types.to(torch.int8), starts, lengths, 4)
    assert rows.tolist() == [
        [-1, 5, 6, 7],  # three words behind the second image
        [4, 5, 6, 7],  # nothing behind the video: its own last tokens
        [2, 3, 4, 5],  # no image at all
    ]
