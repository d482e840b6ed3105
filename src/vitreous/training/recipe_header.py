"""What a recipe file says of itself before its first value: where it comes from, and what it gave.

The comment lines at the top of a recipe are its header. Lines without a key come first and say what the recipe is for;
then, each at most once, in this order:

    # source: where its choices come from
    # command: what was run to measure it
    # hardware: on what
    # minutes: 0.83
    # accuracy: 98.15% (97.22 to 98.89, 3 seeds)

A line that begins with three spaces after the `#` goes on with the line before. The minutes are those of training, on
the wall; the accuracy is the mean, with the lowest and the highest of so many seeds, on test images unless it says
otherwise. A key that is missing was not measured.
"""

import dataclasses
import re
from dataclasses import dataclass

from vitreous.errors import ConfigError

KEYS = ("source", "command", "hardware", "minutes", "accuracy")
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class RecipeHeader:
    """What a recipe file says of itself.

    Args:
        purpose: What the recipe is for.
        source: Where its choices come from.
        command: What was run to measure it.
        hardware: On what.
        minutes: Wall-clock time of training.
        accuracy: Mean and spread over seeds.

    The last five are None where the file does not say.
    """

    purpose: str = ""
    source: str | None = None
    command: str | None = None
    hardware: str | None = None
    minutes: float | None = None
    accuracy: str | None = None

    def format(self) -> str:
        """Returns the header as comment lines, which `parse_header` reads."""
        lines = [f"# {line}" for line in self.purpose.splitlines()]
        for key in KEYS:
            value = getattr(self, key)
            if value is not None:
                text = f"{value:.3g}" if isinstance(value, float) else " ".join(value.split())
                lines.append(f"# {key}: {text}")
        return "\n".join(lines) + "\n"

    def describe(self) -> list[str]:
        """Returns the header as lines to print, a recipe's name left to the caller."""
        minutes = NOT_MEASURED if self.minutes is None else f"{self.minutes:g} minutes"
        return [
            *self.purpose.splitlines(),
            f"accuracy {self.accuracy or NOT_MEASURED}",
            f"training {minutes}{f' on {self.hardware}' if self.hardware else ''}",
            f"command  {self.command or NOT_MEASURED}",
            f"source   {self.source or 'not stated'}",
        ]


def parse_header(text: str) -> RecipeHeader:
    """Returns the header of a recipe file.

    Args:
        text: What the file holds.

    Raises:
        ConfigError: If the minutes are no number, or a key stands there twice.
    """
    purpose: list[str] = []
    values: dict[str, str] = {}
    key: str | None = None
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        content = line[1:]
        match = re.fullmatch(rf"\s*({'|'.join(KEYS)}):\s*(.*?)\s*", content)
        if match:
            key = match[1]
            if key in values:
                raise ConfigError(
                    f"Cannot read the header of a recipe. Expected each key once. Received: {key} twice. "
                    "Remove one of the lines."
                )
            values[key] = match[2]
        elif key is not None and content.startswith("   "):
            values[key] += f" {content.strip()}"
        elif content.strip():
            key = None
            purpose.append(content.strip())
    minutes = values.pop("minutes", None)
    try:
        number = None if minutes is None else float(minutes)
    except ValueError as error:
        raise ConfigError(
            f"Cannot read the header of a recipe. Expected a number of minutes. Received: minutes={minutes!r}. "
            "Write it such as 0.83."
        ) from error
    return dataclasses.replace(RecipeHeader(purpose="\n".join(purpose), minutes=number), **values)  # type: ignore[arg-type]
