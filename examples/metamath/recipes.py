"""Every method with the settings and the learning rate that it is known to need."""

from __future__ import annotations

from collections.abc import Callable

import fadapt
from fadapt import Method

from .protocol import DataError

Maker = Callable[[int], Method]


def recipes(r: int) -> dict[str, tuple[Method, float]]:
    """{name: (method, learning rate)} of every method that trains, at this rank.

    Rates are those of PEFT's method comparison and of the methods' papers where they give one:
    methods with a few numbers a site take larger steps than the factors of a matrix.
    """
    alpha = 2.0 * r
    found: dict[str, tuple[Method, float]] = {
        "LoRA": (fadapt.LoRA(r=r, alpha=alpha), 1e-3),
        "RsLoRA": (fadapt.RsLoRA(r=r, alpha=alpha), 1e-3),
        "PiSSA": (fadapt.PiSSA(r=r, alpha=float(r)), 1e-3),
        "OLoRA": (fadapt.OLoRA(r=r, alpha=float(r)), 1e-3),
        "MiCA": (fadapt.MiCA(r=r, alpha=alpha), 2e-3),
        "KaSA": (fadapt.KaSA(r=r, alpha=float(r)), 1e-3),
        "DoRA": (fadapt.DoRA(r=r, alpha=alpha), 1e-3),
        "DeLoRA": (fadapt.DeLoRA(r=r), 1e-2),
        "EVA": (fadapt.EVA(r=r, alpha=alpha), 1e-3),
        "CorDA": (fadapt.CorDA(r=r, alpha=float(r)), 1e-3),
        "AdaLoRA": (fadapt.AdaLoRA(r=r, alpha=alpha), 5e-3),
        "VeRA": (fadapt.VeRA(), 1e-2),
        # 30, 45, 1, 2 and 1 times LoRA's rate, as in PEFT's comparison.
        "LoKr": (fadapt.LoKr(r=r, alpha=alpha), 3e-2),
        "HiRA": (fadapt.HiRA(r=r), 4.5e-2),
        "LoHa": (fadapt.LoHa(r=r, alpha=alpha), 1e-3),
        "GraLoRA": (fadapt.GraLoRA(r=-(-r // 2) * 2, alpha=alpha), 2e-3),
        "MiSS": (fadapt.MiSS(), 1e-3),
        "LoRAGA": (fadapt.LoRAGA(r=r, alpha=float(r)), 1e-3),
        # 3 times and once LoRA's rate, as in PEFT's comparison; RandLoRA's own scale of 20.
        "SHiRA": (fadapt.SHiRA(r=r), 3e-3),
        "RandLoRA": (fadapt.RandLoRA(r=r, alpha=20.0 * r), 1e-3),
        # arXiv 2404.03592, arithmetic reasoning: 9e-4.
        "ReFT": (fadapt.ReFT(r=r), 1e-3),
        # PEFT's comparison, as it is: the increment is divided by the width.
        "C3A": (fadapt.C3A(), 0.3),
        # arXiv 2405.03003, instruction tuning of LLaMA: scaling 300, n = 1000.
        "FourierFT": (fadapt.FourierFT(scaling=300.0), 3e-2),
        # The rate of LoRA-XS's authors for MetaMathQA; TinyLoRA is LoRA-XS with fewer numbers.
        "LoRAXS": (fadapt.LoRAXS(r=r, alpha=float(r)), 4e-3),
        "TinyLoRA": (fadapt.TinyLoRA(), 4e-3),
        "BOFT": (fadapt.BOFT(), 1e-3),
        "PSOFT": (fadapt.PSOFT(r=r), 2e-3),
        "IA3": (fadapt.IA3(), 1e-2),
        "IA3FF": (fadapt.IA3FF(), 1e-2),
        "HRA": (fadapt.HRA(r=r), 1e-3),
        "RoAd": (fadapt.RoAd(), 1e-2),
        "OFT": (fadapt.OFT(), 1e-3),
        "BitFit": (fadapt.BitFit(), 5e-3),
        "LNTuning": (fadapt.LNTuning(), 1e-2),
        "TrainableTokens": (fadapt.TrainableTokens(), 5e-3),
        "Full": (fadapt.Full(), 1e-4),
    }
    slow = ("SSVD", "AntiPaSTO", "AntiPaSTORotation", "AntiPaSTOAblate", "AntiPaSTOArrow",
            "AntiPaSTOASVD", "AntiPaSTOCorDA", "AntiPaSTODPLR")  # fmt: skip
    for name in slow:
        found[name] = (getattr(fadapt, name)(), 1e-2)
    return found


def small(r: int) -> dict[str, tuple[Method, float]]:
    """The same for the embedded base, which is narrow, and is trained for few steps.

    Rates are the best of six in ``measured``.
    """
    found = recipes(r)
    rates = {
        "LoRA": 0.008, "RsLoRA": 0.004, "PiSSA": 0.008, "OLoRA": 0.008, "MiCA": 0.016,
        "KaSA": 0.032, "DoRA": 0.008, "DeLoRA": 0.024, "EVA": 0.008, "CorDA": 0.0024,
        "AdaLoRA": 0.04, "VeRA": 0.16, "LoKr": 0.036, "HiRA": 0.108, "LoHa": 0.032,
        "GraLoRA": 0.016, "MiSS": 0.0024, "LoRAGA": 0.004, "SHiRA": 0.024, "RandLoRA": 0.0024,
        "ReFT": 0.008, "C3A": 2.4, "FourierFT": 0.036, "LoRAXS": 0.0384, "TinyLoRA": 0.01,
        "BOFT": 0.064, "PSOFT": 0.016, "IA3": 0.192, "IA3FF": 0.32, "HRA": 0.032, "RoAd": 0.16,
        "OFT": 0.008, "BitFit": 0.04, "LNTuning": 0.16, "TrainableTokens": 0.02, "Full": 0.002,
        "SSVD": 0.008, "AntiPaSTO": 0.64, "AntiPaSTORotation": 0.32, "AntiPaSTOAblate": 0.32,
        "AntiPaSTOArrow": 0.08, "AntiPaSTOASVD": 0.16, "AntiPaSTOCorDA": 0.32,
        "AntiPaSTODPLR": 0.024,
    }  # fmt: skip
    # Blocks, and a number of directions, for its narrowest weight, (64, 192).
    methods = {
        "RoAd": fadapt.RoAd(group_size=32),
        "OFT": fadapt.OFT(block_size=16),
        "C3A": fadapt.C3A(block_size=32),
        "TinyLoRA": fadapt.TinyLoRA(r=r),
    }
    methods |= {n: getattr(fadapt, n)(r=64) for n in found if n.startswith("AntiPaSTO")}
    return {name: (methods.get(name, method), rates[name]) for name, (method, _) in found.items()}


def chosen(names: str, known: dict[str, tuple[Method, float]]) -> dict[str, tuple[Method, float]]:
    """The named methods, or all.

    Raises:
        DataError: a name that is unknown.
    """
    if names == "all":
        return known
    lower = {name.lower(): name for name in known}
    wanted = [n.strip() for n in names.split(",") if n.strip()]
    if unknown := [n for n in wanted if n.lower() not in lower]:
        raise DataError(f"unknown methods {unknown}; choose from {', '.join(known)}, or all")
    return {lower[n.lower()]: known[lower[n.lower()]] for n in wanted}
