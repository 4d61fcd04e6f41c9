"""Figures from arrays and rows, without torch: for reports, files and trackers."""
