"""An unfinished run taken up again: by the same command, or by its name alone."""

import json
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from vitreous.data import BUILT_IN, Dataset
from vitreous.errors import ConfigError, DataError, MissingPathError, RunError, RunExistsError, VitreousError
from vitreous.spec import Record
from vitreous.training.checkpoint import Checkpoints
from vitreous.training.devices import CheckpointKind, DistributionConfig
from vitreous.training.distribute import Layout, create_layout
from vitreous.training.planning import free_path, without_none
from vitreous.training.progress import Reporter
from vitreous.training.recipe import Interval, MaskedConfig, Recipe, parse_interval
from vitreous.training.run import Resume, Run, RunWriter, load_run, partial_folder
from vitreous.training.sharded import ShardedCheckpoints, check_orbax
from vitreous.training.trackers import Trackers

# Options that change no number of a run.
_FREE = ("recipe.checkpoint_every", "recipe.keep_checkpoints", "recipe.on_nan", "recipe.cache", "recipe.max_bad")
FREE_ARGUMENTS = (
    *("checkpoint_every", "keep_checkpoints", "on_nan", "cache", "max_bad", "devices", "parallel", "checkpoints"),
    "track",
)
_NOT_OPTIONS = (*_FREE, "command", "recipe_name", "data.root", "data.notes")
_NOT_CALLED = ("out", "resume", "reporter")
_PLACES = ("data", "recipe", "pretrained", "teacher")  # arguments that may be paths
_MAX_NAMED = 6  # differences that an error lists


def resume(
    path: str | Path,
    *,
    data: str | Path | Dataset | None = None,
    task: str | None = None,
    reporter: Reporter | None = None,
    **changes: Any,
) -> Run:
    """Continues a run that was killed, from its last checkpoint: `train` or `pretrain` is called as it was.

    Args:
        path: Where the finished run was to be: `out` of the call.
        data: The data, where they can no longer be found as they were, or came from Python. They must be the same.
        task: `"train"` or `"pretrain"`, where it must be that. Default: whichever it is.
        reporter: Where progress is shown. Default: nowhere.
        **changes: Options that change no result, such as `checkpoint_every`; any other must be as it was.

    Returns:
        The run. Trained for epochs, on the same hardware, backend and versions, it is bit for bit what it would have
        become without the interruption; a time budget goes on with what is left of it.

    Raises:
        MissingPathError: If no run was begun there.
        RunError: If the run is finished, or none of its checkpoints is whole.
        ConfigError: If an option differs.
        DataError: If the data have changed.
    """
    from vitreous.training.pretrainer import pretrain
    from vitreous.training.trainer import train

    call = read_call(path)
    found = call.pop("task")
    if task not in (None, found):
        raise ConfigError(
            f"Cannot resume {path}. Expected a run of `vitreous {task}`. Received: task={found}. "
            f"Resume it with: vitreous {found} --resume {path}."
        )
    data = data if data is not None else call["data"]
    if data is None:
        raise ConfigError(
            f"Cannot resume {path}. Expected the data, which came from Python. Received: data=None. Pass the Dataset."
        )
    if changes.get("devices") == 1:
        call.pop("parallel", None)  # one device shares nothing
    for name, value in changes.items():
        nests = isinstance(call.get(name), dict) and isinstance(value, dict)
        call[name] = {**call[name], **value} if nests else value
    if isinstance(call.get("masked"), dict):
        call["masked"] = MaskedConfig.from_dict(call["masked"])
    if isinstance(call.get("recipe"), dict):
        call["recipe"] = Recipe.from_dict(call["recipe"])
    run = pretrain if found == "pretrain" else train
    return run(**{**call, "data": data}, out=path, reporter=reporter, resume="only")


