"""Masked autoencoding, on whatever backend Keras runs on."""

import keras
import numpy as np
import pytest
from layer_harness import to_numpy

from vitreous.data import Batch
from vitreous.errors import ConfigError, RunError
from vitreous.model import VisionTransformer
from vitreous.spec import InputSpec, ViTConfig
from vitreous.training.masked import MaskedAutoencoder, reconstruction_loss
from vitreous.training.optimizer import Optimizer
from vitreous.training.recipe import OptimizerConfig
from vitreous.training.step import create_step


def create(mask_rate=0.75, mask_size=1, mask_target="image", **changes):
    config = {"patch_size": 4, "projection_dim": 16, "num_blocks": 2, "num_heads": 2, "num_classes": 0, **changes}
    encoder = VisionTransformer(ViTConfig(image_size=16, **config))
    masked = {"mask_rate": mask_rate, "mask_size": mask_size, "mask_target": mask_target}
    return MaskedAutoencoder(encoder, **masked, decoder_dim=64, num_decoder_blocks=1)


def draw(count=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 16, 16, 3)).astype("float32")


def cut(images):
    """(B, 16, 16, 3) to patches (B, 16, 48)."""
    return images.reshape(-1, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, 48)


@pytest.mark.parametrize(("mask_target", "axes"), [("image", (1, 2)), ("patch", 2)])
def test_the_error_is_that_of_the_hidden_patches(mask_target, axes):
    model, images = create(mask_target=mask_target), draw()
    seen, _ = map(to_numpy, model.reconstruct(images))
    is_hidden = (cut(seen) == 0).all(axis=2)
    assert is_hidden.sum(axis=1).tolist() == [12, 12, 12]  # of 16 patches
    assert len({tuple(row) for row in is_hidden}) > 1  # each image hides others
    np.testing.assert_allclose(cut(seen)[~is_hidden], cut(images)[~is_hidden], atol=1e-6)
    model.decoder_pixels.kernel.assign(np.zeros((64, 48)))
    bias = np.linspace(-1, 1, 48)
    model.decoder_pixels.bias.assign(bias)
    patches = cut(images).astype("float64")
    wanted = (patches - patches.mean(axis=axes, keepdims=True)) / np.sqrt(patches.var(axis=axes, keepdims=True) + 1e-6)
    errors = ((wanted - bias) ** 2).mean(axis=2)
    expected = (errors * is_hidden).sum(axis=1) / 12
    np.testing.assert_allclose(to_numpy(model(images)), expected, rtol=1e-5)


@pytest.mark.parametrize("mask_target", ["image", "patch"])
def test_what_is_seen_stays_as_it_is(mask_target):
    model, images = create(mask_target=mask_target), draw()
    seen, filled = map(to_numpy, model.reconstruct(images))
    np.testing.assert_allclose(np.where(seen == 0, 0, filled), seen, atol=1e-6)
    model.decoder_pixels.kernel.assign(np.zeros((64, 48)))  # nothing but the mean is predicted
    _, filled = map(to_numpy, model.reconstruct(images))
    patches, is_hidden = cut(images), (cut(seen) == 0).all(axis=2)
    mean = patches.mean(axis=(1, 2) if mask_target == "image" else 2, keepdims=True)
    wanted = np.broadcast_to(mean, patches.shape)
    np.testing.assert_allclose(cut(filled)[is_hidden], wanted[is_hidden], atol=1e-5)


