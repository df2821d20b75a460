"""The stages of a network, which need no other module to be known."""

STAGES = {"full_precision": 0, "ternary": 1, "binary": 2}
"""Stages by name, in their order, and the number that each has in the logs."""
