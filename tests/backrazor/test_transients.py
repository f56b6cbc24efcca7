"""What a step holds in passing: not saved, but it decides the peak."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import backrazor as br


def frozen(*layers: nn.Module) -> nn.Sequential:
    """The layers in training mode, their batch norms on running statistics with nothing trainable."""
    model = nn.Sequential(*layers).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


def stem(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]


@pytest.mark.parametrize(
    ("layers", "planes"),
    [
        # the pool's input, its gradient or its output, and less than a plane in passing
        ([*stem(64), nn.MaxPool2d(3, 2, 1)], 1.9),
        # gradient of output and input, and half a plane of chunks
        ([*stem(32), nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU()], 2.9),
    ],
    ids=["max_pool", "depthwise"],
)
def test_the_peak_is_not_made_of_passing_tensors(layers: list[nn.Module], planes: float) -> None:
    model = frozen(*layers)
    br.razor_(model, br.RazorConfig(0.97))
    channels = layers[0].out_channels
    plane = 8 * channels * 112 * 112 * 4  # one activation of the first convolution, bytes
    predicted = br.memory.predict(model, (3, 224, 224), 8)
    assert (predicted.peak_bytes - predicted.saved_bytes) / plane < planes


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_by_samples_equals_the_whole_batch(batch: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 64, 90, 90).contiguous(memory_format=layout)  # chunks of one sample
    dense, pruned = nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    br.razor_(pruned, br.RazorConfig(0.9))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = pruned(ours), dense(theirs)
    assert torch.equal(out, expected) and out.stride() == expected.stride()
    grad = torch.randn_like(expected)
    out.backward(grad), expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad)


class Residual(nn.Module):
    def __init__(self, inside: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.inside, self.after = inside, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x + self.inside(x))


@pytest.mark.parametrize(
    "block",
    [
        lambda: Residual(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        lambda: Residual(nn.Conv2d(8, 8, 3, padding=1), nn.GELU()),
        lambda: Residual(nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.5)),
    ],
    ids=["relu", "gelu", "dropout"],
)
def test_gradients_of_a_residual_are_added_in_place(block) -> None:
    """A gradient that is a view of something else cannot be added to: autograd would make a third tensor."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), block(), block())
    br.razor_(model, br.RazorConfig(0.9))
    loss = model(torch.randn(2, 3, 16, 16)).sum()
    with torch.profiler.profile(record_shapes=True) as profiled:
        loss.backward()
    large = [e for e in profiled.events() if e.name == "aten::add" and e.input_shapes[:1] == [[2, 8, 16, 16]]]
    assert not large
