"""transformers' Trainer over an adapter: train, evaluate, checkpoint, resume, keep the best.

The Trainer sees a module whose only parameters, and whose only state, are the adapter's: its
checkpoints hold nothing of the base. A second Trainer goes on from a checkpoint of the first and
ends with the same weights, to the last bit.

    python examples/trainer.py [--steps 60] [--out out/trainer]
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from word_problems import TEMPLATE, stories

import fadapt

BASE = Path(__file__).parent / "tiny_base"
TRAINED, HELD_OUT = 256, 64


def problems(tokenizer: Any, count: int, seed: int, test: bool) -> datasets.Dataset:
    """Word problems with their answers; the question's tokens carry no loss."""

    def encoded(row: dict[str, str]) -> dict[str, list[int]]:
        question = tokenizer(row["question"])["input_ids"]
        answer = tokenizer(f" {row['answer']}")["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}

    rows = [
        {"question": TEMPLATE.format(query=story.query()), "answer": story.response()}
        for story in stories(count, seed, test=test)
    ]
    return datasets.Dataset.from_list(rows).map(encoded, remove_columns=["question", "answer"])


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": torch.tensor(mask),
        "labels": padded("labels", -100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("out/trainer"))
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    train = problems(tokenizer, TRAINED, seed=0, test=False)
    held_out = problems(tokenizer, HELD_OUT, seed=1, test=True)
    every = max(1, args.steps // 4)

    def trainer_over(module: torch.nn.Module, folder: str) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(args.out / folder),
            max_steps=args.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 10),
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(module, arguments, collate, train, held_out)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def adapter() -> torch.nn.Module:
        params = fadapt.init(model, {"q_proj|v_proj|up_proj|down_proj": fadapt.DoRA(r=8)})
        return fadapt.as_module(model, params)

    module = adapter()
    print("\n".join(x for x in fadapt.summary(module.params).splitlines() if "adapted:" in x))
    trainer = trainer_over(module, "whole")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss without an adapter: {before:.3f}")
    for entry in trainer.state.log_history:
        if "eval_loss" in entry and entry["step"]:
            print(f"step {entry['step']:3}: {entry['eval_loss']:.3f}")
    best = Path(trainer.state.best_model_checkpoint)
    print(f"the best is {best.name}, and its weights are the module's now")
    size = (best / "model.safetensors").stat().st_size
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"its file has {size:,} bytes, where the base has {whole:,}")

    # A process that was killed after the first checkpoint: the same module, made anew.
    resumed = adapter()
    again = trainer_over(resumed, "resumed")
    again.train(resume_from_checkpoint=str(args.out / f"whole/checkpoint-{every}"))
    pairs = zip(module.parameters(), resumed.parameters(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    print(f"resumed from step {every}: the same weights to the last bit: {equal}")
    assert equal, "a resumed run ended elsewhere"

    fadapt.save(module.params, args.out / "adapter.safetensors")
    params = fadapt.load(args.out / "adapter.safetensors", model)
    batch = collate([held_out[i] for i in range(8)])
    with torch.no_grad():
        loss = fadapt.run(model, params, batch)
        assert torch.equal(loss, module(**batch).loss)
    print(
        f"{args.out / 'adapter.safetensors'}: ordinary params, whose loss on 8 rows is {loss:.3f}"
    )


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    main()
