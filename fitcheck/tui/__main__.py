"""python -m fitcheck.tui: the screen, also where no terminal is seen (a browser's session)."""

import sys

from fitcheck.tui import run

if __name__ == "__main__":
    sys.exit(run(may_measure="--no-measure" not in sys.argv[1:]))
