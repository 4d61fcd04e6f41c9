"""The command line, and one function for each workflow."""
