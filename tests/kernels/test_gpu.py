"""What only a GPU can show: the compiled kernels, the operators' case table on them, graph capture, the memory and time
bars. Memory errors and races: ``compute-sanitizer`` over this file, see docs/kernels.md."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br
from backrazor import kernels
from backrazor.codecs import pack
from backrazor.codecs.smooth import quantiser
from backrazor.kernels import Stored
from backrazor.kernels.bitmask import reference as bitmask
from backrazor.kernels.derivative import reference as derivative
from backrazor.kernels.dispatch import implementation
from backrazor.kernels.rowquant import reference as rowquant
from backrazor.kernels.topk import reference as topk
from razorlab.bench.rows import Row
from tests.backrazor.cases import AXES, PRUNING, pairwise
from tests.backrazor.compare import LIMITS, assert_close, assert_same_bits, gradients_on
from tests.backrazor.networks import convnet, mlp
from tests.backrazor.samples import DATA, layouts, sample
from tests.kernels.test_operators import arguments
from tests.oracles import vjp_at

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TensorFloat-32: oracles are compared to a few roundings."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_their_references(dtype: torch.dtype, data: str) -> None:
    thresholds, levels = quantiser("gelu", 4)
    for n in (1, 7, 256, 1000, 5000, 100_003, 3_000_000):
        x = sample(data, (2, n), dtype, seed=n)
        on_device = x.cuda()
        assert implementation("topk", on_device).__name__.endswith("triton")
        for values, index in (
            (str(dtype).removeprefix("torch."), "bitmap"),
            ("int8", "tile"),
            ("int4", "tile"),
            ("int4", "bitmap"),
        ):
            flag, keep = torch.zeros(1, dtype=torch.int32, device="cuda"), max(n // 10, 1)
            *expected, status = topk.pack(x, keep, values, index)
            stored = kernels.topk_pack(on_device, keep, values, index, flag)
            for name, got, wanted in zip(Stored._fields, stored, expected, strict=True):
                assert_same_bits(f"{name}, n={n}, {values}", got.cpu(), wanted)
            assert int(flag) == status
            x_hat = kernels.topk_unpack(*stored, n, index, dtype)
            assert_same_bits(f"x_hat, n={n}, {values}", x_hat.cpu(), topk.unpack(*expected, n, index, dtype))
        bits, codes = bitmask.encode(x, 0.0, 6.0), derivative.encode(x, thresholds, 4)
        assert_same_bits("bits", kernels.mask_encode(on_device, 0.0, 6.0).cpu(), bits)
        assert_same_bits("masked", kernels.mask_apply(on_device, bits.cuda()).cpu(), bitmask.apply(x, bits))
        assert_same_bits("codes", kernels.level_encode(on_device, thresholds.cuda(), 4).cpu(), codes)
        product = kernels.level_apply(on_device, codes.cuda(), levels.cuda(), 4)
        assert_same_bits("product", product.cpu(), derivative.apply(x, codes, levels, 4))
        clamped, expected = on_device.clone(), x.clone()
        assert_same_bits("bits of clamping", kernels.mask_clamp_(clamped, 0.0, 6.0).cpu(), bits)
        bitmask.clamp_(expected, 0.0, 6.0)
        assert_same_bits("clamped", clamped.cpu(), expected)
        scaled = kernels.mask_scale(on_device.view(2, 1, n), bits.cuda(), *torch.tensor([[0.7], [1.3]]).cuda(), 1e-3)
        wanted = bitmask.scaled(x.view(2, 1, n), bits, torch.tensor([0.7]), torch.tensor([1.3]), 1e-3)
        assert torch.equal(scaled.isfinite().cpu(), wanted.isfinite())
        assert_close("scaled", scaled.cpu().nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0), LIMITS[dtype])
        mean, rstd = torch.randn(2), torch.rand(2) + 0.5
        found, wanted = kernels.row_encode(on_device, mean.cuda(), rstd.cuda(), 4), rowquant.encode(x, mean, rstd, 4)
        for name, a, b in zip(("row codes", "row scales"), found, wanted, strict=True):
            assert_same_bits(f"{name}, n={n}", a.cpu(), b)
        assert_same_bits("rows", kernels.row_decode(*found, n, 4, dtype).cpu(), rowquant.decode(*wanted, n, 4, dtype))


@pytest.mark.parametrize("name", arguments())
def test_opcheck(name: str) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(kernels, name), arguments("cuda")[name], test_utils=tests)


@pytest.mark.parametrize("name", ("norm_forward", "norm_backward", "softmax_backward", "topk_unpack_normalised"))
def test_fused_kernels_agree_with_their_references(name: str) -> None:
    found = getattr(kernels, name)(*arguments("cuda")[name])
    expected = getattr(kernels, name)(*arguments("cpu")[name])
    for a, b in zip(*((r,) if isinstance(r, Tensor) else r for r in (found, expected)), strict=True):
        assert_close(name, a.cpu(), b, 1e-2 if a.dtype == torch.uint8 else 1e-5)


def razored(layer: nn.Module, **fields: object) -> nn.Module:
    copied = copy.deepcopy(layer)
    br.razor_(copied, br.RazorConfig(**({"norm": "dense", "activation": "dense", "attention": "dense"} | fields)))
    return copied


@pytest.mark.parametrize("name", PRUNING)
def test_gradients_are_those_at_x_hat(name: str) -> None:
    """The whole case table. cuDNN picks its algorithm by batch, so a forward in chunks is equal to rounding only."""
    case = PRUNING[name]
    for number, setting in enumerate(pairwise(AXES)):
        torch.manual_seed(number)
        plain = case.build().to("cuda", setting["dtype"])
        x = torch.randn(case.shape).to("cuda", setting["dtype"])
        x = (layouts(x) if x.dim() > 1 else {}).get(setting["layout"], x)
        layer = razored(plain, sparsity=setting["sparsity"], values=setting["values"], index=setting["index"])
        check_case(f"{name}: {setting}", plain, layer, x, setting["trained"])


def check_case(name: str, plain: nn.Module, layer: nn.Module, x: Tensor, trained: str) -> None:
    for key, parameter in layer.named_parameters():
        parameter.requires_grad_(trained in ("all", key))
    x.requires_grad_(trained in ("all", "input"))
    out = layer(x)
    assert_close(f"forward of {name}", out, plain(x), LIMITS[x.dtype])
    wanted = {key: p for key, p in layer.named_parameters() if p.requires_grad}
    wanted |= {"input": x} if x.requires_grad else {}
    if not wanted:
        assert not out.requires_grad, name
        return
    grad = torch.randn_like(out)
    got = dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))
    sample_dims = 4 if isinstance(plain, nn.Conv2d) else 2
    batched = x.detach() if x.dim() >= sample_dims else x.detach().unsqueeze(0)
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    x_hat = pack(batched, layer.razor.pruned, flag).unpack().view(x.shape)
    oracle = vjp_at(plain, x_hat, grad)
    for key, gradient in got.items():
        assert_close(f"{key} of {name}", gradient, oracle[key], LIMITS[x.dtype])


CONFIGS = {"compact": br.RazorConfig.compact(0.9), "paper": br.RazorConfig.paper(0.9), "int8": br.RazorConfig.int8()}


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize(("build", "shape"), [(mlp, (6, 5, 20)), (convnet, (4, 3, 33, 33))], ids=["mlp", "convnet"])
def test_presets_agree_with_the_cpu(build, shape: tuple[int, ...], preset: str) -> None:
    model, x = build(), torch.randn(shape)
    br.razor_(model, CONFIGS[preset])
    found = [gradients_on(model, x, device) for device in ("cpu", "cuda")]
    for name, gradient in found[1].items():
        assert_close(name, gradient, found[0][name], 1e-2)  # a value at the threshold may round to the other side


def test_nothing_waits_for_the_device() -> None:
    model = mlp(0.1).cuda()
    br.razor_(model, CONFIGS["compact"])
    x = torch.randn(6, 5, 20, device="cuda")
    model(x).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("build", "shape"), [(mlp, (6, 5, 20)), (convnet, (4, 3, 33, 33))], ids=["mlp", "convnet"])
def test_a_captured_step_is_the_eager_step(build, shape: tuple[int, ...]) -> None:
    """Forward, backward and optimizer in one CUDA graph, replayed on new inputs."""
    eager = build().cuda()
    br.razor_(eager, CONFIGS["compact"])
    captured = copy.deepcopy(eager)
    inputs = [torch.randn(shape, device="cuda") for _ in range(5)]
    static = inputs[0].clone()

    def stepper(model: nn.Module):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

        def step(x: Tensor) -> None:
            optimizer.zero_grad(set_to_none=False)
            model(x).square().mean().backward()
            optimizer.step()

        return step

    step, captured_step = stepper(eager), stepper(captured)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured_step(static)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        step(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_step(static)
    for x in inputs:
        static.copy_(x)
        graph.replay()
        step(x)
    for (name, a), (_, b) in zip(captured.named_parameters(), eager.named_parameters(), strict=True):
        assert_close(name, a, b, 1e-5)


def test_compiled_gradients_are_the_eager_ones() -> None:
    model = mlp().cuda()
    br.razor_(model, CONFIGS["compact"])
    x, found = torch.randn(6, 5, 20, device="cuda"), []
    for run in (model, torch.compile(copy.deepcopy(model))):
        F.mse_loss(run(x), torch.zeros(6, 5, 4, device="cuda")).backward()
        found.append({name.removeprefix("_orig_mod."): p.grad for name, p in run.named_parameters()})
    for name, gradient in found[1].items():
        assert_close(name, gradient, found[0][name], 1e-2)


BARS = {  # (backbone, precision, batch): dense peak / ours at least, our step / dense step at most
    ("vit_b16", "float32", 128): (2.0, 1.5),
    ("vit_b16", "bfloat16", 128): (2.0, 2.0),
    ("proxylessnas", "float32", 8): (2.0, 3.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", BARS, ids=str)
def test_bar_of_memory_and_time(setting: tuple[str, str, int]) -> None:
    """compact 0.9 beside dense and checkpointing: peak above what is resident, median step; and the prediction."""
    backbone, precision, batch = setting
    shared = {"backbone": backbone, "precision": precision, "batch": batch, "device": "cuda"}
    rows = {
        "dense": Row(label="dense", **shared),
        "checkpointing": Row(label="checkpointing by block", checkpointing="block", **shared),
        "ours": Row(label="compact 0.9", razor=("compact", 0.9), **shared),
    }
    measured = br.memory.measure_steps(
        {name: row.build for name, row in rows.items()}, repeats=1, steps=10, turns="process"
    )
    smaller, slower = BARS[setting]
    dense, ours = measured["dense"], measured["ours"]
    assert dense.peak_bytes >= smaller * ours.peak_bytes, measured
    assert ours.step_seconds <= slower * dense.step_seconds, measured
