import copy
import pickle

import numpy as np
import pytest

from vitreous.errors import ConfigError, UnknownNameError
from vitreous.spec import AugmentConfig, DataConfig, InputSpec, ModelSpec, ViTConfig
from vitreous.training.recipe import OptimizerConfig, Recipe

WRONG = [
    (Recipe, {"epochs": "5"}, "epochs. Expected an integer, or None. Received: epochs='5'. Pass it without quotes."),
    (Recipe, {"epochs": 2.5}, "epochs. Expected an integer, or None. Received: epochs=2.5. Pass such a value."),
    (Recipe, {"model": 5}, "model. Expected text. Received: model=5. Pass such a value."),
    (Recipe, {"batch_size": True}, "batch_size. Expected an integer. Received: batch_size=True. Pass such a value."),
    (
        Recipe,
        {"optimizer": 5},
        "optimizer. Expected a record OptimizerConfig (in TOML, a table of its fields). Received: optimizer=5. "
        "Pass such a value.",
    ),
    (
        Recipe,
        {"precision": "float16"},
        "precision. Expected 'auto', 'float32' or 'bfloat16'. Received: precision='float16'. Pass one of them.",
    ),
    (
        Recipe,
        {"architecture": 3},
        "architecture. Expected a table of names and values. Received: architecture=3. Pass such a value.",
    ),
    (
        Recipe,
        {"image_size": "32"},
        "image_size. Expected an integer, or two (vertical, horizontal), or None. Received: image_size='32'. "
        "Pass it without quotes.",
    ),
    (
        OptimizerConfig,
        {"learning_rate": "1e-3"},
        "learning_rate. Expected a number. Received: learning_rate='1e-3'. Pass it without quotes.",
    ),
    (ViTConfig, {"num_blocks": 2.5}, "num_blocks. Expected an integer. Received: num_blocks=2.5. Pass such a value."),
    (ViTConfig, {"num_blocks": None}, "num_blocks. Expected an integer. Received: num_blocks=None. Pass such a value."),
    (ViTConfig, {"num_heads": "3"}, "num_heads. Expected an integer. Received: num_heads='3'. Pass it without quotes."),
    (ViTConfig, {"mlp_dim": "64"}, "mlp_dim. Expected an integer. Received: mlp_dim='64'. Pass it without quotes."),
    (
        ViTConfig,
        {"use_class_token": 1},
        "use_class_token. Expected True or False. Received: use_class_token=1. Pass such a value.",
    ),
    (
        ViTConfig,
        {"pooling": ["mean"]},
        "pooling. Expected 'class', 'mean', 'map' or 'class_mean'. Received: pooling=",
    ),
    (
        ViTConfig,
        {"rope_reference_grid": (1, 2, 3)},
        "rope_reference_grid. Expected an integer, or two (vertical, horizontal). "
        "Received: rope_reference_grid=(1, 2, 3). Pass such a value.",
    ),
    (InputSpec, {"mean": 0.5}, "mean. Expected a list of numbers. Received: mean=0.5. Pass such a value."),
    (
        AugmentConfig,
        {"crop_scale": ("a", "b")},
        "crop_scale. Expected a list of 2 numbers. Received: crop_scale=('a', 'b'). Pass such a value.",
    ),
]


@pytest.mark.parametrize(("record", "values", "message"), WRONG)
def test_values_of_another_type_are_refused(record, values, message):
    for create in (lambda: record(**values), lambda: record.from_dict(values), lambda: record().replace(**values)):
        with pytest.raises(ConfigError) as caught:
            create()
        assert str(caught.value).startswith(f"Cannot use {message}")


def test_nested_records_are_checked_too():
    with pytest.raises(ConfigError, match=r"Cannot use learning_rate\. Expected a number\. Received: .*'fast'"):
        Recipe.from_dict({"optimizer": {"learning_rate": "fast"}})
    with pytest.raises(
        ConfigError, match=r"Cannot use config\. Expected a record ViTConfig .* Received: config=\{\}\."
    ):
        ModelSpec(name="vit", config={}, input=InputSpec())  # type: ignore[arg-type]


def test_values_that_a_record_settles_stay_good():
    config = ViTConfig(
        image_size=32, patch_size=[8, 4], patch_strides=None, mlp_dim=None, rope_temperature=None, rope_reference_grid=7
    )  # type: ignore[arg-type]
    assert (config.image_size, config.patch_size, config.patch_strides) == ((32, 32), (8, 4), (8, 4))
    assert (config.mlp_dim, config.rope_temperature, config.rope_reference_grid) == (3072, 10000.0, (7, 7))
    assert ViTConfig(num_classes=np.int64(3), layer_scale=0).num_classes == 3  # type: ignore[arg-type]
    assert Recipe(image_size=None, epochs=None, time="9s").budget_seconds == 9
    assert AugmentConfig(crop_scale=[1, 1]).crop_scale == (1.0, 1.0)  # type: ignore[arg-type]
    assert InputSpec(mean=[0, 0, 1]).mean == (0.0, 0.0, 1.0)  # type: ignore[arg-type]


def test_records_can_be_copied_and_pickled():
    recipe = Recipe(epochs=3)
    assert copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe)) == recipe


def test_unknown_names_say_what_was_expected():
    with pytest.raises(UnknownNameError) as caught:
        ViTConfig.from_dict({"num_head": 3})
    assert str(caught.value).startswith(
        "Unknown key of ViTConfig. Received: key of ViTConfig='num_head'. Nearest: num_heads"
    )
    assert ". Expected the name of an existing key of ViTConfig. Keys: image_size, " in str(caught.value)
    error = UnknownNameError("model", 5, ["vit"], "List them all.")  # type: ignore[arg-type]
    assert str(error) == "Unknown model. Received: model=5. Expected the name of an existing model. List them all."


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"val_fraction": 1},
            "Cannot use val_fraction. Expected a share in [0, 1). Received: val_fraction=1. Pass one",
        ),
        ({"test_fraction": -0.1}, "Received: test_fraction=-0.1."),
        (
            {"val_fraction": 0.5, "test_fraction": 0.5},
            "Expected val_fraction + test_fraction below 1. Received: val_fraction=0.5, test_fraction=0.5. Pass",
        ),
        ({"label_separator": ""}, "Cannot use label_separator. Expected at least one character."),
        ({"num_folds": 1}, "Cannot use num_folds. Expected at least 2. Received: num_folds=1. Pass 5 or 10."),
        ({"fold": 1}, "Cannot use fold. Expected num_folds beside it. Received: fold=1, num_folds=None."),
        ({"num_folds": 3, "fold": 4}, "Expected a fold from 1 to 3. Received: fold=4. Count folds from 1."),
        ({"label_column": 3}, "Cannot use label_column."),
    ],
)
def test_data_config_refuses(values, message):
    with pytest.raises(ConfigError) as caught:
        DataConfig(**values)
    assert message in str(caught.value)


def test_data_config_round_trip():
    config = DataConfig(val_fraction=0, label_column="species", num_folds=5, fold=5)
    assert DataConfig.from_dict(config.to_dict()) == config
