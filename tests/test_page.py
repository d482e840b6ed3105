"""The page, used as people use it: in a real browser, against a small server, and as one file."""

import http.server
import io
import json
import re
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_chromium
from look_models import NAMES, look_once, make_explainer
from PIL import Image

from vitreous.look import look
from vitreous.report import render_look

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")

PAGE = Path(__file__).parents[1] / "src" / "vitreous" / "server" / "page"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
REFUSAL = "Cannot read 'image'. Expected an image: jpeg, png. Received: <b>text</b>. Convert it."


def make_png(seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype="uint8")).save(file, "png")
    return file.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """What the page asks of a server, with the answers of a real model."""

    def do_GET(self):
        if self.path == "/v1/model":
            examples = [{"name": "first.png", "class": NAMES[1]}, {"name": "second.png", "class": None}]
            return self.answer_json(
                {"name": "tiny", "classes": NAMES, "examples": examples, "why_no_explanations": self.server.why_not}
            )
        if self.path.startswith("/v1/examples/"):
            return self.answer(make_png(int(self.path[-1])), "image/png")
        path = PAGE / ("index.html" if self.path == "/" else self.path.removeprefix("/static/"))
        return self.answer(path.read_bytes(), TYPES[path.suffix])

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = urllib.parse.urlsplit(self.path)
        self.server.posts.append(self.path)
        start = body.find(b"\x89PNG")
        if start < 0:
            return self.answer_json({"error": REFUSAL}, 415)
        if url.path == "/v1/predict":
            pairs = [{"class": name, "probability": 0.5} for name in NAMES[:2]]
            return self.answer_json([{"image": "image", "predictions": pairs, "is_sure": False}])
        pixels = np.asarray(Image.open(io.BytesIO(body[start:])))
        classes = urllib.parse.parse_qs(url.query).get("classes")
        return self.answer_json(look(make_explainer(), pixels, classes=classes))

    def answer_json(self, value, status=200):
        self.answer(json.dumps(value).encode(), "application/json", status)

    def answer(self, body, kind, status=200):
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.posts, server.why_not = [], None
    server.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(make_png())
    return path


def wait_for_answer(tab):
    tab.wait("!document.getElementById('walk').hidden && document.getElementById('status').hidden")


def map_of(tab, selector="#map"):
    return tab.run(f"document.querySelector('{selector}').toDataURL()")


def read_shares(text):
    """Returns the percentages in a text as shares."""
    return [float(number) / 100 for number in re.findall(r"([0-9.]+)%", text)]


def assert_clean(tab, address):
    assert tab.complaints() == []
    assert [url for url in tab.requests() if not url.startswith((address, "data:", "blob:"))] == []


def test_image_is_dropped_and_its_answer_appears(browser, server, png):
    tab = browser.open(server.url)
    tab.wait("document.querySelectorAll('#examples button').length == 2")
    assert not tab.is_shown("#answer")
    tab.drop("#drop", png)
    wait_for_answer(tab)
    expected = look(make_explainer(), png)
    first = expected["predictions"][0]
    assert tab.text("#verdict") == f"{first['class']}, {100 * first['probability']:.1f}%"
    bars = tab.text("#bars").split("\n")
    assert bars[::2] == [each["class"] for each in expected["predictions"]]
    assert bars[1::2] == [f"{100 * each['probability']:.1f}%" for each in expected["predictions"]]
    assert tab.text("#other").startswith(f"The other class: {100 * expected['other']:.1f}%")
    assert tab.text("#picture-name") == "picture.png, as it enters the model"
    assert "16" in tab.text("[data-fill=num_patches]") and "class token" in tab.text("[data-if=prefix]")
    assert tab.run("document.querySelectorAll('#blocks tbody tr').length") == 2
    assert tab.text("#softmax").split("\n")[-1].endswith("100%")
    assert server.posts == ["/v1/look"]
    assert_clean(tab, server.url)
    tab.close()


