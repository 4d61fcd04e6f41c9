"""What a person types: the command line, and one function for each workflow."""
