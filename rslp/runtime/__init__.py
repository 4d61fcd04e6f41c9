"""The process and its machine: ranks, signals, child processes, memory."""
