"""A stand-in for Slurm's commands: ``install`` links sbatch, srun, squeue, sacct and scancel to this file.

sbatch really runs the script, in a session of its own, so that a job outlives whoever submitted it.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scancel")


def install(folder: Path) -> dict[str, str]:
    """Make the commands in a folder; return the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in COMMANDS:
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder / "jobs")}


def jobs() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def sbatch(arguments: list[str]) -> None:
    script = Path(arguments[-1])
    number = len(list(jobs().iterdir())) + 1
    folder = jobs() / str(number)
    folder.mkdir()
    header = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    name = next(line.partition("=")[2] for line in header if "--job-name=" in line)
    (folder / "name").write_text(name.strip("\"'"))
    (folder / "header").write_text("\n".join(header))
    nodes = next((line.partition("=")[2] for line in header if "--nodes=" in line), "1")
    environment = {
        **os.environ,
        "SLURM_JOB_ID": str(number),
        "SLURM_NTASKS": nodes,
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_NODELIST": "localhost,second" if nodes == "2" else "here",
    }
    command = f'echo $$ > "{folder}/pid"; bash "{script}"; echo $? > "{folder}/code"'
    with (folder / "output").open("w") as output:
        subprocess.Popen(
            ["bash", "-c", command], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    print(f"Submitted batch job {number}")


def srun(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--unbuffered", action="store_true")
    parser.add_argument("--output")
    parser.add_argument("--error")
    _, rest = parser.parse_known_args(arguments)
    tasks = [
        subprocess.Popen(rest, env={**os.environ, "SLURM_NODEID": str(number), "SLURM_PROCID": str(number)})
        for number in range(int(os.environ["SLURM_NTASKS"]))
    ]
    sys.exit(max(task.wait() for task in tasks))


def state_of(folder: Path) -> str:
    if (folder / "cancelled").exists():
        return "CANCELLED"
    if (folder / "code").exists():
        return "COMPLETED" if (folder / "code").read_text().strip() == "0" else "FAILED"
    return "RUNNING"


def squeue(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--me", action="store_true")
    parser.add_argument("-o")
    parser.add_argument("--name", default="")
    parser.add_argument("-j", default="")
    known = parser.parse_args([one for one in arguments if one != "-h"])
    for folder in sorted(jobs().iterdir()):
        name = (folder / "name").read_text()
        if state_of(folder) == "RUNNING" and known.name in ("", name) and known.j in ("", folder.name):
            print(folder.name if known.o == "%A" else "RUNNING")


def sacct(arguments: list[str]) -> None:
    folder = jobs() / arguments[arguments.index("-j") + 1]
    if folder.exists():
        print(state_of(folder))


def scancel(arguments: list[str]) -> None:
    folder = jobs() / arguments[0]
    (folder / "cancelled").touch()
    os.killpg(int((folder / "pid").read_text()), signal.SIGKILL)


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "squeue": squeue, "sacct": sacct, "scancel": scancel}[sys.argv[1]](
        sys.argv[2:]
    )
