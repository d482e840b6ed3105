"""The exceptions of vitreous.

    VitreousError
    ├── ConfigError            (ValueError)         an option or an argument that cannot work
    │   └── UnknownNameError   (LookupError)        a name that no table has; offers the nearest ones
    ├── DataError              (ValueError)         a data set that cannot be used
    │   └── ImageError         (ValueError)         one image that cannot be read
    ├── MissingPathError       (FileNotFoundError)  a path that does not exist
    ├── WeightsError           (ValueError)         weights that cannot be read, or do not fit the model
    ├── RunError               (ValueError)         a folder that is not a run, or not a whole one
    │   └── RunExistsError     (FileExistsError)    a run that would be overwritten
    ├── TrainingError          (RuntimeError)       training that cannot go on
    ├── ExportError            (ValueError)         an export that cannot be read, or does not agree with its model
    ├── ClusterError           (RuntimeError)       machines that cannot be reached, or do not do their part
    ├── RequestError           (ValueError)         a request that the server refuses, with its HTTP status
    └── MissingDependencyError (ImportError)        an optional package that is not installed

Each message has four parts: what failed; what was expected; `Received: name=value`; what to do.
Only the command line and the server translate these, into an exit code or a status. Inside, a few places catch the one
kind that they can answer: loading images leaves out a broken one and names it later (`ImageError`, `MissingPathError`),
evaluating on other data, or inspecting it, does without the splits of training where there are none (`DataError`), and
starting a run overwrites a folder only if it is a run (`RunError`, `MissingPathError`).
"""

import difflib
from collections.abc import Iterable


class VitreousError(Exception):
    """Base of every error that vitreous raises on purpose.

    Attributes:
        is_of_all: Whether all processes that train together have heard of it, before the first step.
    """

    is_of_all = False


class ConfigError(VitreousError, ValueError):
    """An option or an argument has a value that cannot work."""


class UnknownNameError(ConfigError, LookupError):
    """A name is in no table.

    Args:
        kind: What was looked up, in the singular (`"model"`).
        name: The name that was not found.
        known: The names that exist; the nearest ones go into the message.
        hint: What to do to see them all.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = ""):
        nearest = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
        offer = f"Nearest: {', '.join(nearest)}. " if nearest else ""
        super().__init__(
            f"Unknown {kind}. Received: {kind}={name!r}. {offer}Expected the name of an existing {kind}. {hint}".strip()
        )
        self.nearest = nearest


class DataError(VitreousError, ValueError):
    """A data set cannot be used as it is."""


class ImageError(DataError):
    """One image cannot be read or decoded.

    Args:
        name: The file.
        reason: Why, in a few words; also the attribute `reason`.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"Cannot read the image {name}. Expected a whole image in a format that Pillow reads. Received: {reason}. "
            "Replace the file, or remove it."
        )
        self.reason = reason


class MissingPathError(VitreousError, FileNotFoundError):
    """A path does not exist."""


class WeightsError(VitreousError, ValueError):
    """Weights cannot be read, do not fit a model, or cannot be written in the format asked for."""


class RunError(VitreousError, ValueError):
    """A folder is not a run, or not a whole one."""


class RunExistsError(RunError, FileExistsError):
    """A run already exists where a new one would be written."""


class TrainingError(VitreousError, RuntimeError):
    """Training cannot go on."""


class ExportError(VitreousError, ValueError):
    """An export cannot be written or read, or answers otherwise than the model that it was made from."""


class ClusterError(VitreousError, RuntimeError):
    """Machines of a cluster cannot be reached, or do not do their part."""


class RequestError(VitreousError, ValueError):
    """A request that the server refuses.

    Args:
        status: HTTP status of the answer, 400 or more.
        message: What failed, what was expected, what was received, what to do.
        headers: More headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class MissingDependencyError(VitreousError, ImportError):
    """An optional package is not installed.

    Args:
        package: The package that is missing.
        extra: The extra of vitreous that installs it; None for a package that every install should have.
        purpose: What needs it.
    """

    def __init__(self, package: str, extra: str | None, purpose: str):
        name = f"vitreous[{extra}]" if extra else "vitreous"
        super().__init__(
            f"{purpose} cannot be used. Expected the package {package}. Received: it is not installed. "
            f"Install it with: pip install '{name}'"
        )
