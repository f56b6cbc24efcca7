"""What the operators ask of a GPU, seen without one: fake CUDA tensors have shapes and types and no data."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import backrazor as br
from backrazor.codecs import NormCodec, Pruned
from backrazor.functional import common, conv
from backrazor.functional.conv import ConvSpec, forward_chunks
from backrazor.functional.layer_norm import group_norm, layer_norm
from backrazor.kernels import mask_scale, topk_pack
from backrazor.memory.predict import _Allocations
from tests.backrazor.compare import LIMITS, assert_close, relative_rms

HALVES = (torch.bfloat16, torch.float16)
NORMS = {"layer_norm": lambda: nn.LayerNorm(24), "group_norm": lambda: nn.GroupNorm(2, 6)}


class Statistics(TorchDispatchMode):
    """The types of mean and reciprocal deviation: what a norm's forward gives, and what its backward is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.given: set[torch.dtype] = set()
        self.handed: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::native_")
        if name in NORMS:
            self.given |= {statistic.dtype for statistic in result[1:]}
        if name.removesuffix("_backward") in NORMS and name.endswith("_backward"):
            at = 3 if name.startswith("layer") else 2
            self.handed |= {statistic.dtype for statistic in args[at : at + 2]}
        return result


@pytest.mark.parametrize("rule", ["int8", "bfloat16", "pruned"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_the_backward_of_a_norm_reads_statistics_of_the_forwards_type(
    name: str, dtype: torch.dtype, affine: bool, rule: str
) -> None:
    """On CUDA PyTorch's LayerNorm has them in float32 whatever the input, its GroupNorm in the input's type."""
    codec = NormCodec(rule, Pruned(0.9, "int8"))
    with FakeTensorMode(), Statistics() as seen:
        flag = torch.zeros(1, dtype=torch.int32, device="cuda")
        x = torch.empty(4, 6, 24, dtype=dtype, device="cuda", requires_grad=True)
        width = 24 if name == "layer_norm" else 6
        weight = torch.empty(width, dtype=dtype, device="cuda") if affine else None
        if name == "layer_norm":
            out = layer_norm(x, (24,), weight, weight, 1e-5, codec, flag)
        else:
            out = group_norm(x, 2, weight, weight, 1e-5, codec, flag)
        out.grad_fn.apply(torch.empty_like(out))  # not by the engine, which looks for the device
    assert seen.given == seen.handed != set()


@pytest.mark.parametrize("parameters", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_a_16_bit_norm_runs_with_the_parameters_that_the_cpu_allows(
    name: str, dtype: torch.dtype, parameters: torch.dtype
) -> None:
    if parameters not in (dtype, torch.float32):
        pytest.skip("the dense norm refuses two 16-bit types")
    plain = NORMS[name]().to(parameters)
    ours = copy.deepcopy(plain)
    br.razor_(ours, br.RazorConfig(norm="bfloat16"))
    x, grad = torch.randn(2, 4, 6, 24).to(dtype)
    found: list[dict[str, Tensor]] = []
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(grad)
        found.append({"input": leaf.grad} | {key: p.grad for key, p in layer.named_parameters()})
    for key, gradient in found[0].items():
        assert_close(f"{key} of {name}", gradient.float(), found[1][key].float(), LIMITS[torch.bfloat16])


def test_chunks_on_cuda_are_larger() -> None:
    mib = 1 << 20
    assert len(list(common.sample_chunks(64, mib, torch.device("cpu")))) == 8
    assert len(list(common.sample_chunks(64, mib, torch.device("cuda")))) == 1


def test_the_forward_of_a_convolution_on_cuda_is_whole_unless_memory_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ConvSpec((1, 1), (1, 1), (1, 1), 1)
    with FakeTensorMode():
        x, weight = (torch.empty(*shape, device="cuda") for shape in ((64, 16, 112, 112), (16, 16, 3, 3)))
        assert forward_chunks(x, weight, spec) == [(0, 64)]
        monkeypatch.setattr(conv, "CUDA_FORWARD_BYTES", x.numel())
        monkeypatch.setattr(conv, "_backend", lambda *_: None)
        monkeypatch.setattr(common, "CUDA_CHUNK_BYTES", x.numel())
        assert len(forward_chunks(x, weight, spec)) == 4


@pytest.mark.parametrize(("layout", "copied"), [("contiguous", 0), ("channels_last", 32 << 20)])
def test_what_packing_takes_in_passing_is_in_the_predicted_peak(layout: str, copied: int) -> None:
    """On CUDA: counters of digits, float32 values on their way to int8, and samples copied from another layout."""
    peaks = []
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), _Allocations() as seen:
            x, flag = torch.empty(64, 8, 256, 256, device=device), torch.zeros(1, dtype=torch.int32, device=device)
            x = x if layout == "contiguous" else x.contiguous(memory_format=torch.channels_last)
            seen.peak = seen.live = 0
            packed = topk_pack(x, 52_429, "int8", "tile", flag)
        assert seen.live == sum(part.untyped_storage().nbytes() for part in packed)
        peaks.append(seen.peak - seen.live)
    counters = 2048 + 2048 + 512 + 2 * 3 + 16 * (512 + 2)  # three digits; three slots; 16 chunks of 2^15 elements
    assert peaks == [0, 64 * 4 * (52_429 + counters) + copied]


class Chain(nn.Sequential):
    """Two convolutions under frozen norms, the second by groups; a drop-in of its own finds no chain in Sequential."""

    def __init__(self, act: nn.Module, affine: bool) -> None:
        norms = [nn.BatchNorm2d(8, affine=affine) for _ in range(2)]
        for norm in norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.eval().requires_grad_(False)
        first, second = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        super().__init__(first, norms[0], act, second, norms[1])


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.ReLU(), nn.SiLU()], ids=lambda act: type(act).__name__)
@pytest.mark.parametrize(("dtype", "affine"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)])
def test_mask_and_scale_at_once_have_the_gradients_of_one_after_the_other(
    act: nn.Module, dtype: torch.dtype, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, x = Chain(act, affine).to(dtype), torch.randn(3, 3, 17, 15).to(dtype)
    seen = []

    def noted(*given):
        seen.append(given[1] is None)
        return mask_scale(*given)

    def results(dtype: torch.dtype) -> dict[str, Tensor | None]:
        model, leaf = copy.deepcopy(plain).to(dtype), x.to(dtype, copy=True).requires_grad_()
        assert br.razor_(model, br.RazorConfig(0.5, values="float32", fill="zero")).fused
        out = model(leaf)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype))
        return {"output": out, "input": leaf.grad} | {key: p.grad for key, p in model.named_parameters()}

    exact, apart = results(torch.float32), results(dtype)
    for name in ("conv_norm_act", "epilogue"):
        monkeypatch.setattr(import_module(f"backrazor.functional.{name}"), "on_cuda", lambda device: True)
    monkeypatch.setattr(import_module("backrazor.functional.conv_norm_act"), "mask_scale", noted)
    found = results(dtype)
    assert sorted(seen) == ([True] if isinstance(act, nn.SiLU) else [False, True])
    assert torch.equal(found.pop("output"), apart["output"])
    for key, gradient in found.items():
        if gradient is not None:  # frozen norms have none
            error, usual = (relative_rms(grads[key].float(), exact[key]) for grads in (found, apart))
            assert error <= 2 * usual + 1e-5, key  # rounded before a sum instead of after it
