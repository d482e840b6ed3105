"""Where weights come from: a file or a folder on disk, or a model of the Hugging Face hub through its cache."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.errors import MissingDependencyError, MissingPathError, UnknownNameError, VitreousError, WeightsError
from vitreous.registry import list_weights
from vitreous.weights import huggingface
from vitreous.weights.tensors import Entry

# In a folder or on the hub, the first of these that is there.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.keras",
)
MAX_CONFIG_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Source:
    """Weights that were found.

    Args:
        name: What the user asked for.
        path: The file of weights, or the index of several.
        config: What the config.json beside it holds; empty where there is none.
        preprocessor: What the preprocessor_config.json beside it holds.
        model: A model's name, where the source itself tells it.
        config_path: The file that `config` was read from; None where there is none.
        preprocessor_path: The file that `preprocessor` was read from; None where there is none.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    model: str | None = None
    config_path: Path | None = None
    preprocessor_path: Path | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        WeightsError: If it is damaged or too large, or holds no object.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}")
    except (ValueError, RecursionError, OSError) as error:
        raise WeightsError(
            f"Cannot read {path}. Expected a JSON object. Received: {error}. Get the file again."
        ) from error
    return values


@contextlib.contextmanager
def describing(found: Source, member: str = "") -> Iterator[None]:
    """Turns what a description of the wrong types raises, while it is read, into an error that names its file.

    Args:
        found: The source that is read.
        member: The description within the file of weights, where it lies there.

    Raises:
        WeightsError: If a value cannot be used.
    """
    try:
        yield
    except VitreousError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        path = found.config_path or found.path
        if not member and found.preprocessor_path is not None:
            try:
                huggingface.read_preprocessor(found.preprocessor)
            except Exception:  # this one is the culprit
                path = found.preprocessor_path
        where = f"{member} in {path}" if member else str(path)
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise WeightsError(
            f"Cannot read {where}. Expected a description of a model with values of the right types. Received: one "
            f"that cannot be used ({type(error).__name__}: {reason}). Correct the file, or get it again."
        ) from error


def watched(entries: Mapping[str, Entry], name: str, notes: list[str]) -> dict[str, Entry]:
    """Returns tensors that are known to be floats, and of which a note tells when not all numbers are finite.

    Args:
        entries: The tensors that a model may read.
        name: The source, for the error.
        notes: Gets a line for each tensor with infinities or NaN, once it is read.

    Raises:
        WeightsError: If one is of integers or booleans.
    """
    if wrong := [f"{key} of type {x.dtype}" for key, x in entries.items() if x.dtype.lower().startswith(_NOT_FLOAT)]:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise WeightsError(
            f"Cannot import {name}. Expected weights of a floating-point type. Received: {wrong[0]}{more}. Quantised "
            "weights are not read; get the file in float32, float16 or bfloat16."
        )

    def reader(key: str, entry: Entry) -> Entry:
        def read() -> np.ndarray:
            values = entry.read()
            if values.size and not np.isfinite([values.min(), values.max()]).all():
                note = f"{key} holds {int((~np.isfinite(values)).sum())} numbers that are infinite or NaN"
                if note not in notes:
                    notes.append(note)
            return values

        return entry._replace(read=read)

    return {key: reader(key, entry) for key, entry in entries.items()}


_NOT_FLOAT = ("i", "u", "bool", "q", "complex")  # types as safetensors, NumPy and torch write them, in small letters


def _beside(path: Path) -> tuple[dict[str, Any], dict[str, Any], None, Path | None, Path | None]:
    """Returns what describes a file of weights: NAME.json, or the config.json of its folder, and the preprocessor.

    These are the fields of `Source` after the path.
    """
    stem = path.name.removesuffix(".index.json").removesuffix(path.suffix).removesuffix(".weights")
    config: dict[str, Any] = {}
    config_path = None
    for candidate in (path.with_name(f"{stem}.json"), path.with_name("config.json")):
        if candidate.is_file() and candidate != path:
            config, config_path = read_json(candidate), candidate
            break
    preprocessor = path.with_name("preprocessor_config.json")
    if not preprocessor.is_file():
        return config, {}, None, config_path, None
    return config, read_json(preprocessor), None, config_path, preprocessor