def describe_call(task: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a call of `train` or `pretrain` was given, fit for JSON: what `resume` calls it with again.

    Args:
        task: `"train"` or `"pretrain"`.
        arguments: Its arguments by name, with those of `**changes` beside them.
    """
    call: dict[str, Any] = {"task": task}
    for name, value in arguments.items():
        if isinstance(value, Record):
            value = value.to_dict()
        if name == "data" and isinstance(value, Dataset):
            call[name] = None
        elif name not in _NOT_CALLED and value is not None and _is_plain(value):
            call[name] = _absolute(name, value)
    return call


def _is_plain(value: Any) -> bool:
    """Whether a value is fit for JSON; what is not, such as a tracker of one's own, changes no number of a run."""
    try:
        json.dumps(value, default=str if isinstance(value, Path) else None)
    except TypeError:
        return False
    return True


def batch_of(out: str | Path | None, resume: Resume, recipe: Recipe, *, is_rate_given: bool) -> Recipe | None:
    """Returns a recipe with the batch size, and what it decides, that the unfinished run at `out` was begun with.

    None where there is no such run: the batch size is then still to be found.
    """
    if out is None or resume == "never":
        return None
    found = Checkpoints(partial_folder(out) / "checkpoints", interval=Interval()).load_config()
    if found is None:
        return None
    before = Recipe.from_dict(found["recipe"])
    rate = recipe.optimizer.learning_rate if is_rate_given else before.optimizer.learning_rate
    optimizer = recipe.optimizer.replace(learning_rate=rate)
    return recipe.replace(batch_size=before.batch_size, optimizer=optimizer)


def _absolute(name: str, value: Any) -> Any:
    """Returns an argument fit for JSON; one that names a file or folder does so wherever the run is resumed from."""
    if isinstance(value, Path):
        return str(value.absolute())
    if not isinstance(value, str) or name not in _PLACES or not Path(value).exists():
        return value
    # A bare name of a data set or of a recipe is never a path.
    has_own_meaning = {"data": value in BUILT_IN, "recipe": not value.endswith(".toml")}.get(name, False)
    return value if has_own_meaning else str(Path(value).absolute())


def read_call(path: str | Path) -> dict[str, Any]:
    """Reads what the unfinished run at `path` was asked for, as `describe_call` has it. Errors as for `resume`."""
    folder = partial_folder(path)
    file = folder / "call.json"
    what = f"Cannot resume {path}."
    if not folder.is_dir():
        try:
            load_run(path)
        except MissingPathError as error:
            raise MissingPathError(
                f"{what} Expected an unfinished run. Received: nothing at {folder}. Check the path: it is the --out of "
                "the run."
            ) from error
        raise RunError(f"{what} Expected an unfinished run. Received: a finished one. There is nothing left to do.")
    try:
        call = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(call, dict) or call.get("task") not in ("train", "pretrain"):
            raise ValueError("it is of no call")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{what} Expected {file}, which says what the run was asked for. Received: {error}. "
            "Give the command of the run again instead."
        ) from error
    return {"data": None, **call}


def open_checkpoints(
    writer: RunWriter,
    config: dict[str, Any],
    recipe: Recipe,
    *,
    resume: Resume,
    reporter: Reporter,
    layout: Layout,
    kind: CheckpointKind | None = None,
) -> tuple[Checkpoints, dict[str, Any]]:
    """Returns the checkpoints of a run, after comparing what is asked for with what lies there, and its configuration.

    Args:
        writer: Of the run.
        config: As `describe_run` has it.
        recipe: As it was settled.
        resume: As `train` was given it.
        reporter: Where it is said what is done.
        layout: The processes that train.
        kind: `"whole"` or `"sharded"`. Default: whole.

    Returns:
        The checkpoints, and `config`; of a run that is resumed with the command that began it.

    Raises:
        ConfigError: If an option differs, and the run may not begin anew.
        DataError: If the data do.
    """
    plain = tomllib.loads(tomli_w.dumps(without_none(config)))
    options: dict[str, Any] = {
        "interval": parse_interval(recipe.checkpoint_every),
        "keep": recipe.keep_checkpoints,
        "config": plain,
        "report": reporter.warn,
    }
    if kind == "sharded":
        checkpoints: Checkpoints = ShardedCheckpoints(writer.checkpoints, layout=layout, **options)
    else:
        checkpoints = Checkpoints(writer.checkpoints, **options)
    found = checkpoints.load_config()
    if found is None:
        if resume == "only":
            reporter.note("Resumed  before the first checkpoint: training begins at its start")
        return checkpoints, config
    try:
        _check_same(writer.path, found, plain, reporter)
    except (ConfigError, DataError) as error:
        if not writer.overwrite or resume == "only":
            raise
        reporter.warn(f"{error} It may be overwritten: the unfinished run is removed, and this one begins anew.")
        writer.clear()
        return checkpoints, config
    config = {**config, "command": found.get("command", config["command"])}
    checkpoints.config = {**plain, "command": config["command"]}
    return checkpoints, config


def open_writer(out: str | Path | None, name: str, *, overwrite: bool, resume: Resume, reporter: Reporter) -> RunWriter:
    """Returns the writer of a run at `out`, or at the first free `runs/NAME-N`. Errors as for `RunWriter`."""
    while True:
        try:
            place = free_path(name, reporter) if out is None else out
            return RunWriter(place, overwrite=overwrite, resume=resume, report=reporter.warn)
        except RunExistsError:
            if out is not None:
                raise  # else another process has just begun there


