"""`python -m lorakit` is `lorakit`."""

import sys

from lorakit.cli import main

sys.exit(main())
