"""What importing costs: the package and the command line's help load nothing heavy. Each check is a fresh process."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vitreous

ROOT = Path(__file__).parents[1]
HEAVY = ("keras", "numpy", "jax", "jaxlib", "torch", "tensorflow", "PIL", "matplotlib", "sklearn", "scipy", "h5py")


def run(code: str, **environment: str) -> Any:
    """Runs code in a fresh Python and returns the JSON on the last line that it prints."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOADED = f"sorted(set(sys.modules) & set({HEAVY!r}))"


def test_importing_the_package_is_fast_and_light():
    code = f"""
import json, sys, time
start = time.perf_counter()
import vitreous
seconds = time.perf_counter() - start
print(json.dumps(dict(seconds=seconds, heavy={LOADED}, version=vitreous.__version__, names=dir(vitreous))))
"""
    results = [run(code) for _ in range(2)]
    assert results[0]["heavy"] == []
    assert results[0]["version"] == vitreous.__version__
    assert set(vitreous.__all__) <= set(results[0]["names"])
    # It takes about 5 ms; the limit only has to catch an import of Keras, which takes seconds.
    assert min(result["seconds"] for result in results) < 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]], ids=" ".join)
def test_command_line_help_is_light(arguments):
    code = f"""
import json, sys
from vitreous.cli import main
sys.argv = ["vitreous", *{arguments!r}]
try:
    result = main()
except SystemExit as exit:
    result = exit.code
print()
print(json.dumps(dict(exit=result, heavy={LOADED})))
"""
    answer = run(code)
    assert answer["heavy"] == []
    assert answer["exit"] in (0, None)


def test_errors_and_registry_are_light():
    code = f"""
import json, sys
import vitreous.errors
print(json.dumps(dict(heavy={LOADED}, same=vitreous.VitreousError is vitreous.errors.VitreousError)))
"""
    assert run(code) == {"heavy": [], "same": True}


def test_data_needs_none_of_the_readers():
    code = """
import json, sys
import vitreous.data
readers = {"keras", "jax", "torch", "PIL", "sklearn", "pyarrow", "datasets", "fsspec", "s3fs", "pandas"}
print(json.dumps(sorted(set(sys.modules) & readers)))
"""
    assert run(code) == []


def test_figures_need_neither_keras_nor_pyplot():
    code = """
import json, sys
import vitreous.figures
print(json.dumps(sorted(set(sys.modules) & {"keras", "jax", "torch", "tensorflow", "matplotlib.pyplot"})))
"""
    assert run(code) == []


def test_every_public_name_loads_from_its_module():
    code = """
import json, sys
import vitreous
homes = {}
for name in vitreous.__all__:
    value = getattr(vitreous, name)
    homes[name] = getattr(value, "__module__", None)
    assert name in vars(vitreous), name  # loaded once, then a plain attribute
import vitreous.errors, vitreous.data, vitreous.training
from vitreous import figures
print(json.dumps(homes))
"""
    homes = run(code)
    for name, home in vitreous._HOMES.items():
        assert homes[name] == home or homes[name].startswith(f"{home}."), name


def test_first_keras_name_settles_the_backend():
    code = """
import json, sys
import vitreous, vitreous.backend
expected = vitreous.backend._choose(None)[0]
vitreous.get_spec, vitreous.ViTConfig
before = "keras" in sys.modules
vitreous.Patches
import keras
print(json.dumps([before, keras.backend.backend() == expected]))
"""
    assert run(code, KERAS_BACKEND="") == [False, True]


def test_public_names_are_listed_once_each():
    tree = ast.parse((ROOT / "src/vitreous/__init__.py").read_text())
    guards = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen_by_type_checkers = {alias.name: node.module for node in guards[0].body for alias in node.names}
    assert seen_by_type_checkers == vitreous._HOMES
    assert sorted(vitreous.__all__) == sorted([*vitreous._HOMES, "__version__"])


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'vitreous' has no attribute 'Patch'"):
        vitreous.Patch  # noqa: B018
    assert not hasattr(vitreous, "__wrapped__")
