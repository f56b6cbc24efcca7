"""Tables about the CUDA kernels that need no GPU: what the assembler says of each, and a roofline of a training step.

    python scripts/kernel_tables.py resources   # registers, shared memory, occupancy; compiles for sm_80, sm_90, sm_100
    python scripts/kernel_tables.py roofline    # steps on three GPUs; compiles what they launch for sm_90
    python scripts/kernel_tables.py issue       # of the kernels of ViT-B/16's step: launches and instructions

Compiling everything takes some minutes the first time. Binaries are kept in Triton's cache: a command that was cut off
goes on where it was.

The roofline runs a step on fake tensors, which have shapes but no data, along the path that CUDA takes by default. It
adds up, operator by operator, the largest of three: its arithmetic at the device's peak rate, its bytes at the device's
bandwidth, and, of our own kernels, the instructions in their binaries at the rate at which the device issues them;
never less than a launch takes. The host's time is that of its launches; a step takes the longer of the two. It knows
nothing of caches or of how near a kernel comes to a peak: a prediction.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import backrazor as br
from backrazor.kernels import dispatch
from razorlab import ahead, binaries
from razorlab.bench.rows import CLASSES
from razorlab.launches import Launches, as_on_cuda
from razorlab.models import build_backbone
from razorlab.training.methods import apply_method, set_train_mode

LAUNCH_SECONDS = 3e-6  # about the shortest a kernel takes, and what lies between two of them
HOST_SECONDS = 12e-6  # of the host for a launch: 11 to 18 for a Triton kernel, measured with a stand-in driver


@dataclass(frozen=True)
class Gpu:
    """Peak rates per second by the maker's data sheets: bytes, operations in float32 and in dense bfloat16, and
    instructions of a warp (four per multiprocessor and clock)."""

    name: str
    bandwidth: float
    float32: float
    bfloat16: float
    issue: float


GPUS = (
    Gpu("A100 80 GB SXM", 2.04e12, 19.5e12, 312e12, 108 * 4 * 1.41e9),
    Gpu("H100 80 GB SXM", 3.35e12, 67e12, 989e12, 132 * 4 * 1.76e9),
    Gpu("RTX 4090, 24 GB", 1.01e12, 82.6e12, 165e12, 128 * 4 * 2.52e9),
)
_ATEN = torch.ops.aten
_OPERATIONS = flop_registry | {  # PyTorch does not count in-place products, nor the CPU's attention
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
STEPS = (("vit_b16", 128, torch.float32), ("vit_b16", 128, torch.bfloat16), ("proxylessnas", 8, torch.float32))


def _bytes(*values: object) -> int:
    """Of all distinct tensors in ``values``; what is broadcast counts once."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors.values())


def kernel_bytes(name: str, inputs: tuple, result: object) -> int:
    """Bytes that one of this library's operators moves, by the counts of docs/kernels.md."""
    once = _bytes(inputs) + _bytes(result)
    if name == "topk_pack":
        x, keep, _, index, _ = inputs
        dense, values = _bytes(x), result[0]
        staged = 2 * x.shape[0] * keep * x.element_size() if values.dtype == torch.int8 and index != "none" else 0
        if index == "none":
            return once
        return (4 if x.element_size() == 4 else 3) * dense + staged + _bytes(result)
    if name in ("topk_unpack", "topk_unpack_normalised"):
        return once + _bytes(inputs[2] if inputs[3].numel() == 0 else inputs[3])
    return once


class Row(NamedTuple):
    """What an operator does: arithmetic operations, bytes, launches, whether in float32; of ours, the kernels."""

    name: str
    operations: float
    moved: int
    launches: int
    wide: bool
    kernels: tuple[ahead.Launch, ...] = ()


class Traffic(Launches):
    """Launches, and a row for every operator that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    def note(self, function, args: tuple, kwargs: dict, result: object, launches: int) -> None:
        super().note(function, args, kwargs, result, launches)
        if function.namespace == "backrazor":
            name = function._schema.name
            moved = kernel_bytes(name.split("::")[1], args, result)
            kernels = self.work_of_operator(function, args, kwargs).launches
            self.rows.append(Row(name, 0, moved, launches, False, kernels))
            return
        count = _OPERATIONS.get(function.overloadpacket)
        operations = count(*args, **kwargs, out_val=result) if count else 0
        wide = any(isinstance(leaf, Tensor) and leaf.dtype == torch.float32 for leaf in tree_leaves(args))
        self.rows.append(Row(str(function), operations, _bytes(args, kwargs) + _bytes(result), launches, wide))

    @property
    def own(self) -> list[Row]:
        """The rows of this library's operators."""
        return [row for row in self.rows if row.name.startswith("backrazor")]

    def seconds(self, gpu: Gpu) -> float:
        return sum(_seconds(row, gpu) for row in self.rows)


def _seconds(row: Row, gpu: Gpu) -> float:
    arithmetic = row.operations / (gpu.float32 if row.wide else gpu.bfloat16)
    issue = sum(map(warp_instructions, row.kernels)) / gpu.issue
    return max(arithmetic, row.moved / gpu.bandwidth, issue, row.launches * LAUNCH_SECONDS)


_issued = functools.cache(binaries.issued)


def warp_instructions(launch: ahead.Launch) -> int:
    """Instructions that all warps of a launch issue, by its binary for sm_90, from above."""
    outside, inside = _issued(launch.configuration)
    return launch.programs * launch.configuration.warps * (outside + launch.passes * inside)


