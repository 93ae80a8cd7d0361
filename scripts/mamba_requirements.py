"""What the installed mamba_ssm imports and its environment lacks, without importing any of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import apply_patches

PACKAGES = ("einops", "huggingface_hub", "packaging", "transformers", "triton")
# From there on transformers lacks a name that mamba_ssm before 2.3 imports.
NEW_TRANSFORMERS = 5
OLD_NAME = "GreedySearchDecoderOnlyOutput"


def is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder left behind has no origin


def has_old_name() -> bool:
    """Whether whoever imported transformers before has given the name back to it."""
    return hasattr(sys.modules.get("transformers.generation"), OLD_NAME)


def problem(package: Path) -> str | None:
    """A sentence on what is to be installed for mamba_ssm in this folder to import, or None."""
    files = [path.read_text(encoding="utf-8", errors="replace") for path in package.rglob("*.py")]
    source, name = "\n".join(files), f"mamba_ssm {apply_patches.version_of(package)}"
    # At a line's beginning: what is imported in a try or a function can be done without.
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    lacking = [each for each in PACKAGES if each in imported and not is_installed(each)]
    old = OLD_NAME in source
    if lacking:
        wanted = [
            f"'transformers<{NEW_TRANSFORMERS}'" if old and n == "transformers" else n
            for n in lacking
        ]
        hint = ""
        if "triton" in lacking:
            hint = " (Triton for a Jetson: from the index that its torch came from)"
        return (
            f"{name} cannot be imported without {' and '.join(lacking)}: "
            f"pip install {' '.join(wanted)}{hint}"
        )
    if old and is_installed("transformers") and not has_old_name():
        version = importlib.metadata.version("transformers")
        if int(version.partition(".")[0]) >= NEW_TRANSFORMERS:
            return (
                f"{name} cannot be imported with transformers {version}, which has no {OLD_NAME}: "
                f"pip install 'transformers<{NEW_TRANSFORMERS}'"
            )
    return None
