"""Private names of torch stand in base/torch_private.py alone, and knowledge of transformers and
accelerate in hugging_face.py: an upgrade is then read in two files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fadapt

ROOT = Path(fadapt.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PRIVATE_HOME = ROOT / "base" / "torch_private.py"
HUGGING_FACE_HOME = ROOT / "hugging_face.py"
# Of other libraries' objects, by whatever name the object goes.
PRIVATE_ATTRIBUTES = re.compile(
    r"_parameters|_modules|_buffers|_compiled_call_impl|_orig_mod|_C|_dynamo|_inductor|_functorch"
    r"|_grouped_mm|_pytree|_make_subclass|_make_wrapper_subclass|_version|_forward_hooks|_base"
    r"|_forward_pre_hooks|_foreach_\w+"
)
HUGGING_FACE_NAMES = re.compile(
    r"get_output_embeddings|get_input_embeddings|use_cache|_gradient_checkpointing_func|_hf_hook"
    r"|_old_forward|loss_function|loss_type|is_encoder_decoder|get_text_config|is_transposed"
    r"|logits_to_keep|RotaryEmbedding|Conv1D|CpuOffload|gradient_checkpointing"
)


def of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST) -> list[str]:
    """The dotted names that a module imports from outside of the package."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def is_private(name: str) -> bool:
    return any(p.startswith("_") and p != "__future__" for p in name.split("."))


@pytest.mark.parametrize("path", [f for f in FILES if f != PRIVATE_HOME], ids=of)
def test_private_names_of_torch_have_one_home(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not [n for n in imported(tree) if is_private(n) or "UninitializedTensorMixin" in n]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
            continue
        owner = ast.unparse(node.value)
        mine = owner in ("self", "cls") or node.attr.startswith("__")
        where = f"{of(path)}:{node.lineno}: {owner}.{node.attr}"
        assert owner.split(".")[0] != "torch" or mine, where
        assert mine or not PRIVATE_ATTRIBUTES.fullmatch(node.attr), where


@pytest.mark.parametrize("path", [f for f in FILES if f != HUGGING_FACE_HOME], ids=of)
def test_knowledge_of_hugging_face_has_one_home(path: Path) -> None:
    """Whole strings and attributes count; prose and messages may speak of them."""
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else None
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
        found = name is not None and HUGGING_FACE_NAMES.fullmatch(name)
        assert not found, f"{of(path)}:{getattr(node, 'lineno', 0)}: {name}"


def test_each_private_name_has_its_reason() -> None:
    tree = ast.parse(PRIVATE_HOME.read_text())
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert functions
    assert all(len(ast.get_docstring(f) or "") > 40 for f in functions)


def test_the_homes_are_not_empty_words() -> None:
    """What the tests above look for is there to be found."""
    private = ast.parse(PRIVATE_HOME.read_text())
    attributes = {n.attr for n in ast.walk(private) if isinstance(n, ast.Attribute)}
    assert any(PRIVATE_ATTRIBUTES.fullmatch(a) for a in attributes)
    assert any(is_private(n) for n in imported(private))
    constants = {
        n.value for n in ast.walk(ast.parse(HUGGING_FACE_HOME.read_text()))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }  # fmt: skip
    assert any(HUGGING_FACE_NAMES.fullmatch(c) for c in constants)
