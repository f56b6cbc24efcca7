"""Dense prediction: masks and what is done to them, the network, the scores, a run that learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose_plain
from PIL import Image
from torch.nn import functional as F
from torchvision import tv_tensors

import backrazor as br
from razorlab.commands import tables
from razorlab.data import build_data
from razorlab.data.masks import IGNORED, MaskedImages, MaskFiles
from razorlab.data.published import PUBLISHED
from razorlab.data.published.install import install
from razorlab.data.spec import LabelledImages
from razorlab.data.transforms import UNLABELLED, Fit, RandomScale, eval_transform, train_transform
from razorlab.errors import UserError
from razorlab.experiments import SEGMENTATION, SEGMENTATION_ROWS, experiments
from razorlab.memory_profile import StepProfile
from razorlab.records import config_hash
from razorlab.settings import validate
from razorlab.tables import load_runs
from razorlab.training.costs import build_step
from razorlab.training.evaluation import confusion, correct_in_top, pixel_scores
from razorlab.training.network import assemble
from razorlab.training.optimisation import Schedule
from razorlab.training.run import execute
from tests.datasets.tiny_archives import make_tiny, mat, png

SCENES = ("task=segmentation", "data=scenes", "model=timm", "model.name=test_efficientnet", "model.pretrained=false")


def scenes(*overrides: str):
    config = compose_plain(*SCENES, *overrides)
    return build_data(config["data"], config["paths"], task="segmentation")


def test_scenes_are_the_same_every_time_and_hold_every_class() -> None:
    data = scenes()
    assert (len(data.train), len(data.val), len(data.test)) == (240, 60, 120)
    assert data.class_names == ("ground", *map(str, range(10)))
    image, mask = data.train[0]
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((3, 96, 96), torch.uint8, (96, 96), torch.int64)
    again, other = scenes().train[0], scenes("data.split_seed=1").train[0]
    assert torch.equal(image, again[0]) and torch.equal(mask, again[1]) and not torch.equal(image, other[0])
    for split in (data.train, data.val, data.test):
        met = torch.stack([split[i][1] for i in range(len(split))]).unique().tolist()
        assert met == [IGNORED, *range(11)]
    labelled = mask > 0
    assert image[0][labelled].float().mean() > image[0][mask == 0].float().mean() + 50, "digits are brighter"
    assert type(image) is torch.Tensor and type(mask) is torch.Tensor


def test_image_and_mask_move_alike() -> None:
    """The image says in its red channel what its mask says."""
    truth = np.zeros((40, 60), np.uint8)
    truth[10:30, 20:50] = 1
    image = Image.fromarray(np.repeat(truth[..., None] * 250, 3, axis=2))
    source = LabelledImages([image], (0,), [truth])
    for kind in ("random_crop", "scale_crop", "resize_crop", "plain"):
        data = {"image_size": 32, "train_transform": kind, "crop_scale_min": 0.3, "flip": True}
        transform = train_transform(data | {"color_jitter": 0.0, "hue_jitter": 0.0})
        images = MaskedImages(source, transform, cache=False)
        torch.manual_seed(0)
        moved = [images[0] for _ in range(20)]
        for x, y in moved:
            assert x.shape == (3, 32, 32) and y.shape == (32, 32)
            said = (x[0] > 125) == (y == 1)
            assert said[y != IGNORED].float().mean() > 0.91, kind
        assert len({x.numpy().tobytes() for x, _ in moved}) == (2 if kind == "plain" else 20)
    torch.manual_seed(1)
    padded = RandomScale()(tv_tensors.Image(torch.zeros(3, 40, 60)), tv_tensors.Mask(torch.zeros(1, 40, 60)))
    assert padded[0].shape[-2:] == padded[1].shape[-2:] != (40, 60)


def _seen(transform, image: Image.Image, truth: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return MaskedImages(LabelledImages([image], (0,), [truth]), transform, cache=False)[0]


def test_interpolation_and_evaluation_are_those_that_the_configuration_names() -> None:
    """An image is brought to size as it would be without its mask; its mask goes along by the nearest pixel."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 250, (90, 120, 3)).astype(np.uint8)
    truth = np.repeat(np.repeat(random.integers(0, 3, (9, 12)), 10, 0), 10, 1).astype(np.uint8)
    image = Image.fromarray(pixels)
    base = compose_plain(*SCENES, "data.image_size=64")["data"] | {"crop_scale_min": 0.3, "flip": True}
    for kind in ("plain", "random_crop", "resize_crop", "scale_crop"):
        ways = [
            _seen(train_transform(base | {"train_transform": kind, "interpolation": way}), image, truth)
            for way in ("bilinear", "bicubic")
        ]
        assert torch.equal(ways[0][1], ways[1][1]) and not torch.equal(ways[0][0], ways[1][0]), kind
        assert set(ways[0][1].unique().tolist()) <= {IGNORED, 0, 1, 2}
    for kind in ("squash", "center_crop", "squash_crop"):
        for way in ("bilinear", "bicubic"):
            data = base | {"train_transform": "random_crop", "eval_transform": kind, "interpolation": way}
            seen, target = _seen(eval_transform(data, masks=True), image, truth)
            assert torch.equal(seen, eval_transform(data).fixed(image)), (kind, way)
            # what the mask shows in the middle is what lies in the middle of the image
            grey = np.repeat(truth[..., None] * 100, 3, 2)
            shown = eval_transform(data).fixed(Image.fromarray(grey)).float()[0].div(100).round()
            assert (shown == target).float().mean() > 0.85, kind
    for interpolation in ("bilinear", "bicubic"):
        data = base | {"train_transform": "scale_crop", "interpolation": interpolation}
        seen, target = _seen(eval_transform(data, masks=True), image, truth)
        assert (target[:48] != IGNORED).all() and (target[48:] == IGNORED).all(), "the whole image is fitted in"
        whole = Image.fromarray(pixels).resize((64, 48), getattr(Image.Resampling, interpolation.upper()))
        assert (seen[:, :48].float() - torch.tensor(np.array(whole)).permute(2, 0, 1)).abs().max() <= 2


