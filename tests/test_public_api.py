"""Every public name is documented with all its parameters and an example that runs, and is named
in the README or the guide.
"""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fadapt
from fadapt import testing

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "examples/guide").glob("*.md")]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public(module: ModuleType) -> dict[str, Any]:
    """{dotted name: class or function} of a module and of the modules that it exports."""
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or not getattr(value, "__module__", "fadapt").startswith("fadapt"):
            continue
        if isinstance(value, ModuleType):
            # Submodules appear as attributes once they are imported; those that are meant are
            # imported under their name in __init__.
            source = Path(fadapt.__file__).read_text(encoding="utf-8")
            if re.search(rf"^from \. import {name} as {name}$", source, re.MULTILINE):
                found |= {f"{name}.{k}": v for k, v in public(value).items() if callable(v)}
        elif callable(value):
            found[name] = value
    return found


API = {
    **{k: v for k, v in public(fadapt).items() if not k.startswith("peft._")},
    "testing.check_method": testing.check_method,
}


def parameters(item: Any) -> list[str]:
    """The names of a function's parameters, or of a class's own fields."""
    if inspect.isfunction(item):
        return [p for p in inspect.signature(item).parameters if p not in ("self", "cls")]
    if not dataclasses.is_dataclass(item):
        return []
    return [f.name for f in dataclasses.fields(item) if not f.name.startswith("_")]


def documented(item: Any) -> str:
    """The docstring; for a class, with those of its bases that are not the contract itself."""
    classes = item.__mro__ if inspect.isclass(item) else (item,)
    own = [c for c in classes if c is item or getattr(c, "__module__", "").startswith("fadapt.")]
    return "\n".join(
        c.__dict__.get("__doc__") or "" if inspect.isclass(c) else c.__doc__ or "" for c in own
    )


@pytest.mark.parametrize("name", API)
def test_every_parameter_is_documented(name: str) -> None:
    text = documented(API[name])
    assert text.strip()
    entries: set[str] = set()
    for section in re.findall(r"^ *(?:Args|Attributes):\n((?: +.*\n?)+)", text, re.MULTILINE):
        for names in re.findall(r"^ +((?:\*{0,2}\w+(?:, )?)+):", section, re.MULTILINE):
            entries |= {n.strip("* ") for n in names.split(",")}
    assert [p for p in parameters(API[name]) if p not in entries] == []


@pytest.mark.parametrize("name", API)
def test_every_name_has_an_example_that_runs(name: str, tmp_path, monkeypatch) -> None:
    doc = API[name].__dict__.get("__doc__") if inspect.isclass(API[name]) else API[name].__doc__
    assert re.search(r"^ *Examples?:$", doc or "", re.MULTILINE), f"{name} has no Example"
    assert "+SKIP" not in (doc or ""), f"{name}: an example that does not run"
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(API[name], name, globs=namespace())
    written: list[str] = []
    with warnings.catch_warnings():
        result = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=written.append)
    assert result.attempted
    assert not result.failed, "".join(written)


@pytest.mark.parametrize("name", API)
def test_every_name_is_in_the_readme_or_the_guide(name: str) -> None:
    word = re.compile(rf"\b{re.escape(name.split('.')[-1])}\b")
    assert any(word.search(page.read_text(encoding="utf-8")) for page in PAGES)


def namespace() -> dict[str, Any]:
    """What the package's docstring says that the examples begin with."""
    torch.manual_seed(0)
    start = doctest.DocTestParser().get_doctest(fadapt.__doc__ or "", {}, "fadapt", None, None)
    names: dict[str, Any] = {}
    for example in start.examples:
        exec(example.source, names)
    return names
