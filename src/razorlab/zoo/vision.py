"""The families of torchvision and timm: the smallest network of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .cases import LARGEST, Case, floats

ROOT = Path(__file__).resolve().parents[3]

# torchvision: family -> its smallest network
_CLASSIFIERS = {
    "alexnet": "alexnet",
    "convnext": "convnext_tiny",
    "densenet": "densenet121",
    "efficientnet": "efficientnet_b0",
    "efficientnetv2": "efficientnet_v2_s",
    "googlenet": "googlenet",
    "inception": "inception_v3",
    "maxvit": "maxvit_t",
    "mnasnet": "mnasnet0_5",
    "mobilenetv2": "mobilenet_v2",
    "mobilenetv3": "mobilenet_v3_small",
    "regnet": "regnet_y_400mf",
    "resnet": "resnet18",
    "resnext": "resnext50_32x4d",
    "shufflenetv2": "shufflenet_v2_x0_5",
    "squeezenet": "squeezenet1_1",
    "swin": "swin_t",
    "swinv2": "swin_v2_t",
    "vgg": "vgg11",
    "vgg_bn": "vgg11_bn",
    "vit": "vit_b_16",
}
_SEGMENTATION = {
    "deeplabv3": "deeplabv3_mobilenet_v3_large",
    "fcn": "fcn_resnet50",
    "lraspp": "lraspp_mobilenet_v3_large",
}
_DETECTION = {
    "fasterrcnn": "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_resnet50": "fasterrcnn_resnet50_fpn",
    "fcos": "fcos_resnet50_fpn",
    "keypointrcnn": "keypointrcnn_resnet50_fpn",
    "maskrcnn": "maskrcnn_resnet50_fpn",
    "retinanet": "retinanet_resnet50_fpn",
    "ssd": "ssd300_vgg16",
    "ssdlite": "ssdlite320_mobilenet_v3_large",
}
_VIDEO = {
    "r3d": "r3d_18",
    "mc3": "mc3_18",
    "r2plus1d": "r2plus1d_18",
    "s3d": "s3d",
    "mvit": "mvit_v1_b",
    "swin3d": "swin3d_t",
}


def pictures(*shape: int) -> Tensor:
    """Random pictures (*, height, width) of unit deviation, whose amplitudes fall with the frequency as those of
    photographs do (Field, J. Opt. Soc. Am. A 4, 1987). White noise has no two neighbours alike, and no convolution's
    image is like that."""
    noise = torch.fft.rfft2(torch.randn(shape))
    height, width = shape[-2:]
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    found = torch.fft.irfft2(noise / frequency.clamp_min(1 / max(height, width)), s=(height, width))
    return found / found.std()


def torchvision_cases() -> Iterator[Case]:
    import torchvision

    def images(network: str, size: int, batch: int) -> Callable:
        def make() -> tuple:
            options = {"init_weights": True} if network in ("googlenet", "inception_v3") else {}
            model = torchvision.models.get_model(network, weights=None, **options)
            x = pictures(batch, 3, size, size)
            return model, lambda model: floats(model(x))

        return make

    def segmentation(network: str) -> Callable:
        def make() -> tuple:
            model = torchvision.models.get_model(network, weights=None, weights_backbone=None, num_classes=21)
            x = pictures(2, 3, 160, 160)
            return model, lambda model: floats(model(x))

        return make

    def detection(network: str) -> Callable:
        def make() -> tuple:
            options = {} if network.startswith("ssd") else {"min_size": 256, "max_size": 320}
            model = torchvision.models.get_model(network, weights=None, weights_backbone=None, num_classes=5, **options)
            x = list(pictures(2, 3, 256, 256).div(8).add(0.5).clamp(0, 1))
            target = {
                "boxes": torch.tensor([[20.0, 30.0, 120.0, 160.0], [60.0, 60.0, 200.0, 220.0]]),
                "labels": torch.tensor([1, 2]),
                "masks": torch.zeros(2, 256, 256, dtype=torch.uint8).index_fill(1, torch.arange(60, 160), 1),
                "keypoints": torch.rand(2, 17, 3) * torch.tensor([60.0, 60.0, 0.0]) + torch.tensor([60.0, 60.0, 1.0]),
            }
            return model, lambda model: floats(model(x, [dict(target) for _ in x]))

        return make

    def video(network: str) -> Callable:
        def make() -> tuple:
            model = torchvision.models.get_model(network, weights=None)
            frames, size = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "swin3d_t": (8, 112)}.get(network, (8, 112))
            x = pictures(1, 3, frames, size, size)
            return model, lambda model: floats(model(x))

        return make

    for family, network in _CLASSIFIERS.items():
        size = {"inception_v3": 299, "maxvit_t": 224}.get(
            network, 160 if "swin" not in network and "vit" not in network else 224
        )
        yield Case(f"torchvision/{family}", network, images(network, size, 2 if size > 160 else 4))
    for family, network in _SEGMENTATION.items():
        yield Case(f"torchvision/{family}", network, segmentation(network))
    for family, network in _DETECTION.items():
        yield Case(f"torchvision/{family}", network, detection(network))
    for family, network in _VIDEO.items():
        yield Case(f"torchvision/{family}", network, video(network))


_SIZES = ("femto", "atto", "pico", "nano", "xxs", "xxt", "xx_small", "x_small", "xs", "tiny", "lite", "050", "xsmall")
_SIZES += ("mini", "small", "_t", "_s", "b0", "a0", "18", "16", "26")


def _smallest_first(name: str) -> tuple[int, int, str]:
    """Names in the order of the size that they promise, roughly."""
    rank = next((i for i, word in enumerate(_SIZES) if word in name), len(_SIZES))
    return rank, sum(map(int, re.findall(r"\d+", name))), name


def timm_cases() -> Iterator[Case]:
    """The smallest network of every module of timm: of the five whose names promise least, by parameters."""
    import timm

    cache = ROOT / "outputs" / "zoo_timm.txt"
    known = dict(line.split() for line in cache.read_text().splitlines()) if cache.exists() else {}
    if not known:
        for module in timm.list_modules():
            counts = []
            for name in sorted(timm.list_models(module=module), key=_smallest_first)[:5]:
                try:
                    with torch.device("meta"):
                        model = timm.create_model(name)
                except Exception:  # not on meta tensors, or it asks for a download
                    continue
                counts.append((sum(p.numel() for p in model.parameters()), name))
            if counts:
                known[module] = min(counts)[1]
        cache.parent.mkdir(exist_ok=True)
        cache.write_text("".join(f"{module} {name}\n" for module, name in sorted(known.items())))

    def make_of(network: str) -> Callable:
        def make() -> tuple:
            with torch.device("meta"):
                count = sum(p.numel() for p in timm.create_model(network).parameters())
            if count > LARGEST:
                raise ValueError(f"not tried: {count / 1e6:.0f} million parameters, more than {LARGEST / 1e6:.0f}")
            model = timm.create_model(network)
            x = pictures(2, *timm.data.resolve_data_config({}, model=model)["input_size"])
            return model, lambda model: floats(model(x))

        return make

    for module, network in sorted(known.items()):
        yield Case(f"timm/{module}", network, make_of(network))
