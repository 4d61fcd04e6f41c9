"""From a checkpoint to rows of metrics, and from rows to what a person reads."""
