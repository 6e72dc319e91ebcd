"""Which parameters a config means, or why it means none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from .adapted_map import check_site
from .base.checks import check_model
from .base.quantized import quantized_map
from .base.roles import find_roles
from .base.towers import layers_of, split_name
from .base.weights import LINEAR_KINDS, BaseWeight, Kind, find_weights, weights_by_name
from .config import DEFAULT_EXCLUDE, Config
from .errors import ConfigError, FadaptError, TargetError
from .hugging_face import input_embeddings, output_heads
from .method import Method
from .patterns import check_speed
from .site import Site

HEAD = "lm_head"
"""The exclude pattern that stands for the output head, whatever the model calls it."""

Found = list[tuple[BaseWeight, Site, Method]]


@dataclass(frozen=True)
class LeftOut:
    """A weight of the base, of two axes or more, that is not adapted; and why.

    Attributes:
        name: of the parameter.
        shape: as it is stored.
        size: the number of its values.
        reason: in words.
        notable: whether a rule meant it, and could not have it.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    reason: str
    notable: bool = False


@dataclass(frozen=True)
class Coverage:
    """What share of a base is adapted.

    Attributes:
        size: the number of values in all parameters of the base, tied ones counted once.
        adapted: of these, in adapted weights.
        left_out: the other weights of two axes or more, in the model's order.
    """

    size: int
    adapted: int
    left_out: tuple[LeftOut, ...]

    def without(self, dropped: Mapping[str, BaseWeight], reason: str) -> Coverage:
        """The same after some sites were given up."""
        more = [LeftOut(n, w.stored_shape, w.size, reason, True) for n, w in dropped.items()]
        adapted = self.adapted - sum(part.size for part in more)
        return replace(self, adapted=adapted, left_out=(*self.left_out, *more))


def resolve(model: nn.Module, config: Config) -> Found:
    """The sites that a config means, in the model's order. See :class:`Config` for the rules.

    Raises:
        TargetError: a rule, exclude pattern, layer or role that matches nothing; a tied weight
            named without its use; a parameter that cannot be adapted.
        ConfigError: a shape that the method cannot take.
    """
    return resolve_with_coverage(model, config)[0]


def resolve_with_coverage(model: nn.Module, config: Config) -> tuple[Found, Coverage]:
    """As :func:`resolve`; and what is left out, with the reasons."""
    check_model(model)
    search = _Search(model, config)
    found = search.sites(search.filtered(search.chosen()))
    return found, coverage(search.every, [site.name for _, site, _ in found], search.reasons)


def coverage(
    weights: list[BaseWeight], adapted: list[str], reasons: dict[str, tuple[str, bool]]
) -> Coverage:
    """The share of a model's weights that is adapted.

    Args:
        weights: from :func:`find_weights`.
        adapted: the names of the sites.
        reasons: {name of a weight: (why it is left out, whether that is notable)}.
    """
    names = set(adapted)
    sizes: dict[int, int] = {}
    mine: set[int] = set()
    for weight in weights:
        sizes.setdefault(id(weight.parameter), weight.size)
        if not names.isdisjoint(weight.names):
            mine.add(id(weight.parameter))
    left_out = [
        LeftOut(w.name, w.stored_shape, w.size, *reasons.get(w.name, ("no rule means it", False)))
        for w in weights
        if w.kind is not Kind.VECTOR and id(w.parameter) not in mine
    ]
    return Coverage(sum(sizes.values()), sum(sizes[i] for i in mine), tuple(left_out))


