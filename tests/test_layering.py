"""The layering of src/vitreous: a module imports only from the ranks before its own, or from its own folder.

The table is the contract; docs/architecture.md shows it too. A new module goes into `RANKS` in the same change.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "vitreous"

# From the bottom up. A folder counts as one name: its files share its rank and may import each other.
RANKS = (
    {"errors", "files", "text"},
    {"patches", "registry_table"},
    {"spec", "resize"},
    {"positions"},
    {"registry", "backend", "layers"},
    {"model", "data"},
    {"evaluation", "label_errors", "figures", "weights", "calibration"},
    {"training"},
    {"measurement", "inspection", "explanation", "export", "embeddings"},  # these read what training leaves
    {"engine"},
    {"prediction", "answers", "ray_engine"},
    {"look"},
    {"report"},
    {"server"},
    {"cli"},
    {"__main__"},  # python -m vitreous
)
RANK_OF = {name: rank for rank, names in enumerate(RANKS) for name in names}


def modules(source: Path) -> dict[str, Path]:
    """Returns {dotted name below the package: file} of every module but the package's own `__init__`."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts:
            found[".".join(parts)] = path
    return found


def imports(module: str, path: Path, children: set[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, top-level name below vitreous) for each import of vitreous in a file, wherever it stands.

    `children` are the top-level modules of the package: `from vitreous import data` imports one of them, and
    `from vitreous import train` imports a public name, reported as `"vitreous"`.
    """
    package = ["vitreous", *module.split(".")]
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            targets = [f"{origin}.{alias.name}" for alias in node.names] if origin == "vitreous" else [origin]
        else:
            continue
        for target in targets:
            top, _, rest = target.partition(".")
            if top == "vitreous" and rest != "__version__":
                child = rest.split(".")[0]
                yield node.lineno, child if child in children else "vitreous"


def violations(source: Path) -> list[str]:
    """Returns one line for each unknown module and each import that points up or sideways."""
    found = []
    names = modules(source)
    children = {module.split(".")[0] for module in names}
    for module, path in names.items():
        own = module.split(".")[0]
        if own not in RANK_OF:
            found.append(f"{path.relative_to(source)}: {own} has no rank; add it to RANKS")
            continue
        for line, other in imports(module, path, children):
            if other == own:
                continue
            if other == "vitreous":
                found.append(f"{path.relative_to(source)}:{line}: import from the module itself, not from vitreous")
            elif other not in RANK_OF or RANK_OF[other] >= RANK_OF[own]:
                found.append(f"{path.relative_to(source)}:{line}: {own} must not import {other}")
    return found


def test_every_module_imports_only_from_the_ranks_before_its_own():
    assert modules(SOURCE), f"no modules found in {SOURCE}"
    assert violations(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("layers.py", "from vitreous.model import create_model", "layers.py:1: layers must not import model"),
        ("layers.py", "import vitreous.model", "layers.py:1: layers must not import model"),
        ("layers.py", "import numpy as np\nfrom vitreous import model", "layers.py:2: layers must not import model"),
        ("layers.py", "from . import model", "layers.py:1: layers must not import model"),
        ("layers.py", "def f():\n    from .model import x", "layers.py:2: layers must not import model"),
        ("data/images.py", "from ..cli import main", "data/images.py:1: data must not import cli"),
        ("data/__init__.py", "from ..cli import main", "data/__init__.py:1: data must not import cli"),
        ("model.py", "from vitreous.data import images", "model.py:1: model must not import data"),
        ("layers.py", "from vitreous import train", "layers.py:1: import from the module itself, not from vitreous"),
        ("layers.py", "import vitreous", "layers.py:1: import from the module itself, not from vitreous"),
        ("helpers.py", "", "helpers.py: helpers has no rank; add it to RANKS"),
        ("layers.py", "from vitreous.helpers import f", "layers.py:1: layers must not import helpers"),
    ],
)
def test_checker_sees_a_violation(tmp_path, file, code, message):
    for name in ("__init__.py", "layers.py", "model.py", "cli.py", "data/__init__.py", "data/images.py", file):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / file).write_text(code)
    if "vitreous.helpers" in code:
        (tmp_path / "helpers.py").write_text("")
    assert message in violations(tmp_path)


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("model.py", "from vitreous.layers import MLP\nfrom vitreous.spec import ViTConfig"),
        ("model.py", "from vitreous import layers"),
        ("cli.py", "from vitreous import __version__\nfrom .data.images import x"),
        ("data/images.py", "from .splits import x\nfrom vitreous.data import splits\nfrom ..errors import DataError"),
        ("layers.py", "import keras\nfrom vitreousness import model\nimport os.path"),
    ],
)
def test_checker_allows_what_the_table_allows(tmp_path, file, code):
    for name in ("__init__.py", "errors.py", "spec.py", "layers.py", "data/__init__.py", "data/splits.py", file):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / file).write_text(code)
    assert violations(tmp_path) == []
