"""The page of the server as one HTML file, for one image: it works without a server, and loads nothing."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from vitreous.text import escape_text

_PAGE = Path(__file__).parents[1] / "server" / "page"
_SCRIPTS = ("drawing.js", "walk.js", "view.js", "offline.js")  # each after those that it imports from
_IMPORT = re.compile(r"^import \{[^}]*\} from \"\./[a-z]+\.js\";\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(async )?(function|class|const) )", re.MULTILINE)
_HEAD = """\
<link rel="stylesheet" href="static/page.css">
<script type="module" src="static/page.js"></script>
"""


def render_look(look: dict[str, Any], *, name: str = "") -> str:
    """Returns the page of one image as one HTML file.

    Args:
        look: What `vitreous.look.look` returned.
        name: What to call the image.

    Returns:
        HTML with everything inside: text, style, scripts, image and numbers. Its content security policy lets no
        other script run, and nothing be loaded. No text from the data can end the element that it stands in.
    """
    page = _read("index.html")
    style = _read("page.css")
    script = "".join(_EXPORT.sub("", _IMPORT.sub("", _read(each))) for each in _SCRIPTS)
    data = json.dumps({"look": look, "name": escape_text(name)}, allow_nan=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # in JSON, < stands in strings alone
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
        f"<style>{style}</style>\n",
        f'<script type="application/json" id="look-data">{data}</script>\n',
        f'<script type="module">{script}</script>\n',
    )
    before, after = page.split(_HEAD)
    return before + "".join(parts) + after


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
