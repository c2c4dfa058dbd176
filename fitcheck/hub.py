"""A model that is not of the catalog: from the Hugging Face Hub, a folder, or a GGUF file.

    read("org/name@revision")  read("./folder")  read("model.gguf")     # -> Model

Of the Hub, config.json comes through huggingface_hub's cache (HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE hold), and of the weights only the headers, by range requests. Nothing here runs
what it reads: no remote code, no pickle; files are bounded before they are parsed.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
FIRST = 2**17  # bytes of a first range request: most headers are within
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Small = Callable[[str], Any]  # a JSON file of the repository or folder; None where there is none
Headers = Callable[[str], list[Tensor]]  # the tensors of one of its safetensors files


def is_path(text: str) -> bool:
    """Whether a user means a file or a folder, by how the name is written."""
    return text.endswith(".gguf") or text.startswith((".", "/", "~", "\\")) or text[1:3] == ":\\"


def is_hub_id(text: str) -> bool:
    """Whether that is what the Hub calls a model: `org/name`, or `org/name@revision`."""
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w])?"
    return re.fullmatch(rf"{part}/{part}(?:@[\w./-]{{1,128}})?", text, re.ASCII) is not None


def read(text: str) -> Model:
    """The model at a path or of a Hub id; FitCheckError for all that can go wrong on the way."""
    if is_path(text) or (not is_hub_id(text) and Path(text).exists()):
        return local(text)
    if not is_hub_id(text):
        raise FitCheckError(
            f"{text[:80]!r} is no model's name", "a name of the catalog, org/name, ./folder, x.gguf"
        )
    return remote(text)


def local(text: str) -> Model:
    """The model in a folder (config.json, safetensors) or in a GGUF file."""
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            return _folder(path)
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


def _folder(path: Path) -> Model:
    def small(name: str) -> Any:
        file = path / name
        if not file.exists():
            return None
        if file.stat().st_size > LARGEST_JSON:
            raise corrupt(f"{path.name}/{name}", "it is too long")
        return _json(file.read_bytes(), f"{path.name}/{name}")

    def headers(name: str) -> list[Tensor]:
        return _header_of(path / name)

    name = path.resolve().name or "folder"
    config = small("config.json")
    if config is None and small("adapter_config.json") is not None:
        return _adapted(small("adapter_config.json"), name, headers, anywhere=True)
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
    return _of(config, name, small, headers, weights.__contains__)


def _of(
    config: Any, name: str, small: Small, headers: Headers, has: Callable[[str], bool]
) -> Model:
    """The Model of a config, its count held against the headers where there are any."""
    model = _understood(config, name)
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


def _understood(config: Any, name: str) -> Model:
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


def _adapted(config: Any, name: str, headers: Headers, anywhere: bool) -> Model:
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


def find(text: str) -> Model:
    """A catalog's model where the name is exactly that of one, without any network; else read."""
    from fitcheck import catalog

    entries = catalog.model_entries()
    row = next((e for e in entries if e["id"].lower() == text.lower()), None)
    return catalog.model(row) if row else read(text)


def remote(text: str) -> Model:
    """The model of a Hub id, at a revision where one is named after an @."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    repo, _, revision = text.partition("@")
    rev = revision or None

    def small(name: str) -> Any:
        try:
            path = hf_hub_download(repo, name, revision=rev, local_files_only=here_only)
        except RemoteEntryNotFoundError:
            return None
        with Path(path).open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise corrupt(f"{text}: {name}", "it is too long")
        return _json(content, f"{text}: {name}")

    with _told(repo, rev):
        here_only = not _reached(repo, rev)
        config = small("config.json")
        if config is None:
            return _without_config(repo, rev, small)
        folder = Path(hf_hub_download(repo, "config.json", revision=rev, local_files_only=True))
        kept = {file.name for file in folder.parent.glob("*.safetensors")}
        if here_only and not kept:
            model = _understood(config, text)
            return replace(model, note="the Hub was not asked: its cached config.json alone")

        def headers(name: str) -> list[Tensor]:
            if name in kept:
                return _header_of(folder.parent / name)
            return safetensors_header(_ranges(repo, name, rev), f"{text}: {name}")

        def has(name: str) -> bool:
            return name in kept or (not here_only and (name != WEIGHTS or _exists(repo, name, rev)))

        return _of(config, text, small, headers, has)


def _reached(repo: str, rev: str | None) -> bool:
    """Whether the Hub answers; hf_hub_download would try for 23 seconds before it said so.

    FitCheckError where config.json is too long to be one, before it is downloaded.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError

    if constants.is_offline_mode():
        return False
    try:
        found = get_hf_file_metadata(hf_hub_url(repo, "config.json", revision=rev))
    except EntryNotFoundError:
        return True
    except HfHubHTTPError:
        raise
    except HTTPError:
        return False
    if (found.size or 0) > LARGEST_JSON:
        raise corrupt(f"{repo}: config.json", "it is too long")
    return True