def test_an_image_is_fitted_whole_and_its_margin_counts_nowhere() -> None:
    for height, width, inside in ((20, 30, (20, 30)), (64, 32, (32, 16))):
        image, mask = Fit(32)(
            tv_tensors.Image(torch.full((3, height, width), 9, dtype=torch.uint8)),
            tv_tensors.Mask(torch.ones(1, height, width, dtype=torch.uint8)),
        )
        assert image.shape == (3, 32, 32) and mask.shape == (1, 32, 32)
        assert (mask == 1).sum() == inside[0] * inside[1] and (mask[0, : inside[0], : inside[1]] == 1).all()
        assert (mask[(mask != 1)] == UNLABELLED).all() and (image[:, : inside[0], : inside[1]] == 9).all()


def test_mask_files_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    (tmp_path / "a.png").write_bytes(png(values))
    (tmp_path / "b.mat").write_bytes(mat({"GTcls": {"Segmentation": values}}))
    (tmp_path / "c.png").write_bytes(b"no picture")
    (tmp_path / "d.mat").write_bytes(mat({"other": values}))
    files = MaskFiles(tuple(sorted(tmp_path.iterdir())))
    assert np.array_equal(files[0], values) and np.array_equal(files[1], values)
    for index in (2, 3):
        with pytest.raises(UserError, match=f"{files.paths[index].name} cannot be read as a mask"):
            files[index]
    meant = MaskFiles(files.paths, (UNLABELLED, 1, 0))[0]
    assert meant.flatten()[:4].tolist() == [UNLABELLED, 1, 0, UNLABELLED]
    source = LabelledImages([Image.new("RGB", (5, 3))], (0,), [values])
    with pytest.raises(UserError, match="5x3 pixels and its mask 4x3"):
        MaskedImages(source, train_transform(compose_plain(*SCENES)["data"]), cache=False)[0]


def brute_force_mean_iou(guess: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    counted, ious = labels >= 0, []
    for label in range(classes):
        ours, theirs = (guess == label) & counted, labels == label
        if (ours | theirs).any():
            ious.append(((ours & theirs).sum() / (ours | theirs).sum()).item())
    return 100 * sum(ious) / len(ious)


def test_scores_of_pixels_are_those_written_out() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 8, 8), torch.randint(4, (3, 8, 8))  # class 4 is named and nowhere
    labels[torch.rand(3, 8, 8) < 0.2] = IGNORED
    logits[:, 3] += 0.5
    counts = confusion(logits, labels)
    guess, counted = logits.argmax(1), labels >= 0
    loss = F.cross_entropy(logits, labels, reduction="sum")
    scores = pixel_scores(counts, float(loss), 3)
    assert counts.sum() == counted.sum()
    assert scores.top1 == pytest.approx(100 * (guess == labels)[counted].float().mean().item())
    assert scores.mean_iou == pytest.approx(brute_force_mean_iou(guess, labels, 5), rel=1e-5)
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores.images == 3 and scores.selected == scores.mean_iou and "top5" not in scores.figures()
    assert correct_in_top(logits, labels, 1).item() == pytest.approx(3 * scores.top1 / 100, rel=1e-5)
    coarse = torch.randn(3, 5, 3, 4)
    wide = F.interpolate(coarse, (8, 8), mode="bilinear")
    assert correct_in_top(coarse, labels, 1) == correct_in_top(wide, labels, 1)
    absent = pixel_scores(torch.tensor([[4, 0, 0], [1, 3, 0], [0, 0, 0]]), 0.0, 1)  # class 2 is nowhere
    assert absent.mean_iou == pytest.approx(100 * (4 / 5 + 3 / 4) / 2)


