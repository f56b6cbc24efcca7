"""Values of configuration keys that are right by themselves and contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer.errors import UserError


def check_conflicts(given: Mapping[str, Any]) -> None:
    """Refuse keys whose values contradict each other.

    Raises:
        UserError: naming both, and what to choose.
    """
    preset, sparsity = given["razor.name"], given["razor.sparsity"]
    if preset in ("none", "int8"):
        if sparsity:
            raise UserError(
                f"razor={preset} razor.sparsity={sparsity} contradict each other: {preset} prunes nothing; "
                "choose razor=compact or razor=paper, or leave razor.sparsity out"
            )
        extra = [
            path
            for path in ("values", "index", "fill", "norm", "activation", "attention", "rest", "head_sparsity")
            if given[f"razor.{path}"] is not None
        ]
        if extra and preset == "none":
            raise UserError(
                f"razor=none razor.{extra[0]}={given[f'razor.{extra[0]}']} contradict each other: "
                "none keeps everything dense; choose another preset or leave the key out"
            )
    if given["method.name"] == "norm_last" and given["method.bn_affine"] == "frozen":
        raise UserError(
            "method=norm_last method.bn_affine=frozen contradict each other: norm_last trains the norm "
            "layers; choose method=last, or method.bn_affine=train"
        )
    batch, micro = given["trainer.batch_size"], given["trainer.micro_batch"]
    if micro is not None and micro > batch:
        raise UserError.value("trainer.micro_batch", micro, f"at most trainer.batch_size={batch}")
    if given["trainer.cuda_graph"]:
        for path, value, reason in (
            ("trainer.device", "cpu", "only a CUDA device has graphs"),
            ("trainer.compile", True, "choose one of them"),
            ("trainer.checkpointing", "block", "recomputation sets the random state, which a capture cannot"),
            ("trainer.checkpointing", "stage", "recomputation sets the random state, which a capture cannot"),
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
