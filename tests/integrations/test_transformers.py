"""The callback under the real Trainer of transformers: what it razors, logs and stops on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import backrazor as br
from backrazor.integrations.transformers import RazorCallback

CONFIG = br.RazorConfig(sparsity=0.8)


class Images(Dataset):
    """Random images of 8 x 8 pixels with labels; ``bad`` is the index of one that holds NaN."""

    def __init__(self, count: int = 64, bad: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 1, 8, 8, generator=generator)
        self.labels = torch.randint(0, 10, (count,), generator=generator)
        if bad is not None:
            self.pixels[bad, 0, 0, 0] = float("nan")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**shape, **width))


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    usual: dict = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "seed": 0,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(usual | changes))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_razors_before_training_logs_what_the_ledger_says_and_trains_as_by_hand(tmp_path: Path) -> None:
    data, results = Images(), {}
    for way in ("callback", "by hand"):
        model = vit()
        callback = RazorCallback(CONFIG, layers=True)
        if way == "by hand":
            br.razor_(model, CONFIG)
        callbacks = [callback] if way == "callback" else []
        settings = arguments(tmp_path, gradient_accumulation_steps=2)
        trainer = Trainer(model, settings, train_dataset=data, callbacks=callbacks)
        assert any(isinstance(module, br.nn.DropIn) for module in model.modules()), "razored before it is wrapped"
        trainer.train()
        results[way] = weights(model)
        if way == "callback":
            logged = [entry for entry in trainer.state.log_history if "loss" in entry]
            assert [entry["step"] for entry in logged] == [2, 4]
            assert callback.report is not None and len(callback.report.replaced) > 8
    with br.memory.ledger(model) as book:
        output = model(pixel_values=data.pixels[:8].clone(), labels=data.labels[:8].clone())
    assert output.loss.requires_grad
    for entry in logged:
        assert entry["saved_MB"] == pytest.approx(book.total_bytes / 1e6, rel=1e-3)
        assert 0.5 < entry["kept_energy_lowest"] <= entry["kept_energy"] <= 1
        assert any(name.startswith("kept_energy/") and "attention" in name for name in entry)
    assert all(torch.equal(value, results["by hand"][name]) for name, value in results["callback"].items())


@pytest.mark.parametrize("by_hand", [False, True])
def test_labels_are_detected_on_a_razored_model(tmp_path: Path, by_hand: bool) -> None:
    model = vit()
    if by_hand:
        br.razor_(model, CONFIG)
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=Images(16), callbacks=[RazorCallback(CONFIG)])
    assert trainer.label_names == ["labels"]
    assert trainer.evaluate()["eval_loss"] > 0, "no loss without labels"
    again = Trainer(model, arguments(tmp_path), eval_dataset=Images(16))  # the class is the razored one by now
    assert again.label_names == ["labels"] and again.evaluate()["eval_loss"] > 0


def test_labels_of_question_answering_are_detected_by_the_class_s_name(tmp_path: Path) -> None:
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForQuestionAnswering(BertConfig(vocab_size=50, **width))
    expected = Trainer(model, arguments(tmp_path)).label_names
    br.razor_(model, CONFIG)
    assert Trainer(model, arguments(tmp_path)).label_names == expected == ["start_positions", "end_positions"]


def test_bad_numbers_stop_training_and_leave_the_weights_alone(tmp_path: Path) -> None:
    model, callback = vit(), RazorCallback(CONFIG)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Images(8, bad=3), callbacks=[callback])
    before = weights(model)
    with pytest.raises(FloatingPointError, match="NaN or Inf in the input of"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_training_goes_on_after_a_forward_that_failed_in_a_step_that_was_looked_at(tmp_path: Path) -> None:
    class Broken(Images):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return super().__getitem__(index) | {"pixel_values": torch.zeros(1, 12, 12)}

    model = vit()
    settings = arguments(tmp_path, logging_steps=1)
    trainer = Trainer(model, settings, train_dataset=Broken(), callbacks=[RazorCallback(CONFIG)])
    with pytest.raises(ValueError, match="image size"):
        trainer.train()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None, "the ledger is closed"
    assert [name for name, module in model.named_modules() if name and module._forward_hooks] == []
    trainer.train_dataset = Images()
    trainer.train()
    assert trainer.state.log_history[-1]["step"] == 4 and not model._forward_hooks
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


@pytest.mark.parametrize("first", [False, True])
def test_tensorboard_shows_the_figures_where_the_callback_comes_first(tmp_path: Path, first: bool) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = RazorCallback(CONFIG)
    settings = arguments(tmp_path, report_to=["tensorboard"])
    trainer = Trainer(vit(), settings, train_dataset=Images(), callbacks=[callback])
    if first:
        assert callback.report_first(trainer) is callback
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert ("train/saved_MB" in events.Tags()["scalars"]) == first
    assert "train/loss" in events.Tags()["scalars"]


def test_report_first_refuses_a_trainer_that_it_is_not_of(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not one of the Trainer"):
        RazorCallback().report_first(Trainer(vit(), arguments(tmp_path)))
    with pytest.raises(ValueError, match="every=0"):
        RazorCallback(every=0)


def test_a_model_of_model_init_is_razored_when_training_begins(tmp_path: Path) -> None:
    callback = RazorCallback(CONFIG, every=1)
    trainer = Trainer(None, arguments(tmp_path), train_dataset=Images(), model_init=vit, callbacks=[callback])
    trainer.train()
    assert any(isinstance(module, br.nn.DropIn) for module in trainer.model.modules())
    assert callback.figures["saved_MB"] > 0


def test_without_transformers_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "backrazor.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install backrazor\[transformers\]"):
        import backrazor.integrations.transformers  # noqa: F401
