"""The terminal UI: one question, one answer, always on screen. The only code that imports textual.

fitcheck                 # on a terminal
"""


def run() -> int:
    """Open the screen; the exit code."""
    from fitcheck.tui.app import FitCheckApp

    app = FitCheckApp()
    app.run()
    return app.return_code or 0
