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
    }
    slow = ("SSVD", "AntiPaSTO", "AntiPaSTORotation", "AntiPaSTOAblate", "AntiPaSTOArrow",
            "AntiPaSTOASVD", "AntiPaSTOCorDA", "AntiPaSTODPLR")  # fmt: skip
    for name in slow:
        found[name] = (getattr(fadapt, name)(), 1e-2)
    return found


def small(r: int) -> dict[str, tuple[Method, float]]:
    """The same for the embedded base, which is narrow, and is trained for few steps."""
    found = {name: (method, 4 * lr) for name, (method, lr) in recipes(r).items()}
    found["RoAd"] = (fadapt.RoAd(group_size=32), 4e-2)
    found["OFT"] = (fadapt.OFT(block_size=16), 4e-3)
    found["C3A"] = (fadapt.C3A(block_size=32), found["C3A"][1])
    for name in [n for n in found if n.startswith("AntiPaSTO")]:
        # The narrowest weight is (64, 192).
        found[name] = (getattr(fadapt, name)(r=64), 4e-2)
    return found


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
