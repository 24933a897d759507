"""Residuals from stored gradients against probabilities that the model gives."""

from __future__ import annotations

import pytest
import torch
from toy import Toy, fitted, texts

from lightning_tracin.scoring.residuals import mean_residual_at, residuals_at
from lightning_tracin.storage.trace import Trace


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 1e-2)])
def test_a_residual_is_what_the_label_lacks_to_probability_1(tmp_path, dtype, tolerance):
    fitted(tmp_path, dtype=dtype)
    for checkpoint in Trace(tmp_path).checkpoints:
        module = Toy().eval()
        module.load_state_dict(checkpoint.weights())
        ids, labels = texts().tensors
        given = module(ids).double().softmax(1).gather(1, labels[:, None])[:, 0].detach()
        found = residuals_at(checkpoint)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), 1 - given, rtol=tolerance, atol=tolerance)
        assert mean_residual_at(checkpoint) == pytest.approx(float((1 - given).mean()), rel=tolerance)
