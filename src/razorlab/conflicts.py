"""Values of configuration keys that are right by themselves and contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from razorlab.errors import UserError
from razorlab.keys import RAZOR_OVERRIDES


def check_conflicts(given: Mapping[str, Any]) -> None:
    """Refuse keys whose values contradict each other.

    Raises:
        UserError: naming both, and what to choose.
    """
    if given["data.name"] == "folder" and given["data.root"] is None:
        raise UserError("data.root must be given (folder that holds the images): write data.root=...")
    preset, sparsity = given["razor.name"], given["razor.sparsity"]
    if preset in ("none", "int8"):
        if sparsity:
            raise UserError(
                f"razor={preset} razor.sparsity={sparsity} contradict each other: {preset} prunes nothing; "
                "choose razor=compact or razor=paper, or leave razor.sparsity out"
            )
        extra = [path for path in (*RAZOR_OVERRIDES, "dense") if given[f"razor.{path}"] is not None]
        for path, plain in (("forward", "dense"), ("selection", "magnitude")):
            if (value := given[f"razor.{path}"]) != plain:
                raise UserError(
                    f"razor={preset} razor.{path}={value} contradict each other: {preset} prunes nothing; "
                    "choose razor=paper or razor=compact"
                )
        if extra and preset == "none":
            raise UserError(
                f"razor=none razor.{extra[0]}={given[f'razor.{extra[0]}']} contradict each other: "
                "none keeps everything dense; choose another preset or leave the key out"
            )
    if preset != "none" and given["trainer.checkpointing"] == "selective":
        raise UserError(
            f"razor={preset} trainer.checkpointing=selective contradict each other: what selective checkpointing keeps "
            "of a product is dense, and kept past the razor; choose trainer.checkpointing=block, or razor=none"
        )
    if given["method.name"] == "norm_last" and given["method.bn_affine"] == "frozen":
        raise UserError(
            "method=norm_last method.bn_affine=frozen contradict each other: norm_last trains the norm "
            "layers; choose method=last, or method.bn_affine=train"
        )
    batch, micro = given["trainer.batch_size"], given["trainer.micro_batch"]
    if micro is not None and micro > batch:
        raise UserError.value("trainer.micro_batch", micro, f"at most trainer.batch_size={batch}")
    _check_task(given)
    _check_release(given)
    _check_state_bits(given)
    if given["trainer.cuda_graph"]:
        for path, value, reason in (
            ("trainer.device", "cpu", "only a CUDA device has graphs"),
            ("trainer.compile", True, "choose one of them"),
            ("trainer.checkpointing", "block", "recomputation sets the random state, which a capture cannot"),
            ("trainer.checkpointing", "stage", "recomputation sets the random state, which a capture cannot"),
            ("trainer.checkpointing", "selective", "recomputation sets the random state, which a capture cannot"),
        ):
            if given[path] == value:
                shown = str(value).lower()
                raise UserError(f"trainer.cuda_graph=true {path}={shown} contradict each other: {reason}")
    if given["data.val_fraction"] + given["data.test_fraction"] >= 1:
        raise UserError.value(
            "data.test_fraction",
            given["data.test_fraction"],
            f"below 1 - data.val_fraction={1 - given['data.val_fraction']:g}",
        )


def _check_task(given: Mapping[str, Any]) -> None:
    """What segmentation and text have no form for."""
    if given["task.name"] == "text":
        _check_text(given)
    stride = given["task.output_stride"]
    if given["task.name"] != "segmentation":
        return
    if stride not in (8, 16, 32):
        raise UserError.value("task.output_stride", "null" if stride is None else stride, "8|16|32")
    if given["method.name"].startswith("tinytl"):
        raise UserError(
            f"method={given['method.name']} task=segmentation contradict each other: TinyTL's branches are made for "
            "classifiers; choose another method"
        )
    measured = given["trainer.measure.image_size"]
    if measured not in (None, given["data.image_size"]):
        raise UserError(
            f"trainer.measure.image_size={measured} task=segmentation contradict each other: masks are not brought to "
            "another size; leave it null"
        )


def _check_text(given: Mapping[str, Any]) -> None:
    if given["task.tokens"] is None:
        raise UserError("task.tokens=null is not allowed: it takes a whole number from 8 for task=text, such as 64")
    method = given["method.name"]
    if method.startswith("tinytl"):
        raise UserError(f"method={method} task=text contradict each other: TinyTL's branches are convolutions")
    for path in ("trainer.measure.image_size", "trainer.channels_last"):
        if given[path]:
            shown = str(given[path]).lower()
            raise UserError(f"{path}={shown} task=text contradict each other: texts are no images; leave it out")


def _check_release(given: Mapping[str, Any]) -> None:
    """Released gradients: what needs all of them before the first weight changes cannot be had."""
    if not given["trainer.release_gradients"]:
        return
    micro = given["trainer.micro_batch"]
    reasons = (
        (
            "optim.grad_clip",
            given["optim.grad_clip"] is not None,
            "the norm of all gradients is known when most have stepped; optim.grad_clip_each clips each by its own",
        ),
        (
            "trainer.micro_batch",
            micro is not None and micro < given["trainer.batch_size"],
            "gradients add up over micro-batches; lower trainer.batch_size, or raise razor.sparsity",
        ),
        (
            "trainer.nonfinite",
            given["trainer.nonfinite"] == "skip",
            "others have stepped when a bad gradient is found; choose stop, which goes on from the last checkpoint",
        ),
        (
            "trainer.precision",
            given["trainer.precision"] == "float16",
            "an overflow of the scaled loss is found when others have stepped; choose bfloat16",
        ),
        (
            "trainer.compile",
            given["trainer.compile"],
            "a compiled backward hands out all gradients at once, so that nothing would be released",
        ),
        ("trainer.cuda_graph", given["trainer.cuda_graph"], "a graph's gradients lie in memory of their own"),
    )
    for path, conflicts, reason in reasons:
        if conflicts:
            shown = str(given[path]).lower()
            raise UserError(f"trainer.release_gradients=true {path}={shown} contradict each other: {reason}")


def _check_state_bits(given: Mapping[str, Any]) -> None:
    """Optimizer state at 8 bits: what the library has no form for."""
    if given["optim.state_bits"] is None:
        return
    name = given["optim.name"]
    if name == "sgd" and not given["optim.momentum"]:
        raise UserError(
            "optim.state_bits=8 optim.momentum=0 contradict each other: sgd without momentum has no state; "
            "leave optim.state_bits out"
        )
    if name == "adam" and given["optim.weight_decay"]:
        raise UserError(
            f"optim.state_bits=8 optim=adam optim.weight_decay={given['optim.weight_decay']:g} contradict each other: "
            "at 8 bits the decay is that of adamw; choose optim=adamw"
        )
    if given["trainer.cuda_graph"]:
        raise UserError(
            "optim.state_bits=8 trainer.cuda_graph=true contradict each other: its step counts in Python; "
            "leave one of them out"
        )
