"""A report as plain data: written and read again, and refused where a field holds something else."""

import pytest

from thresher.report import Report


def test_it_comes_back():
    report = Report("recipe", [], phases={"trace": 0.5})
    assert Report.from_dict(report.to_dict()).phases == {"trace": 0.5}


@pytest.mark.parametrize("phases", [[], 3, "trace", {"trace": "long"}, {"trace": [1]}])
def test_seconds_that_are_none_are_refused(phases):
    with pytest.raises((AttributeError, TypeError, ValueError)):  # which who reads a file names it for
        Report.from_dict({**Report("recipe", []).to_dict(), "phases": phases})
