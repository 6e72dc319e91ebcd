"""A stack is its members alone, or it says so: the proof on the first batch."""

from __future__ import annotations

import dataclasses
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fadapt
from fadapt.fold import fold
from fadapt.fold import run as fold_run

from .models import perturb, qwen3, reals, tokens


class TimeFirst(nn.Module):
    """Time before the batch within; on flattened rows, or not."""

    def __init__(self, flat: bool):
        super().__init__()
        self.first, self.last, self.flat = nn.Linear(4, 6), nn.Linear(6, 2), flat

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1)
        h = self.first(h.reshape(-1, 4)).view(*h.shape[:2], -1) if self.flat else self.first(h)
        return self.last(torch.tanh(h.transpose(0, 1)).mean(1))


class Latents(nn.Module):
    """Learned queries, which have no batch axis."""

    def __init__(self, count: int = 12):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(count, 8))
        self.q, self.k, self.last = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)
        return self.last((torch.softmax(self.q(self.latents) @ k.mT, -1) @ k).mean(1))


class Mixing(nn.Module):
    """Two layers with something of the whole batch between them."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last, self.how = nn.Linear(4, 8), nn.Linear(8, 4), how

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.how(torch.tanh(self.first(x))))


def competing(h: Tensor) -> Tensor:
    """The half of the rows with the largest sums, as experts with a capacity take them."""
    kept = h.flatten(1).sum(1).argsort(descending=True)[: len(h) // 2]
    return h * h.new_zeros(len(h), *[1] * (h.dim() - 1)).index_fill(0, kept, 1.0)


MIXERS = {
    "batch statistics": lambda h: h - h.mean(0, keepdim=True),
    "a scale of the whole batch": lambda h: h / h.square().mean(),
    "rows in another order": lambda h: h.flip(0),
    "attention over the batch": lambda h: torch.softmax(h @ h.mT, -1) @ h if h.dim() == 2 else h,
    "a capacity": competing,
}


def members(model: nn.Module, n: int = 3, rules=None) -> list[fadapt.Params]:
    cfg = rules or fadapt.LoRA(r=2)
    made = [fadapt.init(model, fadapt.Config(cfg, seed=i)) for i in range(n)]
    return [perturb(p, seed=i, std=0.5) for i, p in enumerate(made)]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("time", [5, 6, 12])
@pytest.mark.parametrize("flat", [True, False])
def test_time_first_is_refused_at_every_length(flat: bool, time: int, n: int) -> None:
    """Also where the time steps are as many as the rows of all adapters."""
    model = TimeFirst(flat)
    with pytest.raises(fadapt.FadaptError, match="unstack"):
        fadapt.apply(model, fadapt.stack(members(model, n)), reals(3, time, 4))


@pytest.mark.parametrize("count", [7, 12])
def test_latents_without_a_batch_axis_are_refused(count: int) -> None:
    model = Latents(count)
    stack = fadapt.stack(members(model, 2, {"q|k|last": fadapt.LoRA(r=2)}))
    with pytest.raises(fadapt.FadaptError, match="stack"):
        fadapt.apply(model, stack, reals(3, 5, 4))
    # Where nothing but rows of the batch is adapted, all is well.
    rows = members(model, 2, {"k|last": fadapt.LoRA(r=2)})
    out = fadapt.apply(model, fadapt.stack(rows), reals(3, 5, 4))
    alone = torch.stack([fadapt.apply(model, p, reals(3, 5, 4)) for p in rows])
    torch.testing.assert_close(out, alone)


@pytest.mark.parametrize("start", ["fresh", "moved"])
@pytest.mark.parametrize("name", MIXERS)
def test_rows_that_meet_are_refused(name: str, start: str) -> None:
    """With both numbers and the way out; also for members that are all still the identity."""
    model = Mixing(MIXERS[name])
    made = members(model) if start == "moved" else [fadapt.init(model, fadapt.LoRA(r=2))] * 3
    stack, x = fadapt.stack(made), reals(8, 4)

    def loss(out, _):
        return F.mse_loss(out, x)

    message = r"in one pass with the other and .* alone .*unstack\(stack\).*vmap.*verify=False"
    for _ in range(2):  # the verdict is kept
        with pytest.raises(fadapt.FadaptError, match=message):
            fadapt.run(model, stack, x, loss)
        with pytest.raises(fadapt.FadaptError, match=message):
            fadapt.apply(model, stack, x)
    assert fadapt.run(model, stack, x, loss, verify=False).shape == (3,)
    assert fadapt.apply(model, stack, x, verify=False).shape == (3, 8, 4)
    alone = torch.stack([fadapt.run(model, p, x, loss) for p in fadapt.unstack(stack)])
    assert alone.isfinite().all()


@pytest.mark.parametrize("name", MIXERS)
def test_own_batches_and_chosen_rows_are_proved_too(name: str) -> None:
    model = Mixing(MIXERS[name])
    stack = fadapt.stack(members(model))
    with pytest.raises(fadapt.FadaptError, match="not independent"):
        fadapt.run(model, stack, reals(3, 8, 4), lambda o, _: o.square().mean(), per_adapter=True)
    with pytest.raises(fadapt.FadaptError, match="not independent"):
        fadapt.apply(model, fadapt.select(stack, [2, 0, 1, 1]), reals(4, 4))


@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_in_training_mode_is_refused(track: bool) -> None:
    norm = nn.BatchNorm1d(8, track_running_stats=track)
    model = nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 4)).train()
    stack, x = fadapt.stack(members(model)), reals(6, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for call in (
        lambda: fadapt.run(model, stack, x, lambda o, _: o.square().mean()),
        lambda: fadapt.apply(model, stack, x),
    ):
        with pytest.raises(fadapt.FadaptError, match=r"1 \(BatchNorm1d\) normalises.*eval"):
            call()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    if track:
        out = fadapt.apply(model, stack, x)
        alone = torch.stack([fadapt.apply(model, p, x) for p in fadapt.unstack(stack)])
        torch.testing.assert_close(out, alone)


def test_a_capacity_in_training_mode_is_refused() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert_capacity = 2

        def forward(self, h: Tensor) -> Tensor:
            return competing(h) if self.training else h

    model = Mixing(Router())
    stack, x = fadapt.stack(members(model)), reals(4, 4)
    model.train()
    with pytest.raises(fadapt.FadaptError, match="capacity"):
        fadapt.apply(model, stack, x)
    traced = torch.compile(lambda x: fadapt.apply(model, stack, x), backend="eager")
    with pytest.raises(fadapt.FadaptError, match="capacity"):
        traced(x)
    model.eval()
    assert fadapt.apply(model, stack, x).shape == traced(x).shape == (3, 4, 4)


@pytest.mark.parametrize("mixes", [False, True])
def test_what_a_model_mixes_in_training_mode_alone_is_refused(mixes: bool) -> None:
    """Dropout is no mixing, whatever it draws."""

    class Centered(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            h = torch.nn.functional.dropout(h, 0.3, self.training)
            return h - h.mean(0, keepdim=True) if mixes and self.training else h

    model = Mixing(Centered())
    stack, x = fadapt.stack(members(model)), reals(4, 4)
    state = torch.get_rng_state()
    model.train()
    if mixes:
        with pytest.raises(fadapt.FadaptError, match=r"training mode.*eval"):
            fadapt.apply(model, stack, x)
        assert fadapt.apply(model, stack, x, verify=False).shape == (3, 4, 4)
    else:
        assert fadapt.apply(model, stack, x).shape == (3, 4, 4)
        torch.set_rng_state(state)
        once = fadapt.apply(model, stack, x)
        torch.set_rng_state(state)
        assert torch.equal(fadapt.apply(model, stack, x), once)
    model.eval()
    fadapt.apply(model, stack, x)


DRAWS = {
    "torch": lambda rows: torch.rand(rows).tolist(),
    "Python": lambda rows: [random.random() for _ in range(rows)],
    "numpy": lambda rows: np.random.rand(rows).tolist(),  # noqa: NPY002, what models use
    "its own": lambda rows: np.random.default_rng().random(rows).tolist(),
}


class Masking(nn.Module):
    """Leaves rows out at random, in training mode, as speech models do with spectra."""

    def __init__(self, draw, mixes: bool, always: bool = False):
        super().__init__()
        self.draw, self.mixes, self.always = draw, mixes, always

    def forward(self, h: Tensor) -> Tensor:
        if not (self.training or self.always):
            return h
        h = h * (torch.tensor(self.draw(len(h))) > 0.4).to(h)[:, None]
        return h - h.mean(0, keepdim=True) if self.mixes else h


@pytest.mark.parametrize("name", DRAWS)
def test_what_a_model_draws_in_training_mode_is_no_mixing_whatever_generator(name: str) -> None:
    model = Mixing(Masking(DRAWS[name], mixes=False)).train()
    stack, x = fadapt.stack(members(model)), reals(8, 4)
    for _ in range(3):  # with other moves, later
        fadapt.apply(model, fadapt.stack(members(model)), x)
    assert fadapt.run(model, stack, x, lambda o, _: o.square().mean()).shape == (3,)


@pytest.mark.parametrize("name", [name for name in DRAWS if name != "its own"])
def test_rows_that_meet_in_training_mode_are_seen_beside_what_is_drawn(name: str) -> None:
    model = Mixing(Masking(DRAWS[name], mixes=True)).train()
    with pytest.raises(fadapt.FadaptError, match=r"not independent.*training mode"):
        fadapt.apply(model, fadapt.stack(members(model)), reals(8, 4))


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("name", [name for name in DRAWS if name != "its own"])
def test_a_model_that_draws_in_eval_mode_is_proved_too(name: str, mixes: bool) -> None:
    """As masked autoencoders do, which hide patches at random."""
    model = Mixing(Masking(DRAWS[name], mixes, always=True)).eval()
    stack, x = fadapt.stack(members(model)), reals(8, 4)
    if mixes:
        with pytest.raises(fadapt.FadaptError, match="not independent"):
            fadapt.apply(model, stack, x)
    else:
        assert fadapt.apply(model, stack, x).shape == (3, 8, 4)


def test_an_output_without_rows_is_refused_where_it_is_handed_out() -> None:
    class Contrastive(Mixing):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = super().forward(x)
            return {"rows": h, "logits": h @ h.mT}

    model = Contrastive(torch.tanh)
    stack, x = fadapt.stack(members(model)), reals(4, 4)
    with pytest.raises(fadapt.FadaptError, match=r"logits.* shape \(4, 8\) .* \(4, 4\) alone"):
        fadapt.apply(model, stack, x)

    def contrast(out, _):
        return F.cross_entropy(out["logits"], torch.arange(4))

    with pytest.raises((fadapt.FadaptError, RuntimeError, ValueError)):
        fadapt.run(model, stack, x, contrast)

    def own(out, _):
        return F.cross_entropy(out["rows"] @ out["rows"].mT, torch.arange(4))

    losses = fadapt.run(model, stack, x, own)
    alone = torch.stack([fadapt.run(model, p, x, own) for p in fadapt.unstack(stack)])
    torch.testing.assert_close(losses, alone)


@dataclasses.dataclass(frozen=True)
class Held:
    rows: Tensor
    more: object = None


@pytest.mark.parametrize("per_adapter", [False, True])
def test_dataclasses_are_taken_apart(per_adapter: bool) -> None:
    """Also those that no registry of trees knows, within others; and mixed rows are seen there."""

    class Returns(Mixing):
        def forward(self, x: Tensor) -> Held:  # type: ignore[override]
            h = super().forward(x)
            return Held(h, {"inner": [Held(h * 2)], "name": "x"})

    model, x = Returns(torch.tanh), reals(3, 8, 4) if per_adapter else reals(8, 4)
    made = members(model)
    stack = fadapt.stack(made)
    out = fadapt.apply(model, stack, x, per_adapter=per_adapter)
    assert type(out) is Held
    assert out.rows.shape == out.more["inner"][0].rows.shape == (3, 8, 4)
    for k, p in enumerate(made):
        alone = fadapt.apply(model, p, x[k] if per_adapter else x)
        torch.testing.assert_close(out.rows[k], alone.rows)
        torch.testing.assert_close(out.more["inner"][0].rows[k], alone.rows * 2)

    def loss(out, _):
        assert out.rows.shape == out.more["inner"][0].rows.shape == (8, 4)
        return (out.rows + out.more["inner"][0].rows).square().sum()

    losses = fadapt.run(model, stack, x, loss, per_adapter=per_adapter)
    alone = [fadapt.run(model, p, x[k] if per_adapter else x, loss) for k, p in enumerate(made)]
    torch.testing.assert_close(losses, torch.stack(alone))
    model = Returns(MIXERS["batch statistics"])
    with pytest.raises(fadapt.FadaptError, match=r"rows.* of one of two test adapters"):
        fadapt.apply(model, fadapt.stack(members(model)), x, per_adapter=per_adapter)


def test_rows_that_meet_are_refused_whatever_the_loss_makes_of_equal_rows() -> None:
    model = Mixing(lambda h: h - h[:1])
    stack, x = fadapt.stack(members(model)), reals(8, 4)

    def contrast(out, _):
        return F.cross_entropy(out @ out.mT, torch.arange(len(out)))

    with pytest.raises(fadapt.FadaptError, match="not independent"):
        fadapt.run(model, stack, x, contrast)


def test_tensors_in_other_objects_are_refused() -> None:
    class Returns(Mixing):
        def forward(self, x: Tensor) -> torch.distributions.Normal:  # type: ignore[override]
            return torch.distributions.Normal(super().forward(x), 1.0)

    model, x = Returns(torch.tanh), reals(8, 4)
    stack = fadapt.stack(members(model))
    with pytest.raises(fadapt.FadaptError, match=r"returns a Normal, whose loc has .* rows"):
        fadapt.apply(model, stack, x)
    with pytest.raises(fadapt.FadaptError, match=r"returns a Normal, whose loc has .* rows"):
        fadapt.run(model, stack, x, lambda out, _: out.mean.square().mean())


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), 0

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.body(x if more is None else x + more)


def passes(model: Counted, call) -> int:
    before = model.calls
    call()
    return model.calls - before


def test_it_costs_two_passes_of_two_and_two_of_one_once() -> None:
    """And one of two and two of one more in training mode."""
    model = Counted()
    stack, x = fadapt.stack(members(model)), reals(5, 4)

    def run(batch, **options):
        return fadapt.run(model, stack, batch, lambda o, _: o.square().mean(), **options)

    assert passes(model, lambda: run({"x": x}, verify=False)) == 1
    assert passes(model, lambda: run({"x": x})) == 1 + 7
    assert passes(model, lambda: run({"x": x})) == 1
    assert passes(model, lambda: run({"x": reals(7, 4)})) == 1  # other rows, nothing else
    assert passes(model, lambda: run({"x": x, "more": x})) == 1 + 7  # other arguments
    assert passes(model, lambda: run({"x": x, "more": x})) == 1
    model.eval()
    assert passes(model, lambda: run({"x": x})) == 1 + 4  # another mode
    model.body[1] = nn.ReLU().eval()
    assert passes(model, lambda: run({"x": x})) == 1 + 4  # another model
    again = fadapt.stack(members(model, 5))
    assert passes(model, lambda: fadapt.apply(model, again, x)) == 1 + 4
    assert passes(model, lambda: fadapt.apply(model, stack, x)) == 1  # of the same structure


def test_it_leaves_no_trace() -> None:
    def drawn(rows: int) -> list[float]:
        return [x + random.random() for x in DRAWS["numpy"](rows)]

    model = Mixing(nn.Sequential(nn.Dropout(0.5), Masking(drawn, mixes=False))).train()
    made = members(model)
    stack, x = fadapt.stack(made), reals(4, 4)
    values = [t.clone() for t in fadapt.trainable(stack)]

    def losses(verify: bool) -> Tensor:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        return fadapt.run(model, stack, x, lambda o, _: o.square().mean(), verify=verify)

    assert torch.equal(losses(True), losses(False))  # dropout draws the same
    assert all(m.training for m in model.modules())
    for old, new in zip(values, fadapt.trainable(stack), strict=True):
        assert torch.equal(old, new)
        assert new.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_without_gradients(mode) -> None:
    model, bad = Counted().eval(), Mixing(MIXERS["batch statistics"])
    with mode():
        assert fadapt.apply(model, fadapt.stack(members(model)), reals(4, 4)).shape == (3, 4, 4)
        stack = fadapt.stack(members(bad))
        with pytest.raises(fadapt.FadaptError, match="not independent"):
            fadapt.run(bad, stack, reals(4, 4), lambda o, _: o.square().mean())


def test_a_failure_within_it_says_so() -> None:
    model = Counted()

    def failing(output, _):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        fadapt.run(model, fadapt.stack(members(model)), reals(4, 4), failing)
    assert "verify=False" in caught.value.__notes__[0]


def test_a_diverged_member_is_no_reason_to_refuse() -> None:
    model = Counted()
    made = members(model)
    for poison in (float("nan"), float("inf"), 1e30):
        broken = made[1].map(
            lambda a, by=poison: a.replace({k: t + by for k, t in a.train.items()})
        )
        out = fadapt.apply(model, fadapt.stack([made[0], broken, made[2]]), reals(3, 4))
        torch.testing.assert_close(out[0], fadapt.apply(model, made[0], reals(3, 4)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_is_no_reason_to_refuse(dtype: torch.dtype) -> None:
    model = qwen3().to(dtype).eval()
    stack = fadapt.stack(members(model, 3, {"q_proj|down_proj": fadapt.DoRA(r=2)}))
    ids = tokens(3, 9)
    assert fadapt.run(model, stack, {"input_ids": ids, "labels": ids}).isfinite().all()
    assert fadapt.apply(model, stack, ids).logits.shape[:2] == (3, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MIXERS)
def test_low_precision_does_not_hide_rows_that_meet(name: str, dtype: torch.dtype) -> None:
    model = Mixing(MIXERS[name]).to(dtype)
    stack = fadapt.stack([fadapt.init(model, fadapt.LoRA(r=2))] * 3)
    with pytest.raises(fadapt.FadaptError, match="not independent"):
        fadapt.apply(model, stack, reals(9, 4, dtype=dtype))


def test_every_site_of_a_stack_is_tried() -> None:
    """Members that adapt different layers: the one layer with latents belongs to the last."""
    model = Latents()
    rules = [{"k": fadapt.LoRA(r=2)}, {"last": fadapt.LoRA(r=2)}, {"q": fadapt.LoRA(r=2)}]
    made = [members(model, 1, rule)[0] for rule in rules]
    with pytest.raises(fadapt.FadaptError, match=r"q\.weight"):
        fadapt.apply(model, fadapt.stack(made), reals(3, 5, 4))
    assert fadapt.apply(model, fadapt.stack(made[:2]), reals(3, 5, 4)).shape == (2, 3, 2)


def test_it_is_off_where_values_cannot_be_looked_at() -> None:
    model = Counted()
    stack, x = fadapt.stack(members(model)), reals(5, 4)

    def loss(o, _):
        return o.square().mean()

    train, rest = fadapt.split(stack)

    def total(train):
        return fadapt.run(model, fadapt.join(train, rest), x, loss).sum()

    assert passes(model, lambda: torch.func.grad(total)(train)) == 1
    with fadapt.bound(model, stack):
        assert passes(model, lambda: fadapt.run(model, stack, x, loss)) == 1
    compiled = torch.compile(total, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(train), total(train))


def test_the_gradients_are_tried_for_a_sweep() -> None:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.mean(0, keepdim=True).expand_as(grad)

    model = Mixing(Backward.apply)
    stack, x = fadapt.stack(members(model)), reals(4, 4)

    def loss(out, _):
        return (out.square()).mean()

    assert fadapt.run(model, stack, x, loss).shape == (3,)  # the losses are right
    why = fold_run.one_by_one(model, stack, x, loss, False, gradients=True)
    assert "gradient" in why
    fine = Mixing(torch.tanh)
    assert not fold_run.one_by_one(
        fine, fadapt.stack(members(fine)), x, loss, False, gradients=True
    )


DECIDING = {
    "if": lambda h: h * 2 if h.mean() > 1e9 else h,
    "item": lambda h: h * (2 if h.sum().item() > 1e9 else 1),
    "float": lambda h: h * 2 if float(h.max()) > 1e9 else h,
    "any": lambda h: h.clamp(-1, 1) if (h > 1e9).any() else h,
    "equal": lambda h: h * 2 if torch.equal(h, h + 1) else h,
    "count": lambda h: h * 2 if (h > 1e9).sum() > 3 else h,
    "largest": lambda h: h * 2 if int(h.flatten().argmax()) > 1e9 else h,
    "tolist": lambda h: h * 2 if h.tolist()[0][0] > 1e9 else h,
    "numpy": lambda h: h * 2 if h.detach().numpy().max() > 1e9 else h,
    "where": lambda h: torch.where(h.mean() > 1e9, h * 2, h),
    "masked": lambda h: h.masked_fill(h.mean() > 1e9, 0.0),
}
APART = {
    "where": lambda h: torch.where(h > 0, h * 2, h),
    "own mean": lambda h: torch.where(h.mean(-1, keepdim=True) > 0, h * 2, h),
    "chosen rows": lambda h: h.index_put(((h > 1).nonzero(as_tuple=True)), torch.tensor(0.0)),
    "experts": lambda h: torch.stack([r * (1 + e) for r, e in zip(h, h.argmax(-1), strict=True)]),
    "a shape": lambda h: h * 2 if h.shape[-1] > 3 else h,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", DECIDING)
def test_a_way_that_all_rows_go_together_is_refused(name: str, training: bool) -> None:
    """However far the batch at hand is from the other way."""
    model = Mixing(DECIDING[name]).train(training)
    stack, x = fadapt.stack(members(model)), reals(8, 4)
    where = r"decides by a value of the whole batch, .*test_stack_proof\.py:\d+.*unstack"
    with pytest.raises(fadapt.FadaptError, match=where):
        fadapt.apply(model, stack, x)
    with pytest.raises(fadapt.FadaptError, match=where):
        fadapt.run(model, stack, x, lambda out, _: out.square().mean())
    assert fadapt.apply(model, stack, x, verify=False).shape == (3, 8, 4)


@pytest.mark.parametrize("name", APART)
def test_ways_of_single_rows_are_no_reason_to_refuse(name: str) -> None:
    model = Mixing(APART[name])
    made = members(model)
    out = fadapt.apply(model, fadapt.stack(made), reals(8, 4))
    for one, p in zip(out, made, strict=True):
        torch.testing.assert_close(one, fadapt.apply(model, p, reals(8, 4)))


def test_what_decides_beside_the_adapters_is_no_reason_to_refuse() -> None:
    """Masks and ids; and a loss function, which sees one adapter's rows."""

    class Masked(Mixing):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            assert mask is not None
            return super().forward(x if (mask == 1).all() else x * mask[:, None])

    model = Masked(torch.tanh)
    stack, x = fadapt.stack(members(model)), {"x": reals(8, 4), "mask": torch.arange(8) > 2}
    logged = []

    def loss(out, _):
        value = out.square().mean()
        logged.append(value.item())
        return value * 2 if value > 0 else value

    assert fadapt.run(model, stack, x, loss).shape == (3,)
    x["mask"] = x["mask"].float()
    assert fadapt.run(model, stack, x, loss).shape == (3,)


