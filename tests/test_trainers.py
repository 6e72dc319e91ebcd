"""Trainer, Accelerate and Lightning train as_module's module as the plain loop does, to the bit.

Each is compared with a loop over fadapt.run on the same batches, with the same optimizer and
schedule; the order of the batches is what the trainer itself chose, noted by its collator.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fadapt

from . import models

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
lightning: Any = pytest.importorskip("lightning")

LR, ROWS, LENGTH = 1e-2, 24, 6


def dataset(rows: int = ROWS, seed: int = 3) -> Any:
    ids = models.tokens(rows, LENGTH, seed=seed).tolist()
    # A column that no forward knows, which Trainer has to leave out.
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "text": ["a"] * rows})


class Noted:
    """A collator that keeps its batches."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all(row.keys() == {"input_ids", "labels"} for row in rows)
        batch = {k: torch.tensor([row[k] for row in rows]) for k in rows[0]}
        self.batches.append(batch)
        return batch


def start(model: nn.Module) -> fadapt.Params:
    return fadapt.init(model, {"q_proj|v_proj": fadapt.LoRA(r=2), "up_proj": fadapt.DoRA(r=2)})


def trainer_for(module: nn.Module, path: Path, **options: Any) -> Any:
    noted = Noted()
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        num_train_epochs=2,
        learning_rate=LR,
        lr_scheduler_type="linear",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        use_cpu=True,
        **options,
    )
    trainer = transformers.Trainer(
        model=module,
        args=arguments,
        train_dataset=dataset(),
        eval_dataset=dataset(8, seed=4),
        data_collator=noted,
    )
    return trainer, noted


def plain(
    model: nn.Module,
    params: fadapt.Params,
    batches: Iterable[dict[str, Tensor]],
    accumulate: int = 1,
    schedule: bool = True,
    clip: bool = True,
) -> list[fadapt.Params]:
    """The loop: the params after each update."""
    leaves = fadapt.trainable(params)
    optimizer = torch.optim.AdamW(leaves, lr=LR, weight_decay=0.0, fused=True)  # as Trainer's
    listed = list(batches)
    updates = len(listed) // accumulate
    after = []
    for i in range(updates):
        group = listed[i * accumulate : (i + 1) * accumulate]
        if schedule:
            optimizer.param_groups[0]["lr"] = LR * ((updates - i) / updates)
        # Trainer divides by the tokens that the accumulated batches predict.
        count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in group)
        for batch in group:
            loss = fadapt.run(model, params, {**batch, "num_items_in_batch": torch.tensor(count)})
            loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after.append(copied(params))
    return after


def copied(params: fadapt.Params) -> fadapt.Params:
    return fadapt.unstack(fadapt.stack([params]))[0]


