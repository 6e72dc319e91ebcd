"""Config: which parameters are adapted, by which method, in which dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .arguments import listed
from .errors import ConfigError
from .method import Method
from .method_json import method_from_json, method_to_json
from .patterns import check_pattern

ROLES = ("reader", "writer", "inner")
DEFAULT_EXCLUDE = ("lm_head", "embed_tokens")

Rules = Method | Mapping[str, Method | None]


@dataclass(frozen=True)
class Config:
    """What to adapt, and how.

    Args:
        rules: a method for every linear map, or {regex: method or None}. Patterns are searched in
            parameter names (``model.layers.0.self_attn.q_proj.weight``); the first match wins,
            None leaves a parameter alone, and a rule that takes effect nowhere is an error. A
            broad rule (one that does not need a layer's own name to match) means linear maps and
            experts; an embedding, a convolution, a bare parameter or an output head is adapted by
            a rule that names it. What a rule leaves out ends :func:`fadapt.summary`.
        layers: only these layer indices (the first number in a name); negative ones count from
            the last layer of each tower (what stands before that number), so that [-1] is the last
            layer of an encoder and of its decoder, however deep each is. None means all.
        roles: only these roles: "reader" (reads the residual stream: its input is residual wide),
            "writer" (its output is), "inner" (neither). Empty means all.
        exclude: patterns never adapted. "lm_head" also keeps a broad rule from the output head,
            whatever the model calls it; a rule that names that head adapts it.
        dtype: of the adapters and their arithmetic; None means float32, or float64 over a
            float64 base.
        seed: of the initial values. A site's start depends on the seed and its name alone.

    Raises:
        ConfigError: a value of the wrong type, a pattern that does not compile, an unknown role.

    Example:
        >>> cfg = fadapt.Config({"0.weight": fadapt.LoRA(r=2), "": fadapt.IA3()}, seed=1)
        >>> {name: type(a.method).__name__ for name, a in fadapt.init(model, cfg).items()}
        {'0.weight': 'LoRA', '2.weight': 'IA3'}
    """

    rules: Rules
    layers: Iterable[int] | None = None
    roles: tuple[str, ...] = ()
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rules = self.rules
        if isinstance(rules, type):
            raise ConfigError(f"{rules.__name__} is a class; write an instance: {rules.__name__}()")
        if isinstance(rules, Mapping):
            for pattern, method in rules.items():
                check_pattern(pattern, "rule")
                if method is not None and not isinstance(method, Method):
                    raise ConfigError(
                        f"rule {pattern!r}: expected a method or None, got {method!r}; "
                        f"write {{{pattern!r}: fadapt.LoRA(r=8)}}"
                    )
            if not rules:
                raise ConfigError("rules is empty; write {regex: method} or a method for all")
            object.__setattr__(self, "rules", dict(rules))
        elif not isinstance(rules, Method):
            raise ConfigError(
                f"rules must be a method or a {{regex: method}} dict, got {rules!r}; "
                'write fadapt.LoRA(r=8) or {"q_proj|v_proj": fadapt.LoRA(r=8)}'
            )
        if self.layers is not None:
            many = isinstance(self.layers, (set, frozenset))
            given = sorted(self.layers, key=repr) if many else self.layers
            layers = tuple(listed("layers", given, _LAYERS))
            if not layers or not all(type(i) is int for i in layers):
                raise ConfigError(
                    "layers must be layer indices such as [0] or [-1], or None for all; got "
                    f"{self.layers!r}"
                )
            object.__setattr__(self, "layers", layers)
        roles = _strings(self.roles, "roles")
        if unknown := [r for r in roles if r not in ROLES]:
            raise ConfigError(f"unknown roles {unknown}; choose from {list(ROLES)}")
        object.__setattr__(self, "roles", roles)
        exclude = _strings(self.exclude, "exclude")
        for pattern in exclude:
            check_pattern(pattern, "exclude")
        object.__setattr__(self, "exclude", exclude)
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        known = isinstance(self.dtype, torch.dtype) and self.dtype in floats
        if self.dtype is not None and not known:
            raise ConfigError(
                "dtype must be a floating torch.dtype (float16, bfloat16, float32 or float64) or "
                f"None, got {self.dtype!r:.80}"
            )
        if type(self.seed) is not int:
            raise ConfigError(f"seed must be an int, got {self.seed!r:.80}")

    @property
    def rule_list(self) -> tuple[tuple[str, Method | None], ...]:
        """The rules as (pattern, method) pairs; a bare method is the pattern ''."""
        if isinstance(self.rules, Method):
            return (("", self.rules),)
        return tuple(self.rules.items())

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data for JSON, TOML or YAML; :meth:`from_dict` reads it.

        Raises:
            ConfigError: a method with a field that JSON cannot hold.

        Example:
            >>> import fadapt
            >>> config = fadapt.Config({"q_proj": fadapt.LoRA(r=4), ".": None}, layers=[0, -1])
            >>> fadapt.Config.from_dict(config.to_dict()) == config
            True
        """
        return {
            "rules": [[p, m and method_to_json(m)] for p, m in self.rule_list],
            "layers": None if self.layers is None else list(self.layers),
            "roles": list(self.roles),
            "exclude": list(self.exclude),
            "dtype": self.dtype and str(self.dtype).removeprefix("torch."),
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """The config that :meth:`to_dict` wrote, over the methods that this process knows.

        Raises:
            ConfigError: a missing, unknown or unsuitable entry.
        """
        known = set(cls.__dataclass_fields__)
        if not isinstance(data, Mapping) or data.keys() != known:
            raise ConfigError(f"a config must have {sorted(known)}, got {data!r:.200}")
        for key in ("rules", "roles", "exclude", "layers"):
            if not isinstance(data[key], list) and not (key == "layers" and data[key] is None):
                raise ConfigError(f"{key} of a config must be a list, got {data[key]!r:.200}")
        try:
            rules = {p: m and method_from_json(m) for p, m in data["rules"]}
            dtype = None if data["dtype"] is None else getattr(torch, data["dtype"])
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ConfigError(f"the rules or dtype of a config are damaged: {error!r}") from error
        if len(rules) < len(data["rules"]):
            raise ConfigError("a config has two rules of one pattern")
        return cls(
            rules=rules[""] if list(rules) == [""] and rules[""] is not None else rules,
            layers=data["layers"],
            roles=tuple(data["roles"]),
            exclude=tuple(data["exclude"]),
            dtype=dtype,
            seed=data["seed"],
        )

    def __hash__(self) -> int:
        return hash((self.rule_list, self.layers, self.roles, self.exclude, self.dtype, self.seed))


_LAYERS = "layer indices such as [0] or [-1], or None for all"


def as_config(cfg: Config | Rules) -> Config:
    """A Config from a method, a {pattern: method} dict or a Config."""
    return cfg if isinstance(cfg, Config) else Config(cfg)


def _strings(value: Any, what: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        return (value,)
    many = isinstance(value, (set, frozenset))
    given = sorted(value, key=repr) if many else value
    return tuple(listed(what, given, f"{what}=('a', 'b'), () for none"))
