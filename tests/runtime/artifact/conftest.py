"""Fixtures of the tests of artifacts."""

import shutil
from pathlib import Path

import pytest
from saved_models import compiled

import thresher


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """(a model's file, inputs of a call), which no test may change."""
    model, inputs = compiled("llama")
    path = tmp_path_factory.mktemp("saved") / "model.thresher"
    return thresher.save(model, path, example_inputs=inputs, longest=64), inputs


@pytest.fixture
def saved(written, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copy(written[0], tmp_path)), written[1]