def coverage_of(model: nn.Module, sites: Iterable[str], config: Config | None) -> Coverage:
    """The share of a model that existing adapters cover, with the reasons that their config gives.

    Raises:
        TargetError: a site that the model does not have.
    """
    weights, names = find_weights(model), list(sites)
    here = {name for weight in weights for name in weight.names}
    if missing := sorted(set(names) - here):
        raise TargetError(
            f"the params adapt {missing[0]}, which this {type(model).__name__} does not have; "
            "pass the base that they were made for"
        )
    reasons: dict[str, tuple[str, bool]] = {}
    try:
        if config is not None:
            meant = resolve_with_coverage(model, config)[1]
            reasons = {part.name: (part.reason, part.notable) for part in meant.left_out}
    except FadaptError:  # a config of another model, whose adapters fit this one too
        pass
    return coverage(weights, names, reasons)


def check_fits(model: nn.Module, sites: Iterable[Site]) -> None:
    """Refuses a model whose weights are not, in place and form, those of the sites.

    Raises:
        TargetError: names the first site.
    """
    weights = weights_by_name(model)
    for site in sites:
        weight = weights.get(site.name)
        why = "does not exist" if weight is None else site.mismatch(weight)
        if why:
            raise TargetError(
                f"the params adapt {site.name}, which {why} in this {type(model).__name__}; pass "
                "the base that they were made for"
            )


def site_of(
    weight: BaseWeight, weights: list[BaseWeight], roles: dict[str, tuple[str, str]]
) -> Site:
    """The address of a weight among those of its model; no fingerprint yet.

    Args:
        weight: one of ``weights``.
        weights: all that have rows and columns.
        roles: from :func:`fadapt.base.roles.find_roles`.
    """
    role, note = roles.get(weight.name, ("", ""))
    d_out, d_in = weight.shape
    tied = tuple(
        n for w in weights if w is not weight and w.parameter is weight.parameter for n in w.names
    )
    return Site(
        name=weight.name,
        out_features=d_out,
        in_features=d_in,
        transposed=weight.transposed,
        bias=weight.bias,
        kind=weight.kind,
        role=role,
        note=note,
        tied=tied,
        experts=weight.experts,
        kernel=weight.kernel,
        flat=weight.flat,
    )


Chosen = list[tuple[BaseWeight, str, Method]]


