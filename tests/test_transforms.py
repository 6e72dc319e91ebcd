"""run under torch.func: grad, vmap, jvp, jacrev, and what they make together."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import grad, grad_and_value, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fadapt
from tests.helpers import lm_loss, make, make_batch, trained


class TestTransforms:
    """torch.func over run, against plain autograd."""

    def setup_method(self) -> None:
        # GPT-2 computes in float64 throughout; Qwen3's norms cast to float32.
        self.model, self.batch = make("gpt2", torch.float64), make_batch("gpt2", padded=False)
        self.params = trained(self.model, fadapt.LoRA(r=2))
        self.train, self.rest = fadapt.split(self.params)
        loss = fadapt.run(self.model, self.params, self.batch, lm_loss)
        leaves = fadapt.trainable(self.params)
        self.loss = loss.detach()
        flat = iter(torch.autograd.grad(loss, leaves))
        self.grads = {n: {k: next(flat) for k in v} for n, v in self.train.items()}

    def f(self, train):
        return fadapt.run(self.model, fadapt.join(train, self.rest), self.batch, lm_loss)

    def close(self, tree, reference) -> None:
        for name, leaves in reference.items():
            for key, tensor in leaves.items():
                torch.testing.assert_close(tree[name][key], tensor, rtol=1e-8, atol=1e-10)

    def directions(self):
        torch.manual_seed(5)
        return {n: {k: torch.randn_like(t) for k, t in v.items()} for n, v in self.train.items()}

    def inner(self, a, b):
        return sum((a[n][k] * b[n][k]).sum() for n in a for k in a[n])

    def test_grad(self) -> None:
        self.close(grad(self.f)(self.train), self.grads)

    def test_grad_over_params_directly(self) -> None:
        def loss(params):
            return fadapt.run(self.model, params, self.batch, lm_loss)

        tree = grad(loss)(self.params)
        assert isinstance(tree, fadapt.Params)
        self.close({n: a.train for n, a in tree.items()}, self.grads)

    def test_grad_and_value(self) -> None:
        grads, loss = grad_and_value(self.f)(self.train)
        torch.testing.assert_close(loss, self.loss)
        self.close(grads, self.grads)

    def test_vmap_over_stacked_params(self) -> None:
        others = [trained(self.model, fadapt.LoRA(r=2), seed=s) for s in range(3)]
        trains = [fadapt.split(p)[0] for p in others]
        stacked = {
            n: {k: torch.stack([t[n][k].detach() for t in trains]) for k in leaves}
            for n, leaves in trains[0].items()
        }
        losses = vmap(self.f)(stacked)
        loop = torch.stack([fadapt.run(self.model, p, self.batch, lm_loss) for p in others])
        torch.testing.assert_close(losses, loop, rtol=1e-9, atol=1e-9)

    def test_jvp(self) -> None:
        tangent = self.directions()
        with sdpa_kernel(SDPBackend.MATH):
            _, derivative = jvp(self.f, (self.train,), (tangent,))
        torch.testing.assert_close(derivative, self.inner(self.grads, tangent))

    def test_jacrev(self) -> None:
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        params = trained(model, fadapt.IA3())
        train, rest = fadapt.split(params)
        x = torch.randn(2, 5, dtype=torch.float64)

        def out(train):
            return fadapt.apply(model, fadapt.join(train, rest), x)

        jac = jacrev(out)(train)["2.weight"]["d"]
        # y_j depends on d_j alone, with derivative the base's y_j.
        expected = torch.diag_embed(model[2](model[1](out_of_first(model, params, x))).detach())
        torch.testing.assert_close(jac, expected)

    def test_hessian_vector_product(self) -> None:
        tangent = self.directions()
        with sdpa_kernel(SDPBackend.MATH):
            _, hvp = jvp(grad(self.f), (self.train,), (tangent,))
        step = 1e-5
        moved = [
            grad(self.f)(
                {n: {k: t + s * tangent[n][k] for k, t in v.items()} for n, v in self.train.items()}
            )
            for s in (step, -step)
        ]
        for n, leaves in hvp.items():
            for k, value in leaves.items():
                reference = (moved[0][n][k] - moved[1][n][k]) / (2 * step)
                torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)

    def test_per_sample_gradients(self) -> None:
        ids = self.batch["input_ids"]

        def sample_loss(train, row):
            batch = {"input_ids": row[None], "labels": row[None]}
            return fadapt.run(self.model, fadapt.join(train, self.rest), batch, lm_loss)

        per_sample = vmap(grad(sample_loss), in_dims=(None, 0))(self.train, ids)
        for i, row in enumerate(ids):
            loop = grad(sample_loss)(self.train, row)
            self.close({n: {k: t[i] for k, t in v.items()} for n, v in per_sample.items()}, loop)


def out_of_first(model, params, x):
    first = params["0.weight"].train["d"]
    return (1 + first) * model[0](x)
