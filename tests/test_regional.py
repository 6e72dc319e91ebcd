"""compile={"regional": True}: equal blocks compiled once, with the values of the plain pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt import ConfigError
from fadapt.training.engine.blocks import Blocks
from fadapt.training.engine.compiler import Compiler
from tests.models import qwen3, tokens


class Block(nn.Module):
    def __init__(self, layer_idx: int, width: int = 8, numbered: bool = False):
        super().__init__()
        self.layer_idx, self.numbered = layer_idx, numbered
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if self.numbered:
            scale = scale / (1 + self.layer_idx)
        return x + scale * self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, layers: int = 4, numbered: bool = False):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.layers = nn.ModuleList([Block(i, numbered=numbered) for i in range(layers)])
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, scale=0.7)
        return self.last(x)


class Counted:
    """A backend that counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


def square(out: Tensor, batch: Any) -> Tensor:
    return out.square().mean()


def members(
    model: nn.Module, methods: Sequence[fadapt.Method], rules: str = "."
) -> list[fadapt.Params]:
    rng = torch.Generator().manual_seed(1)
    made = []
    for seed, method in enumerate(methods):
        config = fadapt.Config({rules: method}, seed=seed, dtype=torch.float64)
        made.append(fadapt.init(model, config))
        with torch.no_grad():
            for leaf in fadapt.trainable(made[-1]):
                leaf += 0.2 * torch.randn(leaf.shape, generator=rng, dtype=leaf.dtype)
    return made


def of(run: Any, model: nn.Module, params: Any, batch: Any, loss_fn: Any) -> list[Tensor]:
    losses = run(model, params, batch, loss_fn, verify=False)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), fadapt.trainable(params))]


def compiler() -> tuple[Compiler, Counted]:
    torch.compiler.reset()
    counted = Counted()
    options = {"regional": True, "dynamic": False, "backend": counted}
    return Compiler(options, torch.device("cpu")), counted


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


MIXED = (fadapt.LoRA(r=2), fadapt.LoRA(r=4), fadapt.DoRA(r=2), fadapt.IA3())


@pytest.mark.parametrize("grad", [False, True])
def test_one_graph_for_all_blocks_and_the_plain_values(grad: bool) -> None:
    torch.manual_seed(0)
    model, x = Net().double().requires_grad_(grad), torch.randn(6, 5, dtype=torch.float64)
    stack = fadapt.stack(members(model, MIXED)).in_groups()
    compiled, counted = compiler()
    wanted = of(fadapt.run, model, stack, x, square)
    for _ in range(2):
        close(of(compiled.run(stack), model, stack, x, square), wanted)
    assert counted.graphs == 1
    assert all(type(m._parameters) is dict for m in model.modules())
    assert all("forward" not in vars(m) for m in model.modules())
    assert all(p.grad is None and p.requires_grad == grad for p in model.parameters())
    # Steps of the optimizer, and new weights of the base, are seen.
    with torch.no_grad():
        stack.groups[0].params["layers.2.up.weight"].train["A"].mul_(2)
        model.layers[1].norm.weight.mul_(3)
    model.layers[3].down.weight = nn.Parameter(torch.ones(8, 16).double(), requires_grad=grad)
    close(of(compiled.run(stack), model, stack, x, square), of(fadapt.run, model, stack, x, square))
    assert counted.graphs == 1


def test_members_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(6, 5, dtype=torch.float64)
    stack = fadapt.stack(members(model, MIXED)).in_groups()
    compiled, _ = compiler()
    before = of(compiled.run(stack), model, stack, x, square)[0]
    with torch.no_grad():
        for adapter in stack.groups[1].params.values():
            for leaf in adapter.train.values():
                leaf.add_(0.5)
    after = of(compiled.run(stack), model, stack, x, square)[0]
    changed = set(stack.groups[1].index)
    for i in range(stack.size):
        assert torch.equal(before[i], after[i]) != (i in changed)


def test_vectors_and_matrices_of_a_layer() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(6, 5, dtype=torch.float64)
    rules = {r"norm\.": fadapt.IA3(), r"up\.weight": fadapt.LoRA(r=2), r"up\.bias": fadapt.IA3()}
    made = []
    for seed in range(2):
        made.append(fadapt.init(model, fadapt.Config(rules, seed=seed, dtype=torch.float64)))
        with torch.no_grad():
            for leaf in fadapt.trainable(made[-1]):
                leaf += 0.1 * (1 + seed)
    stack = fadapt.stack(made)
    compiled, counted = compiler()
    close(of(compiled.run(stack), model, stack, x, square), of(fadapt.run, model, stack, x, square))
    assert counted.graphs <= 2


