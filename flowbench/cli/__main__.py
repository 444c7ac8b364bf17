"""``python -m flowbench.cli`` is the command ``flowbench``."""

import sys

from flowbench.cli.main import main

sys.exit(main())
