"""After a run: from a checkpoint to rows of metrics, tables and predictions."""
