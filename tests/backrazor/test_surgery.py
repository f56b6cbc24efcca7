"""What people do to modules after construction, before ``razor_`` and after it: the razored network computes what the
dense one computes, gradients with it, or refuses in the sentence that stands here.

Nothing is pruned and every activation is a ReLU, so that gradients are the dense ones to rounding.
"""

from __future__ import annotations

import copy
import io
import pickle
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import backrazor as br
from backrazor.nn.base import DropIn
from backrazor.nn.fusion import Linked
from tests.backrazor.compare import assert_close, assert_same_bits
from tests.backrazor.networks import freeze_norms

EXACT = br.RazorConfig(0.0, values="float32", norm="dense", activation="int8", attention="dense", rest="dense")


class Residual(nn.Module):
    """A block in the manner of torchvision's: its chains are not known, those of the Sequential inside are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class ConvNet(nn.Module):
    """A CNN with chains of three, two and Linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            Residual(8),
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(2),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Network:
    """How to build a network, its input, and the parts that the changes are made to."""

    def __init__(self, build: Callable[[], nn.Module], x: Callable[[], Tensor], leader: str, follower: str) -> None:
        self.build, self.x, self.leader, self.follower = build, x, leader, follower


def _convnet() -> nn.Module:
    model = freeze_norms(ConvNet())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model


def _resnet() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    model = freeze_norms(models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    return model


def _inverted_residuals() -> nn.Module:
    """timm's blocks, whose norms carry their activation."""
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    timm_layers = pytest.importorskip("timm.layers")
    settings = {"norm_layer": timm_layers.BatchNormAct2d, "act_layer": nn.ReLU}
    model = nn.Sequential(
        blocks.DepthwiseSeparableConv(3, 8, stride=2, **settings),
        blocks.InvertedResidual(8, 8, exp_ratio=2, **settings),
    )
    model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    freeze_norms(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    return model


def _vit() -> nn.Module:
    vision_transformer = pytest.importorskip("timm").models.vision_transformer
    return vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, num_classes=5, embed_dim=24, depth=2, num_heads=2, act_layer=nn.ReLU
    )


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=5,
    )
    return transformers.BertForSequenceClassification(config)


NETWORKS = {
    "cnn": Network(_convnet, lambda: torch.randn(2, 3, 16, 16), "features.0", "features.1"),
    "cnn, linear chain": Network(_convnet, lambda: torch.randn(2, 3, 16, 16), "head.1", "head.2"),
    "resnet": Network(_resnet, lambda: torch.randn(2, 3, 32, 32), "layer2.0.conv1", "layer2.0.bn1"),
    "timm": Network(_inverted_residuals, lambda: torch.randn(2, 3, 16, 16), "1.conv_pw", "1.bn1"),
    "vit": Network(_vit, lambda: torch.randn(2, 3, 32, 32), "blocks.1.mlp.fc1", "blocks.1.mlp.act"),
    "bert": Network(
        _bert,
        lambda: torch.randint(0, 50, (2, 9)),
        "bert.encoder.layer.1.intermediate.dense",
        "bert.encoder.layer.1.intermediate.intermediate_act_fn",
    ),
}


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return getattr(out, "logits", out)