def test_squares_of_patches_are_hidden_together():
    model, images = create(mask_size=2), draw(8)
    is_hidden = (cut(to_numpy(model.reconstruct(images)[0])) == 0).all(axis=2)
    squares = is_hidden.reshape(8, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(8, 4, 4).sum(axis=2)
    assert sorted(set(squares.ravel().tolist())) == [0, 4]
    assert (squares == 4).sum(axis=1).tolist() == [3] * 8
    assert len({tuple(row) for row in squares}) > 1


@pytest.mark.parametrize(
    "changes", [{}, {"rope": "dinov3", "num_registers": 2}, {"stem": "convolution"}, {"stem": "shifted"}]
)
def test_hidden_pixels_are_not_seen(changes):
    """What is predicted does not depend on what is hidden, with any stem."""
    model, images = create(**changes), draw()
    seen, _ = map(to_numpy, model.reconstruct(images))
    other = np.where(seen == 0, draw(seed=1), images)
    first, second = (to_numpy(model._predict(x, False)[1]) for x in (images, other))
    np.testing.assert_allclose(first, second, atol=1e-5)
    visible = np.where(seen == 0, images, draw(seed=1))
    assert np.abs(to_numpy(model._predict(visible, False)[1]) - first).max() > 1e-3


def test_other_patches_are_hidden_at_each_call_in_training():
    model, images = create(), draw()
    first, second = (to_numpy(model(images, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-4
    first, second = (to_numpy(model(images)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_learns_to_fill_in():
    """Images of one colour gradient each: a few patches tell the others."""
    keras.utils.set_random_seed(0)
    model, average = create(), create()
    spec = InputSpec(image_size=16)
    config = OptimizerConfig(weight_decay=0.0)
    optimizer = Optimizer(model.trainable_variables, config, num_blocks=2)
    step = create_step(model, average, optimizer, input_spec=spec, loss=reconstruction_loss)
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 16)
    losses = []
    for _ in range(80):
        upright = rng.random((32, 1, 1, 1)) < 0.5
        images = np.where(upright, ramp[None, :, None, None], ramp[None, None, :, None]) * np.ones((1, 16, 16, 3))
        batch = Batch(images.astype("uint8"), np.full(32, -1, "int32"), np.ones(32, bool), np.arange(32))
        losses.append(float(step(batch, learning_rate=5e-3, decay=0.9)[0]))
    assert losses[0] > 0.9 and np.mean(losses[-5:]) < 0.2


def test_refuses_what_cannot_be_masked():
    with pytest.raises(ConfigError, match=r"Received: patch_size=\(4, 4\), patch_strides=\(2, 2\)"):
        create(patch_strides=2)
    with pytest.raises(ConfigError, match=r"grid_size=\(4, 4\), mask_rate=0\.99"):
        create(mask_rate=0.99)
    with pytest.raises(ConfigError, match=r"mask_rate=0\.75, mask_size=3\. Pass another"):
        create(mask_size=3)
    with pytest.raises(ConfigError, match="mask_size"):
        create(mask_size=0)


def test_pretrain_leaves_an_encoder_that_training_starts_from(tmp_path):
    import vitreous
    from vitreous.data import Dataset, ImageSet

    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 16)
    labels = rng.integers(0, 2, 80)
    images = np.where(labels[:, None, None, None] == 1, ramp[None, :, None, None], ramp[None, None, :, None]) * np.ones(
        (1, 16, 16, 3)
    )
    every = ImageSet([f"{i}" for i in range(80)], labels, arrays=images.astype("uint8"))
    splits = {"train": every.take(range(60)), "test": every.take(range(60, 80))}
    dataset = Dataset(name="ramps", root=None, class_names=("upright", "level"), splits=splits)
    options = {
        "model": "vit_pico_patch4_32",
        "image_size": (16, 16),
        "epochs": 2,
        "batch_size": 16,
        "architecture": {"num_blocks": 2},
    }
    run = vitreous.pretrain(dataset, out=tmp_path / "pre", **options)
    assert {path.name for path in run.path.iterdir()} == {
        *(
            "README.md",
            "config.toml",
            "curves.png",
            "history.csv",
            "history.jsonl",
            "metrics.json",
            "model.keras",
            "patches.png",
        ),
        "reconstruction.png",
    }
    assert run.config["data"]["num_images"] == {"train": 57, "val": 3}  # the test images are left out
    assert 0 < run.metrics["val_loss"] < 2
    encoder = run.load_model()
    assert encoder.head is None
    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    tuned = vitreous.train(dataset, out=tmp_path / "run", pretrained=run.path, epochs=1, optimizer=still)
    assert tuned.config["recipe_name"] == "few32"  # all that classes need has still to be learnt
    assert tuned.config["model"]["num_blocks"] == 2  # the encoder's, whatever the recipe's model has
    for a, b in zip(encoder.weights, tuned.load_model().weights, strict=False):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=1e-6)
    with pytest.raises(RunError, match=r"Received: a run without classes"):
        vitreous.predict(run, tmp_path / "pre" / "patches.png")


def test_pretrain_refuses_what_only_labels_need(call, tmp_path):
    import vitreous

    with pytest.raises(ConfigError, match=r"Received: loss='focal', patience_epochs=3, trained='lora'\. Leave them"):
        vitreous.pretrain("digits", loss="focal", patience_epochs=3, optimizer={"trained": "lora", "beta_2": 0.9})
    code, _, error = call("pretrain", "digits", "--out", tmp_path / "run", "--loss", "focal")
    assert code == 2 and "--loss" in error
    assert not list(tmp_path.iterdir())


def test_pretrain_drops_a_size_that_was_meant_for_another_model(tmp_path, monkeypatch):
    """As train does: a recipe file's image_size belongs to the recipe's model."""
    import vitreous
    from vitreous.training import pretrainer

    class Stop(Exception):
        pass

    def stop(images, input_spec, *args, **kwargs):
        raise Stop(input_spec.image_size)

    monkeypatch.setattr(pretrainer, "training_loader", stop)
    recipe = tmp_path / "small.toml"
    recipe.write_text('model = "vit_nano_patch4_32"\nimage_size = [16, 16]\nepochs = 1\n')
    for changes, size in (({}, 16), ({"model": "vit_pico_patch4_32"}, 32)):
        with pytest.raises(Stop, match=rf"\({size}, {size}\)"):
            vitreous.pretrain("digits", recipe=recipe, out=tmp_path / "run", **changes)
    with pytest.raises(Stop, match=r"\(24, 24\)"):
        vitreous.pretrain("digits", recipe=recipe, model="vit_pico_patch4_32", image_size=(24, 24))
