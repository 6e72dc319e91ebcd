"""Full, TrainableTokens and ReFT against the plain model with the tensors that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fadapt
from tests import models as zoo

IDS = torch.randint(0, 60, (3, 7), generator=torch.Generator().manual_seed(2))
TOKENS = (4, 17, 33)
IDS[0, :3] = torch.tensor(TOKENS)


def lively(base: nn.Module, cfg: Any) -> fadapt.Params:
    params = fadapt.init(base, cfg)
    rng = torch.Generator().manual_seed(0)
    for leaf in fadapt.trainable(params):
        leaf.data += 0.3 * torch.randn(leaf.shape, generator=rng)
    return params


def model(tied: bool) -> nn.Module:
    base = zoo.llama()
    if tied:
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
    return base


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [TOKENS, None])
def test_rows_move_in_all_uses_of_an_embedding(
    tied: bool, tokens: tuple[int, ...] | None, tmp_path: Path
) -> None:
    base = model(tied)
    batch = {"input_ids": IDS, "labels": IDS}
    params = lively(base, fadapt.TrainableTokens(tokens))
    (d,) = fadapt.trainable(params)
    table = base.model.embed_tokens.weight
    rows = torch.arange(len(table)) if tokens is None else torch.tensor(tokens)
    new = table.detach().index_add(0, rows, d)
    weights = {"model.embed_tokens.weight": new, **({"lm_head.weight": new} if tied else {})}
    want = functional_call(base, weights, (), batch, tie_weights=False).loss
    loss = fadapt.run(base, params, batch)
    torch.testing.assert_close(loss, want)
    for a, b in zip(torch.autograd.grad(loss, d), torch.autograd.grad(want, d), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    merged = fadapt.merge(base, params)  # no warning: all uses have the value
    assert merged.keys() == weights.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, weights[name])
    fadapt.save(params, tmp_path / "a")
    again = fadapt.load(tmp_path / "a", base)
    assert torch.equal(fadapt.run(base, again, batch), loss)
    assert len(fadapt.trainable(again)) == 1
    other = fadapt.scale(params, -0.5)
    losses = fadapt.run(base, fadapt.stack([params, other]), batch)
    torch.testing.assert_close(losses, torch.stack([loss, fadapt.run(base, other, batch)]))
    fresh = fadapt.init(base, fadapt.TrainableTokens(tokens))
    assert torch.equal(fadapt.apply(base, fresh, IDS).logits, base(IDS).logits)
    if tokens is not None:
        lora = fadapt.as_lora(base, params)
        assert {a.method.r for a in lora.values()} == {len(tokens)}  # type: ignore[attr-defined]
        torch.testing.assert_close(fadapt.run(base, lora, batch), loss)


def test_which_embeddings_are_meant() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = nn.Embedding(9, 4), nn.Embedding(5, 4)
            self.out = nn.Linear(4, 9)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.token(ids) + self.place(torch.arange(ids.shape[1])))

    two = Two()
    some = fadapt.TrainableTokens((1,))
    assert set(fadapt.init(two, some)) == {"token.weight", "place.weight"}
    assert set(fadapt.init(two, {"token": some})) == {"token.weight"}
    assert set(fadapt.init(two, {"out": some})) == {"out.weight"}
    with pytest.raises(fadapt.ConfigError, match="token_indices has 7, and there are 5 rows"):
        fadapt.init(two, fadapt.TrainableTokens((7,)))
    two.out.weight = two.token.weight
    with pytest.raises(fadapt.ConfigError, match="are one tied tensor, and the rule means other"):
        fadapt.init(two, some)
    assert set(fadapt.init(two, {"token": some}).at_sites()) == {"token.weight", "out.weight"}
    with pytest.raises(fadapt.TargetError, match="for embeddings, but the model has none"):
        fadapt.init(nn.Linear(4, 4), some)
    with pytest.raises(fadapt.TargetError, match="for norms, but the model has none"):
        fadapt.init(nn.Linear(4, 4), fadapt.LNTuning())
    with pytest.raises(fadapt.ConfigError, match="none twice"):
        fadapt.TrainableTokens((3, 3))
    with pytest.raises(fadapt.TargetError, match="excluded"):
        fadapt.init(two, fadapt.Config({"token": some}, exclude=("token", "out")))


def test_full_takes_every_kind_of_parameter() -> None:
    base = zoo.llama()
    rule = r"embed_tokens|lm_head|q_proj|norm.weight"
    cfg = {r"norm\.weight": fadapt.Full(), rule: fadapt.Full()}
    params = lively(base, fadapt.Config(cfg, exclude=()))
    assert len(params) == 4 + 5
    own = dict(base.named_parameters())
    weights = {
        name: own[name].detach() + a.site.parameter(a.train["D"])
        if a.site.kind != "embedding"
        else own[name].detach() + a.train["D"].mT
        for name, a in params.items()
    }
    batch = {"input_ids": IDS, "labels": IDS}
    want = functional_call(base, weights, (), batch).loss
    loss = fadapt.run(base, params, batch)
    torch.testing.assert_close(loss, want)
    grads = (torch.autograd.grad(one, fadapt.trainable(params)) for one in (loss, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_reft_is_the_papers_edit_of_the_layers_output(bias: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 10, bias)
    params = lively(base, fadapt.ReFT(r=3))
    p = params["weight"].leaves
    k = p["R0"] + p["dR"]
    turn, _ = torch.linalg.qr(k.mT.double())
    r = turn.mT.float()  # orthonormal rows of the same span, in another rotation
    own = params["weight"].method._directions(p)  # type: ignore[attr-defined]
    torch.testing.assert_close(own @ own.mT, torch.eye(3))
    torch.testing.assert_close(own.mT @ own, r.mT @ r)
    x = torch.randn(5, 12)
    h = base(x)
    w, b = p["M"] + own, p["e"]  # the paper's
    want = h + (h @ w.mT + b - h @ own.mT) @ own
    torch.testing.assert_close(fadapt.apply(base, params, x), want)
    with pytest.raises(fadapt.ConfigError, match="moves the bias"):
        fadapt.as_lora(base, params)
    lora = fadapt.as_lora(base, params, drop_bias="weight")
    edit = fadapt.BitFit()
    biased = fadapt.init(base, fadapt.Chain((lora["weight"].method, edit)))
    b0 = torch.zeros(10) if base.bias is None else base.bias.detach()
    leaves = {f"0.{k}": t for k, t in lora["weight"].train.items()}
    leaves["1.d"] = (b0 @ p["M"].mT + b) @ own
    biased = biased.map(lambda a: a.replace(leaves))
    torch.testing.assert_close(fadapt.apply(base, biased, x), want)
    assert lora["weight"].method.r == 3  # type: ignore[attr-defined]
