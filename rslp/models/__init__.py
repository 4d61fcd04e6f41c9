"""Torch modules that know no data and no run: the joint model, heads, the optimiser."""
