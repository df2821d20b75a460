"""Run the command line as ``python -m pcnn_lightning``."""

from pcnn_lightning.cli import main

main()
