"""Run the command line as ``python -m pcnn_lightning`` or ``pcnn_lightning``."""

from pcnn_lightning.cli import main


def run() -> None:
    """Run the command line and return nothing, since a console script exits with what it is returned."""
    main()


if __name__ == "__main__":
    run()
