"""Seconds that `fitcheck bench` measured of the same plan on the same card, in place of estimates.

    with_timings(report).speed.source       # "measured" where such a record was saved

Records are the files that bench saves: in a checkout in catalog/measurements/, else in the user's
data folder. They are untrusted input: bounded, and what is not as expected is passed over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fitcheck import files
from fitcheck.plan import Plan
from fitcheck.report import Report
from fitcheck.speed import measured_speed

LARGEST_FILE = 4 * 2**20
SOURCE = "fitcheck bench"
APART = {"memory", "ram"}  # fields of a plan that change no second


def with_timings(report: Report) -> Report:
    """The report with measured seconds where a record has them; the same report otherwise."""
    found = measured_seconds(report.plan)
    if found is None:
        return report
    seconds, date = found
    if not {phase.name for phase in report.phases} - {"load"} <= seconds.keys():
        return report  # half measured, half guessed would be neither
    phases = tuple([p._replace(seconds=seconds.get(p.name, p.seconds)) for p in report.phases])
    speed = measured_speed(report.plan, phases, f"{SOURCE}, {date}")
    return replace(report, phases=phases, speed=speed) if speed else report


def measured_seconds(plan: Plan) -> tuple[dict[str, float], str] | None:
    """(seconds of each phase in one step, the day) of the newest record of this plan."""
    found = [record for path in _candidates(plan) for record in _records(path, plan)]
    return max(found, key=lambda record: record[1], default=None)


def folder() -> str:
    """Where bench saves records: in a checkout its catalog, else the user's data folder."""
    if not os.path.isdir(f"{files.HERE}/catalog"):
        return f"{files.ROOT}/measurements"
    from platformdirs import user_data_dir  # an answer in a checkout need not wait for it

    return f"{user_data_dir('fitcheck', appauthor=False)}/measurements"


def _candidates(plan: Plan) -> Iterator[str]:
    """Files that are named after this method and model: CARD-DAY-METHOD-MODEL-KEY.json."""
    middle = f"-{plan.method}-{slug(plan.model.id)}-"
    where = folder()
    try:
        names = os.listdir(where)
    except OSError:  # nothing was ever saved
        return
    for name in names:
        if middle in name and name.endswith(".json"):
            yield f"{where}/{name}"


def slug(text: str) -> str:
    """Words as bench writes them in a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _records(path: str, plan: Plan) -> Iterator[tuple[dict[str, float], str]]:
    try:
        if os.path.getsize(path) > LARGEST_FILE:
            return
        with open(path, "rb") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(content, dict) or content.get("source") != SOURCE:
        return
    runs, day = content.get("runs"), content.get("checked")
    if content.get("rung") != "measured" or not isinstance(runs, list) or not isinstance(day, str):
        return
    for run in runs:
        if isinstance(run, dict) and _is_of(run.get("plan"), plan):
            seconds = _seconds(run.get("measured"))
            if seconds:
                yield seconds, day[:20]


def _is_of(recorded: Any, plan: Plan) -> bool:
    """Whether it is the same plan on the same card; fields that a record does not know aside."""
    if not isinstance(recorded, Mapping) or "gpu" not in recorded:
        return False
    own = plan.to_json()
    return all(recorded[name] == own[name] for name in own.keys() & recorded.keys() - APART)


def _seconds(measured: Any) -> dict[str, float]:
    """Seconds of the phases of a run that came to its end; none of any other."""
    if not isinstance(measured, Mapping) or measured.get("oom") or measured.get("steps") == 0:
        return {}
    found = {}
    for row in measured.get("phases") or ():
        if not isinstance(row, Mapping):
            return {}
        name, value = row.get("phase"), row.get("seconds")
        if isinstance(name, str) and isinstance(value, (int, float)) and 0 <= value < 1e9:
            found[name] = float(value)
    return found