def crowded(h: Tensor) -> Tensor:
    """More entries than one member has; no operation shows that the forward asks for a shape."""
    return h * 2 if len((h.abs() > 1e-4).nonzero()) > 60 else h


def test_it_is_repeated_with_other_moves_and_the_batch_at_hand() -> None:
    model = Mixing(crowded)
    stack = fadapt.stack(members(model))

    def run(batch):
        return fadapt.run(model, stack, batch, lambda out, _: out.square().mean())

    small, large = reals(6, 4) * 1e-9, reals(6, 4)
    with torch.no_grad():
        model.first.bias.zero_()
        for _ in range(15):
            run(small)
        with pytest.raises(fadapt.FadaptError, match="not independent"):
            run(large)


def test_a_sweep_proves_again() -> None:
    model = Mixing(crowded)
    with torch.no_grad():
        model.first.bias.zero_()
    batches = [reals(6, 4) * 1e-9] * 16 + [reals(6, 4)] * 4
    trials = [fadapt.Trial(fadapt.LoRA(r=2), seed=i, lr=1e-9) for i in range(3)]

    def sweep(batches, **options):
        return fadapt.sweep(
            model, trials, batches, loss_fn=lambda out, _: out.square().mean(), steps=20, **options
        )

    with pytest.raises(fadapt.FadaptError, match=r"until step 16, .*max_adapters=1"):
        sweep(batches)
    sweep(batches, max_adapters=1)

    class Two(Mixing):
        """Mixes its rows where it gets a second input."""

        def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
            out = super().forward(x)
            return out if more is None else out - out.mean(0)

    model = Two(torch.tanh)
    with pytest.raises(fadapt.FadaptError, match=r"until step 3, .*not independent"):
        sweep([{"x": reals(6, 4)}] * 3 + [{"x": reals(6, 4), "more": reals(6, 4)}])


