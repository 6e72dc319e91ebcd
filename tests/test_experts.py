"""Which bare parameters are stacks of experts, and how they are stored: as the forward has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fadapt

from .models import reals, seeded, trained

L2 = fadapt.LoRA(r=2)
N, D = 3, 8


class ToyExperts(nn.Module):
    """Square matrices, whose shape says nothing of how they are stored."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], **flags: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(N, D, D))
        self.use, self.calls, self.last = use, 0, None
        for name, value in flags.items():
            setattr(self, name, value)

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        self.last = hidden
        return self.use(hidden, self.w)


class Routed(nn.Module):
    """Experts in the form of transformers: by ids and weights of the tokens' choices."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.num_experts = N
        self.up = nn.Parameter(torch.zeros(N, D, D))
        self.down = nn.Parameter(torch.zeros(N, D, D))
        self.transposed = transposed

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e in range(N):
            rows, slot = torch.where(top_k_index == e)
            up, down = self.up[e], self.down[e]
            x = hidden[rows]
            y = (
                (x @ up).relu() @ down
                if self.transposed
                else F.linear(F.linear(x, up).relu(), down)
            )
            out = out.index_add(0, rows, y * top_k_weights[rows, slot, None])
        return out


class Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.experts, Routed):
            ids = torch.arange(len(x))[:, None] % N
            return self.experts(x, ids, torch.ones(len(x), 1))
        return self.experts(x)


USES = {
    "linear": (lambda x, w: sum(F.linear(x, w[i]) for i in range(N)), False),
    "product": (lambda x, w: sum(x @ w[i] for i in range(N)), True),
    "transposed product": (lambda x, w: sum(x @ w[i].T for i in range(N)), False),
    "weight first": (lambda x, w: sum((w[i] @ x.T).T for i in range(N)), False),
    "batched": (lambda x, w: torch.bmm(x.expand(N, *x.shape), w).sum(0), True),
    "batched, transposed": (lambda x, w: torch.bmm(x.expand(N, *x.shape), w.mT).sum(0), False),
    "unbound": (lambda x, w: sum(F.linear(x, m) for m in w.unbind()), False),
}


def check_merge(model: nn.Module, params: fadapt.Params, x: Tensor) -> None:
    want = functional_call(model, fadapt.merge(model, params), (x,))
    assert (want - model(x)).abs().max() > 1e-2
    torch.testing.assert_close(fadapt.apply(model, params, x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
@pytest.mark.parametrize("flags", [{}, {"is_transposed": True}, {"is_transposed": False}], ids=str)
@pytest.mark.parametrize("use", USES)
def test_the_forward_says_how_experts_are_stored(use: str, flags: dict[str, bool]) -> None:
    """Whatever a flag says."""
    function, transposed = USES[use]
    model = seeded(Layer(ToyExperts(function, **flags)))
    params = trained(model, L2)
    site = params["experts.w"].site
    assert (site.kind, site.experts, site.transposed) == ("experts", N, transposed)
    check_merge(model, params, reals(6, D))


@pytest.mark.parametrize("transposed", [False, True])
def test_routed_experts_without_a_flag(transposed: bool) -> None:
    model = seeded(Layer(Routed(transposed)))
    params = trained(model, L2)
    assert {n: a.site.transposed for n, a in params.items()} == {
        "experts.up": transposed,
        "experts.down": transposed,
    }
    check_merge(model, params, reals(6, D))


def test_the_layer_itself_is_not_run() -> None:
    model = seeded(Layer(ToyExperts(USES["linear"][0])))
    hooked: list[nn.Module] = []
    model.experts.register_forward_pre_hook(lambda module, args: hooked.append(module))
    fadapt.init(model, L2)
    assert (model.experts.calls, model.experts.last, hooked) == (0, None, [])


def test_a_forward_that_cannot_be_watched_leaves_it_to_the_flag() -> None:
    def strange(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, w)

    for flag in (False, True):
        model = seeded(Layer(ToyExperts(strange, is_transposed=flag)))
        assert fadapt.init(model, L2)["experts.w"].site.transposed is flag


class Blocks(nn.Module):
    """Block-diagonal gates: three axes, and no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 4, 4))
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.einsum("bhi,hio->bho", x.unflatten(-1, (2, 4)), self.w).flatten(1))


def test_three_axes_alone_make_no_experts() -> None:
    normed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)))
    with pytest.raises(fadapt.TargetError):
        fadapt.init(seeded(normed), L2)  # nothing else is there
    model = seeded(nn.Sequential(Blocks()))
    params = fadapt.init(model, L2)
    assert list(params) == ["0.out.weight"]
    assert "0.w" in fadapt.summary(params, model)


def xlnet() -> nn.Module:
    from transformers import XLNetConfig, XLNetModel

    return seeded(
        XLNetModel(XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48))
    )


def dbrx() -> nn.Module:
    from transformers import DbrxConfig, DbrxModel

    ffn = dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2)
    config = DbrxConfig(
        vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, use_cache=False,
        ffn_config=ffn, attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
    )  # fmt: skip
    return seeded(DbrxModel(config))


@pytest.mark.filterwarnings("ignore::fadapt.FadaptWarning")
@pytest.mark.parametrize(
    ("make", "name", "kind", "experts", "shape"),
    [
        (xlnet, "layer.0.rel_attn.q", "heads", 0, (32, 32)),
        (xlnet, "layer.1.rel_attn.o", "heads", 0, (32, 32)),
        (dbrx, "blocks.0.ffn.experts.mlp.w1", "experts", 4, (24, 32)),
        (dbrx, "blocks.0.ffn.experts.mlp.w2", "experts", 4, (32, 24)),
    ],
)
def test_matrices_in_other_shapes(
    make: Callable[[], nn.Module], name: str, kind: str, experts: int, shape: tuple[int, int]
) -> None:
    """A map split into heads is one map; experts in the rows of one matrix are as many maps."""
    model = make()
    params = trained(model, L2)
    site = params[name].site
    assert (site.kind, site.experts) == (kind, experts)
    assert (site.out_features, site.in_features) == shape
    one = trained(model, {f"^{name}$": fadapt.DoRA(r=2)})
    ids = torch.arange(2, 12).reshape(2, 5)
    for p in (params, one):
        with torch.no_grad():
            got = fadapt.apply(model, p, input_ids=ids)[0]
            want = functional_call(model, fadapt.merge(model, p), (), {"input_ids": ids})[0]
            assert (want - model(input_ids=ids)[0]).abs().max() > 1e-4
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
