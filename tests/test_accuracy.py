"""The estimate against what others measured; run with -s to read the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from fitcheck import accuracy, archive, catalog, files
from fitcheck.decoder import Decoder
from fitcheck.errors import FitCheckError
from fitcheck.kernels import cublas_workspace
from fitcheck.ops import Setting
from fitcheck.plan import METHODS
from fitcheck.tape import Tape

README = Path(__file__).parent.parent / "README.md"
BYTES = {"bf16": 2, "fp32": 4}


@pytest.fixture(scope="module")
def found() -> list[accuracy.Comparison]:
    return accuracy.comparisons()


def test_whole_steps(found: list[accuracy.Comparison]) -> None:
    print(f"\n{accuracy.table(found)}")
    errors = [abs(e) for c in found if (e := c.error("estimate")) is not None]
    assert max(errors) <= 0.05
    assert median(errors) <= 0.02
    traced = [abs(e) for c in found if (e := c.error("dry-run")) is not None]
    assert max(traced, default=0) <= 0.02


def test_outcomes(found: list[accuracy.Comparison]) -> None:
    """No run that was said to fit failed, and the dry run foresaw what happened."""
    assert accuracy.wrong_outcomes(found) == []


def test_no_run_is_dropped(found: list[accuracy.Comparison]) -> None:
    recorded = [
        f"{name} {run.id}"
        for name, content in accuracy.contents()
        for run in content.runs
        if content.source != archive.SOURCE
    ]
    assert [c.run for c in found if c.published] == recorded
    assert len(recorded) == 18
    shown = accuracy.table(found)
    assert all(c.run in shown for c in found)
    lines = {c.run: line for c in found for line in shown.splitlines() if f"| {c.run} |" in line}
    for c in found:
        assert ("not covered" in lines[c.run]) == ("estimate" not in c.predicted)
        assert (lines[c.run].count(" - |") == 2) == ("dry-run" not in c.predicted)


def test_every_measurement_says_where_it_is_from() -> None:
    for path in Path(catalog.ROOT, "measurements").glob("*.json"):
        content = json.loads(path.read_bytes())
        assert content["source"]
        assert content["checked"]
        assert content["rung"] == "measured"


# --- the loss alone ---


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=str(row["id"])) for _, row in accuracy.rows("losses")]
)
def test_loss_heads(row: dict[str, Any]) -> None:
    """Forward and backward of a head, on the tape the estimate plays."""
    size, tokens, vocab = BYTES[row["dtype"]], row["tokens"], row["vocab"]
    width = row["hidden"] or 64
    model = replace(catalog.find_model("llama-3.1-8b"), hidden_size=width, vocab_size=vocab)
    tape = Tape(grad=True, accumulate=True)
    setting = Setting(size, size, False, True, "flash", False, size)
    heads = Decoder(tape, model, setting, 1, tokens)
    if row["logits"] == "given":
        x = tape.new(tokens * vocab * size, size, grad=True)
        end = heads.cross_entropy(x, tokens).edge
    else:
        x = tape.new(tokens * width * size, size, grad=True)
        logits = heads.logits(x, tokens)
        wide = heads.cast(logits, BYTES[row["loss_dtype"]])
        del logits
        loss = heads.cross_entropy(wide, tokens)
        del wide
        end = loss.edge
    tape.backward(end)
    gpu = catalog.find_gpu(row["card"])
    beside = x.bytes + row["tables"] * vocab * width * size  # x's gradient is there already
    if row["logits"] == "projected":
        beside += 2 * cublas_workspace(gpu)
    measured = row["measured"]["allocated_bytes"]
    assert tape.peak + beside == pytest.approx(measured, rel=0.05)


# --- what is stated ---


def test_the_stated_error_is_the_computed_one(found: list[accuracy.Comparison]) -> None:
    """Else: `python -m fitcheck.accuracy --write`."""
    assert json.loads(Path(catalog.ROOT, "accuracy.json").read_bytes()) == accuracy.summary(found)


def test_the_readme_shows_this_table(found: list[accuracy.Comparison]) -> None:
    """Else: `python -m fitcheck.accuracy --write`."""
    if not README.is_file():
        pytest.skip("no README in this checkout")
    text = README.read_text(encoding="utf-8")
    assert accuracy.MARKS[0] in text
    assert accuracy.with_table(text, accuracy.table(found)) == text


def test_the_percentile_is_a_run(found: list[accuracy.Comparison]) -> None:
    runs = [
        replace(found[0], missing="", measured_bytes=100, predicted={"estimate": 100 + n})
        for n in range(20)
    ]
    summary = accuracy.summary(runs)["estimate"]["sft"]
    assert summary["relative"] == 0.18  # 19 of 20 are within 18 %
    assert summary["n"] == 20
    one = accuracy.summary(runs[-1:])["estimate"]["sft"]
    assert one["relative"] == 0.19


def test_what_is_not_covered_is_shown_and_counts_for_nothing(
    found: list[accuracy.Comparison],
) -> None:
    missing = replace(found[0], predicted={}, missing="the architecture x")
    assert accuracy.summary([missing]) == {"estimate": {}}
    assert "| - | not covered: the architecture x |" in accuracy.table([missing])


RECORDED = {  # what `fitcheck bench --save` writes of one run: its measurement and its verdicts
    **{"source": "fitcheck bench", "checked": "2026-11-27", "rung": "measured"},
    **{"card": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2.13.0"}},
}


def recorded(number: int, measured: dict[str, Any], verdict: str) -> str:
    plan = {"model": "qwen2.5-0.5b", "gpu": "h100", "method": "ppo", "batch": number}
    traced = {"verdict": verdict, "allocated_bytes": 990, "reserved_bytes": 1100}
    run = {
        **{"id": 1, "plan": plan, "measured": measured},
        "predicted": {"dry-run": {**traced, "peak_bytes": 1200, "phases": {}}},
    }
    return json.dumps({**RECORDED, "runs": [run]})


def test_own_measurements_count_on_both_rungs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models", "gpus", "reward_models.json"):
        (tmp_path / name).symlink_to(Path(catalog.ROOT, name))
    (tmp_path / "measurements").mkdir()
    runs = {
        "a": recorded(1, {"allocated_bytes": 1000, "outcome": "fits"}, "fits"),
        "b": recorded(2, {"outcome": "does-not-fit"}, "does-not-fit"),
        "c": recorded(3, {"allocated_bytes": 900, "outcome": "tight"}, "fits"),
        "d": recorded(4, {"allocated_bytes": 1, "outcome": "fits"}, "fits").replace(
            '"rung": "measured"', '"rung": "counted"'
        ),
        "e": recorded(5, {"outcome": "does-not-fit"}, "fits"),
    }
    for name, text in runs.items():
        (tmp_path / "measurements" / f"{name}.json").write_text(text)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    found = accuracy.comparisons()
    assert [c.run for c in found] == ["a", "b", "c", "e"]  # counted on a CPU: no evidence
    traced = accuracy.summary(found)["dry-run"]["ppo"]
    assert (traced["relative"], traced["n"]) == (0.1, 2)
    assert traced["basis"] == "peak allocated of 2 ppo runs on an H100 80GB HBM3"
    assert accuracy.summary(found)["estimate"]["ppo"]["n"] == 2
    assert accuracy.wrong_outcomes(found) == [
        "b: the estimate said it fits",
        "c: tight, the dry run said fits",
        "e: the estimate said it fits",
        "e: does-not-fit, the dry run said fits",
    ]
    assert "| dry run GB | error |" in accuracy.table(found)
    assert "does-not-fit |" in accuracy.table(found)


def test_a_report_states_it(found: list[accuracy.Comparison]) -> None:
    summary = accuracy.summary(found)["estimate"]
    for method in METHODS:
        error = catalog.stated_error(method, "estimate")
        assert (error is not None) == (method in summary)
        if error:
            assert error.relative == summary[method]["relative"]
    assert catalog.stated_error("sft", "measured") is None


def test_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "catalog"
    folder.mkdir()
    comparison = accuracy.Comparison("a 1", "M", "sft", "lora", 100, {"estimate": 101}, card="T4")
    monkeypatch.setattr(files, "ROOT", folder)
    monkeypatch.setattr(accuracy, "comparisons", lambda: [comparison])
    monkeypatch.setattr("sys.argv", ["accuracy", "--write"])
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- accuracy -->\nold\n<!-- /accuracy -->\nafter\n", encoding="utf-8"
    )
    assert accuracy.main() == 0
    table = accuracy.table([comparison])
    assert capsys.readouterr().out == table + "\n"
    assert json.loads((folder / "accuracy.json").read_bytes()) == accuracy.summary([comparison])
    text = readme.read_text(encoding="utf-8")
    assert text == f"before\n<!-- accuracy -->\n{table}\n<!-- /accuracy -->\nafter\n"
    readme.write_text("without marks", encoding="utf-8")
    assert accuracy.main() == 0
    assert readme.read_text(encoding="utf-8") == "without marks"


# --- untrusted files ---

RUN: dict[str, Any] = {
    "id": 1,
    "plan": {"model": "llama-3.1-8b", "gpu": "a100 80", "method": "sft", "tuning": "lora"},
    "measured": {"allocated_bytes": 1},
}


HEAD = {"source": "a test", "checked": "today", "rung": "measured"}


def of(run: Any) -> str:
    """A file with one run."""
    return json.dumps({**HEAD, "runs": [run]})


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "Expecting property name"),
        ("[]", "no object with runs"),
        ("{}", "no object with runs"),
        (json.dumps({**HEAD, "runs": 1}), "runs: Input should be a valid array"),
        (of(1), "runs.0: Input should be an object"),
        ("[" * 100_000, "is not a measurement file"),
        ('{"runs": [], "x": "' + "x" * 2**22 + '"}', "larger than 4 MiB"),
        (of({}), "runs.0.id: Field required"),
        (of({**RUN, "measured": {}}), "neither allocated_bytes nor an outcome"),
        (of({**RUN, "plan": {}}), "run odd 1: this is not a plan"),
        (of({**RUN, "plan": {"model": "no-such"}}), "run odd 1: no model"),
        (of({**RUN, "plan": {**RUN["plan"], "x": 1}}), "no field 'x'"),
    ],
)  # fmt: skip
def test_an_odd_measurement_file_is_an_error(
    content: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("models", "gpus", "reward_models.json"):
        (tmp_path / name).symlink_to(Path(catalog.ROOT, name))
    (tmp_path / "measurements").mkdir()
    (tmp_path / "measurements/odd.json").write_text(content)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    with pytest.raises(FitCheckError) as raised:
        accuracy.comparisons()
    assert fault in raised.value.message
    assert raised.value.hint
    monkeypatch.setattr("sys.argv", ["accuracy"])
    assert accuracy.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"estimate": 1}',
        '{"estimate": {"sft": 1}}',
        '{"estimate": {"sft": {"relative": 0.1}}}',
        '{"estimate": {"sft": {"relative": "x", "percentile": 95, "n": 1, "basis": ""}}}',
        '{"estimate": {"sft": {"relative": -0.5, "percentile": 95, "n": 1, "basis": ""}}}',
        '{"estimate": {"sft": {"relative": NaN, "percentile": 95, "n": 1, "basis": ""}}}',
    ],
)
def test_a_damaged_accuracy_file_is_named(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "accuracy.json").write_text(content)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    for cached in (catalog.read, catalog.stated_error):
        cached.cache_clear()
    try:
        with pytest.raises(FitCheckError, match=r"accuracy\.json is damaged"):
            catalog.stated_error("sft", "estimate")
    finally:
        for cached in (catalog.read, catalog.stated_error):
            cached.cache_clear()