def set_part(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# --- What people do: each takes the model and the network, and returns the model to call. -----------------------------


def replace_follower(model: nn.Module, network: Network) -> nn.Module:
    set_part(model, network.follower, nn.Identity())
    return model


def replace_follower_by_another(model: nn.Module, network: Network) -> nn.Module:
    set_part(model, network.follower, nn.Softplus())
    return model


def replace_leader(model: nn.Module, network: Network) -> nn.Module:
    old = model.get_submodule(network.leader)
    torch.manual_seed(5)
    new = (
        nn.Linear(old.in_features, old.out_features)
        if isinstance(old, nn.Linear)
        else nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    )
    set_part(model, network.leader, new)
    return model


def rebuild_by_class(model: nn.Module, network: Network) -> nn.Module:
    """As libraries do that change layers one by one: ``type(layer)(...)``."""
    old = model.get_submodule(network.leader)
    torch.manual_seed(5)
    if isinstance(old, nn.Linear):
        new = type(old)(old.in_features, old.out_features)
    else:
        new = type(old)(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    assert not isinstance(new, DropIn)
    set_part(model, network.leader, new)
    return model


def wrap_leader(model: nn.Module, network: Network) -> nn.Module:
    """The layer becomes a part of another: what LoRA libraries do."""

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * 1.25

    set_part(model, network.leader, Wrapped(model.get_submodule(network.leader)))
    return model


def compile_follower(model: nn.Module, network: Network) -> nn.Module:
    """``module.compile()`` replaces what calling it does."""
    torch._dynamo.reset()
    model.get_submodule(network.follower).compile(backend="eager")
    return model


def hooks_on_everything_inside(model: nn.Module, network: Network) -> nn.Module:
    """Also on the Identities inside a norm."""
    for module in model.get_submodule(network.follower).modules():
        module.register_forward_hook(lambda module, arguments, out: out * 1.25)
    return model


def hook_with_keywords(model: nn.Module, network: Network) -> nn.Module:
    module = model.get_submodule(network.leader)
    module.register_forward_hook(lambda module, arguments, keywords, out: out + 0.5, with_kwargs=True, always_call=True)
    module.register_forward_pre_hook(
        lambda module, arguments, keywords: ((arguments[0] * 2,), keywords), with_kwargs=True
    )
    return model


def share_leader(model: nn.Module, network: Network) -> nn.Module:
    """The leader's object stands in another place of the same container, too."""
    parent = model.get_submodule(network.leader.rpartition(".")[0])
    leader = model.get_submodule(network.leader)
    same = [
        name
        for name, child in parent.named_children()
        if type(child) is type(leader) and child is not leader and child.weight.shape == leader.weight.shape
    ]
    for name in same:
        setattr(parent, name, leader)
    return model


def call_the_leader_from_a_hook(model: nn.Module, network: Network) -> nn.Module:
    """A hook of a part that runs before calls the leader by itself."""
    leader, seen = model.get_submodule(network.leader), []
    first = next(module for module in model.modules() if not list(module.children()))

    def look(module: nn.Module, arguments: tuple) -> None:
        shape = (2, leader.in_features) if isinstance(leader, nn.Linear) else (2, leader.in_channels, 16, 16)
        seen.append(leader(torch.ones(shape)).sum())

    if first is not leader:
        first.register_forward_pre_hook(look)
    return model


def in_half(model: nn.Module, network: Network) -> nn.Module:
    return model.bfloat16().float()


def sync_batchnorm(model: nn.Module, network: Network) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def patch_forward(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    old = module.forward
    module.forward = lambda x: old(x) * 1.5 + 0.1
    return model


def patch_leader(model: nn.Module, network: Network) -> nn.Module:
    return patch_forward(model, network.leader)


def patch_follower(model: nn.Module, network: Network) -> nn.Module:
    return patch_forward(model, network.follower)


def patch_with_a_method(model: nn.Module, network: Network) -> nn.Module:
    """A forward that does not call the old one."""
    module = model.get_submodule(network.leader)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if isinstance(self, nn.Linear):
            return F.linear(x, self.weight * 0.5, self.bias)
        return F.conv2d(x, self.weight * 0.5, self.bias, self.stride, self.padding)

    module.forward = types.MethodType(forward, module)
    return model


def _hook(place: str, kind: str) -> Callable[[nn.Module, Network], nn.Module]:
    def change(model: nn.Module, network: Network) -> nn.Module:
        module = model.get_submodule(getattr(network, place))
        if kind == "forward":
            module.register_forward_hook(lambda module, arguments, out: out * 1.5)
        elif kind == "pre":
            module.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 1.5,))
        elif kind == "backward":
            module.register_full_backward_hook(
                lambda module, inputs, outputs: tuple(None if g is None else g * 2 for g in inputs)
            )
        else:
            module.register_full_backward_pre_hook(lambda module, outputs: tuple(g * 2 for g in outputs))
        return model

    change.__name__ = f"{kind} hook on the {place}"
    return change


def hook_and_remove(model: nn.Module, network: Network) -> nn.Module:
    for name in (network.leader, network.follower):
        model.get_submodule(name).register_forward_hook(lambda module, arguments, out: out * 9).remove()
    return model


def tie_weights(model: nn.Module, network: Network) -> nn.Module:
    """One parameter in two layers."""
    leader = model.get_submodule(network.leader)
    for module in model.modules():
        if type(module).__name__ == type(leader).__name__ and module.weight.shape == leader.weight.shape:
            module.weight = leader.weight
    return model


def share_module(model: nn.Module, network: Network) -> nn.Module:
    """The follower's object serves behind the network, too."""

    class Twice(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.again = model.get_submodule(network.follower)

        def forward(self, x: Tensor) -> Tensor:
            out = logits(self.model, x)
            if isinstance(self.again, nn.BatchNorm2d):
                return out + self.again(out[:, :1, None, None].expand(-1, self.again.num_features, 1, 1)).mean()
            return out + self.again(out - 0.1)

    return Twice(model)


def weight_norm(model: nn.Module, network: Network) -> nn.Module:
    parametrizations.weight_norm(model.get_submodule(network.leader))
    return model


def spectral_norm(model: nn.Module, network: Network) -> nn.Module:
    torch.manual_seed(5)
    parametrizations.spectral_norm(model.get_submodule(network.leader).eval())
    return model


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrized(model: nn.Module, network: Network) -> nn.Module:
    parametrize.register_parametrization(model.get_submodule(network.leader), "weight", _Doubled())
    return model


def pruned(model: nn.Module, network: Network) -> nn.Module:
    prune.l1_unstructured(model.get_submodule(network.leader), "weight", amount=0.4)
    return model


def pruned_for_good(model: nn.Module, network: Network) -> nn.Module:
    prune.remove(prune.l1_unstructured(model.get_submodule(network.leader), "weight", amount=0.4), "weight")
    return model


def deep_copy(model: nn.Module, network: Network) -> nn.Module:
    return copy.deepcopy(model)


def through_pickle(model: nn.Module, network: Network) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module, network: Network) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_a_state(model: nn.Module, network: Network) -> nn.Module:
    other = network.build()
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    return model


def to_empty_and_loaded(model: nn.Module, network: Network) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if getattr(model, "config", None) is not None:
        pytest.skip("position ids are no part of the state")
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def in_double(model: nn.Module, network: Network) -> nn.Module:
    return model.double().float()


def averaged(model: nn.Module, network: Network) -> nn.Module:
    """A moving average with buffers by position, updated from the model."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.update_parameters(model)
    average.update_parameters(model)
    return average


def shared_memory(model: nn.Module, network: Network) -> nn.Module:
    return model.share_memory()


def functional(model: nn.Module, network: Network) -> nn.Module:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return logits_of(torch.func.functional_call(self.model, dict(self.model.named_parameters()), (x,)))

    return Called()


def logits_of(out: object) -> Tensor:
    return getattr(out, "logits", out)


def replicated(model: nn.Module, network: Network) -> nn.Module:
    """A replica as DataParallel makes one: a shallow copy of every module, parameters that are no leaves."""
    modules = list(model.modules())
    replicas = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replicas[id(child)])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1.0)
            if parameter is None:
                replica._parameters[name] = None
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer

    class Replica(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return replicas[id(model)](x)

    return Replica()


def compiled(model: nn.Module, network: Network) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def with_lora(model: nn.Module, network: Network) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=[network.leader], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model)


def as_a_peft_model(model: nn.Module, network: Network) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=[network.leader], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def with_accelerate_hooks(model: nn.Module, network: Network) -> nn.Module:
    """Offloaded weights: accelerate replaces ``forward`` on every module."""
    pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def checkpointed(model: nn.Module, network: Network) -> nn.Module:
    from torch.utils.checkpoint import checkpoint

    parent = model.get_submodule(network.leader.rpartition(".")[0])
    inner = copy.copy(parent)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *arguments: object) -> object:
            return checkpoint(self.inner, *arguments, use_reentrant=False)

    set_part(model, network.leader.rpartition(".")[0], Checkpointed())
    return model


CHANGES: tuple[Callable[[nn.Module, Network], nn.Module], ...] = (
    replace_follower,
    replace_follower_by_another,
    replace_leader,
    rebuild_by_class,
    wrap_leader,
    compile_follower,
    hooks_on_everything_inside,
    hook_with_keywords,
    share_leader,
    call_the_leader_from_a_hook,
    in_half,
    sync_batchnorm,
    patch_leader,
    patch_follower,
    patch_with_a_method,
    *(
        _hook(place, kind)
        for place in ("leader", "follower")
        for kind in ("forward", "pre", "backward", "backward pre")
    ),
    hook_and_remove,
    tie_weights,
    share_module,
    weight_norm,
    spectral_norm,
    parametrized,
    pruned,
    pruned_for_good,
    deep_copy,
    through_pickle,
    through_a_file,
    through_a_state,
    to_empty_and_loaded,
    in_double,
    averaged,
    shared_memory,
    functional,
    replicated,
    compiled,
    with_lora,
    as_a_peft_model,
    with_accelerate_hooks,
    checkpointed,
)


def outcome(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(2)
    out = logits(model, x)
    with torch.no_grad():
        torch.manual_seed(2)
        assert_same_bits("without gradients", logits(model, x), out)
    out.float().square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def built(network: Network) -> nn.Module:
    torch.manual_seed(0)
    model = network.build()
    return model if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else model.train()


ROWS = [
    pytest.param(name, change, id=f"{name}-{change.__name__}")
    for name in NETWORKS
    for change in CHANGES
    if change not in (compiled, compile_follower) or name == "cnn"  # seconds each: tests/kernels has more
]
NO_GRADIENTS = {with_accelerate_hooks}  # weights are taken away again after forward: inference only, dense too


@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")  # peft's own
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # the first layer's input needs none
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "change"), ROWS)
def test_a_changed_network(name: str, change: Callable, when: str) -> None:
    network = NETWORKS[name]
    plain, razored = built(network), built(network)
    razored.load_state_dict(plain.state_dict())
    torch.manual_seed(1)
    x = network.x()
    plain = change(plain, network)
    if when == "before":
        razored = change(razored, network)
        br.razor_(razored, EXACT)
    else:
        br.razor_(razored, EXACT)
        assert any(isinstance(module, Linked) for module in razored.modules())
        razored = change(razored, network)
    words = f"{name}, {change.__name__} {when} razor_"
    if change in NO_GRADIENTS:
        with torch.no_grad():
            assert_same_bits(words, logits(razored, x), logits(plain, x))
        return
    try:
        wanted, dense = outcome(plain, x)
    except RuntimeError as refused:  # a ReLU in place behind a hook
        with pytest.raises(type(refused), match=r"is a view and is being modified inplace"):
            outcome(razored, x)
        return
    got, gradients = outcome(razored, x)
    assert_same_bits(words, got, wanted)
    assert gradients.keys() == dense.keys(), words
    for key in dense:
        assert_close(f"{key} of {words}", gradients[key], dense[key], 1e-4)
    br.check_finite(razored)


WAYS_BACK = tuple(
    change for change in CHANGES if change not in (compiled, compile_follower, with_accelerate_hooks, replicated)
)


@pytest.mark.parametrize("again", [br.unrazor_, lambda model: br.razor_(model, EXACT)], ids=["back", "anew"])
@pytest.mark.parametrize("change", WAYS_BACK, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_the_way_back_after_a_change(name: str, change: Callable, again: Callable) -> None:
    """``unrazor_`` and a second ``razor_`` keep what was done since, or refuse before anything is touched."""
    network = NETWORKS[name]
    plain, razored = built(network), built(network)
    torch.manual_seed(1)
    x = network.x()
    plain = change(plain, network)
    br.razor_(razored, EXACT)
    razored = change(razored, network)
    before = {key: type(module) for key, module in razored.named_modules()}
    if change in (patch_leader, patch_follower, patch_with_a_method):
        with pytest.raises(
            RuntimeError, match=r"(features\.|blocks\.1\.mlp\.)\S+ cannot be turned back: its forward was"
        ):
            again(razored)
        assert before == {key: type(module) for key, module in razored.named_modules()}
    else:
        again(razored)
    with torch.no_grad():
        assert_same_bits(f"{name}, {change.__name__}", logits(razored, x), logits(plain, x))
    if again is br.unrazor_ and not change.__name__.startswith("patch"):
        assert not any(isinstance(module, (DropIn, Linked)) for module in razored.modules())
        assert {type(m).__name__ for m in razored.modules()} == {type(m).__name__ for m in plain.modules()}


def test_a_class_that_knows_itself_is_not_taken_off() -> None:
    """A class made from the drop-in's whose methods call ``super()`` cannot be derived from another one."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    br.razor_(model, EXACT)

    class Special(type(model[0])):
        def extra_repr(self) -> str:
            return super().extra_repr() + ", special"

    model[0].__class__ = Special
    with pytest.raises(RuntimeError, match="0 cannot be turned back: its class was changed to Special after razor_"):
        br.unrazor_(model)
    assert type(model[0]) is Special and isinstance(model[1], DropIn)


def test_slices_and_parts_of_a_razored_network() -> None:
    """For a perceptual loss or features: cut anywhere, also in the middle of a chain."""
    plain = built(NETWORKS["cnn"])
    razored = copy.deepcopy(plain)
    br.razor_(razored, EXACT)
    x = torch.randn(2, 3, 16, 16)
    for stop in range(1, len(plain.features) + 1):
        for cut in (lambda m, stop=stop: m.features[:stop], lambda m, stop=stop: nn.Sequential(*m.features[:stop])):
            assert_same_bits(f"up to {stop}", cut(razored)(x), cut(plain)(x))
    y, z = x, x
    for ours, theirs in zip(razored.features, plain.features, strict=True):
        y, z = ours(y), theirs(z)
        assert_same_bits("part by part", y, z)
    for container in (razored.features, razored.features[:3]):
        del container[1]
    del plain.features[1]
    assert_same_bits("a part deleted", razored(x), plain(x))


def test_a_part_turned_back_and_a_part_razored() -> None:
    plain = built(NETWORKS["cnn"])
    razored = copy.deepcopy(plain)
    x = torch.randn(2, 3, 16, 16)
    br.razor_(razored, EXACT)
    br.unrazor_(razored.features[1])
    assert_same_bits("norm turned back", razored(x), plain(x))
    br.unrazor_(razored)
    br.razor_(razored.features, EXACT)
    assert_same_bits("features razored", razored(x), plain(x))


def test_global_hooks_see_the_members() -> None:
    plain = built(NETWORKS["cnn"])
    razored = copy.deepcopy(plain)
    br.razor_(razored, EXACT)
    x, seen = torch.randn(2, 3, 16, 16), {True: [], False: []}
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, arguments, out: seen[module in ours].append(out.clone())
    )
    ours = set(razored.modules())
    try:
        razored(x), plain(x)
    finally:
        handle.remove()
    assert len(seen[True]) == len(seen[False])
    for number, (a, b) in enumerate(zip(seen[True], seen[False], strict=True)):
        assert_same_bits(f"output {number}", a, b)


