"""The command line: parse, call the library, print. It computes nothing itself, and `--help` imports no Keras."""

import io
import os
import sys
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError, Parameter

from vitreous import __version__
from vitreous.cli.features import embed, neighbours, probe
from vitreous.cli.look import explain
from vitreous.cli.measure import calibrate, evaluate
from vitreous.cli.report import report
from vitreous.cli.serve import serve
from vitreous.cli.tools import convert, models, patches, recipes
from vitreous.cli.train import draw_augmented, pretrain, train
from vitreous.cli.tune import find_lr, tune
from vitreous.cli.use import export, inspect, predict
from vitreous.errors import VitreousError
from vitreous.text import escape_text

app = App(
    name="vitreous",
    help="""Vision Transformers for your own images: train, look inside, ship.

    Start with: vitreous train digits""",
    version=__version__,
    default_parameter=Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,
)

_COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "pretrain": pretrain,
    "find-lr": find_lr,
    "tune": tune,
    "evaluate": evaluate,
    "calibrate": calibrate,
    "report": report,
    "predict": predict,
    "export": export,
    "inspect": inspect,
    "explain": explain,
    "embed": embed,
    "neighbours": neighbours,
    "probe": probe,
    "serve": serve,
    "patches": patches,
    "augment": draw_augmented,
    "convert": convert,
    "models": models,
    "recipes": recipes,
}
for _name, _command in _COMMANDS.items():
    app.command(_command, name=_name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 if it worked, 2 with one line on standard error if the input was wrong.

    Args:
        arguments: Words after `vitreous`. Default: those of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value", help_on_error=False)
    except VitreousError as error:
        code = _fail(str(error))
    except CycloptsError as error:
        code = _fail(
            f"{' '.join(str(error).split())} See: vitreous {' '.join([*(error.command_chain or ()), '--help'])}"
        )
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        code = 0
    except OSError as error:
        code = _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    print(f"Error: {escape_text(' '.join(message.split()))}", file=sys.stderr)
    return 2
