"""The feature cache: outputs of a frozen encoder, computed once, then read in place of the inputs."""
