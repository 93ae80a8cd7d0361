"""What is installed, as far as it can be told without torch, and what to do if it cannot work."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

from ._version import __version__

FOLDER = Path(__file__).resolve().parent
# Not by name: the index has another package of this name.
REINSTALL = "pip install --no-deps --force-reinstall WHEEL-OR-SOURCE-FOLDER"
OLDEST_TORCH = (2, 5)
NEEDS_TORCH = (
    "causal_conv1d needs PyTorch >= 2.5, and pip does not install it, lest it replace one built "
    "for this machine"
)


def require_torch() -> None:
    """ImportError in one sentence if there is no torch that works, or one that is too old."""
    try:
        import torch
    except Exception as error:  # whatever a damaged installation raises
        if getattr(error, "name", None) != "torch":
            raise ImportError(f"causal_conv1d: importing torch failed: {error}") from error
        found = None
    else:
        found = torch
    # What pip leaves of a package may be a folder without a version.
    version = getattr(found, "__version__", None)
    if found is None or version is None:
        raise ImportError(
            f"{NEEDS_TORCH}: install it yourself for {sys.executable}, on a Jetson the one for its "
            f"JetPack",
            name="torch",
        )
    # By its numbers: JetPack's 2.5.0a0 comes before 2.5 in the order of versions.
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        raise ImportError(
            f"{NEEDS_TORCH}: install a newer one yourself than {version!r}, which is in "
            f"{Path(str(found.__file__)).parent}",
            name="torch",
        )


def commit() -> str:
    """The commit that was built, or is checked out where this runs from the sources."""
    try:
        from ._commit import commit
    except ImportError:
        git = ["git", "-C", str(FOLDER)]
        try:
            # Not that of a project whose folder this was merely installed in.
            subprocess.run(
                [*git, "ls-files", "--error-unmatch", Path(__file__).name],
                capture_output=True,
                check=True,
            )
            found = subprocess.run(
                [*git, "rev-parse", "--short", "HEAD"], capture_output=True, check=True, text=True
            )
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return found.stdout.strip()
    return commit[:12]


def description() -> str:
    return (
        f"causal_conv1d {__version__}, commit {commit()}, in {FOLDER}\n"
        f"Python {platform.python_version()}, {platform.platform()}"
    )


def tick(good: bool) -> str:
    mark, plain = ("✓", "ok") if good else ("✗", "FAILED")
    try:
        mark.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return plain
    return mark


def doctor_is_starting() -> bool:
    """Whether ``python -m causal_conv1d`` runs, whose first act is to import the package."""
    names = {"causal_conv1d", "-mcausal_conv1d"}
    return sys.argv[:1] == ["-m"] and not names.isdisjoint(sys.orig_argv)


def report(problem: Exception) -> int:
    """The doctor's words where the package does not import, and its exit status."""
    print(f"{description()}\n{tick(False)} {problem}")
    return 1
