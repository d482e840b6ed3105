import functools
import http.server
import io
import tarfile
import threading
import zipfile

import pytest
from PIL import Image

from vitreous.data import Loader, load_dataset, load_evaluation_images, load_images
from vitreous.data.sources import remote as remote_module
from vitreous.errors import DataError, MissingDependencyError, MissingPathError
from vitreous.spec import InputSpec

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")


def png(value):
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(stream, "png")
    return stream.getvalue()


def packed(files, kind):
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


IMAGES = {f"{'ab'[i % 2]}/{i:02}.png": png(i) for i in range(20)}
SHARD = {f"{i:02}.{kind}": data for i in range(20) for kind, data in (("png", png(i)), ("cls", b"ab"[i % 2 :][:1]))}
TABLE = "path,label\n" + "".join(f"photos/{name},{name[0]}\n" for name in IMAGES)
FILES = {
    **{f"photos/{name}": data for name, data in IMAGES.items()},
    "t.csv": TABLE.encode(),
    "p.zip": packed(IMAGES, "zip"),
    "p.tar": packed(IMAGES, "tar"),
    **{f"shards/s-{i}.tar": packed(dict(list(SHARD.items())[20 * i : 20 * i + 20]), "tar") for i in range(2)},
}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """No settings of this machine, and a cache of our own."""
    folder = tmp_path_factory.mktemp("home")
    names = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "VITREOUS_CACHE": str(folder / "cache"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        yield folder / "cache"


@pytest.fixture(scope="module")
def s3(environment):
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        import s3fs

        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        for name, data in FILES.items():
            files.pipe(f"bucket/data/{name}", data)
        yield "s3://bucket/data"
    server.stop()


@pytest.fixture(scope="module")
def web(tmp_path_factory, environment):
    root = tmp_path_factory.mktemp("web")
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(params=["s3", "web"])
def url(request):
    return request.getfixturevalue(request.param)


def contents(data):
    images = load_evaluation_images(data, ("a", "b"), split="all").images
    return sorted((int(e.image[0, 0, 0]), e.label) for e in images)


@pytest.mark.parametrize("name", ["photos", "photos/", "t.csv", "p.zip", "p.tar", "shards", "shards/s-{0..1}.tar"])
def test_every_kind_of_source(url, name):
    assert contents(f"{url}/{name}") == [(i, i % 2) for i in range(20)]


def test_a_pattern_of_stars(s3):
    assert contents(f"{s3}/shards/s-*.tar") == [(i, i % 2) for i in range(20)]
    with pytest.raises(
        MissingPathError, match=r"Cannot read s3://bucket/data/x-\*\.tar\. .*no files of this pattern\."
    ):
        load_dataset(f"{s3}/x-*.tar")
    with pytest.raises(
        DataError, match=r"Cannot use the files s3://.*\*\.csv\. Expected tar shards\. Received: t\.csv\."
    ):
        load_dataset(f"{s3}/*.csv")


def test_a_remote_folder(url):
    dataset = load_dataset(f"{url}/photos")
    assert dataset.name == "photos" and dataset.root == f"{url}/photos" and dataset.class_names == ("a", "b")
    assert {split: len(images) for split, images in dataset.splits.items()} == {"train": 16, "val": 2, "test": 2}
    assert dataset.splits["train"].path(0) is None
    assert f"images at {url}/photos are fetched in training; a broken one is found when it is read" in dataset.notes
    assert load_dataset(f"{url}/photos").fingerprint == dataset.fingerprint
    loader = Loader(dataset.splits["train"], InputSpec(image_size=(8, 8)), batch_size=8, num_workers=4)
    found = [int(image[0, 0, 0]) for batch in loader.epoch(0) for image in batch.images]
    assert found == [int(name[2:4]) for name in dataset.splits["train"].names] and loader.broken == {}


def test_names_for_prediction(url):
    assert load_images(f"{url}/photos").names == sorted(IMAGES)
    images = load_images([f"{url}/photos/a/02.png", f"{url}/t.csv"])
    assert images.names[:2] == [f"{url}/photos/a/02.png", "photos/a/00.png"] and len(images) == 21
    assert [int(images.load(i)[0, 0, 0]) for i in range(3)] == [2, 0, 1]


def test_a_table_here_of_images_there(tmp_path, web):
    (tmp_path / "x.png").write_bytes(png(77))
    rows = "".join(f"{web}/photos/{name},{name[0]}\n" for name in IMAGES)
    (tmp_path / "t.csv").write_text(f"image,label\n{rows}x.png,a\ngone.png,a\n")
    dataset = load_dataset(tmp_path / "t.csv")
    assert dataset.broken == {"gone.png": "a file that is not there"}
    assert contents(tmp_path / "t.csv")[-1] == (77, 0)
    assert load_images(tmp_path / "t.csv").path(20) == tmp_path / "x.png"


def test_files_are_fetched_once_and_anew_when_they_change(s3, environment):
    import s3fs

    load_dataset(f"{s3}/p.zip")
    (copy,) = environment.glob("remote/*/data/p.zip")
    before = copy.stat().st_mtime_ns
    load_dataset(f"{s3}/p.zip")
    assert copy.stat().st_mtime_ns == before
    s3fs.S3FileSystem().pipe("bucket/data/p.zip", packed({**IMAGES, "a/99.png": png(99)}, "zip"))
    assert contents(f"{s3}/p.zip")[-1] == (99, 0)
    s3fs.S3FileSystem().pipe("bucket/data/p.zip", FILES["p.zip"])


def test_a_broken_remote_image_is_left_out_when_it_is_read(s3):
    import s3fs

    files = s3fs.S3FileSystem()
    for i in range(20):
        files.pipe(f"bucket/broken/{'ab'[i % 2]}/{i}.png", b"" if i == 5 else png(i))
    images = load_evaluation_images("s3://bucket/broken", ("a", "b"), split="all").images
    files.rm("bucket/broken/a/8.png")
    loader = Loader(images, InputSpec(image_size=(8, 8)), batch_size=20, num_workers=2)
    (batch,) = loader.epoch(0)
    assert loader.broken == {"b/5.png": "an empty file", "a/8.png": "a file that is not there"}
    assert batch.mask.sum() == 18


# What goes wrong


def test_nothing_there(s3, web):
    for url in ("s3://no-such-bucket/photos", f"{s3}/nothing", f"{s3}/none.csv", f"{web}/none", f"{web}/none.zip"):
        with pytest.raises(MissingPathError) as caught:
            load_dataset(url)
        assert str(caught.value).startswith(f"Cannot read {url}"), str(caught.value)
        assert "Expected a file, or a folder with files, that exists. Received: " in str(caught.value)
        assert "Check the URL, beginning with its bucket or host." in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_credentials(s3, monkeypatch):
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError) as caught:
        load_dataset(f"{s3}/photos")
    s3fs.S3FileSystem.clear_instance_cache()
    assert str(caught.value).startswith(
        f"Cannot read {s3}/photos. Expected access to it. Received: Unable to locate cred"
    )
    assert "set FSSPEC_S3_ANON=true for a public bucket." in str(caught.value)


