"""The sample cache: windows are decoded once, then read from a memory map, with the same bits as without it."""