def same(a: fadapt.Params, b: fadapt.Params) -> bool:
    pairs = zip(fadapt.trainable(a), fadapt.trainable(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_is_the_plain_loop(accumulate: int, tmp_path: Path) -> None:
    model = models.qwen3()
    frozen = copy.deepcopy(model.state_dict())
    params = start(model)
    module = fadapt.as_module(model, params)
    trainer, noted = trainer_for(
        module,
        tmp_path,
        gradient_accumulation_steps=accumulate,
        eval_strategy="no",
        save_strategy="no",
    )
    trainer.train()
    assert len(noted.batches) == 2 * ROWS // 4
    assert len({tuple(b["input_ids"].flatten().tolist()) for b in noted.batches}) == 12  # shuffled
    after = plain(model, params, noted.batches, accumulate)
    assert same(module.params, after[-1])
    assert not same(module.params, start(model))
    assert all(torch.equal(t, frozen[k]) for k, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training  # the mode was the module's own


def test_trainer_evaluates_saves_resumes_and_finds_the_best(tmp_path: Path) -> None:
    model = models.qwen3()
    params = start(model)
    options: dict[str, Any] = dict(
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    module = fadapt.as_module(model, params)
    trainer, noted = trainer_for(module, tmp_path / "whole", **options)
    trainer.train()
    trained = [b for b in noted.batches if len(b["input_ids"]) == 4]
    after = plain(model, copied(params), trained)
    evaluation = {k: torch.tensor(v) for k, v in dataset(8, seed=4)[:].items() if k != "text"}
    scores = {}
    for step in (3, 6, 9, 12):
        with torch.no_grad():
            scores[step] = fadapt.run(model, after[step - 1], evaluation)
    logged = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert logged == {step: float(score) for step, score in scores.items()}
    best = min(scores, key=lambda step: float(scores[step]))
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert same(module.params, after[best - 1])  # not the last one

    # A checkpoint holds the adapter, with its fixed leaves, and nothing of the base.
    file = tmp_path / "whole/checkpoint-12/model.safetensors"
    values = sum(t.numel() for a in params.values() for t in a.leaves.values())
    base = sum(p.numel() for p in model.parameters())
    assert 4 * values < os.path.getsize(file) < 4 * values + 4000 < 4 * base / 4
    again = fadapt.as_module(model, params)
    from safetensors.torch import load_file

    again.load_state_dict(load_file(file))
    assert same(again.params, after[-1])

    # In a process that begins anew, from the middle.
    resumed = fadapt.as_module(model, start(model))
    trainer, _ = trainer_for(resumed, tmp_path / "resumed", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-6"))
    state = load_file(tmp_path / "resumed/checkpoint-12/model.safetensors")
    again.load_state_dict(state)
    assert same(again.params, after[-1])

    # Of another adapter, which Trainer itself would only warn about.
    other = fadapt.as_module(model, fadapt.init(model, {"q_proj": fadapt.LoRA(r=2)}))
    trainer, _ = trainer_for(other, tmp_path / "other", **options)
    with pytest.raises(fadapt.CheckpointError, match="has the unknown keys"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-6"))


def test_trainer_of_a_classifier_gives_predictions(tmp_path: Path) -> None:
    model = models.bert()
    params = fadapt.init(model, {"query|value": fadapt.LoRA(r=2)})
    module = fadapt.as_module(model, params)
    trainer, _ = trainer_for(module, tmp_path, eval_strategy="no", save_strategy="no")
    labels = [i % 3 for i in range(ROWS)]
    data = datasets.Dataset.from_dict(
        {"input_ids": models.tokens(ROWS, LENGTH).tolist(), "labels": labels, "text": ["a"] * ROWS}
    )
    trainer.train_dataset = trainer.eval_dataset = data
    trainer.train()
    found = trainer.predict(data)
    batches = [{"input_ids": torch.tensor(data["input_ids"][:])}]
    wanted = fadapt.apply(model, module.params, batches[0]).logits
    torch.testing.assert_close(torch.tensor(found.predictions), wanted)
    assert found.label_ids.tolist() == labels


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trainer_with_gradient_checkpointing(tmp_path: Path) -> None:
    model = models.qwen3()
    params = start(model)
    losses = []
    for checkpointing in (False, True):
        module = fadapt.as_module(model.train(), params)
        trainer, _ = trainer_for(
            module,
            tmp_path,
            gradient_checkpointing=checkpointing,
            max_steps=2,
            eval_strategy="no",
            save_strategy="no",
        )
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accelerate_is_the_plain_loop(tmp_path: Path) -> None:
    model = models.qwen3()
    params = start(model)
    module = fadapt.as_module(model, params)
    noted = Noted()
    rows = dataset().remove_columns("text")
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=noted)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    leaves = fadapt.trainable(params)
    own = torch.optim.AdamW(leaves, lr=LR, weight_decay=0.0)
    for i, batch in enumerate(noted.batches):
        (fadapt.run(model, params, batch) / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            own.step()
            own.zero_grad()
    assert same(module.params, params)

    accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert same(accelerator.unwrap_model(prepared).params, params)
    size = sum(f.stat().st_size for f in (tmp_path / "state").glob("model*.safetensors"))
    assert 0 < size < 4 * sum(p.numel() for p in model.parameters()) / 4


def lightning_lesson(module: nn.Module) -> Any:
    class Lesson(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.adapted = module

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.adapted(**batch).loss

        def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
            self.log("held_out", self.adapted(**batch).loss, batch_size=len(batch["input_ids"]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=0.0)

    return Lesson()


def lightning_trainer(path: Path, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=str(path),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        **options,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated")
def test_lightning_is_the_plain_loop(tmp_path: Path) -> None:
    model = models.qwen3()
    frozen = copy.deepcopy(model.state_dict())
    noted = Noted()
    rows = dataset().remove_columns("text")
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=noted)
    evaluation = DataLoader(
        dataset(8, seed=4).remove_columns("text"), batch_size=8, collate_fn=Noted()
    )
    saved = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, monitor="held_out", save_top_k=1, save_last=True, filename="best"
    )
    first = lightning_lesson(fadapt.as_module(model, start(model)).train())
    lightning_trainer(tmp_path, max_epochs=1, callbacks=[saved]).fit(first, loader, evaluation)
    # A checkpoint holds the adapter alone, and a process that begins anew goes on from it.
    last = str(tmp_path / "last.ckpt")
    state = torch.load(last, weights_only=True)["state_dict"]
    assert state.keys() == first.state_dict().keys()
    assert all(key.startswith("adapted.model/layers/") for key in state)
    second = lightning_lesson(fadapt.as_module(model, start(model)).train())
    trainer = lightning_trainer(tmp_path, max_epochs=2, callbacks=[saved])
    trainer.fit(second, loader, evaluation, ckpt_path=last)

    params = start(model)
    leaves = fadapt.trainable(params)
    optimizer = torch.optim.AdamW(leaves, lr=LR, weight_decay=0.0)
    assert len(noted.batches) == 2 * ROWS // 4
    for i, batch in enumerate(noted.batches):
        if i == ROWS // 4:
            assert same(first.adapted.params, params)
        (fadapt.run(model, params, batch) / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert same(second.adapted.params, params)
    assert not same(params, first.adapted.params)
    assert all(torch.equal(t, frozen[k]) for k, t in model.state_dict().items())
    assert not model.training
    with torch.no_grad():
        wanted = fadapt.run(model, params, next(iter(evaluation)))
    assert trainer.callback_metrics["held_out"] == wanted

    other = lightning_lesson(
        fadapt.as_module(model, fadapt.init(model, {"q_proj": fadapt.LoRA(r=2)}))
    )
    again = lightning_trainer(tmp_path, max_epochs=3, callbacks=[saved])
    with pytest.raises(fadapt.CheckpointError, match="has the unknown keys"):
        again.fit(other, loader, evaluation, ckpt_path=last)


def test_a_former_name_of_transformers_does_not_warn() -> None:
    module = fadapt.as_module(models.qwen3(), start(models.qwen3()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.is_gradient_checkpointing is module.is_activation_checkpointing is False
