"""Measurement files: what is written is read back, what is odd is refused, nobody is named."""

from __future__ import annotations

import getpass
import json
import socket
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fitcheck import archive, catalog, files, fit, resolve
from fitcheck.answer import plan_from
from fitcheck.errors import FitCheckError
from fitcheck.measured import Measurement, Oom, Reading, Run
from fitcheck.report import Moment, Phase, Report, Term

MIB = 2**20
PLAN = resolve("qwen2.5-0.5b", gpu="a100", method="sft", sequence=512, batch=2)
READINGS = (
    Reading("load", 1.0, 1885 * MIB, 2000 * MIB, 1886 * MIB, 2000 * MIB, 3000 * MIB, 500 * MIB),
    Reading(
        *("update.forward", 0.5, 7700 * MIB, 9000 * MIB, 8700 * MIB, 9000 * MIB, 9900 * MIB),
        *(600 * MIB, 2048.0, 0.4),
    ),
)


def measurement(**changes: Any) -> Measurement:
    """One run on a card, as the process that measures hands it over."""
    phases = tuple(
        Phase(r.phase, (Moment("largest", (Term("tensors", "step", r.peak_allocated_bytes, ""),)),))
        for r in READINGS
    )
    report = Report(PLAN, phases, fit(PLAN).ram, source="measured", outcome="fits")
    run = Run(
        **{"device": "cuda", "card": "NVIDIA A100-SXM4-80GB", "versions": {"torch": "2.13.0"}},
        **{"date": "2026-11-27", "warmup": 1, "steps": 2, "asked": 2, "retries": 0, "seconds": 1.5},
        **changes,
    )
    return Measurement(report, run, READINGS)


def test_round_trip(tmp_path: Path) -> None:
    estimate = fit(PLAN)
    content = archive.record(measurement(), estimate, estimate)
    path = archive.save(content, tmp_path)
    assert path.name.startswith("nvidia-a100-sxm4-80gb-2026-11-27-sft-qwen-qwen2.5-0.5b-")
    back = archive.read(path)
    assert back == content
    run = back.runs[0]
    assert (run.measured.allocated_bytes, run.measured.outside_bytes) == (8700 * MIB, 600 * MIB)
    assert run.predicted["estimate"].allocated_bytes == estimate.allocated_bytes
    assert plan_from(run.plan) == PLAN
    assert back.rung == "measured" and run.confidence == "high"


def test_a_run_on_a_cpu_proves_nothing_about_a_card() -> None:
    cpu = replace(measurement(), run=replace(measurement().run, device="cpu"))
    content = archive.record(cpu, None, None)
    assert content.rung == "counted" and content.runs[0].confidence == "low"


def test_what_ended_early_has_no_peak() -> None:
    oom = Oom("update.step", 1, "torch._foreach_sqrt", 2**20, 2**19)
    failed = archive.record(replace(measurement(), oom=oom), None, None).runs[0].measured
    assert failed.allocated_bytes is None and failed.oom is not None
    assert failed.oom.requested_bytes == 2**20
    stopped = replace(measurement(), run=replace(measurement().run, steps=0))
    assert archive.record(stopped, None, None).runs[0].measured.allocated_bytes is None


def test_nobody_is_named(tmp_path: Path) -> None:
    text = archive.save(archive.record(measurement(), fit(PLAN), None), tmp_path).read_text()
    for private in (socket.gethostname(), getpass.getuser(), str(Path.cwd()), str(Path.home())):
        assert private not in text.replace("torch", "")


def test_a_folder_of_somebodys_is_not_saved() -> None:
    own = replace(PLAN.model, id="/home/somebody/model")
    theirs = replace(measurement().report, plan=PLAN.change(model=own))
    with pytest.raises(FitCheckError, match="is not saved: the catalog has no such model"):
        archive.record(replace(measurement(), report=theirs), None, None)


def test_export(tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        one = replace(measurement(), run=replace(measurement().run, device=device))
        archive.save(archive.record(one, None, None), tmp_path / "kept")
    bundle = tmp_path / "out.zip"
    assert archive.export(bundle, tmp_path / "kept") == 2
    with zipfile.ZipFile(bundle) as content:
        names = content.namelist()
        assert sorted(names) == sorted(p.name for p in (tmp_path / "kept").iterdir())
        assert json.loads(content.read(names[0]))["runs"]
    with pytest.raises(FitCheckError, match="no measurement to send"):
        archive.export(bundle, tmp_path / "nothing")
    (tmp_path / "kept" / "odd.json").write_text("{}")
    with pytest.raises(FitCheckError, match=r"odd\.json is not a measurement file"):
        archive.export(bundle, tmp_path / "kept")


def test_where_measurements_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert archive.folder() == Path(files.ROOT, "measurements")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(files, "HERE", str(tmp_path))
    (tmp_path / "catalog").mkdir()  # an installed copy has its catalog beside the code
    assert archive.folder().name == "measurements"
    assert archive.folder().parent.name == "fitcheck"
    assert Path(files.ROOT) not in archive.folder().parents


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FitCheckError, match="cannot write"):
        archive.save(archive.record(measurement(), None, None), tmp_path / "file" / "folder")


def test_every_file_of_the_catalog_is_one() -> None:
    paths = list(Path(catalog.ROOT, "measurements").glob("*.json"))
    assert len(paths) >= 2
    for path in paths:
        content = archive.read(path)
        assert content.runs or content.losses


GOOD = archive.record(measurement(), None, None).model_dump(mode="json", exclude_none=True)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good file with one value of it replaced."""
    content: Any = json.loads(json.dumps(GOOD))
    *parents, last = path.split(".")
    place = content
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "Expecting property name"),
        ("[]", "no object with runs"),
        ("{}", "no object with runs"),
        ("[" * 100_000, "not a measurement file"),
        ('{"runs": [], "x": "' + "x" * 2**22 + '"}', "larger than 4 MiB"),
        (changed("host", "x"), "host: Extra inputs are not permitted"),
        (changed("runs.0.measured.user", "x"), "runs.0.measured.user: Extra"),
        (changed("runs.0.measured.allocated_bytes", 0), "allocated_bytes: Input should be greater"),
        (changed("runs.0.measured.allocated_bytes", "8"), "allocated_bytes: Input should be a"),
        (changed("runs.0.measured.allocated_bytes", 2**60), "allocated_bytes: Input should be"),
        (changed("runs.0.measured.outcome", "maybe"), "outcome: Input should be 'fits'"),
        (changed("runs.0.plan", []), "runs.0.plan: Input should be"),
        (changed("rung", "guessed"), "rung: Input should be 'measured' or 'counted'"),
        (changed("note", "x" * 3000), "note: String should have at most"),
        (changed("runs", 1), "runs: Input should be a valid array"),
    ],
)
def test_what_is_odd_is_refused(content: Any, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(FitCheckError) as raised:
        archive.read(path)
    assert fault in raised.value.message and raised.value.hint
