"""Prepacking on a CUDA GPU waits for the device once a call, when it reads the mask."""

import warnings

import masks
import pytest
import torch
import zoo

import thresher

pytestmark = pytest.mark.gpu


def test_a_call_waits_for_the_device_once():
    model, _ = zoo.ZOO["llama"].build()
    model = model.cuda()
    inputs = {k: v.cuda() for k, v in zoo.tokens(masks.mixed((5, 8, 12))).items()}
    torch._dynamo.reset()
    ours = thresher.compile(model, inputs, target="reference")
    ours(**inputs)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            ours(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchron" in str(w.message)]) == 1
