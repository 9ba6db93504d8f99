"""What the README and the pages say is run: their Python blocks, their commands, their links, and the tree of modules."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from pathlm.bench import benchmarks
from pathlm.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, *languages):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [block for language, block in fenced if language in languages]


def command_lines(page):
    """Lines that a reader would type: in sh blocks, and indented by four spaces."""
    text = page.read_text(encoding="utf-8")
    typed = [line for block in blocks(page, "sh") for line in block.splitlines()]
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    typed += [line[4:] for line in plain.splitlines() if line.startswith("    ")]
    return [words for line in typed if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, name_of(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_pathlm_command_on_a_page_exists_with_its_options(page):
    for words in command_lines(page):
        if words[0] != "pathlm":
            continue
        assert words[1] in COMMANDS, shlex.join(words)
        COMMANDS[words[1]].make_context(words[1], words[2:])  # raises for an option or argument that does not exist
        if words[1] == "bench" and len(words) > 2:
            assert words[2] in benchmarks()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_is_mentioned_exists(page):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"`pathlm ([a-z]+)", text)) <= set(COMMANDS)
    assert set(re.findall(r"`pathlm bench ([a-z_]+)", text)) <= set(benchmarks())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_make_target_on_a_page_exists(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for words in command_lines(page):
        if words[0] == "make":
            assert words[1] in targets, shlex.join(words)


def test_the_readme_shows_commands_of_every_kind():
    shown = {tuple(words[:2]) for words in command_lines(ROOT / "README.md")}
    assert {("make", "demo"), ("make", "test")} <= shown
    assert {("pathlm", name) for name in COMMANDS} - {("pathlm", "demo")} <= shown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_tree_in_the_readme_names_every_module_and_nothing_else():
    tree = next(block for block in blocks(ROOT / "README.md", "") if block.startswith("src/pathlm/"))
    shown, parents = set(), []
    for line in tree.splitlines():
        label = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], label]
        assert len(line.split(maxsplit=1)) == 2 or depth == 0, f"{label} has no description"
        if label.endswith(".py"):
            shown.add("".join(parents))
    inside = {f.relative_to(ROOT).as_posix() for f in (ROOT / "src").rglob("*.py")}
    assert shown == {f for f in inside if not f.endswith("/__init__.py") or f == "src/pathlm/__init__.py"}


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= set(re.findall(r"\]\(([^)]+)\)", index))
