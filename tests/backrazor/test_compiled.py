"""``torch.compile`` of razored networks: one graph where the dense network is one, the gradients and the saved bytes of
the network that is not compiled, and no compiling anew."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

import backrazor as br
from tests.backrazor.compare import assert_close, assert_same_bits
from tests.backrazor.networks import convnet, freeze_norms, mlp

pytestmark = [
    # Dynamo's own, about the gradients of what it stands in for
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 64, 64)


def words(count: int = 4) -> Tensor:
    return torch.randint(0, 100, (count, 48))


def timm_net(name: str, **settings: int) -> nn.Module:
    timm = pytest.importorskip("timm")
    return freeze_norms(timm.create_model(name, num_classes=10, **settings).train())


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    return transformers.BertForSequenceClassification(config).train()


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[..., Tensor]
    more: float = 1.0  # saved bytes that the network itself adds where it is traced


NETWORKS = {
    "resnet18": Case(lambda: timm_net("resnet18"), images),
    "mobilenetv2_100": Case(lambda: timm_net("mobilenetv2_100"), images),
    "vit_tiny": Case(lambda: timm_net("vit_tiny_patch16_224", img_size=64, depth=2), images),
    "bert": Case(bert, words),
    # transformers itself writes a mask and repeats k and v where its models are traced
    "llama": Case(llama, words, more=1.1),
}
CONFIGS = {
    "compact": br.RazorConfig.compact(0.9, fill="zero", values="int8"),
    "known": br.RazorConfig.compact(0.9, fill="known", values="int4", activation="auto"),
}


def razored(build: Callable[[], nn.Module], config: br.RazorConfig) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    br.razor_(model, config)
    return model


def compiled(model: nn.Module, **settings: object) -> tuple[Callable, CompileCounterWithBackend]:
    """A compiled copy and what counts its graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(copy.deepcopy(model), backend=counter, **settings), counter


def loss_of(model: Callable, x: Tensor) -> Tensor:
    torch.manual_seed(1)  # dropout
    out = model(x)
    return (out if isinstance(out, Tensor) else out.logits).float().square().mean()


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of(model, x)
    loss.backward()
    named = ((name.removeprefix("_orig_mod."), p.grad) for name, p in model.named_parameters())
    return loss.detach(), {name: grad for name, grad in named if grad is not None}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps between forward and backward, storages counted once, beside what lives anyway."""
    held: dict[int, Tensor] = {}
    alive = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), x)}

    def note(t: Tensor) -> Tensor:
        held[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = loss_of(model, x)  # noqa: F841 (holds the graph)
    return sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in alive)


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert_close(name, got[name], grad, bound)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "network",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "mobilenetv2_100" else []) for name in NETWORKS],
)
def test_one_graph_with_the_gradients_and_the_bytes_of_the_eager_step(network: str, config: str) -> None:
    case = NETWORKS[network]
    model, x = razored(case.build, CONFIGS[config]), case.inputs()
    loss, wanted = gradients(model, x)
    with br.memory.ledger(model) as book:
        held = loss_of(model, x)
    run, counter = compiled(model, fullgraph=True)
    got_loss, got = gradients(run, x)
    assert counter.frame_count == 1
    assert_close("loss", got_loss, loss, 1e-6)
    assert_same_gradients(got, wanted)
    del held
    eager, traced = book.total_bytes, saved_bytes(run, x)
    assert traced <= 1.02 * case.more * eager and eager <= 1.3 * traced, f"{eager} bytes eager, {traced} compiled"
    for _ in range(2):
        gradients(run, x)
    assert counter.frame_count == 1


def behind_codes() -> nn.Module:
    """Layers that read the codes of a smooth activation, and a mask."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(2),
        nn.Linear(28 * 28, 16), nn.GELU(), nn.Linear(16, 4),
    )  # fmt: skip


@pytest.mark.parametrize("build", [pytest.param(lambda: timm_net("resnet18"), marks=pytest.mark.slow), behind_codes])
def test_a_last_batch_compiles_once_more(build: Callable[[], nn.Module]) -> None:
    model = razored(build, CONFIGS["known"])
    run, counter = compiled(model, fullgraph=True)
    for count in (4, 3, 5, 4, 6, 3):
        x = images(count) if build is not behind_codes else torch.randn(count, 3, 32, 32)
        _, got = gradients(run, x)
        assert_same_gradients(got, gradients(model, x)[1])
    assert counter.frame_count == 2


@pytest.mark.parametrize("preset", ["compact", "paper", "int8"])
@pytest.mark.parametrize(("build", "shape"), [(mlp, (6, 5, 20)), (convnet, (4, 3, 33, 33))], ids=["mlp", "convnet"])
def test_the_presets(build: Callable[[], nn.Module], shape: tuple[int, ...], preset: str) -> None:
    config = br.RazorConfig.int8() if preset == "int8" else getattr(br.RazorConfig, preset)(0.9)
    model, x = razored(build, config), torch.randn(shape)
    wanted = gradients(model, x)[1]
    run, _ = compiled(model, fullgraph=True)
    assert_same_gradients(gradients(run, x)[1], wanted)


