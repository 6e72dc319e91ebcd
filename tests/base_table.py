"""The table of methods x bases: ``python -m tests.base_table`` writes it into the guide.

A cell is what a run of the pair showed:

- "exact": bit-equal to the base at the start, and equal to the plain model with the merged weights
  in float64 (grouped_mm, whose kernel has no float64: in float32, within its rounding);
- "kernel": bit-equal at the start, and equal to the dequantised model within the rounding of the
  layer's own float32 kernel;
- "run": bit-equal at the start, and trained; but it cannot be merged, for the reason below;
- "refused": an error, with its reason below the table.

SSteer is not the identity at the start; its strength is 0 there.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fadapt
from tests.models import gpt2, perturb, qwen3_tied, reals, seeded, tokens
from tests.test_bases import Embedded, SelfAttention, mixtral, qwen3_moe
from tests.test_quantized import EVERY, dequantize, two_layers

EXACT, KERNEL = "exact", "exact within the kernel's rounding"


@dataclass(frozen=True)
class Base:
    """A column: a model, the rule that names its weights, and its inputs.

    Attributes:
        note: how it is computed, where that is not by the exact product rule.
    """

    title: str
    model: Callable[[], nn.Module]
    rule: str
    inputs: Callable[[int], dict[str, Any]]
    quantised: bool = False
    float32: bool = False
    note: str = ""


def _ids(seed: int) -> dict[str, Any]:
    return {"input_ids": tokens(seed=seed), "use_cache": False}


def _rows(*shape: int) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {"input": reals(*shape, seed=seed)}


def _experts(make: Callable[[], nn.Module], implementation: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = make()
        model.set_experts_implementation(implementation)
        return model

    return build


DENSE = "dense fallback, announced by a DenseFallbackWarning"
BASES = [
    Base("nn.Linear", lambda: seeded(nn.Sequential(nn.Linear(16, 16))), "", _rows(5, 16)),
    Base("GPT-2 Conv1D", gpt2, "c_attn", _ids),
    Base(
        "nn.Embedding",
        lambda: seeded(Embedded(vocab=64)),
        "table",
        lambda s: {"ids": tokens(seed=s)},
        note="a method that changes the input makes it a dense one-hot matrix, with a warning",
    ),
    Base("tied lm_head", qwen3_tied, r"lm_head\.weight", _ids),
    Base(
        "MultiheadAttention",
        lambda: seeded(SelfAttention()),
        "",
        lambda s: {"x": reals(2, 5, 32, seed=s)},
        note=DENSE,
    ),
    Base(
        "Conv2d, groups",
        lambda: seeded(nn.Sequential(nn.Conv2d(8, 16, 2, groups=2))),
        "^0",
        _rows(2, 8, 4, 4),
        note=DENSE,
    ),
    Base("experts eager", _experts(mixtral, "eager"), "experts", _ids),
    Base("experts batched_mm", _experts(qwen3_moe, "batched_mm"), "experts", _ids),
    Base("experts grouped_mm", _experts(mixtral, "grouped_mm"), "experts", _ids, float32=True),
    *(
        Base(kind, lambda kind=kind: two_layers(kind), "", _rows(5, 64), quantised=True)
        for kind in ("nf4", "fp4", "nf4 double", "8bit")
    ),
]
SMALL = {
    "OFT": fadapt.OFT(block_size=4),
    "RoAd": fadapt.RoAd(group_size=4),
    **{name: EVERY[name] for name in EVERY if name not in ("OFT", "RoAd", "TruncatedLoRA")},
}


def cell(method: fadapt.Method, base: Base) -> str:
    """What a run of the pair shows.

    Raises:
        AssertionError: neither exact nor refused.
    """
    model = base.model()
    if not base.quantised:
        model = model.float() if base.float32 else model.double()
    inputs = _cast(base.inputs(7), model, base.quantised)
    config = fadapt.Config({base.rule: method} if base.rule else method, exclude=())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fadapt.FadaptWarning)
        try:
            calib = _calibration(method, base, model)
            params = fadapt.init(model, config, calib, loss_fn=_loss)
            start = fadapt.scale(params, 0) if type(method).__name__ == "SSteer" else params
            out = _tensor(fadapt.apply(model, start, **inputs))
            assert torch.equal(out, _tensor(model(**inputs))), "not the identity at the start"
            params = _train(params)
            out = _tensor(fadapt.apply(model, params, **inputs))
        except fadapt.FadaptError as error:
            return f"refused: {error}"
        moved = (out - _tensor(model(**inputs))).abs().max()
        assert moved > 1e-5, f"{method} leaves {base.title} silently unadapted"
        try:
            merged = fadapt.merge(model, params, dtype=torch.float32 if base.quantised else None)
        except fadapt.ConfigError as error:
            return f"run: {error}"
        plain = dequantize(model) if base.quantised else model
        ref = _tensor(functional_call(plain, merged, (), inputs, tie_weights=False))
    error = (out - ref).abs().max() / ref.abs().max()
    tol = 1e-9 if out.dtype == torch.float64 else 2e-4
    assert error < tol, f"{method} over {base.title}: relative error {error:.1e}"
    return KERNEL if base.quantised or base.float32 else EXACT


def _loss(output: Any, _: Any) -> Tensor:
    return _tensor(output).sin().sum()


def _train(params: fadapt.Params) -> fadapt.Params:
    perturb(params, std=0.1)
    with torch.no_grad():
        for adapter in params.values():
            if "alpha" in adapter.train:
                adapter.train["alpha"].abs_()
    return fadapt.project(params)


def _calibration(method: Any, base: Base, model: nn.Module) -> list[Any] | None:
    if getattr(method, "statistic", None) is None:
        return None
    batches = [_cast(base.inputs(seed), model, base.quantised) for seed in range(20)]
    if type(method).__name__ != "SSteer":
        return batches
    other = [_cast(base.inputs(seed + 50), model, base.quantised) for seed in range(20)]
    return [tuple(map(_sequences, pair)) for pair in zip(batches, other, strict=True)]


def _sequences(batch: dict[str, Any]) -> dict[str, Any]:
    """Rows as sequences of one token, which pairs are made of."""
    return {k: t[:, None] if k == "input" and t.dim() == 2 else t for k, t in batch.items()}


def _cast(batch: dict[str, Any], model: nn.Module, quantised: bool) -> dict[str, Any]:
    dtype = torch.float32 if quantised else next(model.parameters()).dtype
    return {
        k: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
        for k, t in batch.items()
    }


def _tensor(out: Any) -> Tensor:
    return getattr(out, "logits", out)


def table() -> str:
    """The table as markdown, with the reasons of the refusals."""
    reasons: dict[str, int] = {}
    titles = [base.title for base in BASES]
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(BASES) + 1) + "|"]
    for name, method in sorted(SMALL.items()):
        row = []
        for base in BASES:
            kind, colon, reason = short(cell(method, base)).partition(": ")
            number = reasons.setdefault(reason, len(reasons) + 1) if colon else 0
            row.append(f"{kind} [{number}]" if colon else kind)
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", f"kernel: {KERNEL}."]
    for note in dict.fromkeys(b.note for b in BASES if b.note):
        titles = " and ".join(b.title for b in BASES if b.note == note)
        lines.append(f"{titles}: {note}.")
    lines += [f"[{n}] {reason}." for reason, n in reasons.items()]
    return "\n".join(lines)


def _reason(text: str) -> str:
    if "no statistics are collected" in text or "were counted" in text:
        return "the method starts from statistics, and there is no rule that observes this layer"
    if "cannot have one" in text:
        return "run and apply alone: the method adds a bias, and this layer cannot hold one"
    return text.split(": ", 1)[-1]


PAGE = Path(__file__).parents[1] / "examples/guide/bases.md"
BEGIN, END = "<!-- table: python -m tests.base_table -->\n", "\n<!-- end of table -->"


def written() -> str:
    """The table as it stands in the guide."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def stated() -> dict[tuple[str, str], str]:
    """{(method, title of a base): what the guide's table says}, as :func:`cell` returns it."""
    head, _, *lines = [x.strip("| ").split(" | ") for x in written().splitlines() if x[:1] == "|"]
    reasons = dict(re.findall(r"^\[(\d+)\] (.*)\.$", written(), re.MULTILINE))
    return {
        (name, title): re.sub(r" \[(\d+)\]$", lambda m: ": " + reasons[m[1]], text)
        for name, *row in lines
        for title, text in zip(head[1:], row, strict=True)
    }


def short(text: str) -> str:
    """What :func:`cell` found, as the table says it."""
    kind, _, rest = text.partition(": ")
    if kind in ("refused", "run"):
        return f"{kind}: {_reason(rest)}"
    return "kernel" if text == KERNEL else text


def write(text: str) -> None:
    """Puts a table into the guide, in place of the one that stands there."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # bitsandbytes tells of every cast
    write(table())