@pytest.mark.parametrize("stride", [8, 16])
def test_the_network_scores_every_pixel_and_razored_the_same(stride: int) -> None:
    outputs = []
    for razor in ("none", "compact"):
        torch.manual_seed(0)
        network = assemble(compose_plain(*SCENES, f"razor={razor}", f"task.output_stride={stride}"), 11)
        network.model.eval()
        outputs.append(network.model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))))
        (features,) = network.model.backbone(torch.zeros(1, 3, 64, 64))
        assert features.shape[-1] == 64 // stride
    assert outputs[0].shape == (2, 11, 64, 64) and torch.equal(*outputs)
    assert network.model.backbone.get_submodule("bn1").momentum == 0.01
    names = [name for name, p in network.model.named_parameters() if name.startswith(f"{network.backbone.head}.")]
    assert "classifier.4.weight" in names and not any(name.startswith("backbone") for name in names)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_razored_step_keeps_no_map_of_the_images_size(precision: str) -> None:
    """The same loss and the same gradient of the scores, from scores that are stretched in the loss alone."""
    settings = (*SCENES, "data.image_size=64", f"trainer.precision={precision}", "optim.label_smoothing=0.1")
    found = {}
    for razor in ("none", "compact"):
        config = compose_plain(*settings, f"razor={razor}")
        step = build_step(config, 11, 3, 64)
        scores: list[torch.Tensor] = []
        hook = step.model.classifier.register_forward_hook(lambda _, __, out, to=scores: to.append(out))
        with br.memory.ledger(step.model) as ledger:
            loss = step.forward()
        hook.remove()
        (slope,) = torch.autograd.grad(loss, scores[0])
        found[razor] = loss, slope, ledger.by_module().get("", 0)
    (dense, slope, kept), (razored, other, left) = found.values()
    exact = precision == "float32"
    assert torch.allclose(dense, razored, rtol=1e-6 if exact else 1e-3)
    similar = F.cosine_similarity(slope.flatten().float(), other.flatten().float(), dim=0)
    assert similar > (1 - 1e-6 if exact else 0.99)
    assert kept >= 3 * 11 * 64 * 64 * 4 and left <= 2 * scores[0].numel() * 4
    profile = StepProfile(config, 11, 64)
    assert profile.predict(3, 0.9).saved_bytes == pytest.approx(ledger.total_bytes, rel=0 if exact else 0.02)
    assert profile.predict(3, None).saved_bytes > ledger.total_bytes + kept // 2


def test_the_backbone_takes_the_pretrained_weights() -> None:
    config = compose_plain("task=segmentation", "data=scenes", "razor=none", "model=efficientnet_lite0")
    segmenter = assemble(config, 11)
    whole = assemble(compose_plain("razor=none", "model=efficientnet_lite0"), 10)
    weights = whole.model.state_dict()
    for name, value in segmenter.model.backbone.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert segmenter.backbone.weights is not None and set(segmenter.backbone.stages) == {
        f"backbone.{stage}" for stage in whole.backbone.stages
    }


def test_the_polynomial_schedule_falls_to_zero() -> None:
    optim = {"schedule": "poly", "warmup_steps": 0}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    schedule = Schedule(optimizer, optim, 100)
    rates = [schedule.set(step) for step in (0, 50, 99)]
    assert rates == pytest.approx([0.01, 0.01 * 0.5**0.9, 0.01 * 0.01**0.9])


