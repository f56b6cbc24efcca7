"""Training on a device that has little memory: what fits below a hard limit, and what the system stops.

    python examples/hard_limit.py                       # MobileNetV2, batch 8, 224 px, 160 MB: three rows
    python examples/hard_limit.py --rows ours --limit 140

Each row trains one epoch in a process of its own: dense, with checkpointing by block, and ours (activations pruned to
3%, every gradient freed as soon as its parameter has stepped). Optimizer, batch, precision and frozen batch norm are
the same. Weights are random and images are scikit-learn's digits, drawn large.

The limit counts from "loaded": torch, timm, scikit-learn and backrazor imported, and two steps of a small plain network
taken with the same optimizer, so that all rows start with what PyTorch loads at its first step. What a row needs from
there on is its own, weights and our kernels with their loader included. The kernels were compiled beforehand.

The limit is a memory cgroup (version 2) where this process may make one beside its own; it counts pages that are used.
Else it is RLIMIT_DATA, which counts private writable memory whether it is used or not. So every row runs on one thread
(the stack of another counts whole), and its allocator returns what is freed (MALLOC_* below).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import backrazor as br

ROWS = ("dense", "checkpointing", "ours")
STOPPED = 3  # the exit code of a row that could not allocate
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


def small_steps() -> None:
    """What PyTorch loads at its first step."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        F.cross_entropy(model(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()


def network(row: str, sparsity: float, images: Tensor) -> nn.Module:
    """MobileNetV2 for ten classes; batch norm has the statistics of ``images`` and is frozen."""
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_100", num_classes=10)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.requires_grad_(False)
    with torch.no_grad():
        model.train()(images)
    if row == "ours":
        br.razor_(model, br.RazorConfig(sparsity))
    if row == "checkpointing":
        for stage in model.blocks:
            for block in stage:
                block.forward = _recomputed(block.forward)
    for norm in norms:
        norm.eval()
    return model


def _recomputed(forward):
    return lambda x: checkpoint(forward, x, use_reentrant=False)


def drawn(digits: Tensor, side: int) -> Tensor:
    """(B, 8, 8) -> (B, 3, side, side)."""
    return F.interpolate(digits[:, None], side, mode="bilinear").expand(-1, 3, -1, -1).contiguous()


def status(key: str) -> int:
    """A line of this process's status, bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def set_limit(limit: int, cgroup: Path | None) -> None:
    """From now on this process gets ``limit`` bytes more than it has."""
    ctypes.CDLL(None).malloc_trim(0)
    if cgroup is None:
        above = status("VmData") + limit
        resource.setrlimit(resource.RLIMIT_DATA, (above, above))
        return
    (cgroup / "memory.max").write_text(str(limit))
    swap = cgroup / "memory.swap.max"
    if swap.exists():
        swap.write_text("0")
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))  # what was used before stays with the group before


def new_cgroup() -> Path | None:
    """A memory cgroup beside the one of this process, None where there is no such thing or it may not be written."""
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        parent = Path("/sys/fs/cgroup", own.removeprefix("0::").lstrip("/")).parent
        if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
            return None
        folder = parent / f"hard-limit-{os.getpid()}"
        folder.mkdir()
        return folder
    except (OSError, StopIteration):
        return None


def train(options: argparse.Namespace) -> int:
    """One row in this process: 0, or ``STOPPED``."""
    torch.set_num_threads(1)
    source = load_digits()
    digits = torch.tensor(source.images[: options.images], dtype=torch.float32) / 8 - 1
    labels = torch.tensor(source.target[: options.images])
    del source
    small_steps()
    set_limit(int(options.limit * 1e6), options.cgroup)
    start = status("VmRSS")
    losses: list[float] = []
    try:
        model = network(options.row, options.sparsity, drawn(digits[:2], options.side))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=options.rate, momentum=0.9)
        if options.row == "ours":
            br.memory.GradientRelease(optimizer)
        for x, y in zip(digits.split(options.batch), labels.split(options.batch), strict=True):
            loss = F.cross_entropy(model(drawn(x, options.side)), y)
            loss.backward()
            optimizer.step()  # ours has stepped already
            optimizer.zero_grad()
            losses.append(loss.item())
            del loss
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        words = str(error).strip() or "no memory left"
        reason = words.splitlines()[0].rpartition("DefaultCPUAllocator: ")[2]
        print(f"{options.row}: stopped in step {len(losses) + 1}: {reason}")
        return STOPPED
    tenth = max(len(losses) // 10, 1)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    used = (status("VmHWM") - start) / 1e6
    print(f"{options.row}: trained {len(losses)} steps, loss {first:.2f} to {last:.2f}, {used:.0f} MB resident at most")
    return 0


def in_own_process(row: str, arguments: list[str]) -> int:
    """The exit code of a row."""
    cgroup = new_cgroup()
    command = [sys.executable, __file__, *arguments, "--row", row]
    try:
        command += ["--cgroup", str(cgroup)] if cgroup else []
        code = subprocess.run(command, env={**os.environ, **ENVIRONMENT}).returncode
    finally:
        if cgroup is not None:
            cgroup.rmdir()
    if code not in (0, STOPPED):
        print(f"{row}: ended with code {code}" + ("; killed at the limit" if code == -9 and cgroup else ""))
    return code


def main(arguments: list[str] | None = None) -> dict[str, int]:
    """Every row after the other; returns their exit codes: 0 trained, ``STOPPED`` or -9 at the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--limit", type=float, default=160.0, help="MB above what is loaded")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224, help="of the images, pixels")
    parser.add_argument("--images", type=int, default=320, help="of the epoch")
    parser.add_argument("--rate", type=float, default=1e-3, help="of learning")
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--cgroup", type=Path, help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if options.row is not None:
        sys.exit(train(options))
    subprocess.run([sys.executable, "-m", "backrazor.warmup", "--types", "float32"], check=True)
    probe = new_cgroup()
    if probe is not None:
        probe.rmdir()
    kind = "RLIMIT_DATA" if probe is None else "a memory cgroup"
    print(
        f"{options.limit:.0f} MB above what is loaded, by {kind}; batch {options.batch}, {options.side} px", flush=True
    )
    return {row: in_own_process(row, arguments) for row in options.rows}


if __name__ == "__main__":
    main()
