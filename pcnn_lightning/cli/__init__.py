"""The command line: ``python -m pcnn_lightning fit --config configs/digits.yaml``."""

from pcnn_lightning.cli.entry import main as main
from pcnn_lightning.cli.parser import OneBitCLI as OneBitCLI
