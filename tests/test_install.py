"""scripts/install.py and install_wheels.py, with small wheels made here."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_apply_patches import snapshot

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("scripts_path")


def make_wheel(folder, name, tag="py3-none-any", version="9.9", files=()):
    """A wheel as the format has it, with one module per (name, text)."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    contents = dict(files) | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        "Requires-Dist: torch==0.1\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = [f"{path},," for path in (*contents, f"{info}/RECORD")]
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for each, text in contents.items():
            wheel.writestr(each, text)
        wheel.writestr(f"{info}/RECORD", "\n".join(record) + "\n")
    return path


def run_install_wheels(folder, site, *options):
    environment = os.environ | {"PIP_TARGET": str(site), "PYTHONPATH": str(site)}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PIP_FIND_LINKS", None)
    command = [sys.executable, ROOT / "scripts/install_wheels.py", folder, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def has_pip():
    return subprocess.run([sys.executable, "-m", "pip", "-V"], capture_output=True).returncode == 0


needs_pip = pytest.mark.skipif(not has_pip(), reason="this Python has no pip")


@needs_pip
def test_install_wheels_installs_patches_and_verifies(sources, tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    package = snapshot(sources / "mamba_ssm")
    make_wheel(wheels, "causal_conv1d", files=[("causal_conv1d/__init__.py", "wrong = True\n")])
    make_wheel(wheels, "causal_conv1d", "py3-none-linux_riscv64", version="10.0")
    mamba = [(f"mamba_ssm/{name}", data.decode()) for name, data in package.items()]
    make_wheel(wheels, "mamba_ssm", files=mamba, version="2.2.4")
    found = run_install_wheels(wheels, site)
    assert (site / "causal_conv1d-9.9.dist-info").is_dir(), found.stderr
    assert found.stdout.count("patched: ") == 4
    # What was installed is no library at all, and verify.py must say so.
    assert "✗ causal_conv1d_fn" in found.stdout and found.returncode == 1

    found = run_install_wheels(wheels, site, "--no-patches", "--no-verify")
    assert found.returncode == 0 and "patched: " not in found.stdout
    assert "✗" not in found.stdout


@needs_pip
def test_install_wheels_without_a_wheel_for_this_machine(tmp_path):
    wheels = tmp_path / "wheels"
    make_wheel(wheels, "causal_conv1d", "py3-none-linux_riscv64")
    found = run_install_wheels(wheels, tmp_path / "site")
    assert found.returncode == 1
    assert "linux_riscv64" in found.stderr and os.uname().machine in found.stderr


@needs_pip
def test_install_wheels_tells_that_pip_refused(tmp_path):
    make_wheel(tmp_path, "causal_conv1d", "cp27-none-any")
    found = run_install_wheels(tmp_path, tmp_path / "site")
    assert found.returncode == 1 and "pip did not install causal_conv1d" in found.stderr


def test_install_wheels_of_an_empty_folder(tmp_path):
    found = run_install_wheels(tmp_path, tmp_path / "site")
    assert found.returncode == 1 and "causal_conv1d-*.whl" in found.stderr


JETPACK_6 = "causal_conv1d-1.7.0+portable.10.cu12-py3-none-linux_aarch64.whl"
JETPACK_7 = "causal_conv1d-1.7.0+portable.10.cu13-py3-none-manylinux_2_28_aarch64.whl"
OLD_6 = "causal_conv1d-1.7.0+portable.9.cu12-py3-none-linux_aarch64.whl"
OLD_7 = "causal_conv1d-1.7.0+portable.9.cu13-py3-none-manylinux_2_28_aarch64.whl"
SERVER = "causal_conv1d-1.7.0+portable.10.cu13-py3-none-manylinux_2_28_x86_64.whl"
# The machine, CUDA of its torch ("": a torch without, None: no torch), the wheels, the one to take.
CHOICES = {
    "JetPack 6": ("aarch64", "12.6", (JETPACK_6, JETPACK_7), JETPACK_6),
    "JetPack 7": ("aarch64", "13.0", (JETPACK_6, JETPACK_7), JETPACK_7),
    "an older wheel of the right CUDA": ("aarch64", "12.6", (OLD_6, JETPACK_7), OLD_6),
    "the newest": ("aarch64", "13.2", (OLD_6, OLD_7, JETPACK_6, JETPACK_7), JETPACK_7),
    "torch without CUDA": ("aarch64", "", (JETPACK_6, OLD_7), JETPACK_6),
    "no torch": ("aarch64", None, (OLD_6, JETPACK_7), JETPACK_7),
    "a server": ("x86_64", "13.0", (JETPACK_6, JETPACK_7, SERVER), SERVER),
    "x86 without its wheel": ("x86_64", "13.0", (JETPACK_6, JETPACK_7), None),
    "x86 without torch": ("x86_64", None, (JETPACK_6, JETPACK_7), None),
    "another CUDA": ("aarch64", "11.4", (JETPACK_6, JETPACK_7), None),
}


@pytest.mark.parametrize("machine, cuda, names, wanted", CHOICES.values(), ids=CHOICES)
def test_install_wheels_chooses_by_machine_and_torch(
    machine, cuda, names, wanted, tmp_path, monkeypatch, capsys
):
    """A torch that cannot be imported is read all the same; pip is stood in for."""
    import install_wheels

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    if cuda is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart is missing')\n")
        value = repr(cuda or None)
        text = f"from typing import Optional\ncuda: Optional[str] = {value}\nhip = None\n"
        (tmp_path / "torch/version.py").write_text(text)
    for name in names:
        (tmp_path / name).touch()
    installed = []
    monkeypatch.setattr(install_wheels.platform, "machine", lambda: machine)
    monkeypatch.setattr(install_wheels, "pip_install", lambda *args: installed.append(args) or True)
    status = install_wheels.main([str(tmp_path), "--no-patches", "--no-verify"])
    error = capsys.readouterr().err
    if wanted is not None:
        assert status == 0 and error == ""
        assert [args[-1] for args in installed] == [str(tmp_path / wanted)]
        return
    assert status == 1 and installed == [] and error.count("\n") == 1
    assert all(name in error for name in (*names, f"a wheel for {machine}"))
    assert cuda is None or f".cu{cuda.split('.')[0]} in its version" in error


ODD = [
    "causal_conv1d-foo.whl",
    "causal_conv1d-weird+1-py3-none-any.whl",
    "causal_conv1d-1..2-py3-none-any.whl",
    f"{SERVER[:-4]} (1).whl",
]


def test_install_wheels_leaves_out_what_is_no_wheels_name(tmp_path, monkeypatch, capsys):
    import install_wheels

    for name in ODD:
        (tmp_path / name).touch()
    installed = []
    monkeypatch.setattr(install_wheels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(install_wheels, "cuda_of_torch", lambda: None)
    monkeypatch.setattr(install_wheels, "pip_install", lambda *args: installed.append(args) or True)
    command = [str(tmp_path), "--no-patches", "--no-verify"]
    assert install_wheels.main(command) == 1 and installed == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "and there is none; " in error
    assert all(f"{name} is no wheel's name" in error for name in ODD)
    (tmp_path / SERVER).touch()
    assert install_wheels.main(command) == 0
    assert [args[-1] for args in installed] == [str(tmp_path / SERVER)]


def test_install_wheels_of_what_is_no_folder(tmp_path, capsys):
    import install_wheels

    wheel = make_wheel(tmp_path, "causal_conv1d")
    assert install_wheels.main([str(wheel)]) == 1
    assert f"is a file: give the folder that it is in, {tmp_path}" in capsys.readouterr().err
    assert install_wheels.main([str(tmp_path / "nope")]) == 1
    assert f"there is no {tmp_path}/nope" in capsys.readouterr().err


def test_install_wheels_orders_versions():
    import install_wheels

    ordered = """1.6.9 1.7.0rc1 1.7 1.7.0+portable 1.7.0+portable.cu12 1.7.0+portable.9.cu13
        1.7.0+portable.10 1.7.0+portable.10.cu12 1.7.0+portable.10.cu13 1.7.0.post1 1.7.1
        1.10.0""".split()
    assert sorted(reversed(ordered), key=install_wheels.version_key) == ordered
    packaging = pytest.importorskip("packaging.version")
    assert sorted(reversed(ordered), key=packaging.Version) == ordered


def test_install_leaves_torch_alone_and_runs_all_steps(sources, monkeypatch, capfd):
    """pip itself and verify.py are stood in for: a build takes minutes."""
    import install

    monkeypatch.syspath_prepend(sources)
    commands, statuses = [], [0, 0]

    def run(command, **_):
        commands.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, statuses[len(commands) - 1])

    monkeypatch.setattr(install.subprocess, "run", run)
    assert install.main([]) == 0
    pip, verify = commands
    assert pip[1:4] == ["-m", "pip", "install"] and "--no-deps" in pip and pip[-1] == str(ROOT)
    assert verify[1].endswith("scripts/verify.py")
    assert capfd.readouterr().out.count("patched: ") == 6  # mamba_ssm and Mamba-YOLO

    commands.clear()
    assert install.main(["--no-patches", "--no-verify"]) == 0 and len(commands) == 1
    for statuses[:] in ([1, 0], [0, 1]):
        commands.clear()
        assert install.main([]) == 1
    (sources / "mamba_ssm/__init__.py").write_text('__version__ = "2.3.0"\n')
    commands.clear()
    statuses[:] = [0, 0]
    assert install.main([]) == 0 and "mamba_ssm is 2.3.0" in capfd.readouterr().out
