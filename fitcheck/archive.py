"""The files of measurements: what is in one, how it is read, saved and bundled for sending.

    path = save(record(measured, estimate, traced))   # catalog/measurements/ in a checkout
    read(path).runs[0].measured.allocated_bytes
    export(Path("measurements.zip"))

A file is untrusted input: bounded in size, checked against the schema below, its plan against the
rules of plans. It holds nothing that tells whose computer it was: no names, paths or hosts.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal

from platformdirs import user_data_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fitcheck import catalog, timings
from fitcheck.errors import FitCheckError
from fitcheck.measured import Measurement
from fitcheck.plan import Plan
from fitcheck.report import ALLOCATED, Report
from fitcheck.timings import SOURCE, slug

LARGEST_FILE = 4 * 2**20
MOST_RUNS = 10_000

Bytes = Annotated[int, Field(ge=0, le=2**50)]
Size = Annotated[int, Field(gt=0, le=2**50)]
Share = Annotated[float, Field(ge=0, le=1000)]
Text = Annotated[str, Field(max_length=2000)]
Name = Annotated[str, Field(max_length=200)]
Verdict = Literal["fits", "tight", "does-not-fit"]


class Checked(BaseModel):
    """Unknown keys and values of another type are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PhaseRow(Checked):
    """One phase over the measured steps, as fitcheck.measured.Reading."""

    phase: Name
    seconds: Annotated[float, Field(ge=0)]
    allocated_bytes: Bytes
    reserved_bytes: Bytes
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    used_bytes: Bytes | None = None
    outside_bytes: Bytes | None = None
    tokens_per_second: Annotated[float, Field(ge=0)] | None = None
    mfu: Share | None = None
    bandwidth: Share | None = None


class OomRow(Checked):
    """Where memory ran out, as fitcheck.measured.Oom."""

    phase: Name
    step: Annotated[int, Field(ge=0)]
    operator: Name
    requested_bytes: Bytes | None = None
    free_bytes: Bytes | None = None


class Measured(Checked):
    """What happened. A run that ended out of memory has no peak of its own: only that it ended."""

    allocated_bytes: Size | None = None
    reserved_bytes: Size | None = None
    outside_bytes: Bytes | None = None
    steady_bytes: Size | None = None
    nvidia_smi_bytes: Size | None = None
    outcome: Verdict | None = None
    oom: OomRow | None = None
    retries: Annotated[int, Field(ge=0)] | None = None
    seconds: Annotated[float, Field(ge=0)] | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    limit_bytes: Bytes | None = None
    expandable: bool | None = None
    weights: Literal["random", "loaded"] | None = None
    phases: Annotated[list[PhaseRow], Field(max_length=100)] = []


class Predicted(Checked):
    """What a rung had said of the same plan, with the same versions, beforehand."""

    verdict: Verdict
    allocated_bytes: Bytes
    reserved_bytes: Bytes
    peak_bytes: Bytes
    phases: Annotated[dict[Name, Bytes], Field(max_length=100)]  # peak allocated


class RunRow(Checked):
    """One run; its plan is checked where it is made into one."""

    id: Annotated[int, Field(ge=0)] | Name
    plan: Annotated[dict[Name, Any], Field(max_length=100)]
    measured: Measured
    predicted: dict[Literal["estimate", "dry-run"], Predicted] = {}
    confidence: Text = "high"


class LossRow(Checked):
    """Forward and backward of a loss head alone, by its own sizes; published by others."""

    id: Annotated[int, Field(ge=0)] | Name
    source: Text
    version: Name
    card: Name
    logits: Literal["given", "projected"]
    dtype: Literal["bf16", "fp16", "fp32"]
    loss_dtype: Literal["bf16", "fp16", "fp32"]
    tokens: Size
    hidden: Size | None = None
    vocab: Size
    tables: Annotated[int, Field(ge=0, le=100)]
    measured: Measured
    confidence: Text


class File(Checked):
    """A measurement file. rung: counted is a run on a CPU, which proves nothing about a card."""

    source: Text
    checked: Text
    rung: Literal["measured", "counted"]
    card: Name | None = None
    versions: Annotated[dict[Name, Name], Field(max_length=50)] = {}
    note: Text = ""
    runs: Annotated[list[RunRow], Field(max_length=MOST_RUNS)] = []
    losses: Annotated[list[LossRow], Field(max_length=MOST_RUNS)] = []


