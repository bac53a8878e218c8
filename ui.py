"""The front end: `python ui.py`, or `lorakit ui`. The widgets of its pages follow from lorakit/config/schema.py."""

import sys

from lorakit.ui.app import main

if __name__ == "__main__":
    sys.exit(main())
