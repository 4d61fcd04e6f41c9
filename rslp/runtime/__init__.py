"""What a process shares with its machine: signals and child processes, standard streams, memory."""
