"""The front end: `python ui.py`, or `lorakit ui`. Its pages are in lorakit/ui; their widgets follow from config/schema.py."""

import sys

from lorakit.ui.app import main

if __name__ == "__main__":
    sys.exit(main())