def test_parts_and_joined_batches_are_inverse() -> None:
    model = Counted()
    stack = fadapt.stack(members(model))
    batch = {"x": reals(3, 5, 4), "flag": True, "scale": torch.tensor(2.0)}
    parts = fold.parts(batch, stack, per_adapter=True)
    assert [p["x"].shape for p in parts] == [(5, 4)] * 3
    folded = fold.fold_batch(batch, stack, 5, per_adapter=True)
    assert torch.equal(fold.joined(parts, 5)["x"], folded["x"])


def test_threads_prove_one_after_the_other() -> None:
    model = Counted()
    stack, x = fadapt.stack(members(model)), reals(5, 4)
    alone = torch.stack([fadapt.apply(model, p, x) for p in fadapt.unstack(stack)])
    found: list[Tensor] = []
    workers = [
        threading.Thread(target=lambda: found.append(fadapt.apply(model, stack, x)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for out in found:
        torch.testing.assert_close(out, alone)
    assert all(m.training for m in model.modules())


class Capacity(nn.Module):
    """Two experts, each for two rows of the batch; the others go past them."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.expert = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = F.one_hot(self.route(x).argmax(-1), 2)
        places = (chosen.cumsum(0) * chosen).sum(-1, keepdim=True)
        return torch.where(places <= 2, self.expert(x), x)


class BatchSized(Mixing):
    """In training mode alone, and beside a dropout."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(super().forward(x), 0.5, self.training)
        return h * len(x) ** 0.5 if self.training else h


@pytest.mark.parametrize("seed", range(8))
def test_places_among_experts_are_found_whoever_chooses_them(seed: int) -> None:
    torch.manual_seed(seed)
    model = Capacity()
    stack = fadapt.stack(members(model))
    with pytest.raises(fadapt.FadaptError, match="not independent"):
        fadapt.run(model, stack, reals(4, 4), lambda o, _: o.square().mean())


def test_what_depends_on_the_number_of_rows_in_training_mode_is_found() -> None:
    model = BatchSized(torch.tanh).train()
    stack = fadapt.stack(members(model))
    with pytest.raises(fadapt.FadaptError, match=r"training mode.*not independent.*model\.eval"):
        fadapt.run(model, stack, reals(4, 4), lambda o, _: o.square().mean())
    fadapt.run(model.eval(), stack, reals(4, 4), lambda o, _: o.square().mean())


def same(one: fadapt.Params, other: fadapt.Params) -> bool:
    pairs = zip(fadapt.trainable(one), fadapt.trainable(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class TimeFirstOutput(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(0, 1)


def test_a_loss_that_only_a_member_alone_can_take_is_found() -> None:
    """As CTC's, of outputs with time first and one length for each row."""
    model, x = TimeFirstOutput(torch.tanh), reals(3, 5, 4)

    def loss(out: Tensor, _) -> Tensor:
        one, lengths = torch.ones(3, 2).long(), torch.full((3,), 5)
        return F.ctc_loss(out.log_softmax(-1), one, lengths, torch.full((3,), 2))

    made = members(model)
    with pytest.raises(fadapt.FadaptError, match=r"alone and raise in one pass.*input_lengths"):
        fadapt.run(model, fadapt.stack(made), x, loss)
    trials = [fadapt.Trial(p, lr=0.1, name=str(i)) for i, p in enumerate(made)]
    with pytest.warns(fadapt.OneByOneWarning):
        report = fadapt.sweep(model, trials, [x] * 3, loss_fn=loss, progress=False)
    for i, p in enumerate(made):
        alone = fadapt.fit(model, p, [x] * 3, loss_fn=loss, lr=0.1, progress=False)
        for a, b in zip(
            fadapt.trainable(alone), fadapt.trainable(report.final[str(i)]), strict=True
        ):
            assert torch.equal(a, b)


class Masked(Mixing):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return mask @ super().forward(x)


class FromSparse(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to_dense())


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Masked(torch.tanh), (reals(3, 5, 4), torch.ones(5, 5).tril())),
        (FromSparse(torch.tanh), reals(5, 4).to_sparse()),
    ],
    ids=["a mask without rows", "a sparse tensor"],
)
def test_a_batch_that_only_a_member_alone_can_take_is_trained_one_by_one(model, batch) -> None:
    def loss(out: Tensor, _) -> Tensor:
        return out.square().mean()

    made = members(model)
    with pytest.raises(fadapt.ConfigError, match=r"batch axis first|to_dense\(\)"):
        fadapt.run(model, fadapt.stack(made), batch, loss)
    trials = [fadapt.Trial(p, lr=0.1, name=str(i)) for i, p in enumerate(made)]
    with pytest.warns(fadapt.OneByOneWarning):
        report = fadapt.sweep(
            model, trials, [batch] * 3, loss_fn=loss, eval=[batch], progress=False
        )
    for i, p in enumerate(made):
        alone = fadapt.fit(model, p, [batch] * 3, loss_fn=loss, lr=0.1, progress=False)
        for a, b in zip(
            fadapt.trainable(alone), fadapt.trainable(report.final[str(i)]), strict=True
        ):
            assert torch.equal(a, b)


def test_a_complex_loss_is_refused() -> None:
    model = Mixing(torch.tanh)
    with pytest.raises(fadapt.ConfigError, match=r"complex.*abs\(\)"):
        fadapt.run(model, members(model)[0], reals(4, 4), lambda o, _: o.mean() + 0j)


class Deep(nn.Module):
    """Layers whose products round otherwise for many rows, as kernels do."""

    def __init__(self, layers: int, shared: float = 0.0):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(layers)])
        self.last, self.shared = nn.Linear(32, 4), shared

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = F.layer_norm(x, x.shape[-1:])
            if len(x) > 4:
                halves = [y * mask for mask in (torch.arange(32) < 16, torch.arange(32) >= 16)]
                y = layer(halves[0]) + (layer(halves[1]) - layer(torch.zeros_like(y)))
            else:
                y = layer(y)
            x = x + 0.1 * torch.tanh(y)
        # Other rows are noticed only where the own ones are far from the start.
        return self.last(x) + self.shared * torch.tanh((y.abs().mean() - 30).relu())


@pytest.mark.parametrize("layers", [30, 60])
def test_rounding_that_a_deep_model_amplifies_is_no_dependence(layers: int):
    torch.manual_seed(0)
    model = Deep(layers).to(torch.bfloat16).requires_grad_(False)
    methods = [fadapt.DoRA(r=4), fadapt.LoRA(r=4), fadapt.LoRA(r=8)]
    trials = [
        fadapt.Trial(fadapt.Config({"layers": m}, dtype=torch.bfloat16), lr=1e-3) for m in methods
    ]
    rows = torch.randn(4, 32, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fadapt.OneByOneWarning)
        fadapt.sweep(model, trials, [rows], loss_fn=lambda out, _: out.square().mean())


def test_a_dependence_that_shows_only_far_away_in_a_deep_model():
    torch.manual_seed(0)
    model = Deep(60, shared=2.0).to(torch.bfloat16).requires_grad_(False)
    made = [
        fadapt.init(model, fadapt.Config({"layers": fadapt.LoRA(r=4)}, seed=i)) for i in range(2)
    ]
    rows = torch.randn(4, 32, dtype=torch.bfloat16)

    def loss(out: Tensor, _: Tensor) -> Tensor:  # by which members are told apart only far away
        return 1 + 0.25 * out.float().tanh().mean()

    with pytest.raises(fadapt.FadaptError, match="not independent"):
        fadapt.run(model, fadapt.stack(made), rows, loss_fn=loss)
