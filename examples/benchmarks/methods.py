"""Is any method's training step much dearer than LoRA's, in time or in memory?

G7: every method of the package on the seven linear maps of every layer of one model, its step's
time and peak memory over LoRA's, alternating in one process.

    python examples/benchmarks/methods.py [--hidden 512] [--tokens 512]       on the CPU
    python examples/benchmarks/methods.py --device cuda --hidden 1024 --layers 28 --vocab 151936
"""

from __future__ import annotations

import argparse

import torch
from common import TARGETS, alternate, gradient_norm, peak_bytes, qwen3, tokens, training_step

import fadapt


def methods(r: int, wide: int) -> dict[str, fadapt.Method]:
    """Every method that trains without calibration, at the settings of its count in the README.

    Args:
        r: rank of the LoRA family.
        wide: directions of the spectral family.
    """
    return {
        "LoRA": fadapt.LoRA(r=r),
        "RsLoRA": fadapt.RsLoRA(r=r),
        "PiSSA": fadapt.PiSSA(r=r, niter=4),
        "DoRA": fadapt.DoRA(r=r),
        "DeLoRA": fadapt.DeLoRA(r=r),
        "HRA": fadapt.HRA(r=r),
        "IA3": fadapt.IA3(),
        "IA3FF": fadapt.IA3FF(),
        "RoAd 1": fadapt.RoAd(variant=1),
        "RoAd 2": fadapt.RoAd(variant=2),
        "RoAd 4": fadapt.RoAd(variant=4),
        "OFT exact": fadapt.OFT(block_size=32, exact=True),
        "OFT Neumann": fadapt.OFT(block_size=32, exact=False),
        "SSVD first order": fadapt.SSVD(k=r, kind="first_order"),
        "SSVD strict": fadapt.SSVD(k=r, kind="strict"),
        "SSVD free": fadapt.SSVD(k=r, kind="free"),
        "AntiPaSTO": fadapt.AntiPaSTO(r=wide),
        "AntiPaSTORotation": fadapt.AntiPaSTORotation(r=wide, basis="V"),
        "AntiPaSTORotation both": fadapt.AntiPaSTORotation(r=wide, basis="both"),
        "AntiPaSTOAblate": fadapt.AntiPaSTOAblate(r=wide),
        "AntiPaSTOArrow": fadapt.AntiPaSTOArrow(r=wide),
        "AntiPaSTODPLR": fadapt.AntiPaSTODPLR(r=wide),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = dict(hidden=512, layers=2, vocab=2048, tokens=512, rows=1, r=16, wide=32, rounds=5)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the base")
    parser.add_argument("--adapter-dtype", default=None)
    parser.add_argument("--only", default="", help="a part of the methods' names")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    adapter_dtype = getattr(torch, args.adapter_dtype) if args.adapter_dtype else None
    model = qwen3(args.hidden, args.layers, args.vocab, args.device, dtype)
    batch = tokens(args.rows, args.tokens, args.vocab, args.device)
    per_step = args.rows * args.tokens
    print(
        f"{args.hidden} wide, {args.layers} layers, r={args.r} or {args.wide} directions, "
        f"{args.device}, base {args.dtype}, adapters {adapter_dtype or 'float32'}, "
        f"{per_step} tokens a step, torch {torch.__version__}"
    )
    print(
        f"{'method':24}{'ms':>9}{'/ LoRA':>8}{'peak MiB':>10}{'/ LoRA':>8}"
        f"{'trainable':>11}{'loss first':>12}{'last':>9}{'grad norm':>11}"
    )
    lora = _step(model, batch, fadapt.LoRA(r=args.r), adapter_dtype)[0]
    lora_peak = peak_bytes(lora)
    for name, method in methods(args.r, args.wide).items():
        if args.only not in name:
            continue
        step, leaves = _step(model, batch, method, adapter_dtype)
        first = float(step())
        ms = alternate({"lora": lora, "this": step}, args.rounds)
        last, peak = float(step()), peak_bytes(step)
        print(
            f"{name:24}{ms['this']:9.1f}{ms['this'] / ms['lora']:8.2f}{peak / 2**20:10.1f}"
            f"{peak / lora_peak:8.2f}{sum(t.numel() for t in leaves):11,}{first:12.4f}{last:9.4f}"
            f"{gradient_norm(leaves):11.3g}",
            flush=True,
        )


def _step(model, batch, method, dtype):
    params = fadapt.init(model, fadapt.Config({TARGETS: method}, dtype=dtype))
    leaves = fadapt.trainable(params)
    return training_step(lambda: fadapt.run(model, params, batch), leaves), leaves


if __name__ == "__main__":
    main()
