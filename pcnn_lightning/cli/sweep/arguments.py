"""The arguments of ``sweep`` itself, among those of ``fit``, which all of its runs have."""

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

VALUED, SWITCHES = ("--grid", "--out", "--jobs", "--slurm", "--run_dir"), ("--print", "--help", "-h")


def add_sweep_arguments(parser: LightningArgumentParser) -> None:
    """Add the arguments of ``sweep`` to its parser."""
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="A file with a grid, such as methods.yaml of configs/sweeps.")
    add(
        "--grid", action="append", metavar="KEY=VALUE,VALUE...", help="An argument of fit, with its values; repeatable."
    )
    add("--out", type=str | None, default=None, help="Folder of the sweep, with a folder for each run.")
    add("--jobs", type=int, default=1, help="How many runs share the cores and GPUs of this machine at a time.")
    add("--print", action="store_true", help="Print a command for each remaining run, and run none.")
    add(
        "--slurm",
        type=str | None,
        default=None,
        metavar="OPTIONS",
        help="Write an array job with these options of sbatch, such as '--gpus=1 --time=4:00:00', and run none.",
    )
    add("--run_dir", type=str | None, default=None, help="Train and test this run of a sweep only.")


def split_arguments(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split what follows ``sweep`` into its own arguments and those of ``fit``."""
    own: list[str] = []
    others: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        if word in VALUED and words and (word == "--slurm" or not words[0].startswith("--")):
            own.append(f"{word}={words.pop(0)}")  # options of sbatch begin with dashes
        elif word.partition("=")[0] in VALUED + SWITCHES:
            own.append(word)
        elif word.startswith("-"):
            others.append(word)
            if "=" not in word and words and not words[0].startswith("--"):
                others.append(words.pop(0))
        else:
            own.append(word)  # the sweep file
    return own, others
