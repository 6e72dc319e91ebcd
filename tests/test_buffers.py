"""Buffers of the base stay as they are, in whatever mode a forward writes to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fadapt


class Queue(nn.Module):
    """As the key queue of a contrastive model, or the codes of a quantiser."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.get_buffer("seen").mul_(0.9).add_(h.detach().mean(0))
        self.count += 1
        return h + self.get_buffer("seen")


def mean_square(out: Tensor, _) -> Tensor:
    return out.square().mean()


@pytest.mark.filterwarnings("ignore::fadapt.OneByOneWarning")
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_writes_to_its_buffers(training: bool) -> None:
    torch.manual_seed(0)
    model, x = Queue().train(training), torch.randn(3, 4)
    params = fadapt.init(model, fadapt.LoRA(r=2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trials = [fadapt.Trial(params, name="a"), fadapt.Trial(params, name="b")]

    def bound() -> None:
        with fadapt.bound(model, params):
            model(x)
            model(x)
            assert model.count == 2

    calls = [
        lambda: fadapt.run(model, params, x, mean_square).backward(),
        lambda: fadapt.apply(model, params, x),
        bound,
        lambda: fadapt.run(model, fadapt.stack([params] * 2), x, mean_square, verify=False),
        lambda: fadapt.fit(model, params, [x] * 2, loss_fn=mean_square, progress=False),
        lambda: fadapt.sweep(model, trials, [x] * 2, loss_fn=mean_square, eval=[x], progress=False),
        lambda: fadapt.observe(model, fadapt.EVA(r=2), [x] * 4, progress=False),
    ]
    for call in calls:
        call()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
    with pytest.raises(fadapt.FadaptError, match="not independent"):
        fadapt.run(model, fadapt.stack([params] * 2), x, mean_square)
    assert torch.equal(model.state_dict()["seen"], before["seen"])
    model(x)  # a plain call is the model's own
    assert model.count == 1