def locate(source: str | Path) -> Source:
    """Finds weights, and fetches them from the hub where the source says so.

    Args:
        source: A file; a folder; `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`; `timm/NAME.TAG`.

    Raises:
        MissingPathError: If a path does not exist.
        WeightsError: If a folder has no weights, or the hub cannot give them.
        MissingDependencyError: If huggingface_hub is needed and not installed.
    """
    text = str(source)
    path = Path(source)
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        singles = sorted([*path.glob("*.safetensors"), *path.glob("*.npz"), *path.glob("*.keras")])
        if not files and len(singles) != 1:
            raise WeightsError(
                f"Cannot import {text}. Expected a folder with {', '.join(WEIGHT_FILES)} or one other file of weights. "
                f"Received: {', '.join(x.name for x in singles) or 'none of them'}. Pass the file itself."
            )
        path = (files or singles)[0]
        return Source(text, path, *_beside(path))
    if path.is_file():
        return Source(text, path, *_beside(path))
    if text.startswith("hf:"):
        repository, _, revision = text.removeprefix("hf:").partition("@")
        return _fetch(text, repository, revision or None)
    if text.startswith("timm/"):
        repository, _, revision = text.partition("@")
        name = repository.removeprefix("timm/")
        try:
            repository = list_weights(name)[0].hub_id if "." in name else repository
            is_known = "." in name
        except UnknownNameError:
            is_known = False  # a model of the hub that the registry does not have, or a new tag
        return _fetch(text, repository, revision or None, model=name.partition(".")[0], is_known=is_known)
    raise MissingPathError(
        "Cannot import weights. Expected a file, a folder, hf:OWNER/NAME[@REVISION] or timm/NAME.TAG. "
        f"Received: source={text!r}, which does not exist. Check the path."
    )


def _fetch(
    name: str, repository: str, revision: str | None, model: str | None = None, is_known: bool = False
) -> Source:
    """Fetches a model; where it `is_known`, the registry's name goes before the one that its config has."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingDependencyError("huggingface_hub", "hub", f"The source {name}") from error
    what = f"Cannot fetch {name}."
    unreachable: Exception | None = None

    def get(file: str) -> Path | None:
        """Returns the file in the cache, fetched if need be; None if the model has no such file."""
        is_offline = unreachable is not None  # one long wait for the network is enough
        try:
            return Path(
                huggingface_hub.hf_hub_download(repository, file, revision=revision, local_files_only=is_offline)
            )
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            return None

    try:
        weights = None
        for file in WEIGHT_FILES[:4]:
            try:
                weights = get(file)
            except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
                unreachable = unreachable or error  # offline, another of the files may be in the cache
                continue
            if weights:
                break
        if weights is None and unreachable:
            raise unreachable
        if weights is None:
            raise WeightsError(
                f"{what} Expected one of {', '.join(WEIGHT_FILES[:4])}. Received: a model on the hub without them. "
                "Download its weights yourself, and pass the file."
            )
        if weights.name.endswith(".index.json"):
            parts = sorted(set(read_json(weights).get("weight_map", {}).values()))
            for part in parts:
                if get(str(part)) is None:
                    raise WeightsError(
                        f"{what} Expected {part}, which the index names. Received: no such file on the hub. "
                        "Pass another revision."
                    )
        paths = [_optional(get, file, errors) for file in ("config.json", "preprocessor_config.json")]
        config, preprocessor = (read_json(path) if path else {} for path in paths)
        if is_known and config.get("architecture"):  # one file may serve two models, such as those with QuickGELU
            config["architecture"] = model
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{what} Expected access to the model. Received: it is gated. Accept its licence on "
            f"https://huggingface.co/{repository} and log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(
            f"{what} Expected a revision of the model. Received: revision={revision!r}. Check its name on "
            f"https://huggingface.co/{repository}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{what} Expected a model on the hub. Received: repository={repository!r}, which is not there or is "
            "private. Check the name, or log in with: hf auth login"
        ) from error
    except errors.HFValidationError as error:
        raise WeightsError(
            f"{what} Expected hf:OWNER/NAME[@REVISION]. Received: repository={repository!r}. Check the name."
        ) from error
    except WeightsError:
        raise
    except Exception as error:  # whatever the network and its clients raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise WeightsError(
            f"{what} Expected the Hugging Face hub, or the model in its cache. Received: {reason}. Offline, either "
            f"fill the cache where there is a network (hf download {repository}) and copy it ($HF_HOME), or copy the "
            "model's files into a folder and pass the folder."
        ) from error
    return Source(name, weights, config, preprocessor, model, *paths)


def _optional(get: Any, file: str, errors: Any) -> Path | None:
    try:
        return get(file)
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        return None  # the weights were in the cache and this was not: they go without it
