"""The device that a measurement runs on: which it is, what its memory holds, what software runs."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import nn

import fitcheck
from fitcheck.bench.roles import Roles
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan

SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the newer name first
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def this_device() -> torch.device:
    """The accelerator that torch sees, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, 0)


def check_card(plan: Plan, device: torch.device) -> None:
    """FitCheckError where the plan was made for a card of another kind than torch sees."""
    if device.type != "cuda" or torch.version.hip:
        return
    here, asked = torch.cuda.get_device_capability(device), plan.gpu.compute_capability
    if asked is not None and asked != here:
        name = torch.cuda.get_device_name(device)
        raise FitCheckError(
            f"a measurement runs on this machine's {name}, not on {plan.gpu.name}",
            "leave out --gpu; `fitcheck check` and `fitcheck dryrun` answer for other cards",
        )


def limit_to(device: torch.device, limit_bytes: int | None) -> int | None:
    """Let the allocator take that much of the card and no more."""
    if limit_bytes is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
    return limit_bytes


def used_bytes(device: torch.device) -> int | None:
    """What the whole card holds, by NVML or AMD SMI (a Mac: what Metal gave this process).

    None where nobody says. Asking opens no context on the card.
    """
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    if device.type != "cuda":
        return None
    refusals: tuple[type[Exception], ...] = (ImportError, OSError, RuntimeError)
    if find_spec("pynvml"):
        from pynvml import NVMLError  # by which NVML says that it does not know

        refusals += (NVMLError,)
    try:
        return int(torch.cuda.device_memory_used(device.index or 0))
    except refusals:
        return None


def card_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    return {"mps": "this Mac's GPU"}.get(device.type, "this computer's CPU")


def versions() -> dict[str, str]:
    """Who made what ran, by name; nothing that tells whose machine it is."""
    found = {"fitcheck": fitcheck.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with its build: +cu130
    for name, said in (("cuda", torch.version.cuda), ("rocm", torch.version.hip)):
        if said:
            found[name] = said
    if torch.version.cuda and torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found | _driver()


def _driver() -> dict[str, str]:
    from fitcheck import machine

    cards = machine.detect().accelerators
    return {"driver": cards[0].driver} if cards and cards[0].driver else {}


def expandable() -> bool:
    """Whether the allocator was told to use expandable segments."""
    return any("expandable_segments:True" in os.environ.get(name, "") for name in SETTINGS)


def module_names(built: Roles) -> dict[int, str]:
    """The path of every module of every role, by its id."""
    names: dict[int, str] = {}
    for role in ("policy", "reference", "reward", "critic"):
        if isinstance(owner := getattr(built, role), nn.Module):
            for path, module in owner.named_modules():
                names.setdefault(id(module), f"{role}.{path}" if path else role)
    return names
