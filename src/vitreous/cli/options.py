"""Options that several commands take: records as their twins, sizes, the backend."""

import dataclasses
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from vitreous.backend import keep_tensorflow_out, select_backend
from vitreous.errors import ConfigError
from vitreous.server.settings import ServerConfig
from vitreous.spec import AugmentConfig, DataConfig, ViTConfig
from vitreous.training.devices import DistributionConfig
from vitreous.training.recipe import (
    NOT_ARCHITECTURE,
    NOT_PRETRAINED,
    OPTIMIZER_NOT_PRETRAINED,
    DistillationConfig,
    MaskedConfig,
    OptimizerConfig,
    Recipe,
)

Backend = Literal["jax", "torch", "tensorflow"]
Track = Annotated[
    list[Literal["tensorboard", "mlflow", "wandb"]] | None,
    Parameter(
        help="Follow the run with TensorBoard, MLflow or Weights & Biases too; repeat for several. history.csv and "
        "history.jsonl are written anyway."
    ),
]

DATA, RECIPE, DEVICES, OPTIMIZER, DISTILLATION, AUGMENTATION, ARCHITECTURE = (
    Group.create_ordered(name)
    for name in ("Data", "Recipe", "Devices", "Optimizer", "Distillation", "Augmentation", "Architecture")
)


_SOURCES = (
    "a folder with one folder a class, with or without train/ and val/ or test/ above them; a zip or tar of such a "
    "folder; a table (.csv, .tsv, .jsonl, .parquet); WebDataset shards; what save_to_disk of Hugging Face's datasets "
    "left; the URL of one of these; or a built-in name: digits, cifar10, cifar100, mnist, fashion_mnist"
)


def describe_source(before: str, after: str = "") -> Parameter:
    """Returns the help of an argument that takes every source of images, and what else is to say of it."""
    return Parameter(help=f"{before} {_SOURCES}.{after and ' '}{after}")


def _optional(record: type, name: str, without: Sequence[str] = (), types: Mapping[str, Any] | None = None) -> Any:
    """Returns a record's twin for the command line: the same fields and help, and None for "as the recipe says".

    Records inside the record have options of their own; so have the fields named in `without`. `types` has other types
    for some fields, where the command line takes more than the record.
    """
    hints = {**typing.get_type_hints(record), **(types or {})}
    fields = [
        (field.name, hints[field.name] | None, dataclasses.field(default=None))
        for field in dataclasses.fields(record)
        if not dataclasses.is_dataclass(hints[field.name]) and field.name not in without
    ]
    twin = dataclasses.make_dataclass(name, fields, kw_only=True, frozen=True)
    twin.__module__ = __name__  # cyclopts takes classes of built-in modules for scalars
    twin.__doc__ = record.__doc__
    return twin


_BATCH = Annotated[
    int | Literal["auto"],
    Parameter(
        name=("--batch-size", "--batch"),
        help="Images per step; auto: the largest number that fits into memory and, on a CPU, makes training faster. "
        "The learning rate then goes with its square root, unless one is given.",
    ),
]

if typing.TYPE_CHECKING:
    DataOptions: typing.TypeAlias = Any
    SplitOptions: typing.TypeAlias = Any
    MaskedOptions: typing.TypeAlias = Any
    ColumnOptions: typing.TypeAlias = Any
    RecipeOptions: typing.TypeAlias = Any
    OptimizerOptions: typing.TypeAlias = Any
    PretrainRecipeOptions: typing.TypeAlias = Any
    PretrainOptimizerOptions: typing.TypeAlias = Any
    DistillationOptions: typing.TypeAlias = Any
    AugmentOptions: typing.TypeAlias = Any
    ArchitectureOptions: typing.TypeAlias = Any
    ServerOptions: typing.TypeAlias = Any
    DistributionOptions: typing.TypeAlias = Any
else:
    MaskedOptions = _optional(MaskedConfig, "MaskedOptions")
    DataOptions = _optional(DataConfig, "DataOptions", without=("num_folds",))
    SplitOptions = _optional(DataConfig, "SplitOptions", without=("num_folds", "fold"))
    ColumnOptions = _optional(
        DataConfig,
        "ColumnOptions",
        without=("val_fraction", "test_fraction", "group_column", "num_folds", "fold"),
    )
    RecipeOptions = _optional(
        Recipe, "RecipeOptions", without=("image_size", "architecture"), types={"batch_size": _BATCH}
    )
    PretrainRecipeOptions = _optional(
        Recipe,
        "PretrainRecipeOptions",
        without=("image_size", "architecture", *NOT_PRETRAINED),
        types={"batch_size": _BATCH},
    )
    OptimizerOptions = _optional(OptimizerConfig, "OptimizerOptions")
    PretrainOptimizerOptions = _optional(OptimizerConfig, "PretrainOptimizerOptions", without=OPTIMIZER_NOT_PRETRAINED)
    DistillationOptions = _optional(DistillationConfig, "DistillationOptions")
    AugmentOptions = _optional(AugmentConfig, "AugmentOptions")
    ArchitectureOptions = _optional(ViTConfig, "ArchitectureOptions", without=NOT_ARCHITECTURE)
    ServerOptions = _optional(ServerConfig, "ServerOptions")
    DistributionOptions = _optional(DistributionConfig, "DistributionOptions")


def given(options: Any) -> dict[str, Any]:
    """Returns the options that were given."""
    return {key: value for key, value in vars(options).items() if value is not None} if options else {}


def parse_size(text: str | None, name: str) -> tuple[int, int] | None:
    """Returns (vertical, horizontal) from `16` or `16x24`."""
    if text is None:
        return None
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"Cannot read --{name}. Expected a positive number or HEIGHTxWIDTH. Received: {name}={text!r}. "
            "Pass for example 224 or 192x256."
        )
    numbers = [int(part) for part in parts]
    return numbers[0], numbers[-1]


def recipe_changes(
    options: RecipeOptions | None,
    image_size: str | None,
    optimizer: OptimizerOptions | None,
    augment: AugmentOptions | None,
    architecture: ArchitectureOptions | None,
) -> dict[str, Any]:
    """Returns what differs from the recipe."""
    return {
        **given(options),
        "image_size": parse_size(image_size, "image-size"),
        "optimizer": given(optimizer) or None,
        "augment": given(augment) or None,
        "architecture": given(architecture) or None,
    }


def start_backend(backend: str | None) -> None:
    """Settles the Keras backend and says which and why, in one line on standard error."""
    name, reason = select_backend(backend)
    print(f"Backend  {name} ({reason})", file=sys.stderr, flush=True)
    if name != "tensorflow":
        keep_tensorflow_out()


def start_devices(options: DistributionOptions | None, backend: str | None) -> DistributionConfig:
    """Settles the backend, jax where several devices or processes are asked for, and joins the other processes."""
    config = DistributionConfig(**given(options))
    if config.ray is not None and backend not in (None, "jax"):
        raise ConfigError(
            f"Cannot train on Ray with the {backend} backend. Expected jax, the only one of these that Keras spreads "
            f"over devices. Received: backend={backend!r}. Leave --backend out."
        )
    if config.is_several and not backend and "KERAS_BACKEND" not in os.environ:
        backend = "jax"
    start_backend(backend)
    if config.ray is None and (config.coordinator, config.num_processes, config.process_id) != (None, None, None):
        from vitreous.training.distribute import join_processes

        join_processes(config.coordinator, num_processes=config.num_processes, process_id=config.process_id)
    return config
