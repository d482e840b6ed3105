"""The files around the code agree with it: changelog, README, architecture, requirement files, scripts."""

import os
import re
import tomllib
from pathlib import Path

import pytest

import vitreous

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = sorted((ROOT / "requirements").glob("*.txt"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    """Returns {package: version} of a requirement file and those that it includes."""
    found = {}
    for line in path.read_text().splitlines():
        if included := re.match(r"-r (\S+)", line):
            found |= pins(path.parent / included[1])
        elif pin := re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)", line):
            found[normal(pin[1])] = pin[2]
    return found


def test_changelog_names_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog
    assert re.search(rf"(?<![\d.]){re.escape(vitreous.__version__)}(?![\d.]*\d)", changelog)


def test_version_has_one_source():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_readme_names_every_extra(extra):
    assert re.search(
        rf"vitreous\[(\w+,)*{extra}(,\w+)*\]|\.\[(\w+,)*{extra}(,\w+)*\]", (ROOT / "README.md").read_text()
    )


def test_readme_links_resolve():
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    local = [link for link in links if not re.match(r"[a-z]+:|#", link)]
    assert any(link.startswith("docs/") for link in local)
    assert [link for link in local if not (ROOT / link.split("#")[0]).exists()] == []


def tree_in(text: str) -> set[str]:
    """Returns the Python modules that a tree drawn in a code block lists, relative to src/vitreous.

    Each line begins with a path or an indented name; two or more spaces part it from its comment. Indentation below a
    line that ends with a slash makes a path. The block is the first one that lists `errors.py`.
    """
    block = next(block for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL) if "errors.py" in block)
    found, folders = set(), []  # folders: (indentation, path) of those that are open
    for line in filter(str.strip, block.splitlines()):
        indentation = len(line) - len(line.lstrip())
        name = re.split(r"\s{2,}", line.strip())[0].removeprefix("src/vitreous/").removeprefix("./")
        while folders and folders[-1][0] >= indentation:
            folders.pop()
        path = (folders[-1][1] if folders else "") + name
        if name.endswith("/") or not name:
            folders.append((indentation, path))
        elif name.endswith(".py"):
            found.add(path)
    return found


def test_architecture_lists_exactly_the_modules():
    source = ROOT / "src/vitreous"
    modules = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    assert tree_in((ROOT / "docs/architecture.md").read_text()) == modules


def test_tree_is_read_with_and_without_indentation():
    lines = [
        "src/vitreous/",
        "  errors.py   a b",
        "  data/  what",
        "    __init__.py",
        "    a.py  x",
        "  cli.py",
        "model.py",
    ]
    assert tree_in("\n".join(["```", *lines, "```"])) == {
        "errors.py",
        "data/__init__.py",
        "data/a.py",
        "cli.py",
        "model.py",
    }
    assert tree_in("```\nerrors.py  tree\ndata/images.py  x\n```") == {"errors.py", "data/images.py"}


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.name)
def test_requirements_are_pinned_hashed_and_name_no_index(path):
    text = path.read_text()
    assert "://" not in text
    assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host", text)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith(("#", "-r "))]
    assert lines
    assert [line for line in lines if not re.match(r"[A-Za-z0-9._-]+==\d", line)] == []
    if path.name != "torch.txt":  # its comment says why
        assert [line for line in lines if "--hash=sha256:" not in line] == []


def test_requirements_agree_with_each_other_and_cover_the_dependencies():
    versions = {}
    for path in REQUIREMENTS:
        for name, version in pins(path).items():
            assert versions.setdefault(name, version) == version, f"{name} in {path.name}"
    wanted = {"base": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    for file, requirements in wanted.items():
        names = {normal(re.match(r"[A-Za-z0-9._-]+", requirement)[0]) for requirement in requirements}
        assert names <= set(pins(ROOT / "requirements" / f"{file}.txt")), file


@pytest.mark.parametrize("name", ["scripts/setup-env", "scripts/test", "scripts/check", "scripts/demo", ".ci/run"])
def test_scripts_can_be_run(name):
    path = ROOT / name
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in path.read_text()


def test_ci_runs_the_whole_gate():
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("exec scripts/test")
