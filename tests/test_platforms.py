"""Without what Linux alone has, the pipeline still runs. Not a Mac: the names are removed here."""

import subprocess
import sys

from tests.conftest import ROOT, Place

ELSEWHERE = """
import ctypes, os, runpy, sys
del os.sched_getaffinity
library = ctypes.CDLL(None)

class Bare:
    def __getattr__(self, name):
        if name in ("prctl", "mallopt"):
            raise AttributeError(name)
        return getattr(library, name)

real = ctypes.CDLL
ctypes.CDLL = lambda name, *rest, **options: Bare() if name is None else real(name, *rest, **options)
import machine, pathlib
sys.platform = "darwin"
memory = machine.memory_available
machine.memory_available = lambda device: memory(device, pathlib.Path("/nowhere"))
sys.argv = sys.argv[1:]
sys.path[0] = os.getcwd()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_pipeline_runs_without_what_linux_alone_has(place: Place):
    script = place.path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    command = [sys.executable, script, "pipeline.py", place.config, "sft"]
    trained = place.run("train.py", place.config)
    assert "trained" in trained.stdout
    done = subprocess.run(command, cwd=ROOT, env=place.env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout
