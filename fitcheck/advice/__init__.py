"""What makes a plan fit, what it costs, how far each axis goes: all searched on the estimate.

    for fix in fixes(plan, fit(plan)):
        print(fix.flags, fix.saves, fix.verdict, fix.effect)      # the cheapest that fits first

Every change is judged by fit() on the whole changed plan: what a change saves is the difference of
two peaks, never a figure of its own.
"""

from fitcheck.advice.ceiling import Ceiling, ceilings
from fitcheck.advice.commands import command, flags
from fitcheck.advice.fix import Fix, pace, uncached
from fitcheck.advice.frontier import frontier
from fitcheck.advice.room import room
from fitcheck.advice.search import best, fixes

__all__ = [
    "Ceiling",
    "Fix",
    "best",
    "ceilings",
    "command",
    "fixes",
    "flags",
    "frontier",
    "pace",
    "room",
    "uncached",
]
