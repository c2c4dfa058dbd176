"""A model that is not of the catalog: from the Hugging Face Hub, a folder, or a GGUF file.

    read("org/name@revision")  read("./folder")  read("model.gguf")     # -> Model

Of the Hub, config.json comes through huggingface_hub's cache (HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE hold), and of the weights only the headers, by range requests. Nothing here runs
what it reads: no remote code, no pickle; files are bounded before they are parsed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fitcheck import checkpoint, folder
from fitcheck.checkpoint import Tensor, corrupt, safetensors_header
from fitcheck.errors import FitCheckError
from fitcheck.folder import (
    LARGEST_JSON,
    WEIGHTS,
    Small,
    adapted,
    header_of,
    of_config,
    parsed,
    understood,
)
from fitcheck.folder import is_hub_id as is_hub_id
from fitcheck.model import Model

FIRST = 2**17  # bytes of a first range request: most headers are within


def is_path(text: str) -> bool:
    """Whether a user means a file or a folder, by how the name is written."""
    return text.endswith(".gguf") or text.startswith((".", "/", "~", "\\")) or text[1:3] == ":\\"


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
    """The model in a folder or a GGUF file; the base of an adapter is found by its name."""
    return folder.local(text, find)


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
        return parsed(content, f"{text}: {name}")

    with _told(repo, rev):
        here_only = not _reached(repo, rev)
        config = small("config.json")
        if config is None:
            return _without_config(repo, rev, small)
        place = Path(hf_hub_download(repo, "config.json", revision=rev, local_files_only=True))
        kept = {file.name for file in place.parent.glob("*.safetensors")}
        if here_only and not kept:
            model = understood(config, text)
            return replace(model, note="the Hub was not asked: its cached config.json alone")

        def headers(name: str) -> list[Tensor]:
            if name in kept:
                return header_of(place.parent / name)
            return safetensors_header(_ranges(repo, name, rev), f"{text}: {name}")

        def has(name: str) -> bool:
            return name in kept or (not here_only and (name != WEIGHTS or _exists(repo, name, rev)))

        return of_config(config, text, small, headers, has)


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

        return adapted(adapter, repo, headers, find, anywhere=False)
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
