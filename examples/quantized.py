"""Three methods trained over one 4-bit or 8-bit language model, whose codes nobody writes to.

A Llama is built from a config, its linear layers are quantised in this process, and each method in
turn learns to write the Zen of Python, byte by byte, over the same frozen codes. The memory of the
quantised base is printed against the dense one's, and the merged weights of the last method against
what is left of them when they are quantised again.

    python examples/quantized.py [--kind nf4] [--steps 40]
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import copy
import io
import logging

import torch
from torch import Tensor, nn

import fadapt

with contextlib.redirect_stdout(io.StringIO()):
    import this  # it prints itself

import bitsandbytes as bnb
from transformers import LlamaConfig, LlamaForCausalLM

KINDS = ("nf4", "fp4", "nf4-double", "8bit")
METHODS = {
    "LoRA": (fadapt.LoRA(r=8), 5e-3),
    "DoRA": (fadapt.DoRA(r=8), 5e-3),
    "PiSSA": (fadapt.PiSSA(r=8), 2e-3),
}
STEPS, BATCH, LENGTH = 40, 4, 32


def build(width: int, layers: int, device: str) -> nn.Module:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, torch.bfloat16).eval()


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """A copy of the model with bitsandbytes layers in place of nn.Linear, except the head."""
    device = next(model.parameters()).device
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, quantized_layer(module, kind).to(device))
    return model.eval()


def quantized_layer(dense: nn.Linear, kind: str) -> nn.Module:
    sizes = dense.in_features, dense.out_features, dense.bias is not None
    if kind == "8bit":
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            *sizes,
            compute_dtype=torch.bfloat16,
            compress_statistics=kind == "nf4-double",
            quant_type=kind[:3],
        )
    layer.load_state_dict(dense.cpu().state_dict())
    return layer.to("cpu")  # quantises


def memory(model: nn.Module) -> int:
    """Bytes of the weights, with the scales and code books of the quantised ones."""
    tensors: dict[int, Tensor] = {}

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            tensors[value.untyped_storage().data_ptr()] = value
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            for part in vars(value).values():
                add(part)

    for parameter in model.parameters():
        add(parameter)
        add(getattr(parameter, "quant_state", None))
        add(getattr(parameter, "SCB", None))
    for module in model.modules():
        add(getattr(module, "state", None))
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


def batches(device: str, steps: int) -> list[Tensor]:
    """Random pieces of the Zen of Python, as bytes (batch, length)."""
    text = torch.tensor(list(codecs.decode(this.s, "rot13").encode()))
    rng = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(text) - LENGTH, (steps, BATCH), generator=rng)
    return [torch.stack([text[s : s + LENGTH] for s in row]).to(device) for row in starts]


def train(model: nn.Module, method: fadapt.Method, rate: float, data: list[Tensor]):
    params = fadapt.init(model, fadapt.Config(method, seed=0))
    optimiser = torch.optim.AdamW(fadapt.trainable(params), lr=rate)
    losses = []
    for ids in data:
        loss = fadapt.run(model, params, {"input_ids": ids, "labels": ids})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return params, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="nf4")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each method")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # bitsandbytes tells of every cast

    dense = build(args.width, args.layers, args.device)
    model = quantize(dense, args.kind)
    data = batches(args.device, args.steps)
    with torch.no_grad():
        # On some CPUs bitsandbytes packs its codes anew in the first forward, adapted or not.
        base = model(data[0], use_cache=False).logits
    codes = [p.detach().clone() for p in model.parameters()]

    print(f"{args.kind} on {args.device}: {memory(model) / 2**20:.2f} MiB of weights,", end=" ")
    print(f"dense bfloat16 {memory(dense) / 2**20:.2f} MiB")
    print(f"\n{'method':8}{'trainable':>10}{'start is the base':>19}{'loss':>9}{'after':>8}")
    for name, (method, rate) in METHODS.items():
        fresh = fadapt.init(model, method)
        with torch.no_grad():
            equal = torch.equal(fadapt.apply(model, fresh, data[0], use_cache=False).logits, base)
        params, losses = train(model, method, rate, data)
        count = sum(t.numel() for t in fadapt.trainable(params))
        last = sum(losses[-5:]) / len(losses[-5:])
        print(f"{name:8}{count:>10,}{equal!s:>19}{losses[0]:>9.3f}{last:>8.3f}")
        assert equal, f"{name} is not the identity at the start"
        assert last < losses[0] or args.steps < STEPS, f"{name} did not learn"
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), codes, strict=True))
    assert same, "training wrote to the base"
    print("\nthe base's codes are unchanged; no method wrote to them")

    merged = fadapt.merge(model, params, dtype=torch.float32)
    weight = next(iter(merged.values()))
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.cpu()
    again = dequantized(quantized_layer(layer, args.kind))
    error = (again - weight.cpu()).norm() / weight.cpu().norm()
    print(f"merged weights are dense {weight.dtype}; quantised again they differ by {error:.1%}")


def dequantized(layer: nn.Module) -> Tensor:
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


if __name__ == "__main__":
    main()
