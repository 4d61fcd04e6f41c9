"""The report of a run or a study: one page for meetings, made from the files in its directory alone."""
