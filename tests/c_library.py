"""Builds and installs the C library as docs/c.md says, for the tests of what others build on it.

With ``CAUSAL_CONV1D_ONNXRUNTIME_INCLUDE`` in the environment, the folder of onnxruntime_c_api.h,
the operators for ONNX Runtime are part of it; scripts/test.sh sets it.
"""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "test_c"
ONNXRUNTIME_INCLUDE = os.environ.get("CAUSAL_CONV1D_ONNXRUNTIME_INCLUDE", "")
# A compiler that does not optimise takes a quarter of the time.
COMPILER = """\
#!/usr/bin/env bash
exec "${@/#-O3/-O0}"
"""


def run(command, **options):
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}"
    return done.stdout


def printed_lines(page, heading):
    """The commands in a chapter of a page of docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    chapter = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return "".join(re.findall(r"^```bash\n(.*?)^```", chapter, re.MULTILINE | re.DOTALL))


def shell(script, folder, home):
    """Run as by a user whose home is `home`, without a build's settings in the environment."""
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "LC_ALL": "C"}
    env |= {name: os.environ[name] for name in ("CC", "CXX") if name in os.environ}
    return run(["bash", "-euxo", "pipefail", "-c", script], cwd=folder, env=env)


@contextlib.contextmanager
def sources():
    """A source folder whose builds go on from the last ones; for one process at a time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in ("CMakeLists.txt", "cmake", "csrc", "docs"):
            if not (FOLDER / name).exists():
                (FOLDER / name).symlink_to(ROOT / name)
        yield FOLDER


def configure(source, build):
    """Sets what the documentation's lines leave open: no CUDA, and what makes the build short."""
    compiler = FOLDER / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    options = ["-DCAUSAL_CONV1D_CUDA=OFF", f"-DCMAKE_CXX_COMPILER_LAUNCHER={compiler}"]
    options.append(f"-DCAUSAL_CONV1D_ONNXRUNTIME_INCLUDE={ONNXRUNTIME_INCLUDE}")
    options += ["-G", "Ninja"] if shutil.which("ninja") else []
    run(["cmake", "-S", source, "-B", build, *options], cwd=FOLDER)
