"""The proof that in one pass over a model, each adapter of a stack is what it is alone.

A fold is right where a row's output depends on this row alone and rows keep their order along the
first axis. No list of modules can say for which models that is so. So before the first pass over a
model with a structure of stack and a kind of batch, two members run together and alone, in eval
mode: moved at random, since members that are still the identity could be mixed without a trace.
Mixed rows then show as differences of the members' own size, far above rounding. One of the two is
moved further, and sees one row again and again, and another at the end: what is shared by the whole
batch, such as its mean, must not come out the same for both. Then the first runs beside itself:
where rows compete for places, as among experts of a limited capacity, it would have to share all of
its own.

Then the same in training mode, without dropout. A model that draws all the same, in whatever mode,
gives one member other numbers alone. There two passes of the two from the same generators are
compared, of which the second has another member beside the first, which must not notice.

What a model makes of one batch it need not make of the next: ``if h.mean() > 0`` takes one way for
all rows. Where the forward turns a value that follows from the adapters, or from real numbers of
the batch, into one of Python's, or into one switch of ``torch.where``, that is a reason of its own.
What is left, such as a branch on how many rows are above a bound, has a chance to show when the
proof is repeated, with other moves and the batch at hand, at the 16th pass, the 128th, and so on.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base import generators
from ..base.eval_mode import evaluating
from ..base.flow import Flow
from ..base.memory import is_out_of_memory
from ..base.sharded import agreed, groups_of, has_units
from ..base.torch_private import is_transformed, pytree
from ..errors import FadaptError
from ..overlay.instead import is_run_otherwise
from ..params.adapter import Adapter
from ..params.params import Params
from ..params.stack import Group, Stack, at_rank, subset, views
from . import fold
from .dropout_off import WithoutDropout
from .losses import turnstile

Named = dict[str, Tensor]
"""The tensors that one member gives, by name."""

WAYS_OUT = (
    "Run the adapters one by one, [fadapt.run(model, p, batch) for p in fadapt.unstack(stack)], or "
    "with torch.func.vmap over fadapt.run; pass a loss_fn that reads outputs with one row for each "
    "row of the batch; or, where the difference is meant, verify=False"
)

# Relative differences that rounding explains: products of N x B rows take other kernels and other
# orders of summation than products of B rows, layer after layer.
_ROUNDING = {
    torch.float64: 1e-6,  # many models take their norms and losses in float32 all the same
    torch.float32: 2e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 3e-2,
}
_TF32 = 2e-3
_GRADIENTS = 10.0  # as much again: they are sums of more terms
_APART = 5e-2  # relative difference of two members that are different enough to tell
_STEPS = (0.2, 0.6, 2.0, 6.0, 20.0)  # sizes of the random moves, until they are
_FURTHER = 4.0  # the second member's move, in those of the first

_AGAIN = 16, 8  # the pass before which the proof is repeated, and what it is multiplied by

_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _Verdict]] = (
    weakref.WeakKeyDictionary()
)


def possible() -> bool:
    """Whether values can be looked at here: not in a graph, nor under a torch.func transform."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def is_due(count: int) -> bool:
    """Whether the proof is repeated before the pass of this number."""
    due = _AGAIN[0]
    while due < count:
        due *= _AGAIN[1]
    return due == count