def train_together(prepare: Callable[..., Run], call: Mapping[str, Any], changes: dict[str, Any]) -> Run:
    """Calls what trains, on the devices and in the processes that were asked for; the first process alone is heard.

    Args:
        prepare: Settles everything and trains: `prepare(call, changes, layout, reporter, trackers, out=, resume=)`.
        call: The arguments of `train` or `pretrain`.
        changes: Those that change the recipe.
    """
    layout = create_layout(call["devices"], call["parallel"])
    reporter, track = (call["reporter"], call["track"]) if layout.is_first else (None, ())
    reporter = reporter or Reporter()
    with layout.together(), _place_of_process(layout, call["out"], call["resume"]) as (out, resume):
        if DistributionConfig(checkpoints=call["checkpoints"]).checkpoints == "sharded":  # says what is neither
            check_orbax()
        return prepare(call, changes, layout, reporter, Trackers(track, reporter), out=out, resume=resume)


@contextmanager
def _place_of_process(
    layout: Layout, out: str | Path | None, resume: Resume
) -> Iterator[tuple[str | Path | None, Resume]]:
    """Yields where this process writes, and what it resumes: only the first one's run is kept, and read again."""
    if layout.is_first:
        yield out, resume
        return
    with tempfile.TemporaryDirectory(prefix="vitreous-process-") as folder:
        yield Path(folder, "run"), "never"


@contextmanager
def unfinished(writer: RunWriter, reporter: Reporter, trackers: Trackers) -> Iterator[None]:
    """Keeps what an unfinished run can be continued from when its block is left by an exception, and says how.

    Raises:
        RunError: Instead of an `OSError` of the disk.
    """
    try:
        yield
    except BaseException as error:
        reporter.close()
        trackers.fail()
        left = writer.keep()
        if isinstance(error, OSError) and not isinstance(error, VitreousError):
            reason = error.strerror or str(error)
            raise RunError(
                f"Cannot write the run {writer.path}. Expected room, and the right to write. Received: {reason}. "
                f"Make room, then {left or 'train again'}."
            ) from error
        if left:
            reporter.warn(f"The run was not finished; {left}.")
        raise


def _check_same(path: Path, old: dict[str, Any], new: dict[str, Any], reporter: Reporter) -> None:
    what = f"Cannot resume {path}."
    remedy = "or start anew with --no-resume (resume='never')."
    before, now = _flatten(old), _flatten(new)
    # Options that are newer than the run: it had their defaults.
    before = {**_flatten({"recipe": without_none(Recipe().to_dict())}), **before}
    for values in (before, now):  # "jax 0.10.2": another version is said, another backend refused
        values["backend"] = str(values.get("versions.backend")).split()[0]
        values["policy"] = values.pop("versions.policy", None)
    differing = [name for name in dict.fromkeys([*now, *before]) if before.get(name) != now.get(name)]
    has_split_alike = not any(name == "seed" or name.startswith("data.split.") for name in differing)
    if "data.fingerprint" in differing and has_split_alike:
        raise DataError(
            f"{what} Expected the data that it began with, fingerprint={str(before.get('data.fingerprint'))[:12]}. "
            f"Received: fingerprint={str(now.get('data.fingerprint'))[:12]}: images or labels have been added, removed "
            f"or changed. Restore them, {remedy}"
        )
    key = "teacher_fingerprint"
    if key in before and key in differing and "teacher" not in differing:  # runs of 0.1.0 do not say
        raise ConfigError(
            f"{what} Expected the teacher that it began with, {key}={before[key][:12]}. "
            f"Received: {key}={str(now.get(key))[:12]}: other weights lie at {before['teacher']}. "
            f"Restore them, {remedy}"
        )
    data = ("data.num_images.", "data.class_names", "data.fingerprint", "data.split.seed")
    found = ("versions.", "distribution.", key, *data)
    names = [name for name in differing if name not in _NOT_OPTIONS and not name.startswith(found)]
    if names:
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        raise ConfigError(
            f"{what} Expected the options that it began with: {_say(names, before)}. "
            f"Received: {_say(names, now)}{more}. Give the same ones, {remedy}"
        )
    for prefix, how in (("versions.", "with other versions"), ("distribution.", "on other devices")):
        changed = [
            f"{name.removeprefix(prefix)} {before.get(name)}, now {now.get(name)}"
            for name in differing
            if name.startswith(prefix)
        ]
        if changed:
            reporter.warn(
                f"The run was begun {how} ({'; '.join(changed)}): its numbers may come out a little different."
            )


def _say(names: list[str], values: dict[str, Any]) -> str:
    return ", ".join(f"{name.removeprefix('recipe.')}={values.get(name)!r}" for name in names[:_MAX_NAMED])


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested tables as one, under names with dots; `data.notes` and the like stay lists."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
