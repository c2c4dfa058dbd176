"""`fitcheck models --update org/name`: rows of catalog/models/ from the Hub, for a contributor.

Only what is verified becomes a row: the shapes in the repository's safetensors headers must have
the parameters of the closed form. A row that is there keeps what no header says (license, dates).
"""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

from fitcheck import catalog, files
from fitcheck.errors import FitCheckError
from fitcheck.folder import is_hub_id
from fitcheck.hub import read
from fitcheck.model import Model

INDEXED = ("id", "name", "family", "file", "model_type", "params", "release_date", "license")
OF_FILES = ("checkpoint", "adapter_bytes", "note", "sibling")


def update(names: list[str], family: str | None) -> list[str]:
    """Write a row for each Hub id; what was done, a line each. FitCheckError writes nothing more.

    family: of models that the catalog does not have yet.
    """
    if not names:
        raise FitCheckError("which models?", "fitcheck models --update org/name --family Qwen3")
    if not (Path(files.ROOT).parent / "pyproject.toml").exists():
        raise FitCheckError("the catalog is that of an installed package", "run it in a checkout")
    return [_update(name, family) for name in names]


def _update(name: str, family: str | None) -> str:
    if not is_hub_id(name):
        raise FitCheckError(f"{name!r} is no Hub id", "org/name, or org/name@revision")
    repo = name.partition("@")[0]
    entries = catalog.model_entries()
    entry = next((e for e in entries if e["id"] == repo), None)
    family = entry["family"] if entry else family
    if not family:
        raise FitCheckError(f"{repo} is new: of which family?", "add --family, such as Qwen3")
    model = read(name)
    if model.status != "headers":
        raise FitCheckError(
            f"{repo} is not verified: {model.note or model.checked}",
            "a row needs safetensors headers that have as many parameters as the closed form",
        )
    old = catalog.model_row(entry) if entry else {}
    row = old | row_of(model, name, family)
    known = next((e["file"] for e in entries if e["family"] == family), None)
    file = known or re.sub(r"[^a-z0-9.]+", "-", family.lower()).strip("-") + ".json"
    _write_family(file, family, row)
    _write_index({"file": file} | row)
    files.read.cache_clear()
    return f"{'renewed' if entry else 'added'} {repo}: {model.params:,} parameters, in {file}"


def row_of(model: Model, name: str, family: str) -> dict[str, Any]:
    """The catalog's row of a model that was read and verified."""
    held = model.checkpoint
    assert held
    row = {key: value for key, value in model.to_json().items() if key not in OF_FILES}
    repo, _, revision = name.partition("@")
    where = f"huggingface.co/{repo}/blob/{revision or 'main'}"
    return row | {
        **{"id": repo, "family": family, "name": repo.partition("/")[2].replace("-", " ")},
        **{"status": "exact", "formula_matches": True, "params_published": model.params},
        "params_published_note": "exact (unique parameters)",
        "checkpoint_precision": held.quantization or held.dtype,
        "checked": f"{date.today()}: its safetensors headers have {model.params} parameters, "
        "as the closed form has",
        "sources": [f"{where}/config.json", f"{where}: headers of its safetensors"],
    }


def _write_family(file: str, family: str, row: dict[str, Any]) -> None:
    path = Path(files.ROOT, "models", file)
    rows = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else []
    places = [i for i, other in enumerate(rows) if other["id"] == row["id"]]
    if places:
        rows[places[0]] = row
    else:
        rows.append(row)
    body = ",\n".join(f"  {{\n{_lines(one)}\n  }}" for one in rows)
    text = f'{{\n "family": {json.dumps(family)},\n "models": [\n{body}\n ]\n}}\n'
    path.write_text(text, encoding="utf-8")


def _lines(row: dict[str, Any]) -> str:
    """A row, a key a line; texts of a list a line each."""
    found = []
    for key, value in row.items():
        text = json.dumps(value, ensure_ascii=False)
        if key == "sources":
            items = ",\n".join(f"    {json.dumps(one, ensure_ascii=False)}" for one in value)
            text = f"[\n{items}\n   ]"
        found.append(f'   "{key}": {text}')
    return ",\n".join(found)


def _write_index(row: dict[str, Any]) -> None:
    path = Path(files.ROOT, "models/index.json")
    entries = json.loads(path.read_text(encoding="utf-8"))["models"]
    entry = {key: row.get(key) for key in INDEXED} | {"status": row["status"]}
    places = [i for i, other in enumerate(entries) if other["id"] == row["id"]]
    kin = [i for i, other in enumerate(entries) if other["file"] == row["file"]]
    if places:
        entries[places[0]] |= entry
    else:
        entries.insert(kin[-1] + 1 if kin else len(entries), entry)
    lines = ",\n".join(f"  {json.dumps(one, ensure_ascii=False)}" for one in entries)
    path.write_text(f'{{\n "models": [\n{lines}\n ]\n}}\n', encoding="utf-8")
