"""This computer: its accelerators, RAM and limits, as its own drivers and files tell them.

    >>> machine = detect()
    >>> card = best(machine)
    >>> plan = Plan(model=llama, gpu=card.card, memory=card.usable, ram=machine.ram.usable_bytes)

Each vendor has a module here with one `probe`; a probe that fails leaves a note, never an error.
"""

from fitcheck.machine.accelerator import Accelerator, Holder, Machine, Ram
from fitcheck.machine.ask import System
from fitcheck.machine.inventory import best, detect, holders
from fitcheck.machine.show import add_parser, as_json, describe, doctor

__all__ = [
    "Accelerator",
    "Holder",
    "Machine",
    "Ram",
    "System",
    "add_parser",
    "as_json",
    "best",
    "describe",
    "detect",
    "doctor",
    "holders",
]
