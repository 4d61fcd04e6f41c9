"""The built-in example: four small synthetic datasets, their configs and an encoder, written offline from a seed."""
