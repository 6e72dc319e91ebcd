"""Any method, served as a LoRA: train AntiPaSTO, export it, load it with PEFT, compare.

Servers know LoRA and nothing else. The increment of AntiPaSTO has low rank, so a LoRA holds it
exactly; written in the form that vLLM, SGLang and LoRAX all take, it is loaded here by PEFT itself,
and its outputs are those of the trained adapter.

    python examples/serve_as_lora.py [--steps 60] [--out out/served]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_problems import TEMPLATE, stories

import fadapt

BASE = Path(__file__).parent / "tiny_base"
ROWS = 16


def batch(tokenizer, seed: int) -> dict[str, Tensor]:
    """Word problems of two or three events with their answers, padded on the right."""
    texts = [
        f"{TEMPLATE.format(query=story.query())} {story.response()}"
        for story in stories(ROWS, seed, test=False)
    ]
    rows = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    return {
        "input_ids": rows["input_ids"],
        "attention_mask": rows["attention_mask"],
        "labels": labels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("out/served"))
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    model.requires_grad_(False)

    params = fadapt.init(model, {"q_proj|o_proj|down_proj": fadapt.AntiPaSTO(r=48)})
    optimizer = torch.optim.AdamW(fadapt.trainable(params), lr=0.02)
    for step in range(args.steps):
        loss = fadapt.run(model, params, batch(tokenizer, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")

    fadapt.peft.save_peft(model, params, args.out, serving=True)
    config, tensors = fadapt.peft.peft_dict(model, params, serving=True)
    trained = sum(t.numel() for t in fadapt.trainable(params))
    served = sum(t.numel() for t in tensors.values())
    print(f"\n{args.out}: a LoRA of rank {config['r']} on {config['target_modules']}")
    print(f"{trained:,} trained numbers became {served:,} of a LoRA\n")
    layers = model.config.num_hidden_layers
    for server, verdict in fadapt.peft.served_by(config, tensors, layers=layers).items():
        print(f"{server:>6} takes it: {verdict}")

    probe = batch(tokenizer, 10_000)
    ids = {k: probe[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        base = model(**ids).logits
        ours = fadapt.apply(model, params, **ids).logits
        theirs = peft.PeftModel.from_pretrained(model, str(args.out)).eval()(**ids).logits
    print(f"\nadapter against base: logits differ by up to {(ours - base).abs().max():.2f}")
    difference = (ours - theirs).abs().max().item()
    print(f"fadapt against PEFT:  logits differ by up to {difference:.1e}")
    assert difference < 1e-3, "PEFT's outputs are not those of the trained adapter"


if __name__ == "__main__":
    main()
