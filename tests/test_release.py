"""write_index.py by pip and uv, and check_release.py, on small wheels made here."""

import importlib.util
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_check_wheel import COMPILER, HARDENED, SOURCE, build

ROOT = Path(__file__).resolve().parent.parent
MACHINE = platform.machine()
# Nothing of this machine's settings, which may name another index.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
CLEAN |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "UV_NO_CONFIG": "1"}
DOWNLOAD = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", "downloads"]
has_pip = subprocess.run([*DOWNLOAD[:3], "-V"], capture_output=True).returncode == 0


@pytest.fixture(autouse=True)
def scripts_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "dev")


def metadata(version, python=">=3.10", kind="text/markdown"):
    return (
        f"Metadata-Version: 2.4\nName: causal-conv1d\nVersion: {version}\nSummary: For tests\n"
        f"Requires-Python: {python}\nDescription-Content-Type: {kind}\n\n.. unknown::\n"
    )


def make_wheel(folder, version, platform_tag="any", files=(), **settings):
    tag, info = f"py3-none-{platform_tag}", f"causal_conv1d-{version}.dist-info"
    wheel = folder / f"causal_conv1d-{version}-{tag}.whl"
    contents = {"causal_conv1d/__init__.py": "pass\n"} | dict(files)
    contents[f"{info}/METADATA"] = metadata(version, **settings)
    contents[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n"
    record = "".join(f"{name},,\n" for name in (*contents, f"{info}/RECORD"))
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in (contents | {f"{info}/RECORD": record}).items():
            archive.writestr(name, text)
    return wheel


def make_source(folder, version, python):
    file = folder / f"causal_conv1d-{version}.tar.gz"
    data = metadata(version, python).encode()
    with tarfile.open(file, "w:gz") as archive:
        entry = tarfile.TarInfo(f"causal_conv1d-{version}/PKG-INFO")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))


# -------------------------------------------------------------------------------------------- index


@pytest.fixture
def index(tmp_path):
    """A function that writes the index and runs a command in its folder with the index's URL."""
    import write_index

    def use(*command):
        assert write_index.main([str(tmp_path)]) == 0
        url = (tmp_path / "simple").as_uri()
        command = [*map(str, command), "--index-url", url]
        return subprocess.run(command, cwd=tmp_path, env=CLEAN, capture_output=True, text=True)

    return use


@pytest.mark.skipif(not has_pip, reason="this Python has no pip")
def test_pip_takes_from_the_index(index, tmp_path):
    for version in ("1.7.0+portable.9.cu12", "1.7.0+portable.9.cu13", "1.7.0+portable.10.cu12"):
        make_wheel(tmp_path, version, "manylinux_2_28_aarch64")
    make_wheel(tmp_path, "1.7.0+portable.11", python=">=99")
    make_source(tmp_path, "1.7.0+portable.12", python=">=99")
    board = ["--only-binary=:all:", "--platform=manylinux_2_28_aarch64"]
    for asked in ("causal-conv1d", "causal_conv1d==1.7.0+portable.9.cu13"):
        found = index(*DOWNLOAD, *board, asked)
        assert found.returncode == 0, found.stderr
    taken = sorted(path.name.split("-")[1] for path in (tmp_path / "downloads").iterdir())
    assert taken == ["1.7.0+portable.10.cu12", "1.7.0+portable.9.cu13"]
    assert index(*DOWNLOAD, "causal-conv1d==1.7.0+portable.12").returncode != 0


@pytest.mark.skipif(not has_pip, reason="this Python has no pip")
def test_pip_compares_the_hash(index, tmp_path, monkeypatch):
    import write_index

    wheel = make_wheel(tmp_path, "1.7.0+portable.1")
    assert index(*DOWNLOAD, "causal-conv1d").returncode == 0
    make_wheel(tmp_path, "1.7.0+portable.1", files=[("causal_conv1d/other.py", "")])
    monkeypatch.setattr(write_index, "main", lambda _: 0)  # the index is the old one
    (tmp_path / "downloads" / wheel.name).unlink()
    found = index(*DOWNLOAD, "causal-conv1d")
    assert found.returncode != 0 and "HASH" in found.stderr.upper()


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_takes_from_the_index(index, tmp_path):
    make_wheel(tmp_path, "1.7.0+portable.9")
    make_wheel(tmp_path, "1.7.0+portable.10")
    install = ["uv", "pip", "install", "--no-cache", "--no-deps", "--python", sys.executable]
    found = index(*install, "--target", "site", "causal-conv1d")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "site/causal_conv1d-1.7.0+portable.10.dist-info").is_dir()


def test_an_index_of_nothing(tmp_path, capsys):
    import write_index

    assert write_index.main([str(tmp_path)]) == 1
    assert "there is no wheel" in capsys.readouterr().err


def test_a_bad_file_does_not_keep_others_from_the_index(tmp_path, capsys):
    import write_index

    good = make_wheel(tmp_path, "1.7.0+portable.1")
    other = "causal_conv1d-1.7.0+portable.2"
    (tmp_path / f"{other}-py3-none-any.whl").write_bytes(good.read_bytes()[:-30])
    (tmp_path / f"{other}.tar.gz").touch()
    shutil.copy(good, tmp_path / f"{good.stem} (1).whl")
    make_source(tmp_path, "1.7.0+portable.3", ">=3.10")
    (tmp_path / "causal_conv1d-1.7.0+portable.3.tar.gz").rename(tmp_path / "renamed.tar.gz")
    with zipfile.ZipFile(tmp_path / "empty-1.0-py3-none-any.whl", "w"):
        pass
    assert write_index.main([str(tmp_path)]) == 0
    page = (tmp_path / "simple/causal-conv1d/index.html").read_text()
    assert page.count("<a ") == 1 and f">{good.name}</a>" in page
    assert [path.name for path in (tmp_path / "simple").iterdir() if path.is_dir()] == [
        "causal-conv1d"
    ]
    warnings = capsys.readouterr().err.splitlines()
    bad = {path.name for path in tmp_path.iterdir() if path.is_file()} - {good.name}
    assert len(bad) == 5
    assert {line.split(" is left out: ")[0] for line in warnings} == {f"warning: {n}" for n in bad}


