"""All that the package knows of transformers and accelerate, as questions to a model.

Nothing is imported from them: a model is asked for attributes by name, and one that lacks them is
not theirs. Read in transformers 5.24 and accelerate 1.15; each question says what it rests on.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""Where ``gradient_checkpointing_enable`` puts the function that a layer calls (transformers
modeling_utils ``_set_gradient_checkpointing``)."""


HOOK = "_hf_hook"
"""Where accelerate keeps the hook of a layer (hooks ``add_hook_to_module``)."""

LOSS_ARGUMENTS = frozenset(("shift_labels", "num_items_in_batch", "logits_to_keep"))
"""Besides the labels, what a causal language model's loss depends on, or its head's input."""


def config_of(model: nn.Module) -> Any:
    """``model.config``, or None."""
    return getattr(model, "config", None)


def wants_cache(model: nn.Module) -> bool:
    """Whether the model returns a key-value cache unless it is told not to: ``use_cache``."""
    return bool(getattr(config_of(model), "use_cache", False))


def without_cache(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, which ask for no cache unless the caller speaks of one.

    It costs memory, and torch.func cannot return it.
    """
    no_cache = {"use_cache": False} if wants_cache(model) else {}
    return {**no_cache, **kwargs}


def pad_token(model: nn.Module) -> int | None:
    """``config.pad_token_id``."""
    pad = getattr(config_of(model), "pad_token_id", None)
    return pad if isinstance(pad, int) else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """``config.is_encoder_decoder``: makes decoder inputs from labels where none are given."""
    return bool(getattr(config_of(model), "is_encoder_decoder", False))


ATTENTION_MASKS = ("attention_mask", "decoder_attention_mask")
"""Which tokens are no padding: of the encoder or of a model without one, and of the decoder."""

_CROSS = re.compile(r"(?i)encdec|encoder_attn|encoder_attention|cross_?att|src_att|encoder_decoder")
_OF_SOURCE = re.compile(r"(?i)(^|[._])(k|v|kv|key|value|key_value)(_proj|_lin|_linear)?$")
_PICTURES = re.compile(r"(?i)(^|[._])(vision|visual|image|pixel|vit|audio|speech)([._]|$)")


def mask_of(model: nn.Module, name: str) -> str | None:
    """The argument that masks the rows of a layer, told by the parameter's name, where it does.

    In an encoder-decoder the decoder's cross-attention takes its keys and values from the encoder
    (T5's EncDecAttention.k, BART's encoder_attn.v_proj, BERT's crossattention.self.key). The tower
    of a vision or speech model's pictures or sounds has no tokens: a name that no batch has.
    """
    layer = name.rpartition(".")[0]
    if is_encoder_decoder(model):
        side = re.search(r"(?:^|[._])(encoder|decoder)(?:[._]|$)", name)
        if side is None:  # such as the head, which follows the decoder
            return ATTENTION_MASKS[1] if is_head(model, layer) else None
        of_source = side[1] == "encoder" or (_CROSS.search(layer) and _OF_SOURCE.search(layer))
        return ATTENTION_MASKS[0 if of_source else 1]
    if _PICTURES.search(name) and hasattr(config_of(model), "text_config"):
        return "pixel_mask"
    return None


def is_head(model: nn.Module, layer: str) -> bool:
    """Whether the module of this name makes the logits."""
    head = output_head(model)
    return head is not None and model.get_submodule(layer) is head


def without_logits(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments with the logits of one token and without a loss, where the forward can.

    An encoder-decoder keeps its labels, from which it makes the decoder's inputs.
    """
    key = "logits_to_keep"
    if key in kwargs or key not in inspect.signature(model.forward).parameters:
        return dict(kwargs)
    dropped = () if is_encoder_decoder(model) else ("labels",)
    return {**{k: v for k, v in kwargs.items() if k not in dropped}, key: 1}


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits: ``get_output_embeddings()``, whatever it is called."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # a class that inherits the question only
        return None
    return head if isinstance(head, nn.Module) else None


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The heads of a model and of the models within it, such as a captioner's text decoder."""
    return [head for part in model.modules() if (head := output_head(part)) is not None]


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that embeds a model's tokens, or None."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):  # models without tokens
        return None
    return found if isinstance(found, nn.Module) else None


def loss_of(model: nn.Module) -> Any:
    """``model.loss_function``, which the model's forward calls with its logits, or None."""
    return getattr(model, "loss_function", None)


def has_causal_loss(model: nn.Module) -> bool:
    """Whether the loss is the mean next-token cross-entropy (loss_utils ``ForCausalLMLoss``)."""
    return getattr(loss_of(model), "__name__", "") == "ForCausalLMLoss"


LOSS_FUNCTION = "_loss_function"
"""Where a model keeps a loss function that was set on it (modeling_utils ``loss_function``)."""


def calls_loss_function(model: nn.Module) -> bool:
    """Whether the model's own forward, or one that it builds on, asks for ``self.loss_function``.

    Others (T5, BART, Whisper) compute their loss in place, from logits of which they know the
    width. ``loss_function`` is a property that gives what was set, or the loss of the type.
    """
    if not isinstance(getattr(type(model), "loss_function", None), property):
        return False
    for kind in type(model).__mro__:  # a loop, which Dynamo follows on every torch
        if "forward" not in vars(kind):
            continue
        forward = inspect.unwrap(vars(kind)["forward"])
        if "loss_function" in getattr(getattr(forward, "__code__", None), "co_names", ()):
            return True
    return False


def checkpoints(module: nn.Module) -> bool:
    """Whether a layer recomputes its activations in backward when it trains."""
    return may_checkpoint(module) and module.training


def may_checkpoint(module: nn.Module) -> bool:
    """Whether a layer would do so in training mode."""
    return bool(module.__dict__.get("gradient_checkpointing"))


def checkpoint_function(module: nn.Module) -> Any:
    """The function that does so, or None; replace it under ``CHECKPOINT_FUNCTION``."""
    return module.__dict__.get(CHECKPOINT_FUNCTION)


MODEL_FACTS = frozenset(
    "config generation_config main_input_name input_modalities loss_type accepts_loss_kwargs "
    "name_or_path hf_device_map model_tags can_generate is_gradient_checkpointing "
    "is_activation_checkpointing".split()
)
"""What transformers' Trainer, and trainers built on it, ask of a model besides its forward.

``loss_type`` and ``accepts_loss_kwargs`` decide how it counts the tokens of accumulated batches,
``main_input_name`` what it counts, ``hf_device_map`` whether it moves the model.
"""


def fact_of(model: nn.Module, name: str) -> Any:
    """One of these, which must be there; asked for by its present name, as the former one warns."""
    if name == "is_gradient_checkpointing" and hasattr(model, "is_activation_checkpointing"):
        name = "is_activation_checkpointing"
    return getattr(model, name)


CHECKPOINTING_SWITCHES = frozenset(
    "gradient_checkpointing_enable gradient_checkpointing_disable activation_checkpointing_enable "
    "activation_checkpointing_disable".split()
)
"""What its ``gradient_checkpointing`` option calls on a model."""

CALLS_FORWARD = frozenset(("generate",))
"""Methods beside forward that it calls to run a model."""


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is (in, out) (pytorch_utils)."""
    named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)  # below FSDP2's own
    return named and hasattr(module, "nf")


def is_rotary(module: nn.Module) -> bool:
    """A module that makes the tables of rotary position embeddings, by its class's name."""
    return type(module).__name__.endswith("RotaryEmbedding")


def offload_hook(module: nn.Module) -> str | None:
    """The class of accelerate's hook that moves a layer's weights in its forward, or None.

    ``_hf_hook`` is an AlignDevicesHook with ``offload``, a CpuOffload, or a SequentialHook of such.
    """
    hook = module.__dict__.get(HOOK)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) or type(one).__name__ == "CpuOffload":
            return type(one).__name__
    return None


def forward_key(module: nn.Module) -> str:
    """The attribute that holds a layer's own forward: accelerate's hooks keep it under another."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def experts_transposed(module: nn.Module) -> bool | None:
    """Whether fused experts are stored (in, out), where the layer says so, else None.

    ``is_transposed`` is set by ``use_experts_implementation`` (integrations/moe.py).
    """
    return getattr(module, "is_transposed", None)


def speaks_of_experts(module: nn.Module, path: str) -> bool:
    """Whether a module holds experts, by its class, its path or a count that it has.

    Other 3-D parameters are a matrix in disguise (XLNet's heads) or blocks of one (RecurrentGemma's
    gates).
    """
    said = f"{type(module).__name__} {path}"
    return bool(re.search(r"(?i)expert|moe\b|moe[A-Z_.]", said)) or any(
        "expert" in key.lower() and type(value) is int for key, value in vars(module).items()
    )


def heads_side(module: nn.Module, key: str, weight: Tensor) -> str | None:
    """The side of a linear map that a 3-D parameter (d, heads, head width) splits, or None.

    XLNet's q, k, v, r and o and Funnel's r_kernel; the sizes stand in the module or its config. The
    output projection reads heads ("in"), the others write them ("out").
    """
    sizes = {**vars(getattr(module, "config", module)), **vars(module)}

    def are(size: int, *words: str) -> bool:
        return any(
            type(v) is int and v == size and any(w in k for w in words) for k, v in sizes.items()
        )

    d, heads, width = weight.shape
    if not (are(d, "d_model", "hidden_size") and are(heads, "head") and are(width, "head")):
        return None
    return "in" if re.fullmatch(r"o|out|output|(o|out)_(proj|kernel)", key) else "out"
