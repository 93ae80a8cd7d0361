"""Installs the wheels in a folder, patches mamba_ssm 2.2.4 if it is installed, and verifies.

    python scripts/install_wheels.py [FOLDER] [--no-patches] [--no-verify]

FOLDER (default: wheels/ in the repository) holds wheels of causal_conv1d, perhaps for several
machines, of which pip takes the one that fits; and may hold wheels of mamba_ssm. Nothing is
fetched, and torch is never installed or replaced. The exit status is 0 if every step succeeded.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

from install import SCRIPTS, add_options, finish, pip_install


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="Installs this library, and mamba_ssm, by wheel.")
    parser.add_argument("folder", type=Path, nargs="?", default=SCRIPTS.parent / "wheels")
    add_options(parser)
    options = parser.parse_args(arguments)
    found = sorted(options.folder.glob("*.whl"))
    names = {wheel.name.split("-")[0].lower() for wheel in found}
    if "causal_conv1d" not in names:
        print(f"error: there is no causal_conv1d-*.whl in {options.folder}", file=sys.stderr)
        return 1
    for package in ("causal_conv1d", "mamba_ssm"):
        if package not in names:
            continue
        source = ("--no-index", "--find-links", str(options.folder))
        if not pip_install("--force-reinstall", *source, package):
            wheels = ", ".join(wheel.name for wheel in found if wheel.name.startswith(package))
            print(
                f"error: pip installed none of {wheels}; this is Python "
                f"{platform.python_version()} on {platform.system()} {platform.machine()}",
                file=sys.stderr,
            )
            return 1
    return finish(options)


if __name__ == "__main__":
    sys.exit(main())
