"""The callback under the real Trainer of Lightning."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import backrazor as br
from backrazor.integrations.lightning import RazorCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers:UserWarning",
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",  # Lightning's own call of PyTorch
)

CONFIG = br.RazorConfig(sparsity=0.8)


class Module(LightningModule):
    """A small network whose loss is made in ``training_step``, as most are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        convolution = nn.Conv2d(1, 16, 3, padding=1)
        self.network = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(1024, 32), nn.GELU())
        self.head = nn.Linear(32, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.head(self.network(images)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(bad: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 8, 8, generator=generator)
    if bad:
        images[5] = float("inf")
    return DataLoader(TensorDataset(images, torch.randint(0, 10, (64,), generator=generator)), 8)


def trainer(folder: Path, *callbacks: object, **changes: object) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    usual: dict = {"max_steps": 4, "log_every_n_steps": 2, "logger": CSVLogger(folder), "enable_checkpointing": False}
    return Trainer(**(quiet | usual | changes), callbacks=list(callbacks))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def logged(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open() as text:
        return list(csv.DictReader(text))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_razors_logs_what_the_ledger_says_and_trains_as_a_plain_loop_does(tmp_path: Path, accumulated: int) -> None:
    module, callback = Module(), RazorCallback(CONFIG, layers=True)
    seed_everything(0)
    trainer(tmp_path, callback, accumulate_grad_batches=accumulated).fit(module, loader())
    assert callback.report is not None and len(callback.report.replaced) == 5
    rows = logged(tmp_path)
    assert len(rows) == 2

    plain = Module()
    br.razor_(plain, CONFIG)
    optimizer = plain.configure_optimizers()
    for index, batch in enumerate(loader()):
        with br.memory.ledger(plain) as book:
            loss = plain.training_step(batch, 0)
        (loss / accumulated).backward()
        if (index + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
        if (index + 1) // accumulated == 4:
            break
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(module).items())
    for row in rows:
        assert float(row["razor/saved_MB"]) == pytest.approx(book.total_bytes / 1e6, rel=1e-4)
        assert 0.4 < float(row["razor/kept_energy_lowest"]) <= float(row["razor/kept_energy"]) <= 1
        assert float(row["razor/kept_energy/head"]) > 0


def test_bad_numbers_stop_training_and_leave_the_weights_alone(tmp_path: Path) -> None:
    module = Module()
    before = weights(module)
    with pytest.raises(FloatingPointError, match="NaN or Inf in the input of"):
        trainer(tmp_path, RazorCallback(CONFIG), log_every_n_steps=1).fit(module, loader(bad=True))
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_a_checkpoint_of_a_razored_module_loads_in_a_plain_one(tmp_path: Path) -> None:
    module = Module()
    saving = ModelCheckpoint(tmp_path / "saved", filename="last")
    trainer(tmp_path, RazorCallback(CONFIG), saving, enable_checkpointing=True).fit(module, loader())
    plain = Module.load_from_checkpoint(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert not any(isinstance(part, br.nn.DropIn) for part in plain.modules())
    assert all(torch.equal(value, weights(module)[name]) for name, value in weights(plain).items())


def test_what_was_razored_by_hand_stays_and_bad_settings_are_refused(tmp_path: Path) -> None:
    module, callback = Module(), RazorCallback(CONFIG, every=3)
    br.razor_(module.network, br.RazorConfig(sparsity=0.5))
    trainer(tmp_path, callback).fit(module, loader())
    assert callback.report is None and type(module.head) is nn.Linear
    assert callback.figures["saved_MB"] > 0
    with pytest.raises(ValueError, match="every=-1"):
        RazorCallback(every=-1)


def test_without_lightning_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "backrazor.integrations.lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"pip install backrazor\[lightning\]"):
        import backrazor.integrations.lightning  # noqa: F401
