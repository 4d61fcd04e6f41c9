"""The built-in example: four small synthetic datasets, their configs and an encoder."""
