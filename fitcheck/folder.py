"""A model on this disk: a folder with config.json and safetensors, or a GGUF file.

    local("./folder", find)  gguf(Path("model.gguf"))     # -> Model

find: reads the base of a PEFT adapter by name. Nothing here runs what it reads: no remote code, no
pickle; files are bounded before they are parsed.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from fitcheck import checkpoint
from fitcheck.checkpoint import Tensor, corrupt, half, safetensors_header, weighed
from fitcheck.config import is_unknown, model_from
from fitcheck.errors import FitCheckError
from fitcheck.gguf import LONGEST, gguf_header, gguf_model
from fitcheck.model import Model

LARGEST_JSON = 32 * 2**20  # bytes; the index of a thousand shards is 10 MB
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Small = Callable[[str], Any]  # a JSON file of the repository or folder; None where there is none
Headers = Callable[[str], list[Tensor]]  # the tensors of one of its safetensors files
Find = Callable[[str], Model]  # the model of a name or a path


def is_hub_id(text: str) -> bool:
    """Whether that is what the Hub calls a model: `org/name`, or `org/name@revision`."""
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w])?"
    return re.fullmatch(rf"{part}/{part}(?:@[\w./-]{{1,128}})?", text, re.ASCII) is not None


def local(text: str, find: Find) -> Model:
    """The model in a folder (config.json, safetensors) or in a GGUF file."""
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            return _folder(path, find)
        if path.suffix == ".gguf":
            return gguf(path)
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or "the name cannot be one"
        raise FitCheckError(f"{text[:200]} cannot be read: {reason}", "check the path") from fault
    if path.exists():
        raise FitCheckError(
            f"{text[:200]} is neither a folder nor a GGUF file",
            "name the folder that holds config.json; pickled checkpoints are not opened",
        )
    raise FitCheckError(f"there is no {text[:200]}", "a path, or a name without ./ for the catalog")


def gguf(path: Path) -> Model:
    """The model of a GGUF file and, where it is split, of the files beside it."""
    paths = [path]
    if parts := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name):
        count = int(parts[3])
        if not 0 < int(parts[2]) <= count <= 2048:
            raise corrupt(path.name, "its name counts its parts wrongly")
        names = (f"{parts[1]}-{n:05}-of-{parts[3]}.gguf" for n in range(1, count + 1))
        paths = [path.with_name(name) for name in names]
        if missing := [p.name for p in paths if not p.exists()]:
            raise FitCheckError(
                f"{len(missing)} of the {count} parts are missing: {missing[0]}, ...",
                "download all parts into one folder",
            )
    metadata: dict[str, Any] = {}
    tensors: list[Tensor] = []
    for one in paths:
        with one.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise half(one.name)
            with mmap.mmap(file.fileno(), min(size, LONGEST), access=mmap.ACCESS_READ) as data:
                found, rows = gguf_header(data, size, one.name)
        metadata = metadata or found
        tensors += rows
    if len(paths) == 1 and metadata.get("split.count", 0) not in (0, 1):
        raise FitCheckError(f"{path.name} is one part of a split file", "keep the parts' names")
    return gguf_model(metadata, tensors, path.name)


def _folder(path: Path, find: Find) -> Model:
    def small(name: str) -> Any:
        file = path / name
        if not file.exists():
            return None
        if file.stat().st_size > LARGEST_JSON:
            raise corrupt(f"{path.name}/{name}", "it is too long")
        return parsed(file.read_bytes(), f"{path.name}/{name}")

    def headers(name: str) -> list[Tensor]:
        return header_of(path / name)

    name = path.resolve().name or "folder"
    config = small("config.json")
    if config is None and small("adapter_config.json") is not None:
        return adapted(small("adapter_config.json"), name, headers, find, anywhere=True)
    if config is None:
        if files := sorted(path.glob("*.gguf")):
            if len(files) == 1 or "-of-" in files[0].name:
                return gguf(files[0])
            raise FitCheckError(
                f"{path.name} holds {len(files)} GGUF files", f"name one: {path / files[0].name}"
            )
        raise FitCheckError(f"{path} holds no config.json", "name the folder of one model")
    weights = {file.name for file in path.glob("*.safetensors")}
    if not weights and any(path.glob("**/*.incomplete")):
        raise half(name)
    return of_config(config, name, small, headers, weights.__contains__)


def of_config(
    config: Any, name: str, small: Small, headers: Headers, has: Callable[[str], bool]
) -> Model:
    """The Model of a config, its count held against the headers where there are any."""
    model = understood(config, name)
    quantization = config.get("quantization_config") or {}
    quantization = quantization if isinstance(quantization, dict) else {}
    if has(WEIGHTS):
        files = [WEIGHTS]
    elif (index := small(INDEX)) is not None:
        files = checkpoint.shards(index, name)
        if missing := [file for file in files if not has(file)]:
            raise FitCheckError(
                f"{name}: {len(missing)} of {len(files)} files are missing: {missing[0]}, ...",
                "the download did not end; `hf download` goes on where it stopped",
            )
    else:
        return replace(model, note="there are no safetensors to hold its config.json against")
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        tensors = [tensor for rows in pool.map(headers, files) for tensor in rows]
    return weighed(model, tensors, quantization)


def understood(config: Any, name: str) -> Model:
    """The Model of a config, where no formula covers it by transformers' class in a process."""
    if not is_unknown(config, name) or not (find_spec("torch") and find_spec("transformers")):
        return model_from(config, name)
    command = [sys.executable, "-m", "fitcheck.bench", "understand"]
    asked = json.dumps({"name": name, "config": config})
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        run = subprocess.run(
            command, input=asked, capture_output=True, encoding="utf-8", timeout=120, env=offline
        )
    except subprocess.TimeoutExpired as fault:
        raise FitCheckError(f"{name}: its config builds no model in 120 s", "") from fault
    told: dict[str, Any] = next(
        (json.loads(line) for line in run.stdout.splitlines() if line[:1] == "{"), {}
    )
    if "row" in told:
        return Model.from_json(told["row"])
    last = (run.stderr.strip().splitlines() or ["no message"])[-1][:200]
    raise FitCheckError(
        told.get("error", f"{name}: its config builds no model: {last}"),
        told.get("hint", "compare it with the model's page on the Hub"),
    )


def adapted(config: Any, name: str, headers: Headers, find: Find, anywhere: bool) -> Model:
    """The base of a PEFT adapter, its LoRA's bytes added. anywhere: the base may be a path."""
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise corrupt(f"{name}/adapter_config.json", "it names no base model")
    if config.get("peft_type") != "LORA":
        raise FitCheckError(f"{name} is an adapter of another kind than LoRA", f"check {base[:80]}")
    if not is_hub_id(base) and not (anywhere and Path(base).is_dir()):
        raise FitCheckError(
            f"{name} is an adapter on {base[:80]!r}, which is no Hub id", "check its base itself"
        )
    model = find(base)
    if model.adapter_bytes:
        raise FitCheckError(f"{name} is an adapter on an adapter", "merge the first one")
    tensors = headers("adapter_model.safetensors")
    size, params = sum(t.bytes for t in tensors), sum(prod(t.shape) for t in tensors)
    checked = f"{model.checked}; and an adapter of {params:,} parameters"
    return replace(model, id=name, adapter_bytes=size, checked=checked)


def header_of(path: Path) -> list[Tensor]:
    """The header of a safetensors file on disk."""
    if not path.exists():
        raise FitCheckError(f"there is no {path.name} beside its config", "download it again")
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        return safetensors_header(read, path.name, path.stat().st_size)


def parsed(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as fault:
        raise corrupt(name, "it is no JSON") from fault