@dataclass
class _Search:
    """The weights that the rules of one config mean in one model."""

    model: nn.Module
    config: Config
    every: list[BaseWeight] = field(init=False)
    weights: list[BaseWeight] = field(init=False)
    vectors: list[BaseWeight] = field(init=False)
    reasons: dict[str, tuple[str, bool]] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.every = find_weights(self.model)
        # Vectors are meant only by a rule that matches nothing else.
        self.weights = [w for w in self.every if w.kind is not Kind.VECTOR]
        self.vectors = [w for w in self.every if w.kind is Kind.VECTOR]
        names = [n for w in self.every for n in w.names]
        for pattern, _ in self.config.rule_list:
            check_speed(pattern, "rule", names)
        for pattern in self.config.exclude:
            check_speed(pattern, "exclude", names)
        self.roles = find_roles(self.weights)
        self.excluded = self._excluded()
        # What is kept from linear maps by default is what a method for embeddings is for.
        named = [p for p in self.config.exclude if p not in DEFAULT_EXCLUDE]
        self.excluded_by_name = {
            w.name for w in self.every for p in named if any(re.search(p, n) for n in w.names)
        }
        # A model that does not exclude "lm_head" asks for its head, whatever that is called.
        self.heads = self._heads() if HEAD in self.config.exclude else set()

    def _excluded(self) -> set[str]:
        names = [n for w in self.weights for n in w.names]
        excluded = set()
        for pattern in self.config.exclude:
            hits = {w.name for w in self.every if any(re.search(pattern, n) for n in w.names)}
            if pattern not in DEFAULT_EXCLUDE and not hits:
                raise TargetError(
                    f"exclude {pattern!r} matches no parameter; {_near(pattern, names)}"
                )
            for name in hits:
                self._leave_out(name, f"excluded by {pattern!r}")
            excluded |= hits
        return excluded

    def _heads(self) -> set[str]:
        """The weights that make logits: of a model's own head, or tied to an embedding."""
        heads = {id(module) for module in output_heads(self.model)}
        embeddings = {id(w.parameter) for w in self.weights if w.kind is Kind.EMBEDDING}
        return {
            w.name
            for w in self.weights
            if w.kind in (Kind.LINEAR, Kind.QUANTIZED)
            and (id(w.module) in heads or id(w.parameter) in embeddings)
        }

    def _leave_out(self, name: str, reason: str, notable: bool = False) -> None:
        self.reasons.setdefault(name, (reason, notable))

    def chosen(self) -> Chosen:
        """The weights that the rules mean, before layers and roles."""
        for i, (pattern, _) in enumerate(self.config.rule_list):
            for weight in self.every:
                hits = [n for n in weight.names if re.search(pattern, n)]
                if hits and len(hits) < len(weight.names):
                    raise TargetError(
                        f"rule {pattern!r} matches {hits} but not "
                        f"{sorted(set(weight.names) - set(hits))}, which is the same module used "
                        "again: an adapter there changes every use. "
                        f"Match them all: {'|'.join(map(re.escape, weight.names))!r}"
                    )
                if hits:
                    self.taken.setdefault(weight.name, i)
        chosen: Chosen = []
        for i, (pattern, method) in enumerate(self.config.rule_list):
            if method is not None and method.usual_kind != "linear":
                special = self._special(pattern, i, method)
                for weight in special:
                    self._check_kind(pattern, weight)
                if special:
                    chosen += [(w, pattern, method) for w in special]
                    continue
            mine = [w for w in self.weights if self.taken.get(w.name) == i]
            mine = [w for w in mine if w.name not in self.excluded]
            if not mine and not self._matches(pattern, self.weights):
                mine = [w for w in self.vectors if self.taken.get(w.name) == i]
                mine = [w for w in mine if w.name not in self.excluded]
                if mine and method is not None and not method.adapts_vectors:
                    raise TargetError(
                        f"rule {pattern!r} matches only vectors, such as {mine[0].name} of shape "
                        f"{mine[0].stored_shape}, and {type(method).__name__} adapts matrices; "
                        f"write {{{pattern!r}: fadapt.IA3()}}, which scales a vector, or a method "
                        "with adapts_vectors = True"
                    )
            if not mine:
                raise TargetError(self._nothing(pattern, i))
            if method is None:
                for weight in mine:
                    self._leave_out(weight.name, f"left alone by the rule {pattern!r}: None")
                continue
            meant = [w for w in mine if self._is_meant(pattern, w)]
            if not meant and not pattern:
                raise TargetError(
                    f"{type(method).__name__} for all linear maps, but the model has none; its "
                    f"other parameters are {[w.name for w in mine][:8]}: name one in a rule"
                )
            meant = meant or mine
            for weight in meant:
                self._check_kind(pattern, weight)
            for weight in mine:
                if all(weight is not w for w in meant):
                    self._leave_out(weight.name, f"{_what(weight, self.heads)}; a rule may name it")
            chosen += [(w, pattern, method) for w in meant]
        order = {w.name: k for k, w in enumerate(self.every)}
        return sorted(chosen, key=lambda c: order[c[0].name])

    def _special(self, pattern: str, i: int, method: Method) -> list[BaseWeight]:
        """What a rule means by a method for norms or embeddings; none where it names others."""
        norms = method.usual_kind == "norm"
        out = self.excluded if norms else self.excluded_by_name
        mine = [w for w in self.every if self.taken.get(w.name) == i and w.name not in out]
        if norms:
            mine = [w for w in mine if w.kind is Kind.VECTOR]
            found = [w for w in mine if _is_of_norm(w)] or (mine if pattern else [])
        else:
            found = [w for w in mine if w.kind is Kind.EMBEDDING]
            inputs = input_embeddings(self.model)
            if not any(_is_named(pattern, w) for w in found) and inputs is not None:
                found = [w for w in found if w.module is inputs] or found
        if not pattern and not found:
            raise TargetError(
                f"{type(method).__name__} for {method.usual_kind}s, but the model has none; name "
                "a parameter in a rule"
            )
        for weight in self.every:
            if self.taken.get(weight.name) == i and all(weight is not w for w in found):
                self._leave_out(weight.name, f"not what {type(method).__name__} means")
        if method.follows_ties:
            tensors = {id(w.parameter) for w in found}
            found = [w for w in self.every if id(w.parameter) in tensors]
        return found

    def _matches(self, pattern: str, weights: list[BaseWeight]) -> list[str]:
        return [w.name for w in weights if any(re.search(pattern, n) for n in w.names)]

    def _is_meant(self, pattern: str, weight: BaseWeight) -> bool:
        """Whether a rule that matches a weight means it.

        A broad one means the linear maps, but not the head; others are adapted when they are named.
        """
        if weight.kind is Kind.VECTOR or (pattern and _is_named(pattern, weight)):
            return True
        if weight.kind is Kind.PARAMETRIZED:
            return weight.parameter.dim() == 2  # a linear map; refused rather than left out
        return weight.kind in LINEAR_KINDS and weight.name not in self.heads

    def _check_kind(self, pattern: str, weight: BaseWeight) -> None:
        if weight.kind is Kind.VECTOR and quantized_map(weight.module) is not None:
            raise TargetError(
                f"{weight.name} is the bias of a quantized layer, whose kernel takes no other; "
                "adapt the layer by fadapt.BitFit() instead, or put {pattern: None} for it first"
            )
        if weight.kind is Kind.VECTOR and weight.parameter.dim() == 0:
            raise TargetError(
                f"rule {pattern!r} matches {weight.name}, a single number; adapters need an axis. "
                "Put {pattern: None} for it before this rule"
            )
        if weight.kind is Kind.PARAMETRIZED:
            raise TargetError(
                f"{weight.name} belongs to a parametrized layer, whose weight is computed from "
                "it: call torch.nn.utils.parametrize.remove_parametrizations, or put "
                "{pattern: None} for it before this rule"
            )
        if weight.kind is Kind.TENSOR:
            raise TargetError(
                f"rule {pattern!r} matches {weight.name} of shape {weight.stored_shape}; "
                "adapters need a matrix (2-D), a stack of expert matrices (3-D) or a "
                "convolution kernel. Put {pattern: None} for it before this rule; or, where its "
                "first axis counts experts, say so on its module: module.num_experts = "
                f"{weight.stored_shape[0]}"
            )

    def filtered(self, chosen: Chosen) -> Chosen:
        """What is left in the config's layers and roles; and no tied tensor twice."""
        config, before = self.config, chosen
        if config.layers is not None:
            wanted = self._layers(tuple(config.layers), chosen)
            chosen = [c for c in chosen if split_name(c[0].name)[:2] in wanted]
        if config.roles:
            everywhere = chosen
            chosen = [c for c in chosen if self.roles.get(c[0].name, ("",))[0] in config.roles]
            if everywhere and not chosen:
                table = {c[0].name: self.roles.get(c[0].name, ("none",))[0] for c in everywhere[:6]}
                raise TargetError(f"no rule matches a weight in the roles {config.roles}; {table}")
        for pattern, method in config.rule_list:
            if method is not None and not any(c[1] == pattern for c in chosen):
                raise TargetError(
                    f"rule {pattern!r} matches weights, but none in layers={config.layers}, "
                    f"roles={config.roles}; widen them or drop the rule"
                )
        inside = {weight.name for weight, _, _ in chosen}
        for weight, _, _ in before:
            if weight.name not in inside:
                self._leave_out(weight.name, "not in the config's layers and roles")
        self._check_ties(chosen)
        return chosen

    def _layers(self, layers: tuple[int, ...], chosen: Chosen) -> set[tuple[str, int | None]]:
        """The (tower, layer) that the indices mean in the towers of the chosen weights."""
        towers = layers_of(n for w in self.weights for n in w.names)
        inside = {split_name(weight.name)[0] for weight, _, _ in chosen}
        counts = {tower: max(found) + 1 for tower, found in towers.items() if tower in inside}
        present = set().union(*towers.values()) if towers else set()
        every = {split_name(w.name)[:2] for w in self.weights}
        wanted: set[tuple[str, int | None]] = set()
        absent = []
        for i in layers:
            if i >= 0:
                wanted |= {(tower, layer) for tower, layer in every if layer == i}
                absent += [i] * (i not in present)
            else:
                wanted |= {(tower, i + count) for tower, count in counts.items()}
                short = [t for t, count in counts.items() if i + count not in towers[t]]
                absent += [i] * bool(short or not counts)
        if absent:
            deep = counts or {t: max(found) + 1 for t, found in towers.items()}
            has = ", ".join(f"{t or 'the model'} has layers 0 to {n - 1}" for t, n in deep.items())
            raise TargetError(
                f"layers {absent} do not exist; {has or 'the model has no numbered layers'}"
                + ("; name one tower in the rules" if len(deep) > 1 else "")
            )
        return wanted

    def _check_ties(self, chosen: Chosen) -> None:
        patterns = [pattern for pattern, _ in self.config.rule_list]
        out = self.excluded | self.heads
        for weight, pattern, method in chosen:
            uses = [w for w in self.every if w.parameter is weight.parameter]
            uses = [w for w in uses if w is weight or w.name not in out]
            named = [w.name for w in uses if self.taken.get(w.name) == patterns.index(pattern)]
            if len(named) > 1 and not method.follows_ties:
                one, other = (re.escape(n) for n in named[:2])
                raise TargetError(
                    f"{' and '.join(named)} are one tied tensor, and rule {pattern!r} means both. "
                    f"Say which use: {{{one!r}: {method!r}}}, or give each its own rule "
                    f"({one!r} and {other!r}), or exclude them"
                )

    def sites(self, chosen: Chosen) -> Found:
        """The addresses of the chosen weights, after the checks."""
        found: Found = []
        narrow: dict[str, list[BaseWeight]] = {}
        first: dict[str, str] = {}
        for weight, pattern, method in chosen:
            site = site_of(weight, self.every, self.roles)
            weight.check()
            unseen = weight.kind in UNSEEN
            if unseen and _is_calibrated(method):
                raise TargetError(
                    f"{site.name} ({weight.kind}): no statistics are collected there, and "
                    f"{method!r} starts from them; use a method without calibration"
                )
            try:
                check_site(method, site)
            except ConfigError as error:
                message = f"{site.name} ({site.out_features} x {site.in_features}): {error}"
                if pattern and _is_named(pattern, weight):
                    raise ConfigError(message) from None
                if not _is_narrow(site, method):
                    advice = _way_out([weight], chosen, pattern, method)
                    raise ConfigError(message + advice) from None
                narrow.setdefault(pattern, []).append(weight)
                first.setdefault(pattern, message)
                self._leave_out(site.name, f"too narrow for {method!r}: {error}", notable=True)
                continue
            found.append((weight, site, method))
        sites = {site.name for _, site, _ in found}
        for _, site, method in found:
            if site.bias in sites and method.acts_on_bias:
                raise ConfigError(
                    f"{site.bias} has an adapter of its own, and {method!r} at {site.name} changes "
                    "that bias, too; leave one of them out: {pattern: None} before its rule"
                )
        for pattern, few in narrow.items():
            mine = [w for w, p, _ in chosen if p == pattern]
            if sum(w.size for w in few) > FEW * sum(w.size for w in mine):
                method = next(m for _, p, m in chosen if p == pattern)
                advice = _way_out(few, chosen, pattern, method) if len(few) < len(mine) else ""
                raise ConfigError(first[pattern] + advice)
        return found

    def _nothing(self, pattern: str, i: int) -> str:
        names = [n for w in self.weights for n in w.names]
        hits = self._matches(pattern, self.weights) or self._matches(pattern, self.vectors)
        if not hits:
            return f"rule {pattern!r} matches no weight; {_near(pattern, names)}"
        if earlier := [n for n in hits if self.taken[n] < i]:
            by = self.config.rule_list[self.taken[earlier[0]]][0]
            return (
                f"rule {pattern!r} is never used: {earlier[0]} and all else that it matches is "
                f"taken by the earlier rule {by!r}; put the narrower rule first"
            )
        return (
            f"rule {pattern!r} matches only excluded weights, such as {hits[0]}; "
            f"exclude is {self.config.exclude}: pass exclude=() or a narrower one"
        )


