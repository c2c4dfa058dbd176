"""FitCheck: will this training run fit on my GPU?

>>> import fitcheck
>>> fitcheck.check("llama-3.1-8b", method="ppo", gpu="rtx 4090").verdict
'does-not-fit'
"""

from fitcheck.answer import check, resolve
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.plan import Plan
from fitcheck.report import Report

__version__ = "0.1.0"
__all__ = ["FitCheckError", "Plan", "Report", "check", "fit", "resolve"]