def test_an_index_of_what_is_no_folder(tmp_path, capsys):
    import write_index

    assert write_index.main([str(make_wheel(tmp_path, "1.0"))]) == 1
    assert f"is a file: give the folder that it is in, {tmp_path}" in capsys.readouterr().err
    assert write_index.main([str(tmp_path / "nope")]) == 1
    assert f"there is no {tmp_path}/nope" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ check_release


@pytest.fixture
def errors(capsys):
    """A function that returns what check_release.py says is wrong."""
    import check_release

    for tool, name in check_release.TOOLS.items():
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{name} is not installed")

    def check(*files):
        status = check_release.main([str(file) for file in files])
        found = capsys.readouterr().err
        assert status == (1 if found else 0)
        return found

    return check


def with_library(folder, code="", options=HARDENED, platform_tag=None, files=(), **settings):
    """A wheel with one library, of which all else is right."""
    import check_release

    if importlib.util.find_spec("wheel") is None:
        pytest.skip("wheel is not installed")
    names = [name for name in check_release.top_level().split(",") if name != "causal_conv1d"]
    modules = {n if n.endswith(".py") else f"{n}/__init__.py": f"# {n}\n" for n in names}
    with zipfile.ZipFile(build(folder, SOURCE + code, options)) as small:
        library = small.read("causal_conv1d/libcausal_conv1d_cpu.so")
    files = modules | {"causal_conv1d/libcausal_conv1d_cpu.so": library} | dict(files)
    (folder / "release").mkdir()
    tag = platform_tag or f"manylinux_2_28_{MACHINE}"
    wheel = make_wheel(folder / "release", "1.7.0+portable.1", tag, files, **settings)
    unpacked = folder / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    packed = [sys.executable, "-m", "wheel", "pack", "--dest-dir", wheel.parent, unpacked]
    subprocess.run(packed, check=True, capture_output=True)  # with hashes in RECORD
    return wheel


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
EXP = """extern "C" double exp(double);
extern "C" EXPORTED double causal_conv1d_f(double x) { return exp(x); }"""


@needs_compiler
@pytest.mark.parametrize("tag", (f"manylinux_2_28_{MACHINE}", f"linux_{MACHINE}"))
def test_a_good_wheel(errors, tmp_path, tag):
    assert errors(with_library(tmp_path, platform_tag=tag)) == ""


@needs_compiler
@pytest.mark.parametrize("tag", (f"manylinux_2_28_{MACHINE}", f"linux_{MACHINE}"))
def test_a_library_for_newer_systems(errors, tmp_path, tag):
    found = errors(with_library(tmp_path, EXP, (*HARDENED, "-lm"), tag))
    assert f"its libraries need manylinux_2_31_{MACHINE}, and its tag is {tag}" in found


@needs_compiler
def test_files_that_do_not_belong(errors, tmp_path):
    found = errors(with_library(tmp_path, files=[("tests/__init__.py", "pass\n")]))
    assert "W202: Wheel library has undeclared toplevel entry:" in found


@needs_compiler
def test_a_readme_that_cannot_be_shown(errors, tmp_path):
    found = errors(with_library(tmp_path, kind="text/x-rst"))
    assert "`long_description` has syntax errors" in found


@needs_compiler
def test_a_library_that_is_not_always_there(errors, tmp_path):
    (tmp_path / "other.c").write_text("void other(void) {}")
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-x", "c", "other.c", "-o", "libother.so"],
        cwd=tmp_path,
        check=True,
    )
    code = 'extern "C" void other(); extern "C" EXPORTED void causal_conv1d_f() { other(); }'
    options = (*HARDENED, "-x", "none", "-Wl,--no-as-needed", f"-L{tmp_path}", "-lother")
    assert "it links libother.so" in errors(with_library(tmp_path, code, options))


def test_no_wheel_and_no_tools(tmp_path, monkeypatch, capsys):
    import check_release

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert check_release.main([str(tmp_path)]) == 1
    found = capsys.readouterr().err
    assert "pip install twine check-wheel-contents 'auditwheel>=6.8'" in found
    assert "there is no wheel to check" in found
    assert check_release.main([str(tmp_path / "nope")]) == 1
    found = capsys.readouterr().err
    assert f"there is no {tmp_path}/nope\n" in found and "wheel to check" not in found


def test_a_file_that_no_tool_can_read(tmp_path, monkeypatch, capsys):
    import check_release

    monkeypatch.setattr(check_release, "TOOLS", {})  # none is asked
    wheel = make_wheel(tmp_path, "1.0")
    wheel.write_bytes(wheel.read_bytes()[:-30])
    source = tmp_path / "causal_conv1d-1.0.tar.gz"
    source.touch()
    assert check_release.main([str(wheel), str(source)]) == 1
    found = capsys.readouterr().err.splitlines()
    assert [line.split(" is damaged: ")[0] for line in found] == [
        f"error: {file.name}: {file}" for file in (wheel, source)
    ]