def test_a_forward_that_is_not_the_known_one_has_no_chains() -> None:
    """A patched class, or another version of its library: its layers run one by one."""
    mlp = pytest.importorskip("timm").layers.mlp.Mlp
    plain = nn.Sequential(mlp(6, 12, act_layer=nn.ReLU))
    razored = copy.deepcopy(plain)
    br.razor_(razored, EXACT)
    original, seen, x = mlp.forward, [], torch.randn(3, 6)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.fc1(x)
        seen.append(h.clone())
        return self.fc2(self.act(h) + 0.1 * h)

    try:
        mlp.forward = forward
        for _ in range(2):  # razored before the patch, and after it
            assert_same_bits("output", razored(x), plain(x))
            assert_same_bits("what it looks at", seen[0], seen[1])
            seen.clear()
            br.unrazor_(razored)
            assert br.razor_(razored, EXACT).fused == 0
    finally:
        mlp.forward = original
    assert_same_bits("output", razored(x), plain(x))


def test_what_is_made_and_not_handed_through_raises() -> None:
    """The last guard: somebody calls the leader while its container runs, and keeps what it gives."""
    mlp = pytest.importorskip("timm").layers.mlp.Mlp
    model = nn.Sequential(mlp(6, 12, act_layer=nn.ReLU))
    br.razor_(model, EXACT)
    leader, seen = model[0].fc1, []
    handle = model[0].drop1.register_forward_hook(lambda *_: seen.append(leader(torch.ones(3, 6))))
    with pytest.raises(RuntimeError, match=r"Mlp did not hand the output .* filter_fn"):
        model(torch.randn(3, 6))
    handle.remove()
    model(torch.randn(3, 6))  # and nothing of it is left behind


def test_a_member_called_by_another_child_runs_alone() -> None:
    class Inner(nn.Module):
        def __init__(self, leader: nn.Module, follower: nn.Module) -> None:
            super().__init__()
            self.leader, self.follower = leader, follower

        def forward(self, x: Tensor) -> Tensor:
            h = self.leader(x)
            return h + self.follower(h)

    leader, follower = nn.Linear(6, 6), nn.ReLU()
    plain = nn.Sequential(Inner(leader, follower), leader, follower)
    razored = copy.deepcopy(plain)
    br.razor_(razored, EXACT)
    x = torch.randn(3, 6)
    assert_same_bits("output", razored(x), plain(x))


def test_smooth_activations_behind_a_leader() -> None:
    """The one that patches and replacements used to lose."""
    for change in (replace_follower, patch_leader, patch_follower, wrap_leader, share_module, with_lora):
        network = Network(
            lambda: nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)), lambda: torch.randn(3, 6), "0", "1"
        )
        plain, razored = built(network), built(network)
        br.razor_(razored, EXACT)
        x = network.x()
        assert_same_bits(change.__name__, change(razored, network)(x), change(plain, network)(x))


def test_trained_after_inference() -> None:
    """A flag that is first needed under ``inference_mode`` is written to in training, too."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 6), nn.GELU())
    br.razor_(model, br.RazorConfig(0.5, activation="float16"))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.inference_mode():
        model(torch.randn(3, 6))
    model(torch.full((3, 6), float("nan"))).sum().backward()
    with pytest.raises(FloatingPointError, match="NaN or Inf in the input of 0"):
        br.check_finite(model)


def test_a_container_with_a_state_of_its_own() -> None:
    """``__getstate__`` and ``__init_subclass__`` of a Sequential's subclass are respected."""
    import threading

    class Locked(nn.Sequential):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(*layers)
            self.lock = threading.Lock()

        def __getstate__(self) -> dict:
            return {key: value for key, value in self.__dict__.items() if key != "lock"}

    class Asking(nn.Sequential):
        def __init_subclass__(cls, word: str) -> None:
            super().__init_subclass__()

    x = torch.randn(3, 6)
    for cls in (Locked, Asking):
        plain = nn.Sequential(cls(nn.Linear(6, 6), nn.ReLU()))
        razored = nn.Sequential(cls(nn.Linear(6, 6), nn.ReLU()))
        razored.load_state_dict(plain.state_dict())
        br.razor_(razored, EXACT)
        assert_same_bits(cls.__name__, copy.deepcopy(razored)(x), plain(x))


