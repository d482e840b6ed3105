"""jax's compiled functions on disk: in a folder of the user's choice, and not at all while testing."""

import pytest

from vitreous.backend import use_compile_cache

jax = pytest.importorskip("jax")


@pytest.fixture
def config():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_off_while_testing(config):
    assert use_compile_cache() is None
    assert config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(("name", "below"), [("XDG_CACHE_HOME", "vitreous/jax"), ("VITREOUS_COMPILE_CACHE", "")])
def test_folder_of_choice_made_only_when_needed(config, tmp_path, monkeypatch, name, below):
    monkeypatch.setenv("VITREOUS_COMPILE_CACHE", "")
    monkeypatch.setenv(name, str(tmp_path / "caches"))
    folder = use_compile_cache()
    assert folder == tmp_path / "caches" / below
    assert config.jax_compilation_cache_dir == str(folder)
    assert not folder.exists()


def test_a_folder_that_jax_knows_stays(config, tmp_path, monkeypatch):
    monkeypatch.setenv("VITREOUS_COMPILE_CACHE", str(tmp_path / "ours"))
    config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert use_compile_cache() == tmp_path / "theirs"
    assert config.jax_compilation_cache_dir == str(tmp_path / "theirs")
