"""The process and its machine: ranks, signals, child processes, streams, memory, and which classes it may import."""
