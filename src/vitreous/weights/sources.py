"""Where weights come from: a file or a folder on disk, or a model of the Hugging Face hub through its cache."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitreous.errors import MissingDependencyError, MissingPathError, WeightsError

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
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    model: str | None = None


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


def _beside(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what describes a file of weights: NAME.json, or the config.json of its folder, and the preprocessor."""
    stem = path.name.removesuffix(".index.json").removesuffix(path.suffix).removesuffix(".weights")
    config: dict[str, Any] = {}
    for candidate in (path.with_name(f"{stem}.json"), path.with_name("config.json")):
        if candidate.is_file() and candidate != path:
            config = read_json(candidate)
            break
    preprocessor = path.with_name("preprocessor_config.json")
    return config, read_json(preprocessor) if preprocessor.is_file() else {}


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
        return _fetch(text, repository, revision or None, model=repository.removeprefix("timm/").partition(".")[0])
    raise MissingPathError(
        "Cannot import weights. Expected a file, a folder, hf:OWNER/NAME[@REVISION] or timm/NAME.TAG. "
        f"Received: source={text!r}, which does not exist. Check the path."
    )


def _fetch(name: str, repository: str, revision: str | None, model: str | None = None) -> Source:
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
        config, preprocessor = (
            read_json(path) if (path := _optional(get, file, errors)) else {}
            for file in ("config.json", "preprocessor_config.json")
        )
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
    return Source(name, weights, config, preprocessor, model)


def _optional(get: Any, file: str, errors: Any) -> Path | None:
    try:
        return get(file)
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        return None  # the weights were in the cache and this was not: they go without it
