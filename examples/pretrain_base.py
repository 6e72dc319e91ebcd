"""The small base model of the examples, trained from nothing.

    python examples/pretrain_base.py --out examples/tiny_base

A Qwen3 of 1.6 million parameters with a tokenizer of 512 tokens (digits one by one), trained on
``word_problems.pretraining_texts``: stories of one event, and calculations of up to three steps.
It takes about three minutes on one GPU. Beside the model lies ``pretraining.json``: the settings,
the seed, the losses, and how much the model then knows.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from word_problems import TEMPLATE, metamath_rows, pretraining_texts, stories

END = "<|endoftext|>"


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=256
    )


def make_model(vocabulary: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token cross-entropy up to and with each row's first end token."""
    ended = (ids == 0).cumsum(1)
    labels = ids.masked_fill(ended > 1, -100)
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> float:
    """The share of problems whose greedy answer ends in the right number."""
    device = next(model.parameters()).device
    tokenizer.padding_side = "left"
    right = 0
    for start in range(0, len(rows), 250):
        part = rows[start : start + 250]
        prompts = [TEMPLATE.format(query=row["query"]) for row in part]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=0)
        texts = tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for row, text in zip(part, texts, strict=True):
            wanted = row["response"].rpartition("#### ")[2].split("\n")[0]
            right += text.partition("#### ")[2].split("\n")[0].strip() == wanted
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("examples/tiny_base"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--texts", type=int, default=600_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=500, help="of each kind in the final test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()

    texts = list(islice(pretraining_texts(args.seed), args.texts))
    tokenizer = make_tokenizer(texts[:50_000], args.vocabulary)
    rows = [[*ids, 0] for ids in tokenizer(texts)["input_ids"]]
    longest = max(map(len, rows))
    data = torch.zeros(len(rows), longest, dtype=torch.int16)
    for i, ids in enumerate(rows):
        data[i, : len(ids)] = torch.tensor(ids, dtype=torch.int16)
    data = data.to(args.device)
    print(
        f"{len(rows)} texts, at most {longest} tokens; {time.perf_counter() - start:.0f} s",
        flush=True,
    )

    model = make_model(len(tokenizer)).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / 200) * (0.525 + 0.475 * math.cos(math.pi * i / args.steps)),
    )
    step_loss = torch.compile(loss_of) if args.device != "cpu" else loss_of
    losses = {}
    for step in range(args.steps):
        index = torch.randint(len(data), (args.batch,), device=args.device)
        loss = step_loss(model, data[index].long())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0 or step == args.steps - 1:
            losses[step] = round(loss.item(), 4)
            print(
                f"step {step}: loss {losses[step]}, {time.perf_counter() - start:.0f} s", flush=True
            )

    model = model.to(torch.bfloat16).eval()
    known = {
        "one event": accuracy(
            model, tokenizer, metamath_rows(stories(args.stories, 1, events=(1,)))
        ),
        "two or three events, test set": accuracy(
            model, tokenizer, metamath_rows(stories(args.stories, 1, test=True))
        ),
    }
    print(known)
    model.save_pretrained(args.out)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(args.out)
    log = {
        "command": "python examples/pretrain_base.py",
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "parameters": parameters,
        "seconds": round(time.perf_counter() - start),
        "losses": losses,
        "accuracy": known,
    }
    (args.out / "pretraining.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