def _exists(repo: str, name: str, rev: str | None) -> bool:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(repo, name, revision=rev))
    except EntryNotFoundError:
        return False
    return True


def _ranges(repo: str, name: str, rev: str | None) -> checkpoint.Read:
    """Reads parts of a file on the Hub; never more than asked for, whatever the server sends."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(repo, name, revision=rev)
    first = b""

    def part(offset: int, length: int) -> bytes:
        span = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        asked = {**build_hf_headers(), **span}
        with get_session().stream("GET", url, headers=asked, follow_redirects=True) as answer:
            hf_raise_for_status(answer)
            if answer.status_code != 206 and offset:
                raise FitCheckError(f"{repo}: the server sends no parts of files", "")
            found = bytearray()
            for piece in answer.iter_raw():
                found += piece
                if len(found) >= length:
                    break
            return bytes(found[:length])

    def read(offset: int, length: int) -> bytes:
        nonlocal first
        first = first or part(0, FIRST)
        if offset + length <= len(first):
            return first[offset : offset + length]
        return part(offset, length)

    return read


def _without_config(repo: str, rev: str | None, small: Small) -> Model:
    """An adapter's model; FitCheckError, saying what is there instead, for other repositories."""
    from huggingface_hub import list_repo_files

    adapter = small("adapter_config.json")
    if adapter is not None:

        def headers(name: str) -> list[Tensor]:
            return safetensors_header(_ranges(repo, name, rev), f"{repo}: {name}")

        return _adapted(adapter, repo, headers, anywhere=False)
    files = list_repo_files(repo, revision=rev)
    if found := [file for file in files if file.endswith(".gguf")]:
        raise FitCheckError(
            f"{repo} holds GGUF files, no config.json",
            f"download one and check it: hf download {repo} {found[0]} --local-dir .",
        )
    raise FitCheckError(f"{repo} holds no config.json", "it is no model of transformers")


@contextmanager
def _told(repo: str, rev: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into messages of our own."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as fault:
        raise FitCheckError(
            f"{repo} is gated, and this access has not been granted",
            f"accept its terms at {constants.ENDPOINT}/{repo}; `hf auth login` or set HF_TOKEN",
        ) from fault
    except errors.RepositoryNotFoundError as fault:
        raise FitCheckError(
            f"the Hub has no model {repo}, or it is private",
            "check the spelling; for a private one `hf auth login` or set HF_TOKEN",
        ) from fault
    except errors.RevisionNotFoundError as fault:
        raise FitCheckError(f"{repo} has no revision {rev}", "a branch, tag or commit") from fault
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as fault:
        if constants.is_offline_mode():
            raise FitCheckError(
                f"{repo} is not in the cache, and HF_HUB_OFFLINE is set",
                "unset it, or choose a model of the catalog: `fitcheck models`",
            ) from fault
        raise _unreachable(repo) from fault
    except errors.EntryNotFoundError as fault:
        raise FitCheckError(
            f"{repo}: a file that its index names is missing", "report it on the model's page"
        ) from fault
    except errors.HfHubHTTPError as fault:
        code = fault.response.status_code
        if code == 429:
            raise FitCheckError(
                "the Hub's rate limit is reached",
                "wait a few minutes, or set HF_TOKEN: it has more",
            ) from fault
        if code in (401, 403):
            raise FitCheckError(
                f"the Hub refuses this token for {repo}", "`hf auth login`, or set another HF_TOKEN"
            ) from fault
        raise FitCheckError(f"the Hub answers {code} for {repo}", "try again later") from fault
    except errors.HFValidationError as fault:
        raise FitCheckError(f"{repo[:80]!r} is no model's name", "org/name") from fault
    except (errors.HTTPError, OSError) as fault:
        raise _unreachable(repo) from fault


def _unreachable(repo: str) -> FitCheckError:
    from huggingface_hub import constants

    return FitCheckError(
        f"{repo} is not in the catalog, and {constants.ENDPOINT} cannot be reached",
        "check the network, or choose a model of the catalog: `fitcheck models`",
    )


def _header_of(path: Path) -> list[Tensor]:
    """The header of a safetensors file on disk."""
    if not path.exists():
        raise FitCheckError(f"there is no {path.name} beside its config", "download it again")
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        return safetensors_header(read, path.name, path.stat().st_size)


def _json(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as fault:
        raise corrupt(name, "it is no JSON") from fault
