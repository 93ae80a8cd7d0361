"""Builds and installs this library, patches mamba_ssm 2.2.4 if it is installed, and verifies.

    python scripts/install.py [--no-patches] [--no-verify]

The same by hand, in the environment that ``python`` belongs to:

    pip install --no-deps .
    python scripts/apply_patches.py
    python scripts/verify.py

torch is never installed or replaced. The exit status is 0 if every step succeeded.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import apply_patches

SCRIPTS = Path(__file__).resolve().parent


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-patches", action="store_true", help="leave mamba_ssm as it is")
    parser.add_argument("--no-verify", action="store_true", help="leave scripts/verify.py out")


def pip_install(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", *arguments]
    print("+", *command, flush=True)
    return subprocess.run(command).returncode == 0


def patch_mamba_ssm() -> int:
    """Patches the installed mamba_ssm if it is the release that the patches are for."""
    importlib.invalidate_caches()  # it may have been installed a moment ago
    package = apply_patches.find_package("mamba_ssm", None)
    if package is None:
        print("mamba_ssm is not installed: nothing to patch")
        return 0
    version = apply_patches.version_of(package)
    if version != apply_patches.VERSION:
        print(f"mamba_ssm is {version}, the patches are for {apply_patches.VERSION}: none applied")
        return 0
    return apply_patches.main([])


def finish(options) -> int:
    """Patches and verification, after the installation."""
    status = 0 if options.no_patches else patch_mamba_ssm()
    if not options.no_verify:
        print(flush=True)
        status = subprocess.run([sys.executable, SCRIPTS / "verify.py"]).returncode or status
    return status


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="Installs this library from its source.")
    add_options(parser)
    options = parser.parse_args(arguments)
    if not pip_install("--force-reinstall", str(SCRIPTS.parent)):
        print("error: the library could not be installed; see pip's message", file=sys.stderr)
        return 1
    return finish(options)


if __name__ == "__main__":
    sys.exit(main())