UNSEEN = (Kind.EXPERTS, Kind.EMBEDDING, Kind.CONVOLUTION, Kind.HEADS, Kind.VECTOR)
"""What no statistics are collected of."""

FEW = 0.1
"""The share of a rule's weights up to which narrow ones are left out, and not an error."""


def _is_narrow(site: Site, method: Method) -> bool:
    """Whether a matrix has fewer singular directions than the method asks for."""
    asked = [
        value
        for part in getattr(method, "methods", (method,))
        for key in ("r", "k")
        if isinstance(value := getattr(part, key, None), int)
    ]
    return min(site.matrix_shape) < max(asked, default=0)


def _way_out(weights: list[BaseWeight], chosen: Chosen, pattern: str, method: Method) -> str:
    """The rules that leave some of the chosen weights alone."""
    names = [re.escape(w.name.removesuffix(".weight")) for w in weights]
    others = [w.name for w, _, _ in chosen if all(w is not one for one in weights)]
    alone = "|".join(dict.fromkeys(re.sub(r"\d+", r"\\d+", name) for name in names))
    if any(re.search(alone, name) for name in others):  # a number tells them apart
        alone = "|".join(names)
    return f". Or leave it alone: {{{alone!r}: None, {pattern!r}: {method!r}}}"


def _is_of_norm(weight: BaseWeight) -> bool:
    return "norm" in type(weight.module).__name__.lower()


