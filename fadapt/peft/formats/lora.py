"""LORA: LoRA, rsLoRA, EVA, MiCA, DoRA; PiSSA, OLoRA, KaSA ... as the difference of two LoRAs.

Files. ``lora_A.weight`` (r, in), ``lora_B.weight`` (out, r); of embeddings ``lora_embedding_A``
(r, vocab) and ``lora_embedding_B`` (dim, r); of convolutions with the kernel's axes;
``lora_magnitude_vector`` (out,) for DoRA; ``lora_B.bias`` (out,), which is scaled like B. Of a
stack of experts A is (experts r, in), one expert after the other, and B is (out, r experts), one
*rank* after the other. Scale: alpha / r, or alpha / sqrt(r) with ``use_rslora``; both by patterns.

Starts that change the frozen weight (``init_lora_weights``). PEFT subtracts s B0 A0 from W when it
makes and when it loads such an adapter, and the file holds A and B alone. "pissa" and "olora" are
computed from W again, as PEFT does. Where that cannot give the same again ("pissa_niter_N" is not
seeded, "corda" and "lora_ga" need data), the adapter as it was before training has to be given:
``load_peft(path, model, initial=...)``. Written is W + s (B A - B0 A0) as one LoRA of twice the
rank with ``init_lora_weights: true``, as PEFT's own conversion writes it.

KaSA (``kasa_config``) has ``lora_diag`` (r,) between A and B, and PEFT cuts the r smallest singular
triplets off W when it makes and when it loads it; they are computed from W again. It is written as
one LoRA of twice the rank, too, over a base that stays whole. MiCA ("mica") is a LoRA whose B does
not train; PEFT keeps it so where a file says "mica" for all modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import CheckpointError
from ...linalg import bottom_svd, top_svd
from ...method import Factors, Method
from ...methods._moved_factors import MovedFactors
from ...methods.dora import DoRA
from ...methods.kasa import KaSA
from ...methods.lora import LoRA, RsLoRA
from ...methods.mica import MiCA
from ...methods.olora import OLoRA
from ...methods.pissa import PiSSA
from ...params.adapter import Adapter
from ..format import (
    Format,
    Read,
    Settings,
    Taken,
    Tensors,
    majority,
    refuse_strength,
    strength,
    wide,
)
from ..places import CONV1D, CONVOLUTION, EMBEDDING, LINEAR, PARAMETER, QUANTIZED, Place

UNCHANGED_BASE = ("gaussian", "eva", "orthogonal", "mica")
MICA_LAYERS = (LINEAR, CONV1D, EMBEDDING)


class LoRAFormat(Format):
    """LoRA and what PEFT counts as one."""

    peft_type = "LORA"
    methods = (DoRA, MovedFactors, LoRA)
    suffixes = (
        *("lora_A.weight", "lora_B.weight", "lora_B.bias"),
        *("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_diag"),
    )
    layers = frozenset({LINEAR, CONV1D, QUANTIZED, EMBEDDING, CONVOLUTION, PARAMETER})
    fields = frozenset(
        "r lora_alpha use_rslora use_dora init_lora_weights rank_pattern alpha_pattern lora_bias "
        "fan_in_fan_out target_parameters lora_dropout eva_config corda_config lora_ga_config "
        "loftq_config megatron_config megatron_core runtime_config velora_config qalora_group_size "
        "kasa_config trainable_token_indices "
        "ensure_weight_tying".split()
    )
    refused: ClassVar[Mapping[str, str]] = {
        "layer_replication": "it repeats layers of the model",
        "alora_invocation_tokens": "its increment starts at a token (aLoRA)",
        "use_qalora": "it pools the inputs (QALoRA)",
        "use_bdlora": "its factors are block diagonal over devices",
        "arrow_config": "it routes between adapters",
        "monteclora_config": "it samples its weights",
    }
    patterns = ("rank_pattern", "alpha_pattern")
    dropout = "lora_dropout"
    bias_only = "lora_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        a, b = _take_factors(settings, place, tensors)
        r = a.shape[-2]
        alpha = settings.number_at(place, "lora_alpha", 8, "alpha_pattern")
        rs = settings.flag("use_rslora", False)
        method: LoRA = RsLoRA(r, alpha) if rs else LoRA(r, alpha)
        start = _start(settings, place, tensors, method, a)
        if settings.config.get("kasa_config"):
            if start is not None or settings.flag("use_dora", False):
                raise settings.fail(f"{place.key}: KaSA over DoRA, or over a start of its own")
            read = _read_kasa(settings, place, tensors, method, a, b)
        elif settings.flag("use_dora", False):
            if start is not None:
                raise settings.fail(
                    f"{place.key}: DoRA over a start that changes the frozen weight"
                )
            read = _read_dora(settings, place, tensors, method, a, b)
        elif start is not None:
            a0, b0 = start
            s = method.scaling
            # The classes whose start, too, is the same; all run alike.
            known = {"pissa": PiSSA, "olora": OLoRA}
            kind = known.get(str(settings.config.get("init_lora_weights")), MovedFactors)
            read = Read(kind(r=r, alpha=s * r), {"dA": a - a0, "dB": b - b0}, {"A0": a0, "B0": b0})
        elif settings.config.get("init_lora_weights") == "mica" and place.layer in MICA_LAYERS:
            read = Read(MiCA(r=r, alpha=method.scaling * r), {"A": a}, {"B": b})
        else:
            read = Read(method, {"A": a, "B": b}, {})
        return read

    def read_bias(self, settings: Settings, place: Place, tensors: Taken) -> Tensor | None:
        flag = settings.flag("lora_bias", False)
        if "lora_B.bias" not in tensors:
            if flag and place.layer not in (EMBEDDING, PARAMETER):
                raise settings.fail(f"lora_bias is true, and {place.key}.lora_B.bias is missing")
            return None
        r = settings.integer_at(place, "r", 8, "rank_pattern")
        alpha = settings.number_at(place, "lora_alpha", 8, "alpha_pattern")
        s = alpha / (r**0.5 if settings.flag("use_rslora", False) else r)
        return s * tensors.take("lora_B.bias", place.site.out_features)

    def own_bias(self, place: Place, adapter: Adapter, d: Tensor) -> tuple[str, Tensor] | None:
        if place.layer in (EMBEDDING, PARAMETER):
            return None
        return "lora_B.bias", d / _scale(adapter.method, adapter.leaves)

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        parts = {place: (a.method, a.leaves) for place, a in adapters.items()}
        methods = [method for method, _ in parts.values()]
        dora = [isinstance(m, DoRA) for m in methods]
        if any(dora) and not all(dora):
            names = [p.site.name for p, d in zip(parts, dora, strict=True) if not d]
            raise CheckpointError(
                f"PEFT's format has use_dora for all modules or none, and {names[0]} is not DoRA: "
                "save them apart, or convert them: fadapt.as_lora(model, params, r=...)"
            )
        rs = all(isinstance(m, RsLoRA) and "s" not in p for m, p in parts.values())
        ranks, alphas = {}, {}
        for place, (method, p) in parts.items():
            ranks[place] = _rank(method, p)
            alphas[place] = _alpha(method, p, ranks[place], rs)
        bare = [place for place in parts if place.layer == PARAMETER]
        r = alpha = None
        if bare:
            # PEFT takes patterns that match only parameters for mistaken, so these have the
            # defaults; their factors are padded and scaled to them.
            r = max(ranks[place] for place in bare)
            alpha = alphas[bare[0]] if ranks[bare[0]] == r else (1 if rs else r)
            ranks.update(dict.fromkeys(bare, r))
            alphas.update(dict.fromkeys(bare, alpha))
        r, rank_pattern = majority(ranks, r)
        alpha, alpha_pattern = majority(alphas, alpha)
        if any(dora) and bare:
            raise CheckpointError(f"{bare[0].site.name}: PEFT has no DoRA for a bare parameter")
        return {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "use_rslora": rs,
            "use_dora": all(dora),
            "init_lora_weights": "mica" if _all_mica(parts) else True,
            "lora_bias": False,
            "fan_in_fan_out": all(place.layer == CONV1D for place in parts),
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        method, p = adapter.method, adapter.leaves
        c, s = strength(adapter), _scale(method, p)
        a, b = method._factors(p) if isinstance(method, MovedFactors) else (p["A"], p["B"])
        found = {}
        if isinstance(method, DoRA):
            refuse_strength(place, adapter)
            found["lora_magnitude_vector"] = _magnitude(place, p)
        if place.layer == PARAMETER:
            r, own = settings["r"], settings["lora_alpha"]
            c = c * s / (own / (r**0.5 if settings["use_rslora"] else r))
            a, b = F.pad(a, (0, 0, 0, r - a.shape[-2])), F.pad(b, (0, r - b.shape[-1]))
        if c != 1:
            a, b = wide(a), c * wide(b)
        a, b = _put_factors(place, a, b)
        embedding = place.layer == EMBEDDING
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else self.suffixes[:2]
        found.update(zip(names, (a, b), strict=True))
        return found


def _take_factors(settings: Settings, place: Place, tensors: Taken) -> Factors:
    r = settings.integer_at(place, "r", 8, "rank_pattern")
    site = place.site
    d_out, d_in = site.matrix_shape
    if place.layer == EMBEDDING:
        return tensors.take("lora_embedding_A", r, d_in), tensors.take("lora_embedding_B", d_out, r)
    if place.layer == CONVOLUTION:
        ones = (1,) * (len(site.kernel) - 1)
        a = tensors.take("lora_A.weight", r, *site.kernel)
        return a.flatten(1), tensors.take("lora_B.weight", d_out, r, *ones).flatten(1)
    if not site.experts:
        return tensors.take("lora_A.weight", r, d_in), tensors.take("lora_B.weight", d_out, r)
    a = tensors.take("lora_A.weight", site.experts * r, d_in).unflatten(0, (site.experts, r))
    b = tensors.take("lora_B.weight", d_out, r * site.experts).unflatten(1, (r, site.experts))
    return a, b.permute(2, 0, 1).contiguous()


def _put_factors(place: Place, a: Tensor, b: Tensor) -> Factors:
    site = place.site
    if place.layer == CONVOLUTION:
        return a.unflatten(1, site.kernel), b.reshape(*b.shape, *(1,) * (len(site.kernel) - 1))
    if site.experts:
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    return a, b


def _start(
    settings: Settings, place: Place, tensors: Taken, method: LoRA, a: Tensor
) -> Factors | None:
    """A0 and B0 of a start that is subtracted from the frozen weight, or None."""
    init = settings.config.get("init_lora_weights", True)
    if tensors.initial is not None:
        if init == "loftq":
            raise settings.fail("LoftQ trains over another, quantised base: load it there")
        return _take_factors(settings, place, tensors.initial)
    if init is None or isinstance(init, bool) or init in UNCHANGED_BASE:
        return None
    site, s = place.site, method.scaling
    where = f"{place.key}: init_lora_weights={str(init)[:60]!r}"
    if init not in ("pissa", "olora"):
        raise settings.fail(
            f"{where} changes the frozen weight by factors that the file does not hold and that "
            "cannot be computed again. Give the adapter as it was before training, "
            "load_peft(path, model, initial=its_directory); or let PEFT convert the file: "
            "model.save_pretrained(path, path_initial_model_for_weight_conversion=...)"
        )
    if place.layer not in ((LINEAR, CONV1D) if init == "pissa" else (LINEAR,)):
        raise settings.fail(f"{where} is not defined for a {place.layer} weight")
    if method.r > min(site.matrix_shape):
        raise settings.fail(f"{where} with r={method.r} is more than {site.matrix_shape} has")
    weight = place.weight.map.weight().to(torch.promote_types(a.dtype, torch.float32))
    if init == "pissa":
        u, sigma, v = top_svd(weight, method.r)
        root = (sigma / s).sqrt()
        a0, b0 = (v * root).mT, u * root
        # Signs are arbitrary; those of the file keep the moves small.
        sign = torch.where((a0 * a.to(a0)).sum(1) < 0, -1, 1).to(a0)
        return (a0 * sign.unsqueeze(1)).contiguous(), b0 * sign
    q, upper = torch.linalg.qr(weight)
    return upper[: method.r].contiguous(), q[:, : method.r].contiguous()


def _read_kasa(
    settings: Settings, place: Place, tensors: Taken, method: LoRA, a: Tensor, b: Tensor
) -> Read:
    r, s = method.r, method.scaling
    if place.layer != LINEAR:
        raise settings.fail(f"{place.key}: KaSA is not defined for a {place.layer} weight")
    if r > min(place.site.matrix_shape):
        raise settings.fail(f"{place.key}: KaSA of r={r} is more than the weight has")
    weight = place.weight.map.weight().to(torch.promote_types(a.dtype, torch.float32))
    u, sigma, v = bottom_svd(weight, r)
    d, d0 = tensors.take("lora_diag", r), sigma / s
    train = {"dA": a - v.mT, "dB": b - u, "dd": d - d0}
    return Read(KaSA(r=r, alpha=s * r), train, {"A0": v.mT.contiguous(), "B0": u, "d0": d0})


def _all_mica(parts: Mapping[Place, tuple[Method, Mapping[str, Tensor]]]) -> bool:
    """Whether PEFT can make all of them as MiCA, which refuses ranks that a weight has not."""
    return all(
        isinstance(method, MiCA)
        and place.layer in MICA_LAYERS
        and _rank(method, p) <= min(place.site.matrix_shape)
        for place, (method, p) in parts.items()
    )


def _read_dora(
    settings: Settings, place: Place, tensors: Taken, method: LoRA, a: Tensor, b: Tensor
) -> Read:
    d_out = place.site.out_features
    shape = (1, d_out, *(1,) * (len(place.site.kernel) - 1))
    shape = shape if place.layer == CONVOLUTION else (d_out,)
    magnitude = tensors.take("lora_magnitude_vector", *shape).flatten()
    w2 = _squares(place, magnitude.dtype)
    length = w2.sqrt()
    if bool(((length == 0) & (magnitude != 0)).any()):
        raise settings.fail(f"{place.key}: a row of {place.site.name} is zero and has a magnitude")
    mu = magnitude / torch.where(length == 0, 1, length) - (length != 0).to(length)
    alpha = method.scaling * method.r
    return Read(DoRA(method.r, alpha), {"A": a, "B": b, "mu": mu}, {"w2": w2})


def _magnitude(place: Place, p: Mapping[str, Tensor]) -> Tensor:
    w2, mu = p["w2"], p["mu"].to(p["w2"].dtype)
    if bool(((w2 == 0) & ~p["B"].any(-1)).any()):
        raise CheckpointError(
            f"{place.site.name}: a row of the weight is zero, and PEFT divides by its length"
        )
    m = (w2.sqrt() * (1 + mu)).to(torch.promote_types(p["mu"].dtype, torch.float32))
    return m.view(1, -1, *(1,) * (len(place.site.kernel) - 1)) if place.site.kernel else m


def _squares(place: Place, dtype: torch.dtype) -> Tensor:
    weight = place.weight.map.weight()
    return weight.to(torch.promote_types(weight.dtype, dtype)).square().sum(-1)


def _scale(method: Method, p: Mapping[str, Tensor]) -> float:
    assert isinstance(method, LoRA)
    return float(p["s"]) if "s" in p else method.scaling


def _rank(method: Method, p: Mapping[str, Tensor]) -> int:
    if isinstance(method, MovedFactors):
        return 2 * p["A0"].shape[-2]
    return p["A"].shape[-2]


def _alpha(method: Any, p: Mapping[str, Tensor], r: int, rs: bool) -> float:
    plain = "s" not in p and not isinstance(method, MovedFactors)
    if plain and (rs or not isinstance(method, RsLoRA)):
        alpha = method.alpha
    else:
        alpha = _scale(method, p) * (r**0.5 if rs else r)
    return int(alpha) if alpha == int(alpha) else alpha
