"""Several runs made to be compared: their results beside each other, with intervals."""
