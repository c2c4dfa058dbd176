"""The one error of FitCheck: a message for the user, and a hint at the way out."""

from __future__ import annotations


class FitCheckError(Exception):
    """A user's mistake or a question FitCheck cannot answer; never a bug of FitCheck's own.

    The command line prints `error: message`, an empty line, `hint: hint` and exits with 2.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
