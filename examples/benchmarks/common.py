"""What the benchmark scripts share: a model of Qwen3's shape, a step, timing, memory."""

from __future__ import annotations

import fcntl
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

TARGETS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


# Hugging Face gives an attention whose mask it does not know no mask, and causal attention is then
# a flag of torch's kernels. Under torch.compile its own "sdpa" gives them the whole mask instead,
# which takes twice as long. For batches without padding; whoever is compared has it too.
AttentionInterface.register("maskless", sdpa_attention_forward)


def qwen3(
    hidden: int,
    layers: int,
    vocab: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    bias: bool = False,
) -> nn.Module:
    """A frozen Qwen3 with random weights; 1024 wide with 28 layers it is Qwen3-0.6B's shape.

    Args:
        bias: give the linear maps of attention biases, at random, too.
    """
    torch.manual_seed(0)
    full = hidden >= 1024
    heads = max(16, hidden // 128) if full else max(1, hidden // 64)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8 if full else heads,
        head_dim=128 if full else 64,
        intermediate_size=3 * hidden,
        tie_word_embeddings=True,
        use_cache=False,
        max_position_embeddings=4096,
        attn_implementation=attention,
        attention_bias=bias,
    )
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if bias and name.endswith("bias"):
                nn.init.normal_(parameter, std=0.02)
    return model.to(dtype).requires_grad_(False).eval()


def four_bit(model: nn.Module) -> nn.Module:
    """The model with its linear maps, but for the head, quantized to nf4 by bitsandbytes."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            dtype, device = module.weight.dtype, module.weight.device
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
            )
            layer.load_state_dict(module.to("cpu").state_dict())
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, layer.to(device))
    return model.requires_grad_(False)


def tokens(rows: int, length: int, vocab: int, device: str = "cpu") -> dict[str, Tensor]:
    """A causal-LM batch of random tokens."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (rows, length), generator=rng).to(device)
    return {"input_ids": ids, "labels": ids}


def training_step(
    loss_of: Callable[[], Tensor], leaves: list[Tensor], lr: float = 1e-3
) -> Callable[[], Tensor]:
    """A step of AdamW (fused where the leaves allow) that returns the loss."""
    optimiser = torch.optim.AdamW(leaves, lr=lr, fused=True)

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = loss_of()
        loss.sum().backward()
        optimiser.step()
        return loss.detach()

    return step


def gradient_norm(leaves: list[Tensor]) -> float:
    norms = [t.grad.float().norm() for t in leaves if t.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def alternate(
    steps: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3
) -> dict[str, float]:
    """The median milliseconds of each function, called in turn in one process."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + warmup):
        for name, step in steps.items():
            ms = milliseconds(step)
            if i >= warmup:
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


def milliseconds(step: Callable[[], Any]) -> float:
    """Of one call, until the device is done."""
    _wait()
    start = time.perf_counter()
    step()
    _wait()
    return 1e3 * (time.perf_counter() - start)


READY = 5
"""Steps by which a fit has compiled, recorded and warmed up."""


class Ticks(Sequence):
    """The same batch for every step of a fit, whose steps it times.

    Args:
        batch: the batch.
        when_ready: called between two steps, when the fit is ready to be measured.
        peers: steps of others, to be timed in turn with those of the fit.
    """

    def __init__(
        self, batch: Any, when_ready: Callable[[], None], peers: Mapping[str, Callable[[], Any]]
    ):
        self.batch, self.when_ready, self.peers = batch, when_ready, peers
        self.spans: dict[str, list[float]] = {name: [] for name in ("fit", *peers)}
        self.begin: float | None = None

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        _wait()
        if self.begin is not None:
            self.spans["fit"].append(1e3 * (time.perf_counter() - self.begin))
        if len(self.spans["fit"]) == READY:
            self.when_ready()
        if len(self.spans["fit"]) >= READY:
            for name, step in self.peers.items():
                self.spans[name].append(milliseconds(step))
        self.begin = time.perf_counter()
        return self.batch

    def preparation(self) -> float:
        """Seconds until it was ready."""
        return sum(self.spans["fit"][:READY]) / 1e3

    def medians(self) -> dict[str, float]:
        """Milliseconds a step, since the fit was ready."""
        own = self.spans["fit"][READY:]
        return {name: statistics.median(v) for name, v in {**self.spans, "fit": own}.items()}


def announce(directory: Path) -> None:
    """Tells the others at :func:`turn` not to wait for this process."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{os.getpid()}.ready").touch()


@contextmanager
def turn(directory: Path, processes: int) -> Iterator[None]:
    """Waits for that many benchmarks to have compiled, side by side; then they measure in turn.

    Whichever ends earlier, by an error too, is not waited for if it calls :func:`announce`.
    """
    if processes == 1:
        yield
        return
    announce(directory)
    while len(list(directory.glob("*.ready"))) < processes:
        time.sleep(0.1)
    with open(directory / "turn", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def kept_bytes(work: Callable[[Callable[[], None]], Any]) -> tuple[int, int]:
    """Bytes of the tensors that a function made: those alive when it last called back, the peak."""
    kept = 0
    if torch.cuda.is_available():
        _wait()
        before = torch.cuda.memory_allocated()

        def note() -> None:
            nonlocal kept
            kept = torch.cuda.memory_allocated() - before

        peak = peak_bytes(lambda: work(note))
        return kept, peak

    def count() -> None:
        nonlocal kept
        kept = live.now

    with _LiveBytes() as live:
        work(count)
    return kept, live.peak


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most bytes that the tensors made during one call hold at a time."""
    if torch.cuda.is_available():
        _wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        _wait()
        return torch.cuda.max_memory_allocated() - before
    with _LiveBytes() as live:
        step()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is(t)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if _is(t):
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in old and key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key, size)
        return out

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