def test_classes_are_not_kept_alive() -> None:
    import gc
    import weakref

    def used() -> weakref.ref:
        class Own(nn.Sequential):
            pass

        model = nn.Sequential(Own(nn.Linear(3, 3), nn.ReLU()))
        br.razor_(model, EXACT)
        model(torch.randn(2, 3))
        return weakref.ref(Own)

    reference = used()
    gc.collect()
    assert reference() is None


def test_a_subclass_of_a_drop_in_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    br.razor_(model, EXACT)

    class Doubled(type(model[0])):
        pass

    with pytest.raises(TypeError, match=r"Doubled is derived from a drop-in .* derive it from Linear"):
        Doubled(3, 3)


def test_threads_do_not_see_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    plain = built(NETWORKS["cnn"])
    razored = copy.deepcopy(plain)
    br.razor_(razored, EXACT)
    inputs = [torch.randn(2, 3, 16, 16) for _ in range(24)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(razored, inputs))
    for x, out in zip(inputs, outputs, strict=True):
        assert_same_bits("output", out, plain(x))


def test_nothing_hangs_on_the_users_tensors() -> None:
    """They pickle, copy and go to other processes as they came."""
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3), nn.GELU())
    br.razor_(model, br.RazorConfig(0.5, activation="float16"))
    x, plain = torch.randn(4, 5, 6), io.BytesIO()
    torch.save(x, plain)
    h = model[0](x)
    out = model[1:](h)
    out.sum().backward()
    for name, tensor in {"input": x, "norm": h, "output": out, "weight": model[1].weight}.items():
        assert not [key for key in vars(tensor) if "backrazor" in key], name
    buffer = io.BytesIO()
    torch.save(x, buffer)
    assert len(buffer.getvalue()) == len(plain.getvalue())
    for tensor in (h.detach(), copy.deepcopy(x), x.share_memory_(), model[1].weight):
        torch.save(tensor, io.BytesIO())
    copy.deepcopy(model[1].weight)


