"""``python -m imagefs.cli``: the ``imagefs`` command."""

import sys

from imagefs.cli import main

sys.exit(main())
