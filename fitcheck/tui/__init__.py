"""The terminal UI: one question, one answer, always on screen. The only code that imports textual.

fitcheck                 # on a terminal
"""


def run(may_measure: bool = True) -> int:
    """Open the screen where it was left; the exit code."""
    import sys

    from fitcheck.tui import state
    from fitcheck.tui.app import FitCheckApp

    kept, said = state.load()
    app = FitCheckApp(state=kept, watch_machine=True, said=said, may_measure=may_measure)
    app.run()
    if app.return_code == 0 and (fault := state.save(app.state())):
        print(f"note: {fault}", file=sys.stderr)
    return app.return_code or 0