def test_patches_are_pointed_at_with_mouse_keys_and_touch(browser, server, png):
    tab = browser.open(server.url)
    tab.choose("#file", png)
    wait_for_answer(tab)
    attention = make_explainer().trace(make_explainer().prepare(png)).attention[-1].mean(axis=0)
    best = attention[0, 2:].argmax()
    start, said = map_of(tab), tab.text("#readout")
    assert said.startswith("Block 1, mean of its heads: the answer is read from ")
    assert f"read from row {best // 4}, column {best % 4} (" in said
    assert read_shares(said)[0] == pytest.approx(attention[0, 2 + best], abs=2e-3)
    tab.hover("#map", 0.6, 0.1)  # row 0, column 2
    best = attention[4, 2:].argmax()
    name = "itself" if best == 2 else f"row {best // 4}, column {best % 4}"
    said = tab.text("#readout")
    assert "the patch in row 0, column 2 looks at" in said
    assert f"looks at {name} (" in said and said.endswith("% goes to the class and register tokens.")
    shares = read_shares(said)
    assert len(shares) == 4
    assert (shares[0], shares[3]) == pytest.approx((attention[4, 2 + best], attention[4, :2].sum()), abs=2e-3)
    assert map_of(tab) != start
    assert tab.text("[data-fill=patch_place]") == "row 0, column 2"
    tab.hover("h1")
    assert tab.text("#readout").startswith("Block 1, mean of its heads: the answer")
    assert map_of(tab) == start
    tab.click("#map", 0.1, 0.1)
    tab.hover("h1")
    assert "row 0, column 0 looks at" in tab.text("#readout")  # it stays
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp"):
        tab.press(key)
    assert "row 0, column 2 looks at" in tab.text("#readout")
    tab.press("Escape")
    assert "the answer is read from" in tab.text("#readout")
    tab.hover("#exploded", 0.97, 0.97)
    assert "row 3, column 3 looks at" in tab.text("#readout")
    tab.hover("h1")
    tab.resize(360, 740, touch=True)
    tab.tap("#map", 0.4, 0.9)
    tab.wait("document.getElementById('readout').innerText.includes('row 3, column 1 looks at')")
    assert_clean(tab, server.url)
    tab.close()


def test_blocks_heads_and_kinds_of_maps(browser, server, png):
    tab = browser.open(server.url)
    tab.choose("#file", png)
    wait_for_answer(tab)
    maps = {map_of(tab)}
    assert tab.run("document.querySelectorAll('#sheet [role=radio]').length") == 6  # 2 blocks of 2 heads and their mean
    tab.click("#sheet [aria-label='Block 0, head 1']")
    assert tab.text("#readout").startswith("Block 0, head 1: ")
    maps.add(map_of(tab))
    tab.press("ArrowLeft")
    assert tab.run("document.activeElement.ariaLabel") == "Block 0, head 0"
    assert tab.run("document.querySelectorAll('#sheet [aria-checked=true]').length") == 1
    maps.add(map_of(tab))
    tab.click("[value=rollout] + span")
    assert tab.text("#readout").startswith("All blocks: the answer is read from ") and not tab.is_shown("#sheet")
    maps.add(map_of(tab))
    tab.click("[value=positions] + span")
    assert tab.text("#readout").startswith("Position of the patch in row ") and "learnt" in tab.text("#positions-note")
    maps.add(map_of(tab))
    tab.click("[value=relevance] + span")
    answers = [each["class"] for each in look(make_explainer(), png)["predictions"]]
    assert tab.text("#readout").startswith(f"For {answers[0]} speak most: ")
    assert tab.run("[...document.querySelectorAll('#class option')].map((e) => e.value)")[:5] == answers
    maps.add(map_of(tab))
    tab.click("#bars li:nth-child(5) button")  # not computed yet
    tab.wait(f"document.getElementById('readout').innerText.startsWith({json.dumps('For ' + answers[4])})")
    assert server.posts[1:] == [f"/v1/look?classes={urllib.parse.quote(answers[4], safe='!*()')}"]
    values = look(make_explainer(), png, classes=[answers[4]])["relevance"][answers[4]]
    best = int(np.argmax(values))
    assert f"most: row {best // 4}, column {best % 4} " in tab.text("#readout")
    maps.add(map_of(tab))
    assert len(maps) == 7
    assert_clean(tab, server.url)
    tab.close()


def test_errors_are_said_in_words(browser, server, png, tmp_path):
    tab = browser.open(server.url)
    broken, text = tmp_path / "broken.png", tmp_path / "notes.txt"
    broken.write_bytes(b"no image")
    text.write_text("no image")
    tab.choose("#file", broken)
    tab.wait("!document.getElementById('error').hidden")
    assert tab.text("#error") == REFUSAL  # as text: no element comes of it
    tab.choose("#file", text)
    tab.wait("document.getElementById('error').innerText.startsWith('Cannot read notes.txt')")
    assert tab.text("#error") == (
        "Cannot read notes.txt. Expected an image. Received: text/plain. Choose a JPEG or PNG file."
    )
    assert len(server.posts) == 1
    tab.choose("#file", png)
    wait_for_answer(tab)
    assert not tab.is_shown("#error")
    server.shutdown()
    server.server_close()
    tab.choose("#file", png)
    tab.wait("!document.getElementById('error').hidden")
    assert tab.text("#error").startswith("The server does not answer. Is it still running?")
    assert tab.is_shown("#walk")  # what was there stays
    tab.close()