def traffic_of(backbone: str, batch: int, dtype: torch.dtype, config: br.RazorConfig | None) -> Traffic:
    """A training step (forward, backward) on fake tensors; the network in ``dtype``, batch norms frozen."""
    spec = {"name": backbone, "pretrained": False, "weights": None, "drop_rate": 0.0, "head_init": "zero"}
    built = build_backbone(spec, CLASSES, "pretrain")
    frozen = apply_method(built.model, built.head, {"name": "full", "bn_affine": "frozen", "bn_stats": "frozen"})
    if config is not None:
        br.razor_(built.model, config)
    set_train_mode(built.model, frozen)
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_cuda():
        state = {name: _fake(t, dtype) for name, t in (*built.model.named_parameters(), *built.model.named_buffers())}
        images = torch.empty(batch, 3, 224, 224, dtype=dtype)
        labels = torch.empty(batch, dtype=torch.int64)
        with Traffic() as traffic:
            logits = torch.func.functional_call(built.model, state, (images,))
            F.cross_entropy(logits.float(), labels).backward()
    return traffic


def _fake(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    wanted = dtype if tensor.is_floating_point() else tensor.dtype
    fake = torch.empty(tensor.shape, dtype=wanted)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def roofline() -> None:
    print("| step | GPU | dense: GPU, host, ms | compact 0.9: GPU, host, ms | overhead | ours: bytes, issue, all, ms |")
    print("|---|---|---|---|---|---|")
    for backbone, batch, dtype in STEPS:
        dense = traffic_of(backbone, batch, dtype, None)
        razored = traffic_of(backbone, batch, dtype, br.RazorConfig.compact(0.9))
        issued = sum(warp_instructions(launch) for row in razored.own for launch in row.kernels)
        moved = sum(row.moved for row in razored.own)
        for gpu in GPUS:
            own = moved / gpu.bandwidth, issued / gpu.issue, sum(_seconds(row, gpu) for row in razored.own)
            (before, before_host), (after, after_host) = (
                (1e3 * traffic.seconds(gpu), 1e3 * traffic.total * HOST_SECONDS) for traffic in (dense, razored)
            )
            overhead = max(after, after_host) / max(before, before_host) - 1
            kind = str(dtype).removeprefix("torch.")
            print(
                f"| {backbone}, batch {batch}, {kind} | {gpu.name} | {before:.1f}, {before_host:.1f} | "
                f"{after:.1f}, {after_host:.1f} | {overhead:+.0%} | {', '.join(f'{1e3 * part:.1f}' for part in own)} |",
                flush=True,
            )
        print(f"{backbone}, {dtype}: {dense.total} launches dense, {razored.total} razored", file=sys.stderr)


def issue() -> None:
    backbone, batch, dtype = STEPS[1]
    launches: dict[str, list[ahead.Launch]] = {}
    for row in traffic_of(backbone, batch, dtype, br.RazorConfig.compact(0.9)).own:
        for launch in row.kernels:
            configuration = launch.configuration
            launches.setdefault(f"{configuration.family}.{configuration.kernel.lstrip('_')}", []).append(launch)
    total = {name: sum(map(warp_instructions, ours)) for name, ours in launches.items()}
    print("| kernel | launches | instructions per thread: outside, per pass | billions of a warp | H100, ms |")
    print("|---|---|---|---|---|")
    for name in sorted(total, key=total.__getitem__, reverse=True):
        counts = {_issued(launch.configuration) for launch in launches[name]}
        shown = (_span([count[part] for count in counts], "d") for part in (0, 1))
        print(
            f"| {name} | {len(launches[name])} | {', '.join(shown)} | {total[name] / 1e9:.2f} | "
            f"{1e3 * total[name] / GPUS[1].issue:.2f} |"
        )


def resources() -> None:
    wanted = ahead.configurations()
    capabilities = (80, 90, 100)
    binaries = []
    for capability in capabilities:
        binaries += binaries.compile_all(wanted, capability, os.cpu_count() or 1)
        print(f"sm_{capability}: {len(wanted)} binaries", file=sys.stderr)
    kernels = dict.fromkeys((b.configuration.family, b.configuration.kernel) for b in binaries)
    print("| kernel | binaries | spilled bytes | registers | shared bytes | occupancy sm_80 | sm_90 | sm_100 |")
    print("|---|---|---|---|---|---|---|---|")
    for family, kernel in kernels:
        own = [b for b in binaries if (b.configuration.family, b.configuration.kernel) == (family, kernel)]
        shares = [_span([b.occupancy for b in own if b.capability == capability], ".2f") for capability in capabilities]
        sizes = _span([b.registers for b in own], "d"), _span([b.shared_bytes for b in own], "d")
        cells = f"{family}.{kernel.lstrip('_')}", len(own), max(b.local_bytes for b in own), *sizes, *shares
        print("| " + " | ".join(str(cell) for cell in cells) + " |")


def _span(values: list, style: str) -> str:
    low, high = format(min(values), style), format(max(values), style)
    return low if low == high else f"{low} to {high}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("resources", "roofline", "issue"))
    table = parser.parse_args().table
    if dispatch.forced() is not None:
        print(f"kernel_tables.py {table}: unset BACKRAZOR_KERNELS first", file=sys.stderr)
        return 2
    {"resources": resources, "roofline": roofline, "issue": issue}[table]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
