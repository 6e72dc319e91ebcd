"""Without loss_fn, a stack's losses are those of the model's own forward, for each adapter."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import fadapt

from .models import gpt2, perturb, qwen3, tokens

V, B, T = 64, 3, 7
RULES = {
    r"q_proj|v_proj|query|value|q_lin|v_lin|\.q\.|\.v\.|c_attn|query_key_value": fadapt.LoRA(r=2)
}
SIDES = dict(
    vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=48,
    decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
    max_position_embeddings=32,
)  # fmt: skip
BERT = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=32,
)  # fmt: skip
LLAMA = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip
IDS, LABELS = tokens(B, T, seed=1), tokens(B, T, seed=2)
OTHER = nn.functional.pad(IDS[:, 1:], (0, 1), value=-100).roll(1, 0)
BART = hf.BartConfig(**SIDES)
T5 = hf.T5Config(
    vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)
TWO = torch.tensor([0, 1, 1])

# The model, what its batch holds beside the input_ids, and whether one pass can do.
CASES = {
    "BART": (lambda: hf.BartForConditionalGeneration(BART), {"labels": LABELS}, False),
    "BART with decoder inputs": (
        lambda: hf.BartForConditionalGeneration(BART),
        {"labels": LABELS, "decoder_input_ids": LABELS.roll(1, 1)},
        False,
    ),
    "T5": (lambda: hf.T5ForConditionalGeneration(T5), {"labels": LABELS}, False),
    "BART decoder": (
        lambda: hf.BartForCausalLM(
            hf.BartConfig(**SIDES, is_decoder=True, is_encoder_decoder=False, use_cache=False)
        ),
        {"labels": LABELS},
        False,
    ),
    "XLM": (
        lambda: hf.XLMWithLMHeadModel(
            hf.XLMConfig(
                vocab_size=V, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=32
            )
        ),
        {"labels": LABELS},
        False,
    ),
    "Mixtral with the routers' loss": (
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**LLAMA, **MOE, output_router_logits=True, router_aux_loss_coef=0.5)
        ),
        {"labels": IDS},
        False,
    ),
    "Mixtral without": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA, **MOE)),
        {"labels": IDS},
        True,
    ),
    "next sentence": (
        lambda: hf.BertForNextSentencePrediction(hf.BertConfig(**BERT)),
        {"labels": TWO},
        False,
    ),
    "two losses": (
        lambda: hf.BertForPreTraining(hf.BertConfig(**BERT)),
        {"labels": LABELS, "next_sentence_label": TWO},
        False,
    ),
    "masked": (lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)), {"labels": LABELS}, False),
    "tokens": (
        lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT, num_labels=3)),
        {"labels": LABELS % 3},
        False,
    ),
    "spans": (
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**BERT)),
        {"start_positions": TWO, "end_positions": TWO + 3},
        False,
    ),
    "regression": (
        lambda: hf.LlamaForSequenceClassification(
            hf.LlamaConfig(**LLAMA, num_labels=1, pad_token_id=0)
        ),
        {"labels": torch.tensor([0.5, -1.0, 2.0])},
        True,
    ),
    "capped logits": (
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**LLAMA, final_logit_softcapping=2.0)),
        {"labels": IDS},
        True,
    ),
    "a number of items": (
        lambda: qwen3(),
        {"labels": IDS, "num_items_in_batch": torch.tensor(50)},
        True,
    ),
    "shifted labels": (lambda: qwen3(), {"labels": IDS, "shift_labels": OTHER}, True),
    "GPT-2": (lambda: gpt2(), {"labels": IDS}, True),
}  # fmt: skip


def pair(model: nn.Module, rules=None) -> list[fadapt.Params]:
    return [perturb(fadapt.init(model, rules or RULES), seed=s, std=0.5) for s in (1, 2)]


def grad(leaf: Tensor) -> Tensor:
    """Zero where a layer takes no part."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def own_losses(model: nn.Module, members, batches) -> list[float]:
    """Of the merged models: nothing of the runner takes part."""
    losses = []
    for params, batch in zip(members, batches, strict=True):
        merged = copy.deepcopy(model)
        merged.load_state_dict(fadapt.merge(model, params), strict=False)
        losses.append(merged(**batch).loss.item())
    return losses


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every adapted forward."""
    seen: list[int] = []
    from fadapt.fold import run as module

    real = module.call_on_batch

    def counting(model, sites, batch, **options):
        seen.append(batch["input_ids"].shape[0])
        return real(model, sites, batch, **options)

    monkeypatch.setattr(module, "call_on_batch", counting)
    return seen


@pytest.mark.parametrize("per_adapter", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", CASES)
def test_the_losses_are_the_models_own(name: str, per_adapter: bool, passes: list[int]) -> None:
    make, extra, folds = CASES[name]
    torch.manual_seed(0)
    model, batch = make().eval().requires_grad_(False), {"input_ids": IDS, **extra}
    members, parts = pair(model), [batch, batch]
    if per_adapter:
        parts = [{k: v.roll(i, 0) if v.dim() else v for k, v in batch.items()} for i in (0, 1)]
        batch = {k: torch.stack([p[k] for p in parts]) if v.dim() else v for k, v in batch.items()}
    stack = fadapt.stack(members)
    for _ in range(2):
        passes.clear()
        losses = fadapt.run(model, stack, batch, per_adapter=per_adapter)
    assert passes == ([2 * B] if folds else [B, B])  # nothing is tried twice
    assert losses.tolist() == pytest.approx(own_losses(model, members, parts), rel=1e-5)
    losses.sum().backward()
    for params, part in zip(members, parts, strict=True):
        fadapt.run(model, params, part).backward()
    grads = stack.map(
        lambda p: p.map(lambda a: a.replace({k: grad(t) for k, t in a.train.items()}))
    )
    for params, found in zip(members, fadapt.unstack(grads), strict=True):
        for site, adapter in params.items():
            for leaf, tensor in adapter.train.items():
                torch.testing.assert_close(
                    found[site].train[leaf], grad(tensor), rtol=1e-3, atol=1e-6
                )
    assert "_loss_function" not in model.__dict__


def test_members_of_other_ranks_and_methods_run_in_turn() -> None:
    model = hf.T5ForConditionalGeneration(T5).eval().requires_grad_(False)
    kinds = fadapt.LoRA(r=2), fadapt.DoRA(r=2), fadapt.LoRA(r=5, alpha=3.0), fadapt.IA3()
    members = [pair(model, {r"\.q\.|\.v\.": kind})[i % 2] for i, kind in enumerate(kinds)]
    members[2] = fadapt.scale(members[2], 0.5)
    batch = {"input_ids": IDS, "labels": LABELS}
    stack = fadapt.stack(members)
    losses = fadapt.run(model, stack, batch)
    assert losses.tolist() == pytest.approx(own_losses(model, members, [batch] * 4), rel=1e-5)
    losses.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in fadapt.trainable(stack))
    rows = fadapt.select(stack, [3, 0, 2])
    chosen = fadapt.run(model, rows, batch)
    parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    expected = own_losses(model, [members[i] for i in (3, 0, 2)], parts)
    assert chosen.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_model_of_ones_own_that_returns_its_loss() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).square().mean()

    model, x = Own(), torch.randn(5, 4)
    members = pair(model, fadapt.LoRA(r=2))
    losses = fadapt.run(model, fadapt.stack(members), x)
    alone = torch.stack([fadapt.run(model, p, x) for p in members])
    torch.testing.assert_close(losses, alone)


def test_inside_bound_it_is_one_pass_or_an_error() -> None:
    batch = {"input_ids": IDS, "labels": IDS}
    wide = {k: torch.cat([v, v]) for k, v in batch.items()}
    model = qwen3().eval()
    stack = fadapt.stack(pair(model))
    expected = fadapt.run(model, stack, batch)
    with fadapt.bound(model, stack):
        torch.testing.assert_close(fadapt.run(model, stack, batch), expected)
        assert model(**wide).loss.dim() == 0
    model = hf.T5ForConditionalGeneration(T5).eval()
    stack = fadapt.stack(pair(model))
    with (
        fadapt.bound(model, stack),
        pytest.raises(fadapt.FadaptError, match=r"one by one.*loss_fn"),
    ):
        fadapt.run(model, stack, batch)


def test_compiled_it_is_the_same_in_one_graph() -> None:
    batch = {"input_ids": IDS, "labels": IDS}
    small = hf.BartConfig(**{**SIDES, "decoder_layers": 1}, is_decoder=True, use_cache=False)
    one = hf.LlamaConfig(**{**LLAMA, "num_hidden_layers": 1})
    for model in (hf.LlamaForCausalLM(one).eval(), hf.BartForCausalLM(small).eval()):
        stack = fadapt.stack(pair(model))
        torch.compiler.reset()
        step = torch.compile(
            lambda s, m=model: fadapt.run(m, s, batch), fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(step(stack), fadapt.run(model, stack, batch))
        assert "_loss_function" not in model.__dict__


def test_a_loss_function_of_the_users_is_taken_and_kept() -> None:
    model = qwen3().eval()

    def mine(logits, labels, vocab_size, **_):
        return logits.square().mean() + labels.double().mean() / vocab_size

    model.loss_function = mine
    members, batch = pair(model), {"input_ids": IDS, "labels": IDS}
    losses = fadapt.run(model, fadapt.stack(members), batch)
    assert losses.tolist() == pytest.approx(own_losses(model, members, [batch] * 2), rel=1e-5)
    assert model.loss_function is mine

    def failing(**_):
        raise RuntimeError("mine")

    model.loss_function = failing
    with pytest.raises(RuntimeError, match="mine"):
        fadapt.run(model, fadapt.stack(members), batch)
    assert model.loss_function is failing


def test_other_threads_get_the_plain_loss() -> None:
    """While a stack's pass is inside the model's loss function."""
    model = qwen3().eval().requires_grad_(False)
    batch = {"input_ids": IDS, "labels": IDS}
    members, function = pair(model), model.loss_function
    plain = model(**batch).loss
    found: list[Tensor] = []

    def asking(**given):
        if threading.current_thread() is threading.main_thread() and not found:
            found.append(torch.zeros(()))  # once
            other = threading.Thread(
                target=lambda: found.append(model.loss_function(**{**given, "labels": IDS}))
            )
            other.start()
            other.join()
        return function(**given)

    logits = model(**batch).logits
    model.loss_function = asking
    fadapt.run(model, fadapt.stack(members), batch, verify=False)
    assert isinstance(found[1], Tensor)
    assert found[1].dim() == 0
    torch.testing.assert_close(model.loss_function(logits=logits, labels=IDS, vocab_size=V), plain)
