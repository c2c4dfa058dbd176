"""The JSON files of `catalog/`, read when first needed."""

from __future__ import annotations

import json
import os.path
from functools import cache
from typing import Any

from fitcheck.errors import FitCheckError

# os.path and not pathlib, whose import is a twentieth of an answer's time. Inside a wheel the data
# lie beside the code, in a checkout one folder up.
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE if os.path.isdir(f"{HERE}/catalog") else os.path.dirname(HERE), "catalog")

Row = dict[str, Any]


@cache
def read(name: str) -> Row:
    """The content of one catalog file; FitCheckError, naming it, when it is missing or damaged."""
    try:
        with open(f"{ROOT}/{name}", "rb") as file:
            content = json.load(file)
    except (OSError, ValueError) as fault:
        raise damaged(name, str(fault)) from fault
    if not isinstance(content, dict):
        raise damaged(name, "not a JSON object")
    return content


def damaged(name: str, fault: str) -> FitCheckError:
    """The error for a catalog file that is not as it was shipped."""
    return FitCheckError(
        f"the catalog file {ROOT}/{name} is damaged: {fault}",
        "reinstall FitCheck, or restore the file if you have edited it",
    )
