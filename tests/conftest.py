"""What all tests share."""

import os

# rslearn 0.1.19 calls what jsonargparse 4.53 has renamed.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