def difference(
    model: nn.Module,
    whole: Stack,
    batch: Any,
    per_adapter: bool,
    kind: Hashable,
    folded: Callable[[Stack, int, Any], list[Named]],
    single: Callable[[Params, Any], Named],
    gradients: bool,
    passes: int | None = None,
) -> str:
    """In words, how members of a stack differ together from the same alone; "" if they do not.

    Args:
        model: the base.
        whole: the stack.
        batch, per_adapter: as for :func:`fadapt.run`.
        kind: of the call.
        folded: what each member of a small stack gives in one pass over (stack, rows, batch); or
            an empty list, if there is nothing to compare.
        single: the same for one member alone, on (params, batch).
        gradients: whether to compare the gradients of the tensors' sum, too.
        passes: how many there have been; None counts the questions.
    """
    if not whole.groups:  # rows of the base
        return ""
    # Of one row or several: not where other processes, which have to come along, may differ in it.
    sizes = not has_units(model)
    key = (kind, per_adapter, _structure(whole), batch_kind(batch, sizes), _modes(model))
    known = _verdicts.setdefault(model, {})
    if passes is None:
        passes = known[key].passes + 1 if key in known else 1
    if key not in known or (not known[key].why and is_due(passes)):
        try:
            parts = fold.parts(batch, whole, per_adapter)
            proof = _Proof(model, whole, parts, folded, single, seed=passes - 1)
            trains = any(module.training for module in model.modules())
            # In this order: a training pass of another thread, whose end evaluating waits for, may
            # want the turnstile.
            with evaluating(model), turnstile(model), generators.forked(model):
                why = proof.verdict(gradients)
            if trains and not why:
                with turnstile(model), generators.forked(model):
                    why = proof.verdict_in_training()
            known[key] = _Verdict(why)
        except FadaptError:
            raise
        except Exception as error:
            error.add_note(
                "fadapt: while two moved members of the stack ran together and alone, to see "
                "whether they are independent; verify=False leaves that out"
            )
            raise
    known[key].passes = passes
    return known[key].why


@dataclass
class _Verdict:
    """What was found, and how many passes have asked for it."""

    why: str
    passes: int = 0


class _Proof:
    def __init__(
        self,
        model: nn.Module,
        whole: Stack,
        parts: Sequence[Any],
        folded: Callable[[Stack, int, Any], list[Named]],
        single: Callable[[Params, Any], Named],
        seed: int,
    ):
        chosen = _representatives(whole)
        self.model = model
        self.members = subset(whole, chosen)
        self.parts = [parts[i] for i in chosen]
        self.rows = fold.rows_of(self.parts[0])
        if all(part is self.parts[0] for part in self.parts):
            one = [self.rows // 2] * self.rows
            if self.rows > 2:  # a contrastive loss is the same of any rows that are all equal
                one[-1] = 0
            self.parts[1::2] = [fold.rows_at(p, self.rows, one) for p in self.parts[1::2]]
        self.folded, self.single, self.seed = folded, single, seed
        self.tolerance = _tolerance([*model.parameters(), *whole.trainable()])
        # Not over a sharded base, nor where compiled functions run in place of its parts.
        self.looks = not groups_of(model) and not is_run_otherwise()
        self.looked = not self.looks
        self.size = 0.0  # of the last moves at which everything was finite

    def verdict(self, gradients: bool) -> str:
        """The first difference found, from small moves to ones that surely tell members apart."""
        sizes, last = list(_STEPS), None
        while sizes:
            size = sizes.pop(0)
            moved = _moved(self.members, size, self.seed)
            before = generators.states(self.model) if size == _STEPS[0] else None
            with torch.no_grad():
                pairs = zip(views(moved), self.parts, strict=True)
                alone = [self.single(params, part) for params, part in pairs]
            drew = before is not None and before != generators.states(self.model)
            if agreed(self.model, drew, some=True):
                self.size = size
                return self._notices(moved)
            # Over a sharded base, processes with other rows run the same passes.
            is_finite = agreed(
                self.model, all(bool(t.isfinite().all()) for named in alone for t in named.values())
            )
            if not is_finite and last is not None:  # too far
                break
            with torch.no_grad():
                together, why = self._together(moved)
            if not together and not why:
                return ""
            if why := self._agreed(why or self._differs(together, alone)):
                # Nearer they agreed. A deep model amplifies rounding, far away without a bound.
                if last is not None and together and not self._notice_each_other(size, together):
                    break
                return why
            if not is_finite:  # this was too far already, or the base itself is not finite
                sizes = [size / 8] if size > 1e-3 else []
                continue
            # At the smallest move: far away, a deep model's gradients in bfloat16 are all rounding.
            if last is None and gradients and (why := self._agreed(self._compare_gradients(moved))):
                return why
            last, self.size = (moved, alone[0]), size
            if agreed(self.model, self._tell_apart(*alone[:2])):
                break
        if last is None:
            return ""
        moved, first = last
        with torch.no_grad():
            twins, why = self._together(moved, (0, 0))
        return self._agreed(why or self._differs(twins, [first] * 2))

    def _notice_each_other(self, size: float, together: list[Named]) -> bool:
        """Whether what one gives, in passes of equal shapes, depends on where the others are."""
        why = ""
        for i in range(len(together)):
            with torch.no_grad():
                found, failed = self._together(_moved(self.members, size, self.seed, only=i))
            why = why or failed or self._compare(found[i], together[i], together)
        return bool(self._agreed(why))

    def _agreed(self, why: str) -> str:
        """What differs here or, over a sharded base, on another process; "" if nothing does."""
        if not agreed(self.model, bool(why), some=True):
            return ""
        return why or "the adapters of a stack are not independent on another process."

    def _together(
        self, moved: Stack, turns: Sequence[int] | None = None
    ) -> tuple[list[Named], str]:
        """What each gives in one pass; or what goes wrong there, as it does not alone."""
        parts = self.parts
        if turns is not None:
            moved, parts = subset(moved, turns), [parts[i] for i in turns]
        joined = fold.joined(parts, self.rows)
        try:
            if self.looked or turns is not None:
                return self.folded(moved, self.rows, joined), ""
            self.looked = True
            return self._looking(moved, joined)
        except FadaptError:
            raise
        except Exception as error:
            if is_out_of_memory(error) or groups_of(self.model):
                raise
            text = str(error).strip().split("\n")[0]
            return [], (
                "the adapters of a stack cannot share a pass over this model: test adapters work "
                f"alone and raise in one pass, {type(error).__name__}: {text:.200}."
            )

    def _looking(self, moved: Stack, joined: Any) -> tuple[list[Named], str]:
        """The same, and where the model's forward takes a value into Python."""
        found: list[str] = []
        numbers = [
            leaf
            for leaf in pytree.tree_leaves(joined)
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not _is_mask(leaf)
        ]
        with Flow([*moved.trainable(), *numbers], found.append):
            together = self.folded(moved, self.rows, joined)
        if not found:
            return together, ""
        return together, (
            f"the forward of {type(self.model).__name__} decides by a value of the whole batch, "
            f"which depends on the adapters or on the batch's real numbers ({found[0]}: an `if`, "
            ".item() or torch.where), so that the rows of all adapters would go one way, where "
            "each alone may go another."
        )

    def _differs(self, together: list[Named], alone: list[Named]) -> str:
        pairs = zip(together, alone, strict=True)
        return next((why for got, want in pairs if (why := self._compare(got, want, alone))), "")

    def verdict_in_training(self) -> str:
        """The same of what only a model in training mode does, such as statistics of a batch.

        What else is random than dropout (layers that are left out, masks of a spectrogram) comes
        out otherwise for a member alone.
        """
        if not self.size:
            return ""
        moved, self.looked = _moved(self.members, self.size, self.seed), not self.looks
        with torch.no_grad(), WithoutDropout():
            generators.seed_all(0)
            before = generators.states(self.model)
            pairs = zip(views(moved), self.parts, strict=True)
            alone = [self.single(params, part) for params, part in pairs]
            together, why = self._together(moved)
            certain = before == generators.states(self.model)
        if not together and not why:
            return ""
        if agreed(self.model, certain):
            if not (why := self._agreed(why or self._differs(together, alone))):
                return ""
            if agreed(self.model, self._is_random(alone[0], moved), some=True):
                return ""
            return f"in training mode, {why} Call model.eval(), if that mode is not needed."
        return self._notices(moved, " in training mode", " Call model.eval().")

    def _notices(self, moved: Stack, mode: str = "", way_out: str = "") -> str:
        """Whether the first member, with what the model draws, notices who the others are."""
        once, other = self._drawn(moved), self._drawn(_moved_on(moved))
        if not once:
            return ""
        why = self._compare(other[0], once[0], once)
        # Or it is random beyond all of these generators, which tells nothing.
        random = bool(why) and bool(self._compare(self._drawn(moved)[0], once[0], once))
        if not agreed(self.model, bool(why) and not random, some=True):
            return ""
        return (
            f"the adapters of a stack are not independent in this model{mode}: what one of two "
            f"test adapters gives depends on the other.{way_out}"
        )

    def _is_random(self, first: Named, moved: Stack) -> bool:
        """Whether the first member alone comes out otherwise, by a generator of the model's own."""
        with torch.no_grad(), WithoutDropout():
            again = self.single(views(moved)[0], self.parts[0])
        return bool(self._compare(again, first, [first]))

    def _drawn(self, moved: Stack) -> list[Named]:
        """What each gives in one pass, from the same generators."""
        generators.seed_all(0)
        with torch.no_grad():
            return self.folded(moved, self.rows, fold.joined(self.parts, self.rows))

    def _tell_apart(self, one: Named, other: Named) -> bool:
        least = max(10 * self.tolerance, _APART)
        return any(
            _norm(a - b) >= least * max(_norm(a), _norm(b)) > 0
            for name, a in one.items()
            if (b := other.get(name)) is not None and a.shape == b.shape
        )

    def _compare(self, got: Named, want: Named, alone: list[Named]) -> str:
        for name, b in want.items():
            a = got.get(name)
            if a is None or a.shape != b.shape:
                shape = None if a is None else tuple(a.shape)
                return (
                    f"{name} of one adapter has shape {shape} in a stack and {tuple(b.shape)} "
                    "alone: it has no row for each row of the batch."
                )
            if not torch.equal(a.isfinite(), b.isfinite()):
                return f"{name} of one adapter is finite in a stack where it is not alone."
            others = [_norm(named[name]) for named in alone if name in named]
            # Of this member; but a sum that happens to vanish rounds as its terms do.
            error, scale = _norm(a - b), max(_norm(b), max(others) / 100)
            rounding = max(self.tolerance, _ROUNDING.get(b.dtype, 0.0))
            if error > rounding * scale:
                if a.dim() == 0:
                    a_text, b_text = f"{float(a):.7g}", f"{float(b):.7g}"
                else:
                    i = int((a - b).abs().nan_to_num().argmax())
                    a_text, b_text = (f"{float(t.flatten()[i]):.7g}" for t in (a, b))
                return (
                    f"the adapters of a stack are not independent in this model: {name} of one of "
                    f"two test adapters is {a_text} in one pass with the other and {b_text} alone "
                    f"(a relative difference of {error / scale:.2g}; rounding explains "
                    f"{rounding:.0e})."
                )
        return ""

    def _compare_gradients(self, moved: Stack) -> str:
        leaves = moved.trainable()
        with torch.enable_grad():
            together = self.folded(moved, self.rows, fold.joined(self.parts, self.rows))
            a = _gradients(together, leaves)
            alone = [self.single(p, part) for p, part in zip(views(moved), self.parts, strict=True)]
            b = _gradients(alone, leaves)
        position = 0
        size = max((_norm(t) for t in b), default=0.0)
        for group in moved.groups:
            count = len(group.params.trainable())
            mine = range(position, position + count)
            position += count
            for row in range(len(group.index)):
                error = math.hypot(*(_norm(a[i][row] - b[i][row]) for i in mine))
                scale = math.hypot(*(_norm(b[i][row]) for i in mine))
                if error > _GRADIENTS * self.tolerance * max(scale, 1e-3 * size):
                    return (
                        "the adapters of a stack are not independent in this model: the gradient "
                        f"of one of two test adapters, of norm {scale:.7g} alone, differs by "
                        f"{error:.2g} in one pass with the other."
                    )
        return ""


def _is_mask(numbers: Tensor) -> bool:
    """Whether they are all 0 or 1: models ask whether a mask is full, to leave it out."""
    return bool(((numbers == 0) | (numbers == 1)).all())


def named(tree: Any) -> Named:
    """The floating tensors of an output, by their place in it."""
    leaves, _ = pytree.tree_flatten_with_path(fold.opened(tree))
    return {
        f"output{pytree.keystr(path)}": leaf
        for path, leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def _gradients(found: Iterable[Named], leaves: Sequence[Tensor]) -> list[Tensor]:
    total = torch.stack([t.sum() for named in found for t in named.values()]).sum()
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)
    ]


