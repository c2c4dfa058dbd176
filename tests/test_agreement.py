"""The estimate against the dry run: every method, tuning and precision family on twelve models.

Each model is cut to two or three layers (tests/agreement.py); `make accuracy` goes through every
architecture that the dry run can build.
"""

from __future__ import annotations

from itertools import cycle
from statistics import median
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.agreement import METHODS, REGIMES, Agreement, agreement, plan_of  # noqa: E402

pytestmark = pytest.mark.oracle
TYPICAL, WORST, PHASE = 0.02, 0.05, 0.08  # of the peaks: their median, the worst; of any phase

# The peak of a phase of a few dozen megabytes is all rounding: it is held to this many bytes.
ROUNDING = 16 * 2**20

MODELS = {
    **{"meta-llama/Llama-3.2-1B": 2, "meta-llama/Llama-3.1-8B": 2, "Qwen/Qwen2.5-0.5B": 3},
    **{"Qwen/Qwen3-0.6B": 2, "mistralai/Mistral-7B-v0.1": 2, "google/gemma-2-2b": 2},
    **{"google/gemma-3-1b-it": 3, "microsoft/phi-2": 2, "openai-community/gpt2": 3},
    **{"EleutherAI/pythia-410m": 3, "facebook/opt-350m": 3, "allenai/OLMoE-1B-7B-0924": 2},
    **{"deepseek-ai/DeepSeek-V2-Lite": 2},
}
MIXTURES = ("OLMoE", "DeepSeek")


def plans() -> list[tuple[str, int, dict[str, Any]]]:
    """Every method on every model; regimes and sizes take turns, so that all pairs come up."""
    regimes, found = cycle(REGIMES), []
    for name, layers in MODELS.items():
        for method, sizes in METHODS.items():
            tuning, precision, checkpointing = next(regimes)
            if name.partition("/")[2].startswith(MIXTURES) and precision == "bf16-mixed":
                precision = "bf16"  # PyTorch traces experts in 16 bit only
            regime = {"tuning": tuning, "precision": precision, "checkpointing": checkpointing}
            size = sizes[len(found) // len(METHODS) % 2]
            found.append((name, layers, {"method": method, **regime, **size}))
    return found


PLANS = plans()


def title(plan: tuple[str, int, dict[str, Any]]) -> str:
    name, _, knobs = plan
    on = "checkpointing" if knobs["checkpointing"] else "saved"
    return f"{name.partition('/')[2]} {knobs['method']} {knobs['tuning']} {knobs['precision']} {on}"


@pytest.fixture(scope="module")
def found() -> dict[str, Agreement]:
    return {}


@pytest.mark.parametrize("plan", PLANS, ids=title)
def test_peak_and_every_phase(
    plan: tuple[str, int, dict[str, Any]], found: dict[str, Agreement]
) -> None:
    both = found[title(plan)] = agreement(plan_of(*plan))
    assert abs(both.error) <= WORST
    for phase, (estimate, traced) in both.phases.items():
        assert estimate == pytest.approx(traced, rel=PHASE, abs=ROUNDING), phase


def test_typical_error(found: dict[str, Agreement]) -> None:
    if len(found) < len(PLANS):
        pytest.skip("needs the whole of this file")
    assert median(abs(both.error) for both in found.values()) <= TYPICAL


def test_the_plans_are_of_every_kind() -> None:
    assert len(PLANS) >= 40 and len({title(plan) for plan in PLANS}) == len(PLANS)
    for field in ("method", "tuning", "precision", "checkpointing"):
        used = {knobs[field] for _, _, knobs in PLANS}
        wanted = (
            METHODS
            if field == "method"
            else {dict(zip(FIELDS, r, strict=True))[field] for r in REGIMES}
        )
        assert used == set(wanted), field


FIELDS = ("tuning", "precision", "checkpointing")
