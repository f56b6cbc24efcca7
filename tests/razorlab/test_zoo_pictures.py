"""The zoo's inputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from razorlab.zoo.vision import pictures


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 4, 48, 65)], ids=str)
def test_neighbours_are_alike_and_the_deviation_is_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = pictures(*shape)
    assert x.shape == shape
    assert float(x.std()) == pytest.approx(1, abs=1e-3)
    assert F.cosine_similarity(x[..., 1:].flatten(), x[..., :-1].flatten(), 0) > 0.7
    assert F.cosine_similarity(x[..., 1:, :].flatten(), x[..., :-1, :].flatten(), 0) > 0.7
