"""The Python example of the README runs as it stands."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

README = Path(__file__).parents[1] / "README.md"


def test_python_example(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.eye(8, dtype="uint8") * 255).save("digit.png")
    names: dict = {}
    exec(code.replace("epochs=5", "epochs=1"), names)
    assert names["tokens"].shape == (1, 16, 64)
    assert [a.shape for a in names["maps"]] == [(1, 4, 16, 16)] * 6
