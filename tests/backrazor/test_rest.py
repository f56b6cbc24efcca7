"""The net for the rest: what autograd keeps beside the drop-ins is kept in 8 bits, and nothing else changes."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import backrazor as br
from backrazor.codecs.rest import SMALLEST, Blocks, block_width, pack_blocks
from backrazor.functional.rest import running
from backrazor.nn.netted import Netted
from tests.backrazor.compare import assert_close, assert_same_bits

# everything exact but the rest
REST = br.RazorConfig(0.0, values="float32", norm="dense", activation="dense", attention="dense", rest="int8")
DENSE = br.RazorConfig(0.0, values="float32", norm="dense", activation="dense", attention="dense", rest="dense")
WIDTH = 32


class Gated(nn.Module):
    """A gated block, whose product no drop-in covers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class Net(nn.Module):
    """Two blocks and a head; ``wrap`` calls a block."""

    def __init__(self, wrap=lambda block, x: block(x)) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Gated(), Gated()]), nn.Linear(WIDTH, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.wrap(block, x)
        return self.head(x.exp().mean(1))


class Function(nn.Module):
    """Calls a function on two products of its input, so that both have a history."""

    def __init__(self, function) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(64, 64), nn.Linear(64, 64), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.a(x), self.b(x))


class Own(torch.autograd.Function):
    """Saves statistics, as far as anybody knows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def razored(model: nn.Module, config: br.RazorConfig = REST, **options) -> nn.Module:
    ours = copy.deepcopy(model)
    br.razor_(ours, config, **options)
    return ours


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "x",
    [
        inputs(4, 256),
        inputs(5, 7, 123),
        inputs(6, 40, 30).transpose(1, 2),
        inputs(2, 8, 9, 10).to(memory_format=torch.channels_last),
        inputs(64, 48)[:, 5:40],
        inputs(1, 3, 400).expand(7, -1, -1),
        inputs(1031),
    ],
    ids=["rows", "odd", "transposed", "channels_last", "sliced", "expanded", "prime"],
)
def test_blocks_give_back_the_tensor(x: Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    got = Blocks.of(x).read(*pack_blocks(x, ""))
    assert got.shape == x.shape
    assert got.dtype == x.dtype
    if x.is_contiguous() or not x.reshape(-1).is_contiguous() or x.dim() == 3:
        assert [s for s in got.stride() if s == 0] == [s for s in x.stride() if s == 0]
    assert (got.float() - x.float()).abs().max() <= x.float().abs().max() * (1 / 254 + torch.finfo(dtype).eps)
    assert_close("x_hat", got.float(), x.float(), 0.01)


def test_blocks_are_rows_where_that_goes() -> None:
    sizes = {(1024, 64): 64, (2 * 197 * 768, 768): 256, (5 * 7 * 123, 123): 123, (8 * 49, 49): 196, (1031, 1031): 256}
    assert {size: block_width(*size) for size in sizes} == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e4])
def test_any_magnitude_keeps_its_precision(scale: float, dtype: torch.dtype) -> None:
    x = (inputs(16, 256) * scale).to(dtype)
    assert_close("x_hat", Blocks.of(x).read(*pack_blocks(x, "")).float(), x.float(), 0.01)


def test_gradients_are_near_and_a_quarter_of_the_bytes_is_left(net: Net) -> None:
    x = inputs(4, 64, WIDTH)
    ours = razored(net)
    assert_same_bits("output", ours(x), net(x))
    for got, expected in zip(gradients(ours, x), gradients(net, x), strict=True):
        assert F.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.9998
    bytes_of = {}
    for name, model in (("dense", net), ("exact", razored(net, DENSE)), ("rest", ours)):
        with br.memory.ledger(model) as book:
            loss = model(x).sum()
        bytes_of[name] = book.total_bytes
        del loss
    gated = 2 * 2 * 4 * 64 * 64 * 4 + 4 * 64 * WIDTH * 4  # both factors in both blocks, and what exp gave
    assert bytes_of["exact"] - bytes_of["rest"] == pytest.approx(gated * (3 / 4 - 2 / 4 / 64), rel=0.02)


def test_the_ledger_names_it_and_the_prediction_counts_it(net: Net) -> None:
    ours, x = razored(net, br.RazorConfig(0.9)), inputs(4, 64, WIDTH)
    with br.memory.ledger(ours) as book:
        loss = ours(x).mean()
    rows = [row for row in book.rows if row.reason.startswith("rest")]
    assert {row.module for row in rows} == {"", "blocks.0", "blocks.1"}
    assert {row.role for row in rows} == {"quantised", "scales"}
    predicted = br.memory.predict(ours, (64, WIDTH), 4, loss_fn=torch.mean)
    assert predicted.saved_bytes == book.total_bytes
    loss.backward()


def test_one_storage_is_kept_once() -> None:
    model = razored(Function(lambda a, b: a.exp().view(-1, 32).sigmoid() * a.exp().exp().view(-1, 32)))
    with br.memory.ledger(model) as book:
        loss = model(inputs(64, 64)).sum()
    # of a.exp(), sigmoid, a.exp() and its exp each once, though the products and their inputs save them again
    codes = sum(row.bytes for row in book.rows if row.reason.startswith("rest") and row.role == "quantised")
    assert codes == 4 * 64 * 64
    loss.backward()


@pytest.mark.parametrize("part", [lambda x: x[:, 3:40], lambda x: x[5:60], lambda x: x.t()[::2], lambda x: x[::3, 7:]])
def test_a_part_of_what_is_kept_costs_nothing_more(part) -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        e = a.sigmoid()
        return e + (part(e) * part(b.detach())).sum()

    torch.manual_seed(0)
    model, x = Function(function), inputs(64, 64)
    ours = razored(model)
    with br.memory.ledger(ours) as book:
        loss = ours(x).sum()
    codes = [row.bytes for row in book.rows if row.reason.startswith("rest") and row.role == "quantised"]
    assert codes == [64 * 64 + part(x).numel()]  # of e, and the other factor
    del loss
    got, expected = gradients(ours, x)[0], gradients(model, x)[0]
    assert_close("gradient", got, expected, 1e-2)


@pytest.mark.parametrize(
    ("function", "limit"),
    [
        (lambda a, b: a / (4 * b.detach()).exp() + b, 5e-3),  # a code of zero would be divided by
        (lambda a, b: (b.sigmoid() + a.sigmoid() + 1e-6).log(), 1e-2),
        (lambda a, b: (b.sigmoid() + a.sigmoid()) ** 0.5, 1e-2),
        (lambda a, b: torch.rsqrt(b.sigmoid() + 1e-3) * a, 1e-2),
        (lambda a, b: F.normalize(a) * b, 1e-2),
        (lambda a, b: F.normalize(torch.logspace(-3, 3, 2560)[:, None] * a.repeat(40, 1)).sum() + b, 1e-2),
        (lambda a, b: F.softmax(a, -1) * b, 1e-2),
        (lambda a, b: a.amax(1, keepdim=True) + b.amin(0) + torch.max(a + b), 0),
        (lambda a, b: F.cross_entropy(a + b, a.argmax(1)) * a.new_ones(1), 0),
        (lambda a, b: F.mse_loss(a, b) * a.new_ones(1), 0),
        (lambda a, b: torch.logsumexp(a + b, 1), 0),
        (lambda a, b: F.gelu(a) + F.silu(b), 0),  # activation="dense" is dense
        (lambda a, b: F.layer_norm(a, (64,)) + b, 0),
        (lambda a, b: F.scaled_dot_product_attention(a[None], b[None], a[None])[0], 0),
        (lambda a, b: torch.where(a > 0, a, b), 0),  # a bool
        (lambda a, b: a[torch.arange(63, -1, -1)] + b, 0),  # integers
        (lambda a, b: (a.double() * b.double()).float(), 0),
        (lambda a, b: a[:, :15] * b[:, :15], 0),  # small
        (lambda a, b: Own.apply(a) * 1 + b, 0),  # a Function of somebody else's
    ],
)
def test_what_bears_eight_bits_and_what_does_not(function, limit: float) -> None:
    torch.manual_seed(0)
    model, x = Function(function), inputs(64, 64)
    for got, expected in zip(gradients(razored(model), x), gradients(model, x), strict=True):
        if limit:
            assert_close("gradient", got, expected, limit)
        else:
            assert_same_bits("gradient", got, expected)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_keep_a_workspace_of_their_own(layer: type[nn.Module]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = layer(64, 64, batch_first=True), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(x)[0])

    torch.manual_seed(0)
    model, x = Recurrent(), inputs(4, 16, 64)
    for got, expected in zip(gradients(razored(model), x), gradients(model, x), strict=True):
        assert_close("gradient", got, expected, 1e-5)


def test_what_eight_bits_cannot_hold_stays_dense() -> None:
    model = Function(lambda a, b: (a.masked_fill(a < 0, -math.inf).clamp_min(-1e30) * b.exp()).clamp_min(-1e3))
    x = inputs(64, 64)
    for got, expected in zip(gradients(razored(model), x), gradients(model, x), strict=True):
        assert got.isfinite().all() == expected.isfinite().all()
        assert_close("gradient", got.nan_to_num(), expected.nan_to_num(), 0.01)


def test_parameters_buffers_and_views_of_them_are_untouched() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale = nn.Linear(64, 64), nn.Parameter(inputs(64, 64))
            self.frozen = nn.Parameter(inputs(64, 64), requires_grad=False)
            self.register_buffer("table", inputs(128, 64))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x * self.table[:64] + x * self.frozen.t() + torch.mm(self.scale.t(), self.table[64:])

    model = razored(Own())
    with br.memory.ledger(model) as book:
        loss = model(inputs(64, 64)).sum()
    assert not [row for row in book.rows if row.reason.startswith("rest")]
    loss.backward()


def test_versions_are_checked_as_autograd_does() -> None:
    small = Function(lambda a, b: a[:, :15].clone())
    ours = razored(small)
    kept = ours(inputs(64, 64))

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(15, 15)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            self.seen = x.sigmoid()
            return self.seen * x

    model = Keeps()
    br.razor_(model, REST)
    loss = model(kept.detach()).sum()
    model.seen.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_several_backwards(net: Net) -> None:
    ours = razored(net)
    loss = ours(inputs(4, 64, WIDTH)).sum()
    first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(ours.parameters()))
    for a, b in zip(first, again, strict=True):
        assert_same_bits("gradient", a, b)


@pytest.mark.parametrize("config", [REST, br.RazorConfig(0.9)], ids=["rest", "compact"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(net: Net, reentrant: bool, config: br.RazorConfig) -> None:
    x = inputs(4, 64, WIDTH).requires_grad_()
    without = razored(net, config)
    net.wrap = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    ours = razored(net, config)
    for got, expected in zip(gradients(ours, x), gradients(without, x), strict=True):
        assert_close("gradient", got, expected, 1e-5)
    with br.memory.ledger(ours) as book:
        loss = ours(x).sum()
    assert not [row for row in book.rows if row.module.startswith("blocks") and row.reason.startswith("rest")]
    loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_functions_that_are_checkpointed_are_recomputed_alike(net: Net, reentrant: bool) -> None:
    """What a closure calls by itself is saved and recomputed without the net, and its modules under it."""

    def wrap(block: nn.Module, x: Tensor) -> Tensor:
        def call(x: Tensor) -> Tensor:
            return F.gelu(block.up(x)).mean() + torch.tanh(block(x)) * x

        return checkpoint(call, x, use_reentrant=reentrant)

    x = inputs(4, 64, WIDTH).requires_grad_()
    net.wrap = wrap
    for got, expected in zip(gradients(razored(net), x), gradients(net, x), strict=True):
        assert F.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.999


def test_hooks_from_outside_see_what_is_kept(net: Net) -> None:
    x, ours = inputs(4, 64, WIDTH), razored(net)
    expected = gradients(ours, x)
    with save_on_cpu():
        for a, b in zip(gradients(ours, x), expected, strict=True):
            assert_same_bits("gradient", a, b)


def test_the_net_closes_when_forward_raises(net: Net) -> None:
    ours = razored(net)
    with pytest.raises(RuntimeError):
        ours(inputs(4, 64, WIDTH + 1))
    assert running() is None
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    y = inputs(64, 64).requires_grad_()
    with br.memory.ledger(nn.Module()) as book:
        kept = y.exp() * y  # outside of the model
    assert book.by_role() == {"dense": 2 * 64 * 64 * 4}
    del kept


def test_the_way_back_and_copies(net: Net) -> None:
    x = inputs(4, 64, WIDTH)
    ours = razored(net)
    expected = gradients(ours, x)
    assert type(ours).__name__ == "Net"
    for twin in (copy.deepcopy(ours), copy.deepcopy(ours.blocks)[0]):
        assert isinstance(twin, Netted)
    for a, b in zip(gradients(copy.deepcopy(ours), x), expected, strict=True):
        assert_same_bits("gradient", a, b)
    block = pickle.loads(pickle.dumps(ours.blocks[0]))
    assert isinstance(block, Netted)
    assert_same_bits("output", block(x), ours.blocks[0](x))
    br.razor_(ours, DENSE)  # again, with other rules
    for a, b in zip(gradients(ours, x), gradients(net, x), strict=True):
        assert_same_bits("gradient", a, b)
    br.unrazor_(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in net.modules()]
    assert [sorted(vars(m)) for m in ours.modules()] == [sorted(vars(m)) for m in net.modules()]


def test_a_part_that_is_called_alone_has_its_own_net(net: Net) -> None:
    ours = razored(net)
    with br.memory.ledger(ours) as book:
        loss = ours.blocks[1](inputs(4, 64, WIDTH)).sum()
    assert [row for row in book.rows if row.reason.startswith("rest")]
    loss.backward()


@pytest.mark.parametrize(
    "options",
    [
        {"filter_fn": lambda name, module: not name.startswith("blocks.0")},
        {"config": {"blocks.0*": None, "*": br.RazorConfig(0.9)}},
    ],
    ids=["filter_fn", "pattern"],
)
def test_what_is_left_out_is_exact_inside(net: Net, options: dict) -> None:
    ours = copy.deepcopy(net)
    br.razor_(ours, **options)
    with br.memory.ledger(ours) as book:
        loss = ours(inputs(4, 64, WIDTH)).sum()
    roles = {row.module: set() for row in book.rows}
    for row in book.rows:
        roles[row.module].add(row.role)
    assert all(found == {"dense"} for name, found in roles.items() if name.startswith("blocks.0"))
    assert "quantised" in roles["blocks.1"]
    loss.backward()


def test_a_layer_that_is_left_out_is_exact_in_a_razored_one() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    ours = copy.deepcopy(model)
    br.razor_(ours, br.RazorConfig(0.9), filter_fn=lambda name, module: name == "0")
    x = inputs(64, 64)
    for got, expected in list(zip(gradients(ours, x), gradients(model, x), strict=True))[1:]:
        assert_same_bits("gradient", got, expected)


def test_autocast_and_functional_gradients(net: Net) -> None:
    x, ours = inputs(4, 64, WIDTH), razored(net)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = gradients(ours, x), gradients(net, x)
    for got, expected in zip(mine, theirs, strict=True):
        assert F.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.999
    state = dict(ours.named_parameters())
    got = torch.func.grad(lambda state: torch.func.functional_call(ours, state, (x,)).square().sum())(state)
    for g, expected in zip(got.values(), gradients(net, x), strict=True):
        assert_close("gradient", g, expected, 1e-4)  # torch.func knows no hooks: the rest is dense there


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks, after a graph break
def test_compiled(net: Net) -> None:
    ours = razored(net)
    x = inputs(4, 64, WIDTH)
    torch._dynamo.reset()
    for got, expected in zip(gradients(torch.compile(ours, backend="aot_eager"), x), gradients(ours, x), strict=True):
        assert_close("gradient", got, expected, 1e-5)


def test_small_tensors_are_no_affair_of_the_net() -> None:
    model = Function(lambda a, b: a * b)
    ours = razored(model)
    for rows, role in ((SMALLEST // 64 - 1, "dense"), (SMALLEST // 64, "quantised")):
        with br.memory.ledger(ours) as book:
            loss = ours(inputs(rows, 64)).sum()
        assert {row.role for row in book.rows if row.module == "" and row.role != "scales"} == {role}
        del loss
