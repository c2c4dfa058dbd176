"""NVIDIA cards through the nvidia-smi command, for where NVML itself cannot be asked."""

from __future__ import annotations

from fitcheck.machine.accelerator import Accelerator
from fitcheck.machine.ask import Findings, System
from fitcheck.machine.ram import with_shared_memory
from fitcheck.machine.visible import short_uuid, visible

FIELDS = (
    *("index", "uuid", "name", "driver_version", "memory.total", "memory.used", "memory.free"),
    "compute_cap",  # the last one: drivers before 470 refuse the whole query for it [recalled]
)
WSL_COMMAND = "/usr/lib/wsl/lib/nvidia-smi"
MIB = 2**20


def probe(system: System, found: Findings) -> None:
    """Write down the cards that nvidia-smi lists; a note where it fails too."""
    command = WSL_COMMAND if system.exists(WSL_COMMAND) else "nvidia-smi"
    for fields in (FIELDS, FIELDS[:-1]):
        query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        label = f"nvidia-smi {query[0]}"
        answer = found.output(system, [command, *query], label, show=_without_uuids)
        if answer is not None or "compute_cap" not in found.raw[-1][1]:
            break
    cards = []
    for line in (answer or "").splitlines():
        values = dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))
        if len(values) < len(FIELDS) - 1 or not values["index"].isdigit():
            found.note(f"nvidia-smi: a line that is no card: {_without_uuids(line)[:80]!r}")
        elif card := _accelerator(values, system, found):
            cards.append(card)
    found.accelerators += visible(cards, system, found)


def _accelerator(values: dict[str, str], system: System, found: Findings) -> Accelerator | None:
    """A card from one line; numbers may be [N/A], [Not Supported], [Insufficient Permissions]."""
    index, name = int(values["index"]), values["name"]
    total, used, free = (_mib(values[f"memory.{key}"]) for key in ("total", "used", "free"))
    if "Insufficient" in values["memory.total"]:  # a divided card, its instances kept from us
        found.note(f"NVIDIA card {index} ({name}): memory: {values['memory.total']}")
        return None
    capability = values.get("compute_cap", "").split(".")
    known = len(capability) == 2 and all(part.isdigit() for part in capability)
    reserved = None
    if None not in (total, used, free):
        reserved = max(0, total - used - free)  # type: ignore[operator]
    card = Accelerator(
        index=index,
        name=name,
        vendor="nvidia",
        total_bytes=total or 0,
        total_estimated=not total,
        reserved_bytes=reserved or None,  # before driver 510 it is part of used
        used_bytes=used or 0,
        uuid=values["uuid"] if values["uuid"].startswith(("GPU-", "MIG-")) else None,
        driver=values["driver_version"],
        compute_capability=(int(capability[0]), int(capability[1])) if known else None,
        notes=("read from nvidia-smi, which rounds to MiB and counts this process too",),
    )
    if name.endswith("(nvgpu)") or (not total and "GB10" in name):
        return with_shared_memory(card, system)
    return card


def _mib(value: str) -> int | None:
    return int(value) * MIB if value.isdigit() else None


def _without_uuids(text: str) -> str:
    words = (w.strip() for w in text.replace("\n", ",\n,").split(","))
    return ", ".join(short_uuid(w) if w.startswith(("GPU-", "MIG-")) else w for w in words)
