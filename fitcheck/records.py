"""The catalog's smaller rows: reward models, methods and cloud prices.

>>> CloudPrice.from_json(row).usd_per_gpu_hour  # doctest: +SKIP
2.69
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fitcheck.errors import FitCheckError


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """One row of reward_models.json. `params` counts backbone and head, as they are loaded."""

    id: str
    base_model: str  # what it was trained from: a model, or another reward model
    root_base_model: str  # the language model at the bottom of that chain
    params: int
    status: str  # exact, instantiated; approximate, mismatch, nominal: doubtful
    model_type: str
    head: str
    kind: str
    keeps_lm_head: bool
    rewardbench: bool
    verified: str
    sources: tuple[str, ...]
    checked: str
    params_published: int | None = None
    hidden_size: int | None = None
    num_labels: int | None = None
    training_data: str | None = None
    training_data_seen: bool | None = None  # False: recalled; None: unknown data
    max_length: int | None = None
    license: str | None = None
    rewardbench_dtype: str | None = None
    rewardbench_num_gpus: int | None = None
    note: str | None = None

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> RewardModel:
        """The reward model of one catalog row; FitCheckError for a missing or odd key."""
        with _naming(row):
            return cls(**{**row, "sources": tuple(row["sources"])})

    @property
    def doubt(self) -> str:
        """What is not certain about its size, in words; empty when it was counted."""
        return "" if self.status in ("exact", "instantiated") else f"size {self.status}"


@dataclass(frozen=True, slots=True)
class Role:
    """A model that a method keeps: policy, reference, reward or critic."""

    role: str
    trained: bool
    optional: bool
    what: str


@dataclass(frozen=True, slots=True)
class Stage:
    """One phase of a method, named as in a Report, and what happens to memory in it."""

    name: str
    what: str


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method comes from."""

    title: str
    arxiv: str
    year: int


@dataclass(frozen=True, slots=True)
class Method:
    """One row of methods.json."""

    id: str
    title: str
    description: str
    roles: tuple[Role, ...]
    stages: tuple[Stage, ...]
    data: str
    defaults: Mapping[str, Any]
    papers: tuple[Paper, ...]
    sources: tuple[str, ...]
    checked: str

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Method:
        """The method of one catalog row; FitCheckError for a missing or odd key."""
        with _naming(row):
            parts = {
                "roles": tuple(Role(**role) for role in row["roles"]),
                "stages": tuple(Stage(**stage) for stage in row["stages"]),
                "papers": tuple(Paper(**paper) for paper in row["papers"]),
                "sources": tuple(row["sources"]),
            }
            return cls(**{**row, **parts})


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudPrice:
    """What a cloud asked for an instance at a date, in US dollars; never today's price."""

    cloud: str
    instance: str
    gpu: str
    gpu_id: str
    gpu_count: float  # below 1: a share of a card
    usd_per_hour: float
    usd_per_gpu_hour: float
    kind: str  # on-demand, spot, reserved, marketplace on-demand, per-second serverless, ...
    as_of: str
    date_is_exact: bool
    source: str
    checked: str
    spot_usd_per_hour: float | None = None
    region: str | None = None
    vcpus: int | None = None
    ram_gb: int | None = None
    note: str = ""

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> CloudPrice:
        """The price of one catalog row; FitCheckError for a missing or odd key."""
        with _naming(row):
            return cls(**row)


@contextmanager
def _naming(row: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError) as fault:
        name = row.get("id") or row.get("instance") or "(without id)"
        raise FitCheckError(
            f"the catalog row {name!r} is malformed: {fault}",
            "compare it with its neighbours in the same file",
        ) from fault