def test_a_convolution_runs_with_the_norm_and_the_activation_that_follow() -> None:
    """By what made their input: nothing of the three that run one after another is left in the graph."""
    model = razored(
        lambda: freeze_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6())), CONFIGS["known"]
    )
    x, names = torch.randn(2, 3, 9, 9), []

    def note(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        names.extend(node.args[0] for node in graph.graph.nodes if node.target is torch.ops.backrazor.sealed.default)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    gradients(torch.compile(model, backend=aot_autograd(fw_compiler=note, bw_compiler=note), fullgraph=True), x)
    assert names == ["functional.conv_norm_act._forward", "functional.conv_norm_act._gradients"]


class ReadsTwice(nn.Module):
    """Reads the output of its Linear beside the activation of it, and lets a ReLU overwrite its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second, self.relu = (
            nn.Linear(20, 32),
            nn.GELU(),
            nn.Linear(32, 16),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(self.act(y) + y)
        self.relu(z)  # what it returns is not used
        return z * 2


def test_values_that_others_read_too() -> None:
    model, x = razored(ReadsTwice, CONFIGS["known"]), torch.randn(64, 5, 20)
    loss, wanted = gradients(model, x)
    run, _ = compiled(model, fullgraph=True)
    got_loss, got = gradients(run, x)
    assert_same_bits("loss", got_loss, loss)
    assert_same_gradients(got, wanted)


class Product(nn.Module):
    """Saves by itself what no drop-in meets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        self.scale, self.own = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.nn.functional.silu(self.a(x))
        y = (gate * self.b(x)) @ self.frozen.t()
        y = torch.nn.functional.linear(y, self.own)
        return y @ self.scale


@pytest.mark.parametrize("rest", ["int8", "dense"])
def test_the_net_is_in_the_graph(rest: str) -> None:
    """A product's factors in 8 bits, a silu by its derivative's code, a function's input as a layer's; weights as they
    are, trained or frozen."""
    model, x = razored(Product, br.RazorConfig.compact(0.9, rest=rest)), torch.randn(8, 32, 64)
    _, wanted = gradients(model, x)
    run, _ = compiled(model, fullgraph=True)
    _, got = gradients(run, x)
    assert_same_gradients(got, wanted)
    with br.memory.ledger(model) as book:
        held = loss_of(model, x)
    del held
    assert saved_bytes(run, x) <= 1.02 * book.total_bytes


def test_compiled_in_place() -> None:
    """``module.compile()`` replaces what calling it does: the net is in that graph, and none is open around it."""
    model, x = razored(Product, CONFIGS["known"]), torch.randn(8, 32, 64)
    _, wanted = gradients(model, x)
    run, _ = compiled(model, fullgraph=True)
    gradients(run, x)
    model.compile(backend="aot_eager", fullgraph=True)
    assert_same_gradients(gradients(model, x)[1], wanted)
    assert saved_bytes(model, x) == saved_bytes(run, x)
    br.unrazor_(model)
    gradients(model, x)


class Breaks(nn.Module):
    """A network that Dynamo has to leave in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return torch.nn.functional.silu(self.second(y)) * y


def test_a_network_of_several_graphs() -> None:
    model, x = razored(Breaks, CONFIGS["known"]), torch.randn(8, 32, 64)
    loss, wanted = gradients(model, x)
    run, counter = compiled(model)
    for _ in range(3):
        got_loss, got = gradients(run, x)
        assert_close("loss", got_loss, loss, 1e-6)
        assert got.keys() == wanted.keys()
        for name, grad in wanted.items():  # what is between the graphs is kept otherwise
            assert nn.functional.cosine_similarity(got[name].flatten(), grad.flatten(), 0) > 0.999, name
    graphs = counter.frame_count
    gradients(run, x)
    assert counter.frame_count == graphs
    assert torch._C._len_torch_function_stack() == 0


def test_bad_numbers_are_told() -> None:
    model = razored(lambda: nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 4)), CONFIGS["known"])
    run, _ = compiled(model, fullgraph=True)
    x = torch.randn(8, 5, 20)
    gradients(run, x)
    br.check_finite(run._orig_mod)
    x[2, 1, 3] = float("nan")
    gradients(run, x)
    with pytest.raises(FloatingPointError, match="input of 0"):
        br.check_finite(run._orig_mod)


def test_rules_that_change_compile_anew() -> None:
    model, x = razored(mlp, CONFIGS["compact"]), torch.randn(6, 5, 20)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients(run, x)
    br.unrazor_(model)
    br.razor_(model, br.RazorConfig.compact(0.5))
    got = gradients(run, x)[1]
    assert_same_gradients(got, gradients(model, x)[1])


@pytest.fixture
def inductor() -> Iterator[None]:
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
@pytest.mark.parametrize("network", ["mobilenetv2_100", "vit_tiny", "llama"])
def test_inductor(network: str, inductor: None) -> None:
    case = NETWORKS[network]
    # inductor rounds otherwise, and where that makes another code of a factor, a step of 8 bits is a small one
    config = dataclasses.replace(CONFIGS["known"], gate="int8")
    model, x = razored(case.build, config).eval(), case.inputs()  # no dropout: inductor draws its own
    loss, wanted = gradients(model, x)
    run = torch.compile(copy.deepcopy(model), fullgraph=True)
    got_loss, got = gradients(run, x)
    assert_close("loss", got_loss, loss, 1e-4)
    assert_same_gradients(got, wanted, 1e-2)


class Mapped(nn.Module):
    """A product that the network vectorises by itself, as a scan does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(64, 128), nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.out(torch.vmap(lambda a, b: a * b)(y, y.sin()))


def test_what_a_network_vectorises_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = Mapped(), torch.randn(4, 10, 64)
    expected = model(x)
    expected.square().sum().backward()
    bias = model.first.bias.grad
    model.zero_grad()
    br.razor_(model, br.RazorConfig(0.9))
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    out.square().sum().backward()
    assert torch.equal(out, expected)
    torch.testing.assert_close(model.first.bias.grad, bias, rtol=0.05, atol=0.05 * float(bias.abs().max()))
