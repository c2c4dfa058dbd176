"""python -m fitcheck"""

import sys

from fitcheck.cli import main

if __name__ == "__main__":
    sys.exit(main())
