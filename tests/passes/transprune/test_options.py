"""Options of token pruning that make no sense are named, and the paper's schedule."""

import itertools

import pytest
import torch

import thresher
from thresher.errors import ArgumentError


@pytest.mark.parametrize(
    "options, argument",
    [
        (dict(policy="best"), "transprune policy"),
        (dict(mode="code"), "transprune mode"),
        (dict(restore="all"), "transprune restore"),
        (dict(position="lost"), "transprune position"),
        (dict(stages=((1, 0.0),)), "stages"),
        (dict(stages=((1, 1.5),)), "stages"),
        (dict(stages=((0, 0.5),)), "stages"),
        (dict(stages=((2, 0.5), (1, 0.4))), "stages"),
        (dict(stages=((1, 0.5), (2, 0.6))), "stages"),
        (dict(reserve=1.5), "reserve"),
        (dict(reserve=0.5, reserve_by="norm"), "reserve_by"),
        (dict(bucket=0), "bucket"),
    ],
)
def test_options_that_make_no_sense_are_named(options, argument):
    with pytest.raises(ArgumentError) as error:
        thresher.Recipe.of(None, transprune=options)
    assert argument in str(error.value)


def test_wrong_token_types_are_named():
    with pytest.raises(ArgumentError, match="types"), thresher.token_types(torch.zeros(3)):
        pass
    with (
        pytest.raises(ArgumentError, match="scores"),
        thresher.token_types(torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2, 5)),
    ):
        pass


def test_the_schedule_of_the_paper_scales_with_depth():
    from thresher.passes.transprune.transprune import HIGH

    assert [(round(s * 32), k) for s, k in HIGH] == [(7, 0.875), (9, 0.625), (12, 0.125)]
    assert all(b > a for (a, _), (b, _) in itertools.pairwise(HIGH))