def read(path: Path) -> File:
    """The file's content; FitCheckError, naming what is wrong, for anything else."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise _odd(path, "it is larger than 4 MiB")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        raise _odd(path, str(fault)) from fault
    if not isinstance(content, dict) or not content.keys() & {"runs", "losses"}:
        raise _odd(path, "no object with runs")
    try:
        return File.model_validate_json(json.dumps(content))
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise _odd(path, f"{place}: {first['msg']}") from fault


def _odd(path: Path, fault: str) -> FitCheckError:
    return FitCheckError(
        f"{path} is not a measurement file: {fault}", "compare it with its neighbours there"
    )


def record(measured: Measurement, estimate: Report | None, traced: Report | None) -> File:
    """A measurement as a file's content; FitCheckError for a model that is not of the catalog."""
    report, run = measured.report, measured.run
    _check_public(report.plan)
    finished = measured.oom is None and run.steps > 0
    outside = [r.outside_bytes for r in measured.readings if r.outside_bytes is not None]
    predicted: dict[Literal["estimate", "dry-run"], Predicted] = {}
    if estimate is not None:
        predicted["estimate"] = prediction(estimate)
    if traced is not None:
        predicted["dry-run"] = prediction(traced)
    row = RunRow(
        id=1,
        plan=json.loads(json.dumps(report.plan.to_json())),
        measured=Measured(
            allocated_bytes=report.allocated_bytes if finished else None,
            reserved_bytes=report.reserved_bytes if finished else None,
            outside_bytes=max(outside, default=None),
            outcome=report.card_verdict,  # type: ignore[arg-type]
            oom=OomRow(**measured.oom._asdict()) if measured.oom else None,
            retries=run.retries,
            seconds=run.seconds,
            steps=run.steps,
            limit_bytes=run.limit_bytes,
            expandable=run.expandable,
            weights=run.weights,  # type: ignore[arg-type]
            phases=[PhaseRow(**reading._asdict()) for reading in measured.readings],
        ),
        predicted=predicted,
        confidence="high" if run.on_card and not measured.stopped else "low",
    )
    return File(
        source=SOURCE,
        checked=run.date,
        rung="measured" if run.on_card else "counted",
        card=run.card,
        versions=dict(run.versions),
        runs=[row],
    )


def prediction(report: Report) -> Predicted:
    """What a Report says, as it is recorded beside a measurement."""
    return Predicted(
        verdict=report.card_verdict,  # type: ignore[arg-type]
        allocated_bytes=report.allocated_bytes,
        reserved_bytes=report.reserved_bytes,
        peak_bytes=report.peak_bytes,
        phases={p.name: max(m.part(ALLOCATED) for m in p.moments) for p in report.phases},
    )


def _check_public(plan: Plan) -> None:
    """A name that is not of the catalog may be a folder of somebody's."""
    known = {entry["id"] for entry in catalog.model_entries()}
    known |= {row["id"] for row in catalog.rows("reward_models.json", "reward_models")}
    for model in (plan.model, plan.reward_architecture, plan.critic_architecture):
        if model is not None and model.id not in known:
            raise FitCheckError(
                f"a measurement of {model.id} is not saved: the catalog has no such model",
                "add it to catalog/models/ first; others must be able to repeat the run",
            )


def folder() -> Path:
    """Where measurements are kept: in a checkout its catalog, else the user's data folder."""
    return Path(timings.folder())


def own_folder() -> Path:
    """This user's data folder."""
    return Path(user_data_path("fitcheck", appauthor=False))


def save(content: File, target: Path | None = None) -> Path:
    """Write a file of its own into that folder, named after card, plan and day; its path."""
    run = content.runs[0]
    key = hashlib.sha256(run.model_dump_json().encode()).hexdigest()[:8]
    words = (content.card or "", content.checked, run.plan["method"], run.plan["model"], key)
    path = (target or folder()) / f"{slug('-'.join(words))}.json"
    write(content, path)
    return path


def write(content: File, path: Path) -> None:
    """Write one file; FitCheckError where that cannot be."""
    text = json.dumps(content.model_dump(mode="json", exclude_none=True), indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as fault:
        raise FitCheckError(
            f"cannot write {path}: {fault.strerror}", "choose another folder: --to FOLDER"
        ) from fault


def export(bundle: Path, source: Path | None = None) -> int:
    """Bundle all saved measurements, each checked again; how many. FitCheckError without any."""
    saved = [path for path in sorted((source or folder()).glob("*.json")) if _is_own(path)]
    if not saved:
        raise FitCheckError("there is no measurement to send", "make one: fitcheck bench --save")
    try:
        with zipfile.ZipFile(bundle, "w", zipfile.ZIP_DEFLATED) as target:
            for path in saved:
                target.writestr(path.name, path.read_bytes())
    except OSError as fault:
        raise FitCheckError(f"cannot write {bundle}: {fault.strerror}", "name another") from fault
    return len(saved)


def _is_own(path: Path) -> bool:
    return read(path).source == SOURCE
