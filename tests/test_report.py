"""The page of an inspection: whole, escaped, and from nowhere else."""

import re

import numpy as np
import pytest
from html_page import Page, assert_self_contained
from inspection_data import make_faulty, photo

from vitreous.data import Dataset, ImageSet, load_dataset
from vitreous.data.inspection import inspect_dataset, inspect_fast
from vitreous.report import render_inspection
from vitreous.report.inspection import MAX_ITEMS, MAX_NAMES
from vitreous.text import escape_text as shown


@pytest.fixture(scope="module")
def inspection(tmp_path_factory):
    return inspect_dataset(load_dataset(make_faulty(tmp_path_factory.mktemp("data") / "faulty")))


@pytest.fixture(scope="module")
def html(inspection):
    return render_inspection(inspection)


def test_page_names_every_finding(html, inspection):
    page = Page(html)
    ids = {attributes["id"] for tag, attributes in page.tags if "id" in attributes}
    assert ids == {finding.kind for finding in inspection.findings}
    assert {a["href"] for tag, a in page.tags if tag == "a"} == {f"#{kind}" for kind in ids}
    for finding in inspection.findings:
        assert finding.text.title in page.text
        assert finding.text.remedy in page.text
        for item in finding.items:
            for ref in item.files:
                assert ref.file in page.text
    assert "3 errors" in page.text and "10 warnings" in page.text
    assert "66 images, 4 classes: 48 train, 8 val, 10 test" in page.text


def test_page_needs_nothing_from_elsewhere(html):
    assert_self_contained(html)
    assert len(html) < 400_000


def test_page_fits_phones_and_the_dark(html):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html
    assert "color-scheme: light dark" in html


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% for x in y %}",
    "&lt;b&gt;",
    "javascript:alert(1)",
    "\u202egnp.exe",
    "line\nbreak\x07",
    "stray\udcff",
]


def test_hostile_names_are_text(tmp_path):
    count = len(HOSTILE)
    images = np.stack([np.asarray(photo(seed, (32, 32))) for seed in range(count)] * 2)
    dataset = Dataset(
        name=HOSTILE[0],
        root=tmp_path / "<b>",
        class_names=tuple(f"{name} class" for name in HOSTILE),
        splits={"train": ImageSet(HOSTILE * 2, [*range(count)] * 2, arrays=images)},
        broken={f"{name}.png": f"reason {name}" for name in HOSTILE},
        notes=[f"note {name}" for name in HOSTILE],
    )
    html = render_inspection(inspect_dataset(dataset))
    page = assert_self_contained(html)
    for name in HOSTILE:
        for text in (shown(name), f"{shown(name)} class", f"{shown(name)}.png", f"reason {shown(name)}"):
            assert " ".join(text.split()) in page.text, text
    assert "<script" not in html and "<img src=x" not in html and "49" not in shown(HOSTILE[3])
    assert "\u202e" not in html and "\x07" not in html
    html.encode("utf-8")


def test_long_findings_are_cut_and_say_so():
    images = np.repeat(np.asarray(photo(0, (32, 32)))[None], 2, axis=0)
    dataset = Dataset(
        name="many",
        root=None,
        class_names=tuple(f"class {k}" for k in range(300)),
        splits={"train": ImageSet(["a", "b"], [0, 1], arrays=images)},
        broken={f"{i}.jpg": "an empty file" for i in range(500)},
    )
    inspection = inspect_dataset(dataset)
    page = Page(render_inspection(inspection))
    assert f"The first {MAX_NAMES} of 500 cases" in page.text
    assert f"{MAX_NAMES - 1}.jpg" in page.text and f"{MAX_NAMES}.jpg" not in page.text
    assert "276 classes between them are not shown" in page.text
    grid = np.stack([np.asarray(photo(i, (32, 32))) for i in range(40)])
    pairs = Dataset(
        name="pairs",
        root=None,
        class_names=("a",),
        splits={"train": ImageSet([str(i) for i in range(80)], [0] * 80, arrays=np.concatenate([grid, grid]))},
    )
    tags = Page(render_inspection(inspect_dataset(pairs))).tags
    assert sum(tag == "img" for tag, _ in tags) == 2 * MAX_ITEMS


def test_clean_and_fast_pages():
    digits = load_dataset("digits")
    page = Page(render_inspection(inspect_dataset(digits)))
    assert "Nothing stands in the way of training." in page.text
    assert "1,797 images, 10 classes" in page.text
    assert "8pixels, all images" in page.text
    page = Page(render_inspection(inspect_fast(digits)))
    assert "from names, counts and equal files alone" in page.text


def test_thumbnails_show_the_image(html):
    import base64
    import io

    from PIL import Image

    uris = re.findall(r'src="data:image/webp;base64,([^"]+)"', html)
    images = [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in uris]
    assert all(max(image.size) <= 112 for image in images)
    (constant,) = [
        i for i in images if i.size == (96, 96) and all(hi - lo < 10 for lo, hi in i.convert("RGB").getextrema())
    ][:1]
    assert np.allclose(np.asarray(constant.convert("RGB"))[0, 0], (90, 30, 120), atol=4)


def test_notes_stand_on_top(tmp_path):
    dataset = load_dataset(make_faulty(tmp_path / "faulty"))
    html = render_inspection(inspect_fast(dataset))
    for note in dataset.notes:
        assert html.index(note[1:]) < html.index('class="card verdict"')
    assert 'class="soft small">Val is' not in html
