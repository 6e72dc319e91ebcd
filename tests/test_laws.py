"""The law table: every method (a row) times every law, over drawn shapes, biases and seeds.

A new method is one new row. Widths are multiples of 4, so that block methods fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fadapt
from fadapt import testing
from fadapt.testing import LAWS, Case

ROWS = {
    "LoRA": fadapt.LoRA(r=3, alpha=5.0),
    "RsLoRA": fadapt.RsLoRA(r=4),
    "BitFit": fadapt.BitFit(),
    "Full": fadapt.Full(),
    "LNTuning": fadapt.LNTuning(),
    "TrainableTokens": fadapt.TrainableTokens((6, 2)),
    "TrainableTokens all": fadapt.TrainableTokens(),
    "ReFT": fadapt.ReFT(r=3),
    "IA3": fadapt.IA3(),
    "IA3FF": fadapt.IA3FF(),
    "DoRA": fadapt.DoRA(r=2, alpha=4.0),
    "PiSSA": fadapt.PiSSA(r=3, alpha=5.0),
    "PiSSA randomised": fadapt.PiSSA(r=3, niter=2),
    "OLoRA": fadapt.OLoRA(r=3, alpha=5.0),
    "MiCA": fadapt.MiCA(r=3),
    "LoRAGA": fadapt.LoRAGA(r=2, alpha=5.0),
    "LoRAGA randomised": fadapt.LoRAGA(r=2, direction="ArBr", niter=2),
    "KaSA": fadapt.KaSA(r=3, alpha=5.0),
    "DeLoRA": fadapt.DeLoRA(r=4),
    "DeLoRA peft": fadapt.DeLoRA(r=4, lambda0=0.5, form="peft"),
    "HRA": fadapt.HRA(r=4),
    "RoAd 1": fadapt.RoAd(variant=1, group_size=4),
    "RoAd 2": fadapt.RoAd(variant=2, group_size=4),
    "RoAd 4": fadapt.RoAd(variant=4, group_size=4),
    "OFT": fadapt.OFT(block_size=4),
    "OFT Neumann": fadapt.OFT(block_size=4, exact=False),
    "BOFT": fadapt.BOFT(block_size=4),
    "BOFT butterfly": fadapt.BOFT(block_size=2, n_butterfly_factor=2),
    "PSOFT": fadapt.PSOFT(r=4),
    "PSOFT series": fadapt.PSOFT(r=3, exact=False, mag_a=False, ab_svd_init="pissa_init"),
    "PSOFT free": fadapt.PSOFT(r=3, orth=False, mag_b=False),
    "AdaLoRA": fadapt.AdaLoRA(r=3),
    "VeRA": fadapt.VeRA(r=3),
    "SHiRA": fadapt.SHiRA(r=1),
    "RandLoRA": fadapt.RandLoRA(r=3, alpha=15.0),
    "RandLoRA sparse": fadapt.RandLoRA(r=4, alpha=20.0, sparse=True),
    "SHiRA seeded": fadapt.SHiRA(r=2, random_seed=3),
    "EVA": fadapt.EVA(r=3, rho=1.0),
    "CorDA": fadapt.CorDA(r=3),
    "CorDA kpm": fadapt.CorDA(r=3, mode="kpm"),
    "AntiPaSTO wanda": fadapt.AntiPaSTO(r=4, select="wanda"),
    "AntiPaSTOCorDA": fadapt.AntiPaSTOCorDA(r=4),
    "AntiPaSTOASVD": fadapt.AntiPaSTOASVD(r=4),
    "SSteer": fadapt.SSteer(r=4),
    "SSVD strict": fadapt.SSVD(k=4, kind="strict"),
    "SSVD first order": fadapt.SSVD(k=5, kind="first_order"),
    "SSVD free": fadapt.SSVD(k=3, kind="free"),
    "AntiPaSTO": fadapt.AntiPaSTO(r=6),
    "AntiPaSTORotation V": fadapt.AntiPaSTORotation(r=8, basis="V"),
    "AntiPaSTORotation U": fadapt.AntiPaSTORotation(r=8, block_size=2, basis="U"),
    "AntiPaSTORotation both": fadapt.AntiPaSTORotation(r=8, basis="both"),
    "AntiPaSTOAblate": fadapt.AntiPaSTOAblate(r=6, k=1),
    "AntiPaSTOAblate k": fadapt.AntiPaSTOAblate(r=6, k=3),
    "AntiPaSTOArrow": fadapt.AntiPaSTOArrow(r=6, b=3),
    "AntiPaSTODPLR": fadapt.AntiPaSTODPLR(r=6, k=2),
    "Sum": fadapt.Sum((fadapt.LoRA(r=2), fadapt.IA3())),
    "LoKr": fadapt.LoKr(r=1, alpha=2.0),
    "LoKr both": fadapt.LoKr(r=1, decompose_both=True, decompose_factor=4),
    "LoHa": fadapt.LoHa(r=1),
    "LoHa wide": fadapt.LoHa(r=4, alpha=3.0),
    "HiRA": fadapt.HiRA(r=3),
    "GraLoRA": fadapt.GraLoRA(r=4, alpha=6.0),
    "GraLoRA hybrid": fadapt.GraLoRA(r=4, alpha=6.0, gralora_k=4, hybrid_r=2),
    "MiSS": fadapt.MiSS(r=3),
    "MiSS bat": fadapt.MiSS(r=4, mode="bat"),
    "MiSS mini": fadapt.MiSS(r=5, mode="mini", mini_r=4),
    "C3A": fadapt.C3A(block_size=4),
    "FourierFT": fadapt.FourierFT(n_frequency=20),
    "FourierFT few": fadapt.FourierFT(n_frequency=3),
    "LoRAXS": fadapt.LoRAXS(r=4),
    "LoRAXS randomised": fadapt.LoRAXS(r=3, alpha=5.0, niter=2),
    "TinyLoRA": fadapt.TinyLoRA(r=2, u=3),
    "TinyLoRA tied": fadapt.TinyLoRA(r=2, u=3, weight_tying=True),
    "Chain EVA": fadapt.Chain((fadapt.EVA(r=2), fadapt.IA3())),
    "Chain": fadapt.Chain((fadapt.DoRA(r=2), fadapt.IA3FF(), fadapt.LoRA(r=1), fadapt.IA3())),
}


@dataclass(frozen=True)
class Normed(Case):
    """A case whose model has norms."""

    def model(self) -> nn.Module:
        d_in, hidden, d_out = self.widths
        first, last = nn.Linear(d_in, hidden), nn.Linear(hidden, d_out, self.bias)
        model = nn.Sequential(nn.LayerNorm(d_in), first, nn.RMSNorm(hidden), nn.Tanh(), last)
        rng = torch.Generator().manual_seed(self.seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5, generator=rng)
        return model.to(self.dtype).eval()


# Methods for embeddings and norms, which the cases of linear layers have not.
NAMED = {"TrainableTokens": r"^\d", "TrainableTokens all": r"^\d"}
NORMS = {"LNTuning"}


def case_of(row: str, case: Case) -> Case:
    if row in NORMS:
        case = Normed(case.widths, case.bias, case.dtype, case.seed)
    bias = case.bias or row in BIASED
    return testing.replace(case, bias=bias, calib=CALIB.get(row), rule=NAMED.get(row, ""))


def batches(case: Case) -> list[torch.Tensor]:
    return [case.x(64)]


def pairs(case: Case) -> list[tuple[dict, dict]]:
    return [({"input": case.x(32) + 0.5}, {"input": case.x(32).flip(0)})]


CALIB = {
    **dict.fromkeys(
        (
            "LoRAGA",
            "LoRAGA randomised",
            "EVA",
            "CorDA",
            "CorDA kpm",
            "AntiPaSTO wanda",
            "AntiPaSTOCorDA",
            "AntiPaSTOASVD",
            "Chain EVA",
        ),
        batches,
    ),
    "SSteer": pairs,
}
# SSteer trains nothing, so it starts where it ends; at strength 0 it is the base like all others.
EXEMPT = {("SSteer", "exact_identity")}
# A new bias of a layer without one is merge's to give; the dense weights of the laws have none.
BIASED = {"BitFit", "ReFT"}
# A compilation takes a second; the drawn widths matter little to it.
EXAMPLES = {"compiled_equals_eager": 1, "derivatives_equal_finite_differences": 3}

widths = st.integers(2, 6).map(lambda n: 4 * n)
cases = st.builds(
    Case,
    widths=st.tuples(widths, widths, widths),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("row", ROWS)
def test_law(row: str, law) -> None:
    if (row, law.__name__) in EXEMPT:
        return

    @settings(
        max_examples=EXAMPLES.get(law.__name__, 5),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def check(case: Case) -> None:
        law(ROWS[row], case_of(row, case))

    check()


def test_every_public_method_is_a_row() -> None:
    public = {
        name
        for name, cls in vars(fadapt).items()
        if isinstance(cls, type) and issubclass(cls, fadapt.Method) and cls is not fadapt.Method
    }
    rows = {type(m).__name__ for m in ROWS.values()}
    rows |= {"TruncatedLoRA", "Sum"}  # what as_lora and combine make
    assert public == rows, f"no row for {public - rows}"
