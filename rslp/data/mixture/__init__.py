"""The mixture: how batches are drawn from the datasets, as a pure function of seed and epoch."""
