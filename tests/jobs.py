"""Training of tests/micro.py as a process of its own, to be interrupted."""

import pathlib
import subprocess

import micro
import processes


class Job:
    """Trains the micro config on one device, a checkpoint every second step."""

    def __init__(self, folder: pathlib.Path, steps: int):
        self.folder, self.steps = folder, steps
        micro.write_examples(folder / "data.json")

    def start(self, name: str, *overrides: str, workdir: str = "") -> subprocess.Popen:
        """Starts or resumes a run; its log, and without `workdir` the run itself, are in the folder of that name."""
        logs = self.folder / name
        logs.mkdir(exist_ok=True)
        config = f"{pathlib.Path(micro.__file__)}:steps={self.steps},data={self.folder / 'data.json'}"
        command = ["-m", "refusion_jax.train", "--config", config, "--workdir", workdir or logs / "run", *overrides]
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        (process,) = processes.start(command, folder=logs, devices=1, **cache)
        return process

    def finish(self, name: str, process: subprocess.Popen) -> str:
        """What it printed, when it has ended well."""
        (code,), (output,) = processes.finish([process], self.folder / name)
        assert code == 0, output
        return output
