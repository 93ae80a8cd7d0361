"""The C library as other projects get it: docs/c.md as printed, what is installed, the version."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from c_library import ONNXRUNTIME_INCLUDE, ROOT, configure, printed_lines, run, shell, sources

sys.path.append(str(ROOT / "scripts" / "dev"))
import check_wheel


@pytest.fixture
def prefix(c_library):
    return c_library


def test_installed_files(prefix):
    version = ".".join(header_version())
    library = f"lib/libcausal_conv1d_cpu.so.{version}"
    files = {str(p.relative_to(prefix)) for p in prefix.rglob("*") if not p.is_dir()}
    package = "lib/cmake/causal_conv1d/causal_conv1d"
    assert files == {
        "include/causal_conv1d.h",
        "include/selective_scan.h",
        library,
        "lib/libcausal_conv1d_cpu.so.1",
        "lib/libcausal_conv1d_cpu.so",
        "lib/pkgconfig/causal_conv1d_cpu.pc",
        *(f"{package}{s}.cmake" for s in ("Config", "ConfigVersion", "Targets", "Targets-release")),
        *(["lib/libcausal_conv1d_onnxruntime.so"] if ONNXRUNTIME_INCLUDE else []),
    }
    assert os.path.realpath(prefix / "lib/libcausal_conv1d_cpu.so") == str(prefix / library)
    dynamic = run(["readelf", "-dW", prefix / library], env=os.environ | {"LC_ALL": "C"})
    assert "soname: [libcausal_conv1d_cpu.so.1]" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_hardening(prefix):
    """What scripts/dev/check_wheel.py claims of a wheel's libraries holds for these too."""
    assert list(check_wheel.hardening_problems(prefix / "lib/libcausal_conv1d_cpu.so")) == []
    if ONNXRUNTIME_INCLUDE:
        name = "libcausal_conv1d_onnxruntime.so"
        assert list(check_wheel.hardening_problems(prefix / "lib" / name)) == [
            f"{name} looks for libraries in $ORIGIN (RPATH or RUNPATH)",
            f"{name} exports RegisterCustomOps, which is no part of the C interface",
        ]


def test_documented_lines(prefix):
    """Each way of the documentation gives a C and a C++ program that do what they should."""
    script = 'prefix="$HOME/causal_conv1d"\n' + printed_lines("c.md", "Use it")
    with sources() as folder:
        shutil.rmtree(folder / "build" / "c-found", ignore_errors=True)  # of another installation
        configure("docs/examples/c/fetch_content", "build/c-fetched")
        output = shell(script, folder, prefix.parent)
    assert output.count(": 1 3 6 8 8 6\n") == 4, output
    assert output.count("the same bits\n") == 4, output


def configure_other(prefix, tmp_path, request):
    """What CMake says to a project that asks for this package."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(other LANGUAGES C)\n"
        f"find_package(causal_conv1d {request})\nmessage(STATUS ${{causal_conv1d_VERSION}})\n"
    )
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build"]
    command.append(f"-DCMAKE_PREFIX_PATH={prefix}")
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "request_, found",
    (
        ("1.7 REQUIRED", True),
        ("2 REQUIRED", False),
        ("1.8 REQUIRED", False),
        ("0.9 REQUIRED", False),
    ),
)
def test_version_asked_for(request_, found, prefix, tmp_path):
    done = configure_other(prefix, tmp_path, request_)
    assert (done.returncode == 0) is found, done.stderr
    if found:
        assert f"-- {'.'.join(header_version())}\n" in done.stdout


def test_missing_component(prefix, tmp_path):
    """A build without CUDA says that it has no such component."""
    done = configure_other(prefix, tmp_path, "REQUIRED COMPONENTS cpu cuda")
    assert done.returncode != 0
    assert "causal_conv1d was built without its component cuda" in done.stderr


def test_python_files(tmp_path):
    """For the Python package: the library alone, under its plain name."""
    options = ["-DCAUSAL_CONV1D_CUDA=OFF", "-DCAUSAL_CONV1D_PYTHON=ON"]
    run(["cmake", "-S", ROOT, "-B", tmp_path, *options])
    # Nothing is compiled: the install script tells what it would install, and from where.
    script = (tmp_path / "cmake_install.cmake").read_text()
    files = re.findall(r'FILES "(.*)"\)', script)
    assert [Path(file).name for file in files] == ["libcausal_conv1d_cpu.so"]
    assert re.search(r'DESTINATION "\$\{CMAKE_INSTALL_PREFIX\}(/\.)?"', script)


@pytest.mark.parametrize("word", ("0", "no", "False"))
def test_words_for_off(word, tmp_path):
    """CMake's and pip's. With a compiler of CUDA that does not work, AUTO would fail."""
    options = [f"-DCAUSAL_CONV1D_CUDA={word}", "-DCMAKE_CUDA_COMPILER=/bin/false"]
    run(["cmake", "-S", ROOT, "-B", tmp_path, *options])


@pytest.mark.parametrize(
    "word, said", (("maybe", "means nothing here"), ("Yes", "(enable_language)"))
)
def test_other_words_for_cuda(word, said, tmp_path):
    options = [f"-DCAUSAL_CONV1D_CUDA={word}", "-DCMAKE_CUDA_COMPILER=/bin/false"]
    command = ["cmake", "-S", ROOT, "-B", tmp_path, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and said in done.stderr


def test_added_twice(tmp_path):
    """As where two parts of a project each bring it along."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(other LANGUAGES CXX)\n"
        f"add_subdirectory({ROOT} one)\nadd_subdirectory({ROOT} two)\n"
        "get_target_property(type causal_conv1d::cpu TYPE)\nmessage(STATUS ${type})\n"
    )
    options = ["-DCAUSAL_CONV1D_CUDA=OFF"]
    assert "SHARED_LIBRARY" in run(["cmake", "-S", tmp_path, "-B", tmp_path / "build", *options])


def header_version():
    text = (ROOT / "csrc" / "causal_conv1d.h").read_text()
    return re.findall(r"^#define CAUSAL_CONV1D_VERSION_[A-Z]+ (\d+)$", text, re.MULTILINE)


def test_one_version():
    """The header and Python's _version.py agree."""
    text = (ROOT / "causal_conv1d" / "_version.py").read_text()
    major, minor, patch, portable = header_version()
    assert f'"{major}.{minor}.{patch}+portable.{portable}"' in text