def _moved(members: Stack, size: float, seed: int, only: int | None = None) -> Stack:
    """A copy moved at random, by about ``size`` times what keeps a product's scale, or further.

    Args:
        only: the member to move; all, if None.
    """
    rng = torch.Generator().manual_seed(seed)

    def move(leaf: Tensor, step: float) -> Tensor:
        width = leaf.shape[-1] if leaf.dim() else 1
        noise = torch.randn(leaf.shape, generator=rng) * (step / math.sqrt(max(width, 1)))
        sound = leaf.isfinite() & (leaf.abs() < 1e3)  # a member may have diverged
        return torch.where(sound, leaf, 0) + noise.to(leaf)

    def moved(group: Group, name: str, adapter: Adapter) -> Adapter:
        train = {k: t.detach().clone() for k, t in adapter.train.items()}
        for key, leaf in train.items():
            for row, i in enumerate(group.index):
                like = group.originals[row][name] if group.originals else adapter
                own = at_rank(like.method, key, leaf[row])  # the padding stays zero
                step = size * (_FURTHER if i % 2 else 1.0)
                own.copy_(move(own, step if only in (None, i) else 0.0))
        return adapter.replace({k: t.requires_grad_() for k, t in train.items()})

    groups = []
    for group in members.groups:
        adapters = {name: moved(group, name, a) for name, a in group.params.items()}
        groups.append(Group(group.index, Params(adapters), group.originals))
    return Stack(groups)


