"""Every Python block of every page runs, page by page, in order; the README's commands are CI's."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "examples").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)(#[^)\s]*)?\)")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of every fenced block in this language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in found]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# From torch, about the speed of attention under vmap on the CPU.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_run_in_order(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = blocks(page, "python")
    text = page.read_text(encoding="utf-8")
    assert len(found) == text.count("```python")
    # A file of its own, since torch.compile reads it; blank lines for the prose between the blocks
    # give a traceback the page's own line numbers.
    lines = [""] * text.count("\n")
    for line, block in found:
        lines[line : line + block.count("\n")] = block.splitlines()
    path = tmp_path / f"{page.stem}.py"
    path.write_text("\n".join(lines), encoding="utf-8")
    program = types.ModuleType("page_" + page.stem.lower())
    monkeypatch.setitem(sys.modules, program.__name__, program)
    monkeypatch.chdir(tmp_path)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), program.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        assert path.exists(), f"{name(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor[1:] in anchors, f"{name(page)} links to {target}{anchor}"


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(README.read_bytes()) <= 8000


def test_every_page_of_the_guide_is_in_its_contents() -> None:
    guide = ROOT / "examples/guide"
    listed = {target for target, _ in LINK.findall((guide / "README.md").read_text("utf-8"))}
    assert listed >= {p.name for p in guide.glob("*.md")} - {"README.md"}


def test_ci_runs_the_test_command() -> None:
    _, (_, test) = blocks(README, "sh")
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").endswith("\n" + test)


def test_tox_has_the_environments_of_the_commands() -> None:
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    listed = re.search(r"^env_list = (.*)$", tox, re.MULTILINE)
    assert listed
    known = set(listed[1].split(", "))
    wanted = [re.search(r"-e (\S+)", command) for _, command in blocks(README, "sh")]
    assert all(wanted)
    assert {env for found in wanted if found for env in found[1].split(",")} == known
