"""``python -m parvts_fx``: the command ``parvts-fx``."""

import sys

from parvts_fx.command import main

sys.exit(main())