def test_the_flag_is_no_part_of_the_state() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    names = [name for name, _ in model.named_buffers()]
    br.razor_(model, br.RazorConfig(0.5))
    assert [name for name, _ in model.named_buffers()] == names


def test_built_on_meta_and_loaded() -> None:
    """Flags that nobody has initialised are not read: no false alarm, and a real one with the layer's name."""
    state = built(NETWORKS["cnn"]).state_dict()
    with torch.device("meta"):
        model = ConvNet()
    br.razor_(model, EXACT)
    br.check_finite(model)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    x = torch.randn(2, 3, 16, 16)
    model(x).sum().backward()
    br.check_finite(model)
    x[0, 0, 0, 0] = float("nan")
    model(x).sum().backward()
    with pytest.raises(FloatingPointError, match=r"NaN or Inf in the input of features\.0"):
        br.check_finite(model)
    br.check_finite(model)


def test_unknown_bits_are_no_alarm() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    br.razor_(model)
    model[0].flag_for(torch.zeros(1)).fill_(-(2**31))
    br.check_finite(model)


def test_a_patched_layer_is_reported_as_left() -> None:
    model = built(NETWORKS["cnn"])
    patch_leader(model, NETWORKS["cnn"])
    report = br.razor_(model, EXACT)
    reasons = {row.name: row.reason for row in report.left}
    assert "its forward is replaced on the instance" in reasons["features.0"]
    assert "features.0" not in {row.name for row in report.replaced}
    assert report.fused == 3  # of four chains


def test_a_network_that_adds_in_place_trains() -> None:
    """timm's naflexvit adds position embeddings to a Linear's output in place."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model(
        "naflexvit_base_patch16_gap", img_size=32, num_classes=3, embed_dim=48, num_heads=4, depth=1
    )
    razored = copy.deepcopy(plain)
    br.razor_(
        razored,
        br.RazorConfig(0.0, values="float32", norm="dense", activation="dense", attention="dense", rest="dense"),
    )
    x = torch.randn(2, 3, 32, 32)
    for model in (plain, razored):
        model(x).square().sum().backward()
    for (name, a), b in zip(razored.named_parameters(), plain.parameters(), strict=True):
        assert_close(name, a.grad, b.grad, 1e-4)
