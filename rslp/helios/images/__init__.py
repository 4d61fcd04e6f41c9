"""Images on their way into the Helios encoder: units, bands, statistics, dates, batches."""
