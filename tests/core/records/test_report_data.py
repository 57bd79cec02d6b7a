"""A report as plain data: written and read again, and refused where a field holds something else."""

import pytest
from rich.console import Console

from thresher.report import PassReport, Report


def test_it_comes_back():
    report = Report("recipe", [], phases={"trace": 0.5})
    assert Report.from_dict(report.to_dict()).phases == {"trace": 0.5}


@pytest.mark.parametrize("phases", [[], 3, "trace", {"trace": "long"}, {"trace": [1]}])
def test_seconds_that_are_none_are_refused(phases):
    with pytest.raises((AttributeError, TypeError, ValueError)):  # which who reads a file names it for
        Report.from_dict({**Report("recipe", []).to_dict(), "phases": phases})


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_a_terminal_of_any_width_shows_whole_numbers(width):
    gains = {"predicted": {"the whole program": 4.96}, "measured": {"the whole program": 3.1}}
    account = PassReport("decode_attention", error=9.9e-07, own=1.2e-06, budget=1e-05, seconds=6.5, **gains)
    console = Console(width=width, no_color=True)
    with console.capture() as shown:
        console.print(Report("recipe", [account]))
    for whole in ("decode_attention", "9.9e-07", "1.2e-06", "1e-05", "4.96x", "3.10x"):
        assert whole in shown.get()