def test_no_answer():
    with pytest.raises(DataError, match=r"^Cannot read http://127\.0\.0\.1:9/p\.zip\. Expected an answer\. Received: "):
        load_dataset("http://127.0.0.1:9/p.zip")


def test_a_server_that_fails_now_and_then(monkeypatch):
    monkeypatch.setattr(remote_module, "_PAUSES_SECONDS", (0, 0))
    calls = []

    class FileSystem:
        def cat_file(self, path):
            calls.append(path)
            if len(calls) < self.num_good:
                raise OSError("try again")
            return b"data"

    monkeypatch.setattr(remote_module, "open_file_system", lambda url: (FileSystem(), url))
    FileSystem.num_good = 3
    assert remote_module.RemoteStore("s3://b").read(0, "x.png") == b"data" and calls == ["s3://b/x.png"] * 3
    calls.clear()
    FileSystem.num_good = 9
    with pytest.raises(
        DataError, match=r"Cannot read s3://b/x\.png\. Expected an answer\. Received: try again\. Check"
    ):
        remote_module.RemoteStore("s3://b").read(0, "x.png")
    assert len(calls) == 3


def test_what_is_not_installed(monkeypatch):
    with pytest.raises(DataError, match=r"Cannot use nosuch://x\. Expected a URL such as s3://.*Check the URL\."):
        load_dataset("nosuch://x")
    import fsspec

    def refuse(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    for package in ("s3fs", "fsspec"):
        with pytest.raises(MissingDependencyError) as caught:
            load_dataset("s3://bucket/photos")
        assert str(caught.value) == (
            f"The source s3://bucket/photos cannot be used. Expected the package {package}. Received: it is not "
            "installed. Install it with: pip install 'vitreous[remote]'"
        )
        monkeypatch.setitem(__import__("sys").modules, "fsspec", None)


def test_a_package_that_is_in_no_extra(monkeypatch):
    import fsspec

    def refuse(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(
        DataError, match=r"Cannot use gs://b\. .* Received: Please install gcsfs .*\. Install it with pip\."
    ):
        load_dataset("gs://b")
