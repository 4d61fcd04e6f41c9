"""Is this run config sound, and is the data what it says? Asked before a long run, answered all at once."""
