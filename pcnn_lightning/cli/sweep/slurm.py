"""A sweep as an array job of SLURM."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPT = "sweep.sbatch"
SECONDS_BEFORE_THE_END = 120
"""When SLURM announces the end of a job, so that a run can save a checkpoint between two batches."""


def array_job(runs: Sequence[Path], out: Path, options: str) -> str:
    """The script of an array job with a task for each run.

    SIGUSR1 lets a run save a checkpoint and put itself into the queue again, from where it goes on.

    Args:
        runs: folders of the runs that have not finished.
        out: folder of the sweep.
        options: options of ``sbatch``, such as ``--partition=gpu --gpus=1 --time=4:00:00``.
    """
    own = {
        "job-name": "sweep",
        "array": f"0-{len(runs) - 1}",
        "signal": f"SIGUSR1@{SECONDS_BEFORE_THE_END}",
        "output": f'"{out.resolve()}/slurm-%A_%a.txt"',
        "open-mode": "append",
    }
    command = shlex.join([sys.executable, "-m", "pcnn_lightning", "sweep", "--run_dir"])
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{name}={value}" for name, value in own.items()),
            "#SBATCH --requeue",
            *([f"#SBATCH {options}"] if options else []),
            "runs=(",
            *(f"  {shlex.quote(str(run))}" for run in runs),
            ")",
            f"cd {shlex.quote(str(Path.cwd()))}",
            f'srun {command} "${{runs[$SLURM_ARRAY_TASK_ID]}}"',
            "",
        ]
    )
