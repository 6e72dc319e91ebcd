"""How long does it take from the pytree to tensors that a server takes?

    python examples/benchmarks/export.py [--device cuda]

One adapter on all seven linear layers of every block of the Qwen3-0.6B shape (28 layers, 1024 wide,
3072 inner, 16 heads and 8 key-value heads of 128), float32. LoRA is scaled and, where its rank is
none of vLLM's, padded; the factors of HRA and AntiPaSTO are products with the frozen weights. The
median of ten.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import fadapt

LAYERS, WIDTH, INNER, QUERIES, KEYS = 28, 1024, 3072, 16 * 128, 8 * 128
SHAPES = {
    "self_attn.q_proj": (WIDTH, QUERIES),
    "self_attn.k_proj": (WIDTH, KEYS),
    "self_attn.v_proj": (WIDTH, KEYS),
    "self_attn.o_proj": (QUERIES, WIDTH),
    "mlp.gate_proj": (WIDTH, INNER),
    "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}


def base(device: str) -> nn.Module:
    """The linear layers of the model, under its names; the values do not matter."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList()
    for _ in range(LAYERS):
        layer = nn.Module()
        for name, (d_in, d_out) in SHAPES.items():
            group, _, last = name.partition(".")
            if not hasattr(layer, group):
                layer.add_module(group, nn.Module())
            layer.get_submodule(group).add_module(
                last, nn.Linear(d_in, d_out, bias=False, device=device)
            )
        model.model.layers.append(layer)
    return model.requires_grad_(False)


def cases(model: nn.Module) -> dict[str, tuple[fadapt.Params, bool]]:
    """{name: (params, serving)}."""
    qkv = {"q_proj|k_proj|v_proj": fadapt.LoRA(r=16)}
    return {
        "LoRA r=16, serving": (fadapt.init(model, fadapt.LoRA(r=16, alpha=32)), True),
        "LoRA r=12, serving (padded to 16)": (fadapt.init(model, fadapt.LoRA(r=12)), True),
        "LoRA r=16 on q, k, v, serving": (fadapt.init(model, qkv), True),
        "LoRA r=16, PEFT's own form": (fadapt.init(model, fadapt.LoRA(r=16)), False),
        "HRA r=16, serving": (fadapt.init(model, fadapt.HRA(r=16)), True),
        "AntiPaSTO r=256 on v, serving": (
            fadapt.init(model, {"v_proj": fadapt.AntiPaSTO(r=256)}),
            True,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = base(args.device)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads\n")
    print("| adapter | tensors | values (M) | ms |\n|---|---|---|---|")
    for name, (params, serving) in cases(model).items():
        times = []
        for _ in range(args.repeats + 1):
            if args.device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            _, tensors = fadapt.peft.peft_dict(model, params, serving=serving)
            if args.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        values = sum(t.numel() for t in tensors.values()) / 1e6
        median = statistics.median(times[1:]) * 1e3
        print(f"| {name} | {len(tensors)} | {values:.1f} | {median:.1f} |", flush=True)


if __name__ == "__main__":
    main()
