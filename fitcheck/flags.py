"""The command-line flags of a Plan, derived from its fields; `check`, `dryrun`, `models --fits`."""

from __future__ import annotations

import argparse
from typing import Any

from fitcheck.answer import parse
from fitcheck.plan import KNOBS, METHODS
from fitcheck.rules import flag_of

HARDWARE = ("gpu", "gpus", "nodes", "ram")


def add_plan_flags(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, several: bool = False
) -> None:
    """A flag for each field of Plan but the model. several: values by comma, checked later."""
    choices = None if several else METHODS
    parser.add_argument("--method", choices=choices, help=f"what runs ({METHODS[0]})")
    parser.add_argument("--gpu", help="a pretended, empty card; default: this machine's")
    parser.add_argument("--gpus", help="how many cards (1)")
    parser.add_argument("--nodes", help="how many machines (1)")
    parser.add_argument("--ram", help="the host's memory, such as 64gib")
    for name, knob in KNOBS.items():
        text = knob["doc"].replace("%", "%%")
        if knob["choices"]:
            text += f": {', '.join(knob['choices'])}"
        if knob["kind"] == "flag":
            parser.add_argument(flag_of(name), nargs="?", const="on", metavar="on|off", help=text)
        else:
            parser.add_argument(flag_of(name), metavar="VALUE", help=text)


def plan_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given on the command line, as values."""
    fields: dict[str, Any] = {}
    for name in ("method", *HARDWARE, *KNOBS):
        text = getattr(args, name)
        if text is not None:
            fields[name] = value_of(name, text)
    return fields


def value_of(name: str, text: str) -> Any:
    """The value of one field, as it is typed."""
    return text if name in ("method", "gpu") else parse(name, text)
