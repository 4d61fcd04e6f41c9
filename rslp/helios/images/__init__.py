"""Prepare images for the Helios encoder: units, bands, statistics, dates, batches."""
