"""Prepare images for the Helios encoder: units, bands, dates, batches."""
