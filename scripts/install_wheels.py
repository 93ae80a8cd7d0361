"""Installs the wheels in a folder, patches mamba_ssm 2.2.4 if it is installed, and verifies.

    python scripts/install_wheels.py [FOLDER] [--no-patches] [--no-verify]

FOLDER (default: wheels/ in the repository) holds wheels of causal_conv1d, perhaps for several
machines and versions of CUDA: the newest is taken of those for this machine and for the CUDA of the
torch that is installed. It may hold wheels of mamba_ssm too. Nothing is fetched, and torch is never
installed or replaced. The exit status is 0 if every step succeeded.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import sys
from pathlib import Path

from install import SCRIPTS, add_options, finish, pip_install

sys.path.append(str(SCRIPTS / "dev"))
import wheel_files  # noqa: E402


class Wheel:
    """What a wheel's name says."""

    def __init__(self, path: Path):
        self.path = path
        name = wheel_files.parse_name(path)
        self.version, self.platforms = name["version"], name["platform"].split(".")
        label = re.search(r"\+(?:.*\.)?cu(\d+)$", self.version)
        self.cuda = label and label[1]  # CUDA's major version, where the version says it

    def fits(self, machine: str, cuda: str | None) -> bool:
        """cuda: the major version of torch's CUDA; None where there is none."""
        here = any(name == "any" or name.endswith(f"_{machine}") for name in self.platforms)
        return here and (cuda is None or self.cuda in (None, cuda))


def version_key(version: str):
    """Orders versions as PEP 440 does, without epochs, and all kinds of prereleases alike."""
    public, _, local = version.lower().partition("+")
    release, suffix = re.fullmatch(r"v?([\d.]*\d)(.*)", public).groups()
    release = [int(number) for number in release.split(".")]
    while release and release[-1] == 0:
        release.pop()
    final = not re.match(r"[-_.]?(a|b|c|rc|alpha|beta|pre|preview|dev)", suffix)
    # In local labels numbers come after words.
    parts = [part for part in re.split(r"[-_.]", local) if part]
    labels = [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
    return release, final, [int(number) for number in re.findall(r"\d+", suffix)], labels


def cuda_of_torch() -> str | None:
    """CUDA's version of the installed torch, "" if it has none, None without torch.

    torch is not imported, as that may fail for want of another library.
    """
    spec = importlib.util.find_spec("torch")
    file = spec and spec.origin and Path(spec.origin).with_name("version.py")
    if not file or not file.is_file():
        return None
    found = re.search(r"^cuda\b.*= *['\"](.+)['\"]", file.read_text(), re.MULTILINE)
    return found[1] if found else ""


def choose(wheels: list[Wheel], machine: str, cuda: str | None) -> Wheel | None:
    """The newest wheel for this machine and torch; cuda as cuda_of_torch gives it."""
    major = cuda.split(".")[0] if cuda else None
    fitting = [wheel for wheel in wheels if wheel.fits(machine, major)]
    return max(fitting, key=lambda wheel: version_key(wheel.version), default=None)


def wheels_in(folder: Path) -> tuple[list[Wheel], list[str]]:
    """The wheels of causal_conv1d, and a sentence on each that is left out for its name."""
    wheels, left_out = [], []
    for path in sorted(folder.glob("causal_conv1d-*.whl")):
        try:
            wheels.append(Wheel(path))
        except wheel_files.Problem as problem:
            left_out.append(str(problem))
    return wheels, left_out


def nothing_fits(wheels: list[Wheel], machine: str, cuda: str | None) -> str:
    needed = f"for {machine}"
    if cuda:
        needed += f" and CUDA {cuda.split('.')[0]} (.cu{cuda.split('.')[0]} in its version)"
    torch = f"a torch of CUDA {cuda}" if cuda else "no torch with CUDA"
    names = ", ".join(wheel.path.name for wheel in wheels) or "none"
    return f"this is {machine} with {torch}: a wheel {needed} is needed, and there is {names}"


@wheel_files.exits_with_a_sentence
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="Installs this library, and mamba_ssm, by wheel.")
    parser.add_argument("folder", type=Path, nargs="?", default=SCRIPTS.parent / "wheels")
    add_options(parser)
    options = parser.parse_args(arguments)
    wheel_files.check_folder(options.folder)
    wheels, left_out = wheels_in(options.folder)
    if not wheels and not left_out:
        raise wheel_files.Problem(f"there is no causal_conv1d-*.whl in {options.folder}")
    machine, cuda = platform.machine(), cuda_of_torch()
    wheel = choose(wheels, machine, cuda)
    if wheel is None:
        raise wheel_files.Problem("; ".join([nothing_fits(wheels, machine, cuda), *left_out]))
    sources = {"causal_conv1d": [str(wheel.path)]}
    if list(options.folder.glob("mamba_ssm-*.whl")):  # for one Python and torch: pip chooses
        sources["mamba_ssm"] = ["--find-links", str(options.folder), "mamba_ssm"]
    for package, source in sources.items():
        if not pip_install("--force-reinstall", "--no-index", *source):
            raise wheel_files.Problem(
                f"pip did not install {package}; this is Python {platform.python_version()} on "
                f"{platform.system()} {machine}"
            )
    return finish(options)


if __name__ == "__main__":
    sys.exit(main())