def test_examples_paste_and_a_server_that_explains_nothing(browser, server):
    server.why_not = "an export, which holds no layers to look into."
    tab = browser.open(server.url)
    tab.wait("document.querySelectorAll('#examples button').length == 2")
    assert tab.text("#examples").split("\n") == [NAMES[1], "second.png"]
    tab.click("#examples button")
    tab.wait("!document.getElementById('answer').hidden")
    assert tab.text("#verdict") == f"{NAMES[0]}, 50.0% (not sure)"
    assert tab.text("#other") == "There is no look inside: an export, which holds no layers to look into."
    assert not tab.is_shown("#inside") and server.posts == ["/v1/predict"]
    tab.run(
        "(async () => { const data = new DataTransfer();"
        "data.items.add(new File([await (await fetch('v1/examples/1')).blob()], '', {type: 'image/png'}));"
        "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true})); })()"
    )
    tab.wait("document.getElementById('picture-name').innerText == 'the pasted image'")
    assert server.posts == ["/v1/predict"] * 2
    assert_clean(tab, server.url)
    tab.close()


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    (folder / "picture.png").write_bytes(make_png())
    page = render_look(look(make_explainer(), folder / "picture.png"), name="</script><b>é\u2028\x1b.png")
    (folder / "page.html").write_text(page, encoding="utf-8")
    return folder / "page.html"


def test_one_file_works_alone(browser, offline):
    text = offline.read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "static/" not in text and "http-equiv" in text
    tab = browser.open(offline.as_uri())
    wait_for_answer(tab)
    first = look(make_explainer(), offline.with_name("picture.png"))["predictions"][0]["class"]
    assert tab.text("#verdict").startswith(first)
    assert tab.text("#picture-name").startswith("</script><b>é")
    assert not tab.is_shown("#choose")
    start = map_of(tab)
    tab.hover("#map", 0.1, 0.9)
    assert "row 3, column 0 looks at" in tab.text("#readout") and map_of(tab) != start
    tab.click("[value=relevance] + span")
    assert tab.run("document.querySelectorAll('#class option').length") == 3  # those that are in the file
    assert_clean(tab, offline.as_uri())
    tab.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))")
    assert tab.run("window.bad") is None  # the policy holds
    tab.close()


@pytest.mark.parametrize("name", ["map", "bare"])
def test_other_architectures_are_told_as_they_are(browser, tmp_path, name):
    (tmp_path / "page.html").write_text(render_look(look_once(name), name="x"), encoding="utf-8")
    tab = browser.open((tmp_path / "page.html").as_uri())
    wait_for_answer(tab)
    parts = "[...document.querySelectorAll('[data-if]')].filter((e) => e.getClientRects().length)"
    shown = set(tab.run(f"{parts}.map((e) => e.dataset.if)"))
    if name == "map":  # several labels an image, grey, rotary positions, no class token
        assert shown == {"linear", "rotary", "head", "pool-map", "sigmoid", "temperature"}
        expected = [each["class"] for each in look_once(name)["predictions"] if each["probability"] >= 0.5]
        assert tab.text("#verdict") == (", ".join(expected) or "None of its labels")
        assert tab.text("[data-fill=patch_values]") == "8 × 8 pixels of grey = 64 numbers"
        assert tab.text("[data-fill=patch_colour]").startswith("grey ")
        assert "e to its power" not in tab.text("#softmax")
    else:  # no head; waves for positions, a norm after them
        assert shown == {"linear", "added-positions", "given-positions", "pool-mean", "prefix"}
        assert tab.text("#verdict") == "This model has no head: it gives features, no classes."
        assert tab.run("document.querySelector('[value=relevance]').disabled")
    tab.click("[value=positions] + span")
    assert tab.text("#readout").startswith("Position of the patch in row ")
    assert_clean(tab, "file:")
    tab.close()


def test_narrow_dark_and_printed(browser, offline):
    tab = browser.open(offline.as_uri(), width=360, height=740, touch=True)
    wait_for_answer(tab)
    assert tab.run("document.documentElement.scrollWidth") == 360
    colours = {}
    for scheme, media in (("light", ""), ("dark", ""), ("dark", "print")):
        tab.emulate(scheme, media)
        colours[scheme, media] = tab.run(
            "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
        )
    assert colours["light", ""] == ["rgb(255, 255, 255)", "rgb(26, 31, 37)"]
    assert colours["dark", ""] == ["rgb(19, 23, 27)", "rgb(233, 236, 239)"]
    assert colours["dark", "print"] == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    assert not tab.is_shown(".strength")
    tab.close()


def test_everything_that_takes_focus_has_a_name(browser, offline):
    tab = browser.open(offline.as_uri())
    wait_for_answer(tab)
    tab.call("Accessibility.enable")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if any(each["name"] == "focusable" and each["value"]["value"] for each in node.get("properties", ()))
    ]
    roles = {node["role"]["value"] for node in focusable}
    assert {"button", "radio", "link", "slider"} <= roles
    nameless = [node["role"]["value"] for node in focusable if not node.get("name", {}).get("value")]
    assert nameless in ([], ["RootWebArea"])
    live = tab.run("[...document.querySelectorAll('[aria-live], [role=status], [role=alert]')].map((e) => e.id)")
    assert live == ["status", "error", "readout"]
    tab.close()
