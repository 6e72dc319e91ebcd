"""run, apply and bound on real architectures: every torch.func transform, compile, checkpoints."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import fadapt

VOCAB = 61
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
)


def _qwen3(**kwargs):
    config = Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, **kwargs)
    return Qwen3ForCausalLM(config)


def _vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


MODELS = {
    "qwen3": _qwen3,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
    "vit": _vit,
}
METHODS = (
    fadapt.LoRA(r=3),
    fadapt.RsLoRA(r=3),
    fadapt.IA3(),
    fadapt.IA3FF(),
    fadapt.DoRA(r=2),
    fadapt.Chain((fadapt.DoRA(r=2), fadapt.IA3())),
)


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def make_batch(name: str, rows: int = 3, padded: bool = True) -> dict:
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8), "labels": torch.arange(rows) % 3}
    ids = torch.randint(0, VOCAB, (rows, 7))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    labels = torch.arange(rows) % 3 if name == "bert" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lm_loss(output, batch):
    """Cross-entropy in the logits' own dtype; Hugging Face's casts them to float32."""
    logits = output.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())


def trained(model: nn.Module, cfg, seed: int = 0, std: float = 0.1) -> fadapt.Params:
    params = fadapt.init(model, cfg)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf += std * torch.randn(leaf.shape, generator=rng, dtype=leaf.dtype)
    return params


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_identity_at_start(name, method, dtype) -> None:
    model, batch = make(name, dtype), make_batch(name)
    if name == "vit":
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    params = fadapt.init(model, method)
    reference = model(**batch)
    assert torch.equal(fadapt.run(model, params, batch), reference.loss)
    assert torch.equal(fadapt.apply(model, params, **batch).logits, reference.logits)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", MODELS)
def test_run_equals_merged(name, method) -> None:
    model, batch = make(name, torch.float64), make_batch(name)
    if name == "vit":
        batch["pixel_values"] = batch["pixel_values"].double()
    params = trained(model, method)
    merged = fadapt.merge(model, params)
    reference = functional_call(model, merged, (), batch, tie_weights=False)
    out = fadapt.apply(model, params, **batch)
    torch.testing.assert_close(out.logits, reference.logits, rtol=1e-9, atol=1e-9)
    assert (out.logits - model(**batch).logits).abs().max() > 1e-4


def test_training_loop_lowers_the_loss_and_leaves_the_base_alone() -> None:
    model, batch = make("qwen3"), make_batch("qwen3")
    before = copy.deepcopy(model.state_dict())
    params = fadapt.init(model, {"q_proj|v_proj": fadapt.LoRA(r=4), "down_proj": fadapt.DoRA(r=2)})
    optimiser = torch.optim.AdamW(fadapt.trainable(params), lr=3e-2)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = fadapt.run(model, params, batch)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.92 * losses[0]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


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


class TestCheckpointing:
    @pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert", "vit"])
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_gradients_equal_those_without(self, name, reentrant) -> None:
        model, batch = make(name), make_batch(name)
        params = trained(model, fadapt.DoRA(r=2))
        leaves = fadapt.trainable(params)
        reference = torch.autograd.grad(fadapt.run(model, params, batch), leaves)
        for module in model.modules():  # dropout would differ; only the flag is wanted
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        if hasattr(model.config, "attention_probs_dropout_prob"):
            for module in model.modules():
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.0
                if hasattr(module, "dropout_prob"):
                    module.dropout_prob = 0.0
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        functions = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
        calls = _count_layer_calls(model)
        loss = fadapt.run(model, params, batch)
        forward_calls = calls[0]
        loss.backward()
        assert calls[0] == 2 * forward_calls, "the layers were not recomputed"
        for leaf, ref in zip(leaves, reference, strict=True):
            torch.testing.assert_close(leaf.grad, ref, rtol=1e-5, atol=1e-6)
        assert functions == [
            m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()
        ]

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_saves_memory(self) -> None:
        torch.manual_seed(0)
        config = Qwen3Config(**{**SMALL, "num_hidden_layers": 8}, num_key_value_heads=2, head_dim=8)
        model = Qwen3ForCausalLM(config)
        params = trained(model, fadapt.LoRA(r=2))
        batch = make_batch("qwen3", rows=8, padded=False)

        def saved_bytes() -> int:
            seen: dict[int, int] = {}

            def pack(t):
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                fadapt.run(model, params, batch)
            return sum(seen.values())

        plain = saved_bytes()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        assert saved_bytes() < 0.6 * plain

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_under_torch_func_is_refused(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3", padded=False)
        params = trained(model, fadapt.LoRA(r=2))
        train, rest = fadapt.split(params)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with pytest.raises(fadapt.FadaptError, match="gradient_checkpointing_disable"):
            grad(lambda t: fadapt.run(model, fadapt.join(t, rest), batch))(train)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_own_checkpoint_is_refused_outside_bound(self, reentrant) -> None:
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

            def forward(self, x):
                return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

        model, x = Own(), torch.randn(3, 4, requires_grad=True)
        params = trained(model, fadapt.LoRA(r=2))
        with pytest.raises(fadapt.FadaptError, match=r"fadapt\.bound"):
            fadapt.apply(model, params, x)
        with torch.no_grad():
            fadapt.apply(model, params, x)
        with fadapt.bound(model, params):
            model(x).square().sum().backward()
        reference = torch.autograd.grad(
            functional_plain(model, params, x).square().sum(), fadapt.trainable(params)
        )
        for leaf, ref in zip(fadapt.trainable(params), reference, strict=True):
            torch.testing.assert_close(leaf.grad, ref)


def functional_plain(model, params, x):
    plain = {k: v.detach().clone() for k, v in model.named_parameters()}
    for name, adapter in params.items():
        leaves = adapter.train
        plain[name] = plain[name] + adapter.method.scaling * leaves["B"] @ leaves["A"]
    h = torch.tanh(x @ plain["inner.0.weight"].T + plain["inner.0.bias"])
    return h @ plain["inner.2.weight"].T + plain["inner.2.bias"]


def _count_layer_calls(model) -> list[int]:
    calls = [0]
    for module in model.modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and "layer" in _name(model, module):
            module.forward = _counting(module.forward, calls)
    return calls


def _name(model, module) -> str:
    name = next(n for n, m in model.named_modules() if m is module)
    return name.replace(".h.", ".layer.")


def _counting(forward, calls):
    def counted(*args, **kwargs):
        calls[0] += 1
        return forward(*args, **kwargs)

    return counted


class TestCompile:
    @pytest.mark.parametrize("name", ["qwen3", "gpt2"])
    def test_fullgraph_step_without_recompilation(self, name) -> None:
        model, batch = make(name), make_batch(name, padded=False)
        labels = batch.pop("labels")
        graphs = []

        def loss_fn(output, batch):
            return lm_loss(output, {"labels": labels})

        def backend(module, inputs):
            graphs.append(module)
            return module.forward

        torch.compiler.reset()
        step = torch.compile(
            lambda p: fadapt.run(model, p, batch, loss_fn), fullgraph=True, backend=backend
        )
        for seed in (0, 1):
            params = trained(model, {"attn|mlp": fadapt.DoRA(r=2)}, seed=seed)
            loss, reference = step(params), fadapt.run(model, params, batch, loss_fn)
            torch.testing.assert_close(loss, reference)
            leaves = fadapt.trainable(params)
            for a, b in zip(
                torch.autograd.grad(loss, leaves),
                torch.autograd.grad(reference, leaves),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert len(graphs) == 1
        assert all(isinstance(p, nn.Parameter) for p in model.parameters())

    def test_inductor(self) -> None:
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        params, x = trained(model, fadapt.DoRA(r=2)), torch.randn(5, 8)
        torch.compiler.reset()
        step = torch.compile(lambda p: fadapt.apply(model, p, x).square().sum(), fullgraph=True)
        reference = fadapt.apply(model, params, x).square().sum()
        torch.testing.assert_close(step(params), reference)
        leaves = fadapt.trainable(params)
        torch.testing.assert_close(
            torch.autograd.grad(step(params), leaves), torch.autograd.grad(reference, leaves)
        )


class TestBound:
    def test_model_is_adapted_inside_and_itself_outside(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3")
        params = trained(model, fadapt.LoRA(r=2))
        objects = dict(model.named_parameters())
        plain = model(**batch).logits
        with fadapt.bound(model, params) as same:
            assert same is model
            inside = model(**batch).logits
            assert torch.equal(fadapt.run(model, params, batch), model(**batch).loss)
        assert torch.equal(inside, fadapt.apply(model, params, **batch).logits)
        assert torch.equal(model(**batch).logits, plain)
        assert all(p is objects[n] for n, p in model.named_parameters())

    def test_restores_after_an_exception(self) -> None:
        model = make("gpt2")
        objects = dict(model.named_parameters())
        with (
            pytest.raises(ZeroDivisionError),
            fadapt.bound(model, trained(model, fadapt.IA3())),
        ):
            raise ZeroDivisionError
        assert all(p is objects[n] for n, p in model.named_parameters())

    def test_other_params_inside_are_refused(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3")
        params, other = (trained(model, fadapt.LoRA(r=2), seed=s) for s in (0, 1))
        with fadapt.bound(model, params):
            for call in (
                lambda: fadapt.run(model, other, batch),
                lambda: fadapt.init(model, fadapt.LoRA()),
                lambda: fadapt.bound(model, other).__enter__(),
            ):
                with pytest.raises(fadapt.FadaptError, match="bound"):
                    call()

    def test_optimiser_steps_inside_take_effect(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3")
        params = trained(model, fadapt.LoRA(r=2))
        optimiser = torch.optim.SGD(fadapt.trainable(params), lr=0.5)
        with fadapt.bound(model, params):
            loss = model(**batch).loss
            loss.backward()
            optimiser.step()
            assert model(**batch).loss < loss

    def test_generate(self) -> None:
        model = make("qwen3")
        params = trained(model, fadapt.LoRA(r=2), std=0.5)
        ids = make_batch("qwen3", padded=False)["input_ids"]
        out = fadapt.apply(
            model, params, ids, method="generate", max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        with fadapt.bound(model, params):
            inside = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(out, inside)
        logits = fadapt.apply(model, params, out).logits
        assert torch.equal(out[:, 7:], logits[:, 6:-1].argmax(-1))
        with pytest.raises(fadapt.ConfigError, match="no method 'generat'"):
            fadapt.apply(model, params, ids, method="generat")


class TestThreads:
    def test_two_threads_take_turns(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3")
        objects = dict(model.named_parameters())
        members = [trained(model, fadapt.LoRA(r=2), seed=s) for s in range(4)]
        expected = [fadapt.run(model, p, batch).item() for p in members]
        failures: list[str] = []

        def work(i: int) -> None:
            try:
                for _ in range(15):
                    loss = fadapt.run(model, members[i], batch)
                    loss.backward()
                    if loss.item() != expected[i]:
                        failures.append(f"{i}: {loss.item()} != {expected[i]}")
            except Exception as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert all(p is objects[n] for n, p in model.named_parameters())

    def test_bound_holds_for_its_own_thread_alone(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3")
        params, other = (trained(model, fadapt.LoRA(r=2), seed=s) for s in (0, 1))
        wanted = [model(**batch).loss.item(), fadapt.run(model, other, batch).item()]
        found: list[float] = []

        def work() -> None:
            found.append(model(**batch).loss.item())
            found.append(fadapt.run(model, other, batch).item())

        with fadapt.bound(model, params):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(timeout=20)
        assert found == wanted


class TestInputs:
    def test_batches_as_dict_tuple_tensor(self) -> None:
        model = nn.Linear(4, 3)
        params = trained(model, fadapt.LoRA(r=2))
        x, y = torch.randn(5, 4), torch.randn(5, 3)

        def mse(out, batch):
            return (out - y).square().mean()

        one = fadapt.run(model, params, x, mse)
        assert torch.equal(one, fadapt.run(model, params, (x,), mse))
        assert torch.equal(one, fadapt.run(model, params, {"input": x}, mse))
        with pytest.raises(fadapt.ConfigError, match="list"):
            fadapt.run(model, params, [x], mse)

    def test_no_scalar_loss_is_an_error(self) -> None:
        model = nn.Linear(4, 3)
        params = trained(model, fadapt.LoRA(r=2))
        with pytest.raises(fadapt.ConfigError, match=r"shape \(5, 3\).*loss_fn"):
            fadapt.run(model, params, torch.randn(5, 4))
        model, batch = make("qwen3"), make_batch("qwen3")
        del batch["labels"]
        with pytest.raises(fadapt.ConfigError, match="labels"):
            fadapt.run(model, trained(model, fadapt.LoRA(r=2)), batch)

    def test_params_of_another_model(self) -> None:
        params = trained(nn.Sequential(nn.Linear(4, 3)), fadapt.LoRA(r=2))
        with pytest.raises(fadapt.TargetError, match="another base model"):
            fadapt.apply(nn.Sequential(nn.Linear(5, 3)), params, torch.randn(2, 5))
        with pytest.raises(fadapt.TargetError, match="another model"):
            fadapt.apply(nn.Linear(4, 3), params, torch.randn(2, 4))
        with pytest.raises(fadapt.ConfigError, match=r"fadapt\.init"):
            fadapt.apply(nn.Linear(4, 3), {}, torch.randn(2, 4))

    def test_escaped_operations_fall_back_with_a_warning(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 3)

            def forward(self, x):
                return torch.einsum("oi,bi->bo", self.linear.weight, x)

        model, x = Odd(), torch.randn(2, 4)
        params = trained(model, fadapt.LoRA(r=2))
        with pytest.warns(fadapt.DenseFallbackWarning, match=r"linear\.weight.*einsum"):
            out = fadapt.apply(model, params, x)
        expected = x @ fadapt.merge(model, params)["linear.weight"].T
        torch.testing.assert_close(out, expected)
        with pytest.raises(fadapt.TargetError, match="acts on the bias"):
            fadapt.apply(model, trained(model, fadapt.IA3()), x)

    def test_writing_to_an_adapted_weight_is_an_error(self) -> None:
        class Writer(nn.Linear):
            def forward(self, x):
                self.weight.mul_(2)
                return super().forward(x)

        model = Writer(4, 3)
        before = model.weight.clone()
        with pytest.raises(fadapt.FadaptError, match=r"writes to weight"):
            fadapt.apply(model, trained(model, fadapt.LoRA(r=2)), torch.randn(2, 4))
        assert torch.equal(model.weight, before)

    def test_metadata_of_the_overlay_is_the_weights_own(self) -> None:
        seen = {}

        class Curious(nn.Linear):
            def forward(self, x):
                w = self.weight
                seen.update(
                    shape=w.shape, dtype=w.dtype, device=w.device, ndim=w.ndim, size=w.size(0),
                    stride=w.stride(), numel=w.numel(), grad=w.requires_grad, n=len(w),
                )  # fmt: skip
                return super().forward(x.to(self.weight.dtype))

        model = Curious(4, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fadapt.apply(model, trained(model, fadapt.LoRA(r=2)), torch.randn(2, 4).double())
        assert seen == dict(
            shape=(3, 4), dtype=torch.float32, device=torch.device("cpu"), ndim=2, size=3,
            stride=(4, 1), numel=12, grad=False, n=3,
        )  # fmt: skip
