"""The commands of docs/data.md: each is parsed, and its data are loaded, in a folder that has what the page names."""

import io
import re
import shlex
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from vitreous import engine, measurement, prediction, training  # before load_run is replaced: they keep what they find
from vitreous.cli import main
from vitreous.data import DataConfig, load_dataset, load_evaluation_images, load_images

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
assert engine and measurement and prediction and training.train and training.train_folds
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]


def png(value):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(stream, "png")
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    datasets, arrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("page")
    images = {f"{('cat', 'dog')[i % 2]}/{i:02}.png": png(i) for i in range(24)}
    labels = [name[:3] for name in images]
    for name, data in images.items():
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "photos" / name).write_bytes(data)
    with zipfile.ZipFile(root / "photos.zip", "w") as archive:
        for name, data in images.items():
            archive.writestr(name, data)
    shards = [
        {
            f"{i:02}.{k}": v
            for i in range(s * 12, s * 12 + 12)
            for k, v in (("png", png(i)), ("cls", str(i % 2).encode()))
        }
        for s in range(2)
    ]
    (root / "shards").mkdir()
    for name, files in (("photos.tar", images), ("shards/s-000.tar", shards[0]), ("shards/s-001.tar", shards[1])):
        with tarfile.open(root / name, "w") as archive:
            for member, data in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    rows = [
        f"photos/{name},{label},c{i // 2},{'test' if i > 20 else 'train'}"
        for i, (name, label) in enumerate(zip(images, labels, strict=True))
    ]
    (root / "birds.csv").write_text("\n".join(["photo,species,camera,part", *rows]))
    parquet.write_table(arrow.table({"image": list(images.values()), "label": labels}), root / "birds.parquet")
    tags = [["x", "y"][: i % 3] for i in range(24)]
    (root / "tags.csv").write_text(
        "\n".join(["path,tags", *(f"photos/{n},{'|'.join(t)}" for n, t in zip(images, tags, strict=True))])
    )
    (root / "tags.jsonl").write_text(
        "\n".join(
            f'{{"path": "photos/{n}", "tags": {str(t).replace(chr(39), chr(34))}}}'
            for n, t in zip(images, tags, strict=True)
        )
    )
    saved = datasets.Dataset.from_dict(
        {"image": [{"bytes": b, "path": None} for b in images.values()], "label": labels}
    )
    saved.cast_column("image", datasets.Image()).save_to_disk(root / "saved")
    return root


def test_the_page_has_commands():
    assert len(COMMANDS) >= 16


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(folder, monkeypatch, command):
    monkeypatch.chdir(folder)
    words = shlex.split(command)
    assert words[0] == "vitreous"
    calls = []

    def stop(*arguments, **options):
        calls.append((arguments, {key: value for key, value in options.items() if value is not None}))
        raise SystemExit(0)

    places = {
        "train": ["vitreous.training.trainer.train", "vitreous.training.folds.train_folds"],
        "evaluate": ["vitreous.measurement.evaluate"],
        "predict": ["vitreous.data.load_images"],
    }[words[1]]
    with mock.patch("vitreous.training.run.load_run"), pytest.raises(SystemExit) as exit:
        patches = [mock.patch(place, stop) for place in places]
        for patch in patches:
            patch.start()
        try:
            main(words[1:])
        finally:
            for patch in patches:
                patch.stop()
    assert exit.value.code == 0
    ((arguments, options),) = calls
    names = DataConfig.__dataclass_fields__
    config = {name: value for name, value in options.items() if name in names}
    if words[1] == "train":
        dataset = load_dataset(arguments[0], **config)
        assert sum(map(len, dataset.splits.values())) >= (24 if arguments[0] != "digits" else 1797)
        assert dataset.is_multi_label == arguments[0].startswith("tags")
    elif words[1] == "evaluate":
        classes = load_dataset(arguments[1]).class_names
        assert len(load_evaluation_images(arguments[1], classes, **config).images) >= 24
    else:
        images = load_images(*arguments)
        assert len(images) == 12 and isinstance(images.load(0), np.ndarray)