REFUSED = (
    (("data=digits", "task=segmentation"), "data=digits task=segmentation: it has no class per pixel"),
    (("data=scenes",), "data=scenes task=classification: it has no class per image"),
    (("model=vit_b16", "model.pretrained=false", *SCENES[:2]), "model=vit_b16 task=segmentation"),
    (("model=proxylessnas", "model.pretrained=false", *SCENES[:2]), "model=proxylessnas task=segmentation"),
    ((*SCENES, "task.output_stride=12"), "task.output_stride=12 is not allowed: 8|16|32"),
    ((*SCENES, "method=tinytl_l"), "method=tinytl_l task=segmentation contradict each other"),
    ((*SCENES, "trainer.measure.image_size=64"), "trainer.measure.image_size=64 task=segmentation"),
    (("data.train_transform=scale_crop", "model.pretrained=false"), "data.train_transform=scale_crop is not allowed"),
)


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_refused_in_one_line(command, arguments: tuple[str, ...], words: str) -> None:
    code, lines = command(*arguments, "trainer.progress=false")
    assert code == 2 and len(lines) == 1 and words in lines[0], lines


def test_a_classification_keeps_its_folder() -> None:
    config = compose_plain()
    assert config_hash(config) == config_hash({key: value for key, value in config.items() if key != "task"})
    assert config_hash(config) != config_hash(compose_plain("task=segmentation"))
    validate(config)


def test_pets_bring_their_trimaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_tiny("pets", tmp_path / "pets")
    install(spec, tmp_path / "pets", say=lambda line: None)
    monkeypatch.setitem(PUBLISHED, "pets", spec)
    config = compose_plain("task=segmentation", "data=pets", f"paths.data={tmp_path}", "data.val_fraction=0.5")
    data = build_data(config["data"], config["paths"], task="segmentation")
    assert data.class_names == ("background", "pet") and len(data.train) == 6
    assert set(data.test[0][1].unique().tolist()) == {IGNORED, 0, 1}


def test_voc_joins_the_masks_of_sbd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_tiny("voc", tmp_path / "voc")
    install(spec, tmp_path / "voc", say=lambda line: None)
    listing = spec.read(tmp_path / "voc")
    endings = [path.suffix for path in listing.train.masks.paths]
    assert endings == [".png"] * 4 + [".mat"] * 4 and len(listing.mask_names) == 21
    assert {path.stem for path in listing.train.masks.paths}.isdisjoint(path.stem for path in listing.test.masks.paths)
    assert np.array_equal(listing.train.masks[0], listing.train.masks[7])
    monkeypatch.setitem(PUBLISHED, "voc", spec)
    config = compose_plain("task=segmentation", "data=voc", f"paths.data={tmp_path}", "data.val_fraction=0.25")
    data = build_data(config["data"], config["paths"], task="segmentation")
    assert (len(data.train), len(data.val), len(data.test)) == (6, 2, 4) and data.train[0][0].shape == (3, 513, 513)


def test_a_run_learns_and_its_table_says_mean_iou(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("trainer.steps=60", "optim.lr=3e-3", "trainer.batch_size=8", "data.image_size=48", "razor=compact")
    settings += ("trainer.measure.mode=saved", "trainer.progress=false", f"paths.outputs={tmp_path}")
    record = execute(compose_plain(*SCENES, *settings), "segmentation/row")
    assert set(record["test"]) == {"top1", "loss", "images", "mean_iou"} and record["test"]["images"] == 120
    first = (tmp_path / "segmentation").rglob("metrics.csv")
    rows = next(first).read_text().splitlines()
    header = rows[0].split(",")
    losses = [float(row.split(",")[header.index("train_loss")]) for row in rows[1:]]
    assert losses[-1] < 0.9 * losses[0] and rows[-1].split(",")[header.index("val_mean_iou")]
    assert record["memory"]["predicted_bytes"] == record["memory"]["saved_bytes"] > 0
    assert load_runs(tmp_path)["test_mean_iou"].notna().all()
    assert tables.main([str(tmp_path)]) == 0
    assert "Mean IoU, %" in capsys.readouterr().out


def test_the_released_setting_is_the_one_of_voc() -> None:
    rows = experiments("segmentation")
    assert len(rows) == sum(len(recipe.models) for recipe in SEGMENTATION.values()) * len(SEGMENTATION_ROWS)
    config = compose_plain("experiment=segmentation/voc_mobilenetv2_paper70")
    optim, trainer = config["optim"], config["trainer"]
    assert (optim["lr"], optim["head_lr_multiplier"] * optim["lr"], optim["schedule"]) == (1e-3, 1e-2, "poly")
    assert (trainer["steps"], trainer["batch_size"], config["data"]["image_size"]) == (30_000, 16, 513)
    razor = config["razor"]
    assert (razor["sparsity"], razor["norm"], config["task"]["output_stride"]) == (0.7, "pruned", 16)
    assert br.RazorConfig.paper(0.7).fill == "zero"
