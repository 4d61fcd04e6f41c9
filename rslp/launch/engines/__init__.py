"""Engines: where a job can run. One file each: its plan as text, and how that is submitted and followed."""
