"""The base for everybody else: other threads, calls within calls, interrupts, buffers, flags."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import gc
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fadapt
from fadapt.base.leaving import Block

from .attack import interrupts, threads


def mean_square(out: Any, _: Any) -> torch.Tensor:
    return out.square().mean()


def filled(params: fadapt.Params, seed: int = 0) -> fadapt.Params:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf += 0.3 * torch.randn(leaf.shape, generator=rng)
    return params


@pytest.mark.parametrize("kind", interrupts.KINDS)
def test_interrupts(kind: str) -> None:
    found = interrupts.attack(kind, 12)
    assert found == {"hits": 12}


@pytest.mark.parametrize(("first", "second"), threads.PAIRS)
def test_threads(first: str, second: str) -> None:
    assert threads.attack(threads.Attack(), first, second, 5) == (0, [])


class Interrupted(Block):
    """A block that is interrupted at the worst moment: before the first line of its exit."""

    def __init__(self) -> None:
        self.undone = 0

    def __enter__(self) -> None:
        pass

    def undo(self) -> None:
        self.undone += 1
        if self.undone == 1:
            raise KeyboardInterrupt


def test_a_block_whose_exit_is_interrupted_is_undone() -> None:
    block = Interrupted()
    with pytest.raises(KeyboardInterrupt), block:
        pass
    assert block.undone == 2
    block = Interrupted()
    with pytest.raises(KeyboardInterrupt), contextlib.ExitStack() as stack:
        stack.enter_context(block)
    assert block.undone == 1  # ExitStack's own frame cannot be helped, but it works


def small() -> tuple[nn.Sequential, fadapt.Params, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return model, filled(fadapt.init(model, fadapt.LoRA(r=2))), torch.randn(32, 6) * 3 + 1


def test_a_block_in_a_generator_that_is_closed_late() -> None:
    model, params, x = small()
    model.eval()
    plain = model(x)

    def steps() -> Any:
        with fadapt.bound(model, params):
            yield model(x)

    # In a context of its own, as an asynchronous task has it.
    context = contextvars.copy_context()
    running = steps()
    adapted = context.run(next, running)
    assert not torch.equal(adapted, plain)
    assert torch.equal(model(x), plain)
    del running
    gc.collect()
    assert torch.equal(context.run(model, x), plain)
    assert all(type(m._parameters) is dict for m in model.modules())


def test_two_bound_models_and_blocks_that_end_out_of_order() -> None:
    model, params, x = small()
    other = copy.deepcopy(model).eval()
    others = filled(fadapt.init(other, fadapt.DoRA(r=2)), 3)
    model.eval()
    plain = model(x), other(x)
    wanted = fadapt.apply(model, params, x), fadapt.apply(other, others, x)
    with fadapt.bound(model, params), fadapt.bound(other, others):
        assert all(torch.equal(m(x), y) for m, y in zip((model, other), wanted, strict=True))
    first, second = fadapt.bound(model, params), fadapt.bound(other, others)
    first.__enter__()
    second.__enter__()
    type(first).__exit__(first, None, None, None)
    assert torch.equal(model(x), plain[0])
    assert torch.equal(other(x), wanted[1])
    type(second).__exit__(second, None, None, None)
    assert torch.equal(other(x), plain[1])


def test_other_params_within_a_call_of_the_same_model() -> None:
    model, params, x = small()
    model.eval()
    others = filled(fadapt.init(model, fadapt.DoRA(r=2)), 3)
    wanted, found = fadapt.apply(model, others, x), []
    alone = fadapt.apply(model, params, x)

    def hook(*_: Any) -> None:
        handle.remove()
        found.append(fadapt.apply(model, others, x))
        with pytest.raises(fadapt.FadaptError, match="own adapted forward"):
            fadapt.merge(model, params)

    handle = model[3].register_forward_hook(hook)
    assert torch.equal(fadapt.apply(model, params, x), alone)
    assert torch.equal(found[0], wanted)


def test_copies_and_pickles_of_a_model_in_use_are_of_the_base() -> None:
    model, params, x = small()
    model.eval()
    plain = model(x)
    with fadapt.bound(model, params):
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert not torch.equal(model(x), plain)
        for one in (copied, loaded):
            assert torch.equal(one(x), plain)
            assert all(isinstance(p, nn.Parameter) for p in one.parameters())
            assert all(type(m._parameters) is dict for m in one.modules())
        assert all(k in model[0]._parameters for k in ("weight", "bias"))
        assert len(model[0]._parameters) == len(list(reversed(model[0]._parameters))) == 2


class TestBuffers:
    @pytest.mark.parametrize("how", ["run", "apply", "bound", "stack", "sweep", "fit", "compiled"])
    def test_training_mode_does_not_write_to_the_base(self, how: str) -> None:
        model, params, x = small()
        model.train()
        before = copy.deepcopy(model.state_dict())
        options: dict[str, Any] = dict(loss_fn=mean_square, progress=False)
        match how:
            case "run":
                fadapt.run(model, params, x, mean_square).backward()
            case "apply":
                fadapt.apply(model, params, x)
            case "bound":
                with fadapt.bound(model, params):
                    model(x).sum().backward()
            case "stack":
                fadapt.run(model, fadapt.stack([params]), x, mean_square)
            case "sweep":
                fadapt.sweep(model, [fadapt.Trial(fadapt.LoRA(r=2))], [x] * 2, **options)
            case "fit":
                fadapt.fit(model, params, [x] * 2, **options)
            case "compiled":
                torch.compiler.reset()
                step = torch.compile(
                    lambda p: fadapt.run(model, p, x, mean_square), backend="eager", fullgraph=True
                )
                step(params).backward()
        now = model.state_dict()
        assert all(torch.equal(now[k], v) for k, v in before.items())
        assert all(p.grad is None for p in model.parameters())

    def test_a_block_that_was_entered_in_eval_mode(self) -> None:
        model, params, x = small()
        before = copy.deepcopy(model.eval().state_dict())
        with fadapt.bound(model, params):
            model.train()
            model(x)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())

    def test_the_batch_statistics_are_those_of_the_adapted_model(self) -> None:
        model, params, x = small()
        model.train()
        merged = copy.deepcopy(model)
        merged.load_state_dict(fadapt.merge(model, params), strict=False)
        torch.testing.assert_close(fadapt.apply(model, params, x), merged(x))

    def test_the_statistics_live_as_long_as_the_block(self) -> None:
        model, params, x = small()
        model.train()
        merged = copy.deepcopy(model)
        merged.load_state_dict(fadapt.merge(model, params), strict=False)
        with fadapt.bound(model, params):
            model(x)
            merged(x)
            model.eval()
            merged.eval()
            torch.testing.assert_close(model(x), merged(x))
        assert model[1].num_batches_tracked == 0


class Sections(nn.Module):
    """A model that checkpoints by itself."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_own_checkpointing_recomputed_after_its_block_is_an_error(reentrant: bool) -> None:
    model, x = Sections(reentrant), torch.randn(3, 4, requires_grad=True)
    params = filled(fadapt.init(model, fadapt.LoRA(r=2)))
    with fadapt.bound(model, params):
        loss = model(x).square().sum()
    with pytest.raises(fadapt.FadaptError, match="backward inside the block"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
    with fadapt.bound(model, params):
        model(x).square().sum().backward()
    assert all(t.grad is not None for t in fadapt.trainable(params))
    # The base itself may be trained so, when all is over.
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(type(m._parameters) is dict for m in model.modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["run", "bound", "bound, backward after it"])
def test_gradient_checkpointing_of_transformers(reentrant: bool, how: str) -> None:
    from tests.helpers import make, make_batch

    model, batch = make("qwen3").train(), make_batch("qwen3", padded=False)
    params = filled(fadapt.init(model, fadapt.LoRA(r=2)))
    leaves = fadapt.trainable(params)
    wanted = torch.autograd.grad(fadapt.run(model, params, batch), leaves)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = [dict(vars(m)) for m in model.modules()]
    if how == "run":
        fadapt.run(model, params, batch).backward()
    else:
        with fadapt.bound(model, params):
            loss = model(**batch).loss
            if how == "bound":
                loss.backward()
        if how != "bound":
            loss.backward()
    for leaf, ref in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, ref)
    assert all(p.grad is None for p in model.parameters())
    for module, attributes in zip(model.modules(), before, strict=True):
        assert all(module.__dict__[k] is v for k, v in attributes.items())