def _moved_on(members: Stack) -> Stack:
    """A copy in which all members but the first are other adapters."""

    def scaled(group: Group, adapter: Adapter) -> Adapter:
        factors = torch.tensor([1.7 if i else 1.0 for i in group.index])
        return adapter.replace(
            {
                k: t.detach() * factors.to(t).reshape(-1, *[1] * (t.dim() - 1))
                for k, t in adapter.train.items()
            }
        )

    return Stack(
        [
            Group(g.index, g.params.map(lambda a, g=g: scaled(g, a)), g.originals)
            for g in members.groups
        ]
    )


def _representatives(whole: Stack) -> list[int]:
    """At least two members, which adapt every site of the stack between them."""
    groups = sorted(whole.groups, key=lambda g: -len(g.params))
    chosen: list[int] = []
    seen: set[str] = set()
    for group in groups:
        if not seen.issuperset(group.params) or not chosen:
            chosen.append(group.index[0])
            seen |= set(group.params)
    if len(chosen) == 1:
        adapted = [i for g in whole.groups for i in g.index]  # not the rows of the base
        chosen.append(next((i for i in reversed(adapted) if i not in chosen), chosen[0]))
    return sorted(chosen)


def _structure(whole: Stack) -> Hashable:
    return frozenset(
        (tuple(g.params), frozenset(type(a.method) for a in g.params.values()))
        for g in whole.groups
    ), whole.per_row


def batch_kind(batch: Any, sizes: bool = True) -> Hashable:
    """What the batches of one kind have in common: names, types, numbers of axes, axes of one.

    Args:
        sizes: whether axes of one count.
    """
    leaves, spec = pytree.tree_flatten(batch)
    return spec, tuple(
        (t.dtype, t.dim(), tuple(sizes and size == 1 for size in t.shape[:2]))
        if isinstance(t, Tensor)
        else type(t)
        for t in leaves
    )


def _modes(model: nn.Module) -> int:
    return hash(tuple((type(module), module.training) for module in model.modules()))


def _tolerance(tensors: Iterable[Tensor]) -> float:
    kinds = {(t.dtype, t.device.type) for t in tensors if t.is_floating_point()}
    found = [_ROUNDING.get(dtype, 3e-2) for dtype, _ in kinds]
    if (torch.float32, "cuda") in kinds:  # which may mean TF32
        found.append(_TF32)
    found += [
        _ROUNDING.get(torch.get_autocast_dtype(device), 3e-2)
        for device in {device for _, device in kinds} - {"meta"}  # which has no autocast
        if torch.is_autocast_enabled(device)
    ]
    return max(found, default=2e-4)


def _norm(t: Tensor) -> float:
    wide = torch.promote_types(t.dtype, torch.float32)
    return float(torch.linalg.vector_norm(t.detach().to(wide).nan_to_num(0.0, 0.0, 0.0)))