def test_one_adapter() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(6, 5, dtype=torch.float64)
    compiled, counted = compiler()
    for params in members(model, [fadapt.LoRA(r=2), fadapt.LoRA(r=2)], "layers.*up"):
        run = compiled.run(params)
        close(of(run, model, params, x, square), of(fadapt.run, model, params, x, square))
    assert counted.graphs == 2  # the first block's input has no gradient


def test_blocks_whose_number_matters_are_compiled_apart() -> None:
    torch.manual_seed(0)
    model, x = Net(numbered=True).double(), torch.randn(6, 5, dtype=torch.float64)
    stack = fadapt.stack(members(model, MIXED[:2])).in_groups()
    compiled, counted = compiler()
    close(of(compiled.run(stack), model, stack, x, square), of(fadapt.run, model, stack, x, square))
    assert counted.graphs == 4


def test_blocks_that_differ_or_have_hooks_run_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = Net(5).double(), torch.randn(6, 5, dtype=torch.float64)
    model.layers[1].norm.eps = 0.1
    model.layers[2].up.register_forward_hook(lambda module, args, out: 2 * out)
    stack = fadapt.stack(members(model, MIXED[:2])).in_groups()
    compiled, counted = compiler()
    close(of(compiled.run(stack), model, stack, x, square), of(fadapt.run, model, stack, x, square))
    assert [b.prefix for b in Blocks(model, lambda f: f).blocks] == [
        "layers.0.", "layers.3.", "layers.4."
    ]  # fmt: skip
    assert counted.graphs == 1


def test_a_model_without_equal_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    params = fadapt.init(model, fadapt.LoRA(r=2))
    compiled, _ = compiler()
    with pytest.raises(ConfigError, match="no list of such blocks"):
        compiled.run(params)(model, params, torch.randn(2, 4), square)


@pytest.mark.parametrize("count", [1, 3])
def test_fit_and_sweep_train_the_same(count: int) -> None:
    torch.manual_seed(0)
    model = Net(3).double().train()
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    methods = [fadapt.LoRA(r=r, dropout=0.2) for r in (2, 4, 4)][:count]
    trials = [fadapt.Trial(p, lr=1e-2) for p in members(model, methods, "layers")]
    torch.compiler.reset()
    options = {"regional": True, "dynamic": False, "backend": "aot_eager"}
    reports = [
        fadapt.sweep(model, trials, batches, steps=4, loss_fn=square, compile=how, progress=False)
        for how in (False, options)
    ]
    for name in reports[0].names:
        one, other = (fadapt.trainable(report.final[name]) for report in reports)
        close([t.detach() for t in other], [t.detach() for t in one])
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_a_language_model_with_its_own_loss() -> None:
    model = qwen3().double()
    stack = fadapt.stack(members(model, MIXED[:2], "proj")).in_groups()
    batch = {"input_ids": tokens(2, 7), "labels": tokens(2, 7)}
    compiled, counted = compiler()
    close(
        of(compiled.run(stack), model, stack, batch, None),
        of(fadapt.run, model, stack, batch, None),
    )
    assert counted.graphs == 2
    close(
        of(compiled.run(stack), model, stack, batch, None),
        of(fadapt.run, model, stack, batch, None),
    )


@pytest.mark.parametrize("regional", [True, False])
def test_more_structures_than_torch_recompiles_of_one_code(regional: bool):
    torch.manual_seed(0)
    model, batches = Net(2).requires_grad_(False), [torch.randn(3, 5)]
    trials = [fadapt.Trial(fadapt.LoRA(r=r), lr=1e-2, name=f"r{r}") for r in range(1, 11)]
    options: Any = dict(loss_fn=square, max_adapters=1, progress=False)
    compiled = {"regional": regional, "backend": "eager", "dynamic": False}
    report = fadapt.sweep(model, trials, batches, compile=compiled, **options)
    plain = fadapt.sweep(model, trials, batches, **options)
    assert {r.status for r in report.results} == {"finished"}
    for step, losses in plain.losses.items():
        torch.testing.assert_close(report.losses[step], losses, rtol=1e-5, atol=1e-6)