class OwnFunction(nn.Module):
    """Checkpoints as diffusers does: a function of the section and its inputs, without options."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.gradient_checkpointing = False
        self.reentrant = reentrant

    def enable(self) -> None:
        def section(module: nn.Module, *args: Any) -> Any:
            return checkpoint(module.__call__, *args, use_reentrant=self.reentrant)

        self.gradient_checkpointing, self._gradient_checkpointing_func = True, section

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer, x)
            else:
                x = layer(x)
            x = x.tanh()
        return x


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_function_of_the_models_own(reentrant: bool, needs_grad: bool) -> None:
    model = OwnFunction(reentrant)
    x = torch.randn(3, 4, requires_grad=needs_grad)
    params = filled(fadapt.init(model, fadapt.LoRA(r=2)))
    leaves = fadapt.trainable(params)
    wanted = torch.autograd.grad(fadapt.run(model, params, x, mean_square), leaves)
    model.enable()
    if reentrant and not needs_grad:  # torch would lose the gradients of the first section
        with pytest.raises(fadapt.FadaptError, match="use_reentrant=False"):
            fadapt.run(model, params, x, mean_square)
        return
    fadapt.run(model, params, x, mean_square).backward()
    for leaf, ref in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, ref)


def test_sweeps_that_evaluate_in_threads_train_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).train()
    x, seen, flags = torch.ones(4, 8), [], []

    def loss(out: torch.Tensor, _: Any) -> torch.Tensor:
        seen.append(model.training)
        return out.square().mean()

    def score(m: nn.Module, params: Any) -> torch.Tensor:
        flags.append(any(module.training for module in m.modules()))
        return fadapt.run(m, params, x, mean_square)

    def work() -> None:
        fadapt.sweep(
            model,
            [fadapt.Trial(fadapt.LoRA(r=2))],
            [x] * 10,
            eval=score,
            eval_every=1,
            loss_fn=loss,
            progress=False,
            max_adapters=1,
        )

    running = [threading.Thread(target=work) for _ in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert len(seen) == 30
    assert all(seen)
    assert not any(flags)
    assert all(m.training for m in model.modules())
