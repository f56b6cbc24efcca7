"""One run from a configuration to a record."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from razorlab import schema
from razorlab.composition import composed
from razorlab.data import DataBundle, build_data
from razorlab.errors import UserError
from razorlab.files import atomic_write_text
from razorlab.models import text_encoder
from razorlab.records import circumstances, config_hash, read_record, run_directory, side_of, task_of, write_record
from razorlab.settings import validate
from razorlab.training.costs import PARTS, gpu_circumstances, pick_device
from razorlab.training.distributed import World, joined_world, own_gpu
from razorlab.training.evaluation import Scores
from razorlab.training.first_forward import try_forward
from razorlab.training.graphs import check_graph
from razorlab.training.loop import Fitted, Trainer
from razorlab.training.measuring import columns_here, is_pending, measure_apart
from razorlab.training.monitor import LOGGER, Monitor, SilentMonitor
from razorlab.training.network import Network, assemble
from razorlab.training.pictures import layer_figure, sample_figure
from razorlab.training.releasing import check_release
from razorlab.training.watch import watched_layers

RANK_SEEDS = 1_000_003  # between the seeds of two processes


def execute(config: Mapping[str, Any], experiment: str | None = None, recipe: str | None = None) -> dict[str, Any]:
    """Train what ``config`` describes and return its record.

    Everything is checked before the run's folder is made. With ``trainer.resume=auto`` a finished run is returned as it
    stands and an interrupted one goes on. Where several processes share the job, as ``torchrun`` starts them, the main
    one alone writes, and returns the record; the others return an empty dict.

    Args:
        config: the composed configuration as plain values.
        experiment: name of the experiment file, for the folder.
        recipe: name of the recipe that ``config`` began with, for the log and the record.

    Raises:
        UserError: a setting or file is wrong, or nothing can be written.
        FloatingPointError: the numbers of the training are not finite.
        Interrupted: a signal stopped the run; its state is saved.
        RankLost: another process of the job is gone.
    """
    valid = validate(config)
    with joined_world(pick_device(valid["trainer"]["device"]).type) as world:
        return _execute(valid, experiment, recipe, world)


def _execute(config: schema.Config, experiment: str | None, recipe: str | None, world: World) -> dict[str, Any]:
    folder = run_directory(config, experiment)
    if recipe and world.main:
        LOGGER.info("recipe %s: %s; recipe=none takes the plain defaults", recipe, composed("recipe")[recipe].origin)
    resume = config["trainer"]["resume"] == "auto"
    record = world.broadcast(_finished(folder) if resume and world.main else None)
    if record is not None:
        if world.main:
            date = record["circumstances"]["date"]
            LOGGER.info("%s is finished (%s); trainer.resume=never runs it again", folder, date)
            if is_pending(record):
                measure_apart(config, record, record["circumstances"]["processes"])
                write_record(folder / "record.json", {key: value for key, value in record.items() if key != "schema"})
        return record
    device = _prepare(config, world)
    task = task_of(config)
    encode = text_encoder(config["model"], side_of(config)) if task == "text" else None
    with world.one_at_first() as first:
        data = build_data(config["data"], config["paths"], first, task, encode)
    network = assemble(config, len(data.class_names))
    network.model.to(device)
    try_forward(network, config)
    if world.rank:
        torch.manual_seed(config["seed"] + RANK_SEEDS * world.rank)  # each process's dropout draws its own masks
    start = time.perf_counter()
    digest = config_hash(config)
    if world.main:
        _make_folder(folder, config, keep=resume)
    trainer = Trainer(network, data, config, folder, digest, world)
    try:
        if resume:
            trainer.resume()
        with Monitor(folder, trainer.step, trainer.epoch) if world.main else SilentMonitor() as monitor:
            if world.main:
                _log_beginning(network, data, config, folder, trainer)
            # Looking into a step's layers would have a compiled network compiled again at every step, and a CUDA graph
            # holds none of the Python that looks.
            blind = config["trainer"]["compile"] or config["trainer"]["cuda_graph"]
            with contextlib.nullcontext() if blind else watched_layers(network.model, trainer, monitor):
                fitted = trainer.fit(monitor)
            if not world.main:
                return {}
            record = {**_record(config, experiment, digest, fitted, len(data.class_names)), "recipe": recipe}
            record["circumstances"] = circumstances(
                str(device), torch.get_num_threads(), world.size, gpu_circumstances(str(device))
            )
            record["memory"] = columns_here(network, trainer, config)
            record["wall_seconds"] = time.perf_counter() - start
            monitor.figure("memory_by_layer", layer_figure(record["memory"]), trainer.step)
            monitor.figure("test_images", sample_figure(network, data), trainer.step)
            write_record(folder / "record.json", record)  # before the measurement, which may fail or be cut off
            del network, trainer  # and their memory on the device, which the measuring process needs
            if is_pending(record):
                measure_apart(config, record, world.size)
                record["wall_seconds"] = time.perf_counter() - start
                write_record(folder / "record.json", record)
            monitor.finish(config, _final_metrics(record))
            LOGGER.info(
                "test %s, epoch %d %s; record in %s",
                _said(fitted.test),
                fitted.best_epoch,
                "is the last" if config["data"]["protocol"] == "official" else "selected on validation",
                folder,
            )
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written or read ({error.strerror or error}): make room or mend the "
            "folder; the same command goes on from the last checkpoint"
        ) from error
    return record


def _finished(folder: Path) -> dict[str, Any] | None:
    return read_record(folder / "record.json") if (folder / "record.json").is_file() else None


def _prepare(config: schema.Config, world: World) -> torch.device:
    """Seed every generator and set what is global in torch."""
    settings = config["trainer"]
    device = pick_device(settings["device"])
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("trainer.device=cuda is not possible: torch sees no CUDA device; choose cpu or auto")
        if world.size > 1:
            device = own_gpu(world.local_rank)
    check_graph(config, device, world.size)
    check_release(config, world.size)
    random.seed(config["seed"])
    np.random.seed(config["seed"] % 2**32)
    torch.manual_seed(config["seed"])
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    if settings["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for, before CUDA starts
    torch.use_deterministic_algorithms(settings["deterministic"])
    return device


def _make_folder(folder: Path, config: schema.Config, keep: bool) -> None:
    try:
        if folder.exists() and not keep:
            shutil.rmtree(folder)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    except OSError as error:
        raise UserError(f"paths.outputs={config['paths']['outputs']} cannot be written: {error}") from error


def _log_beginning(network: Network, data: DataBundle, config: schema.Config, folder: Path, trainer: Trainer) -> None:
    trained = sum(p.numel() for p in network.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.model.parameters())
    LOGGER.info("run folder %s", folder)
    LOGGER.info(
        "%s: %d training, %d validation, %d test %s, %d classes (%s)",
        config["data"]["name"],
        len(data.train),
        len(data.val),
        len(data.test),
        "texts" if task_of(config) == "text" else "images",
        len(data.class_names),
        data.note,
    )
    LOGGER.info(
        "%s: %.2f M parameters, %.2f M train; weights %s",
        config["model"]["name"],
        total / 1e6,
        trained / 1e6,
        network.backbone.weights or "random",
    )
    if trainer.world.size > 1:
        LOGGER.info("%d processes share each batch of %d", trainer.world.size, trainer.batch)
    if trainer.step:
        LOGGER.info("resumed after epoch %d, step %d", trainer.epoch, trainer.step)
    if network.report:
        (folder / "razor.txt").write_text(network.report + "\n", encoding="utf-8")
        LOGGER.info("razored; what was replaced and what stayed is in %s", folder / "razor.txt")


def _record(config: schema.Config, experiment: str | None, digest: str, fitted: Fitted, classes: int) -> dict[str, Any]:
    # The first steps compile kernels and warm caches: they are left out of the quantiles where there are enough.
    times = np.array(fitted.step_seconds[5:] or fitted.step_seconds)
    names = ("p10", "p50", "p90")
    return {
        "experiment": experiment,
        "config": dict(config),
        "config_hash": digest,
        "seed": config["seed"],
        "classes": classes,
        "val": fitted.val.figures(),
        "test": fitted.test.figures(),
        "best_epoch": fitted.best_epoch,
        "steps": fitted.steps,
        "skipped_steps": fitted.skipped_steps,
        "train_step_seconds": dict(zip(names, np.quantile(times, (0.1, 0.5, 0.9)).tolist(), strict=True)),
    }


def _said(scores: Scores) -> str:
    if scores.mean_iou is not None:
        return f"mean IoU {scores.mean_iou:.2f}%, pixel accuracy {scores.top1:.2f}%"
    return f"accuracy {scores.top1:.2f}% (top-5 {scores.top5:.2f}%)"


def _final_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    scores = [(split, name) for split in ("val", "test") for name in ("top1", "top5", "mean_iou")]
    metrics = {f"final/{split}_{name}": record[split][name] for split, name in scores if name in record[split]}
    memory = record["memory"]
    metrics |= {
        f"memory/{name}": memory[name]
        for name in ("saved_bytes", "predicted_peak_bytes", "peak_bytes", *PARTS, "total_bytes")
        if memory.get(name) is not None
    }
    return metrics
