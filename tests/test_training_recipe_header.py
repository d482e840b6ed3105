import re

import pytest

from vitreous.errors import ConfigError
from vitreous.training.recipe import list_recipes, load_header
from vitreous.training.recipe_header import KEYS, NOT_MEASURED, RecipeHeader, parse_header

WHOLE = """\
# Cats and dogs.
# From scratch.
#
# source: a book,
#   page 3
# command: vitreous train x
# hardware: 2 cores
# minutes: 12.5
# accuracy: 98.15% (97.22 to 98.89, 3 seeds)
model = "m"
# minutes: 7
"""


def test_header_is_read_and_written():
    header = parse_header(WHOLE)
    assert header == RecipeHeader(
        purpose="Cats and dogs.\nFrom scratch.",
        source="a book, page 3",
        command="vitreous train x",
        hardware="2 cores",
        minutes=12.5,
        accuracy="98.15% (97.22 to 98.89, 3 seeds)",
    )
    assert parse_header(header.format()) == header
    assert header.describe() == [
        "Cats and dogs.",
        "From scratch.",
        "accuracy 98.15% (97.22 to 98.89, 3 seeds)",
        "training 12.5 minutes on 2 cores",
        "command  vitreous train x",
        "source   a book, page 3",
    ]


def test_what_is_missing_was_not_measured():
    header = parse_header('# Birds.\nmodel = "m"\n')
    assert [getattr(header, key) for key in KEYS] == [None] * 5
    assert header.describe() == [
        "Birds.",
        f"accuracy {NOT_MEASURED}",
        f"training {NOT_MEASURED}",
        f"command  {NOT_MEASURED}",
        "source   not stated",
    ]
    assert parse_header("") == RecipeHeader()


def test_a_header_that_cannot_be_read():
    with pytest.raises(ConfigError, match=r"Expected a number of minutes\. Received: minutes='ten'"):
        parse_header("# x\n# minutes: ten\n")
    with pytest.raises(ConfigError, match=r"Expected each key once\. Received: source twice"):
        parse_header("# source: a\n# source: b\n")


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_says_what_it_is_and_what_it_gave(name):
    header = load_header(name)
    assert header.purpose
    assert header.source
    measured = [header.command, header.hardware, header.minutes, header.accuracy]
    assert all(measured) or not any(measured), "what was measured says how, on what and how long"
    if header.accuracy:
        assert header.command.startswith(("vitreous ", "python benchmarks/"))
        assert re.match(r"\d+(\.\d+)?%.* \(.*\d seeds?\)$", header.accuracy)
