"""The version of the package, which needs no other module."""

__version__ = "0.1.0.dev0"