def _what(weight: BaseWeight, heads: set[str]) -> str:
    """What a weight is, that a broad rule does not mean it."""
    if weight.name in heads:
        return "the output head"
    return {
        Kind.EMBEDDING: "an embedding",
        Kind.CONVOLUTION: "a convolution",
        Kind.MATRIX: "a bare parameter",
        Kind.TENSOR: "no matrix",
        Kind.PARAMETRIZED: "computed by torch (parametrized)",
    }.get(weight.kind, weight.kind)


def _is_named(pattern: str, weight: BaseWeight) -> bool:
    """Whether the pattern needs the module's own name to match, not its path or ".weight"."""
    parts = weight.name.split(".")
    parts[-2 if len(parts) > 1 and parts[-1].endswith("weight") else -1] = "module"
    return not re.search(pattern, ".".join(parts))


def _is_calibrated(method: Method) -> bool:
    return any(part.statistic is not None for part in getattr(method, "methods", (method,)))


def _near(pattern: str, names: list[str]) -> str:
    words = [w for w in re.split(r"[^A-Za-z0-9_]+", pattern) if len(w) > 2]
    parts = {part for n in names for part in n.split(".")}
    close: dict[str, float] = {}
    for word in words:
        for part in difflib.get_close_matches(word, parts, 2, 0.5):
            ratio = difflib.SequenceMatcher(None, part, word).ratio()
            close[part] = max(close.get(part, 0), ratio)
    best = {n: max(close.get(part, 0) for part in n.split(".")) for n in names}
    near = sorted((n for n in names if best[n]), key=lambda n: -best[n]) or names
    return f"near names are {near[:5]}" if names else "the model has no 2-D parameter"
