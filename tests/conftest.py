"""What all tests share."""

import os

from hypothesis import HealthCheck, settings

# rslearn 0.1.19 calls what jsonargparse 4.53 has renamed.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

# Sums over several threads differ in their last bits from sums in one, and threads only fight over a small machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a busy machine, making examples may be slow; that says nothing of what is tested.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
