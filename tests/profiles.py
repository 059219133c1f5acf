"""How much is tested: HYPOTHESIS_PROFILE is fast, where it isn't set, or ci or long."""

import os

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fast")
FULL = PROFILE != "fast"  # what is marked `full` runs too
