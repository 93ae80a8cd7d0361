"""scripts/dev/check_wheel.py, on small libraries made here that each have one fault."""

import functools
import os
import platform
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MACHINE = platform.machine()
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
HARDENED = ("-Wl,-z,relro,-z,now,-z,noexecstack", "-fvisibility=hidden")
SOURCE = """
#include <stdexcept>
#define EXPORTED __attribute__((visibility("default")))
extern "C" EXPORTED void causal_conv1d_throw(const char* text) { throw std::runtime_error(text); }
extern "C" EXPORTED const char* causal_conv1d_file() { return "./csrc/torch/ops.cpp"; }
"""

pytestmark = pytest.mark.skipif(
    None in (COMPILER, shutil.which("readelf"), shutil.which("nm"))
    or MACHINE not in ("x86_64", "aarch64"),
    reason="needs a C++ compiler, readelf and nm",
)


@pytest.fixture
def check_wheel(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "dev")
    import check_wheel

    return check_wheel


def pack(wheel, library, name="cpu"):
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(library, f"causal_conv1d/libcausal_conv1d_{name}.so")
        archive.writestr("causal_conv1d/py.typed", "")


def build(folder, source=SOURCE, options=HARDENED, name="cpu", tag=f"py3-none-linux_{MACHINE}"):
    """Makes a wheel with one library."""
    library, wheel = folder / "library.so", folder / f"causal_conv1d-1.0-{tag}.whl"
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-x", "c++", "-", *options, "-o", library]
    subprocess.run(command, input=source, text=True, check=True, cwd="/")
    pack(wheel, library, name)
    return wheel


@pytest.fixture(scope="session")
def compiler_suits(tmp_path_factory):
    """A compiler with a static libstdc++ or a newer glibc has faults of its own."""
    symbols = ["nm", "-D", tmp_path_factory.mktemp("compiler") / "library.so"]
    build(symbols[2].parent)
    lines = subprocess.run(symbols, capture_output=True, text=True, check=True).stdout.splitlines()
    foreign = [line for line in lines if " T " in line and " causal_conv1d_" not in line]
    newer = [line for line in lines if re.search("@(GLIBC_2.(29|[3-9])|CXXABI_1.3.1[2-9])", line)]
    if foreign or newer:
        pytest.skip(f"this compiler's libraries are not those of a wheel: {(foreign + newer)[0]}")


@pytest.fixture
def make(tmp_path, compiler_suits):
    """A function that makes a wheel with one library, and returns it."""
    return functools.partial(build, tmp_path)


@pytest.fixture
def errors(check_wheel, capsys):
    """A function that returns what check_wheel.py says is wrong, as its exit status must too."""

    def check(wheel, *options):
        status = check_wheel.main([*options, str(wheel)])
        found = capsys.readouterr().err.splitlines()
        assert status == (1 if found else 0) and all(line.startswith("error: ") for line in found)
        return found

    return check


def test_a_good_wheel(make, check_wheel, capsys):
    wheel = make()
    assert check_wheel.main([str(wheel)]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines()[-1] == f"{wheel.name}: right"


def test_a_wheel_without_its_types(make, errors, tmp_path):
    wheel = make()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "library.so", "causal_conv1d/libcausal_conv1d_cpu.so")
    assert errors(wheel) == ["error: there is no causal_conv1d/py.typed"]


NAME = f"causal_conv1d-1.0-py3-none-linux_{MACHINE}.whl"
UNREADABLE = {
    "missing": (NAME, None, "there is no {}"),
    "a folder": (".", None, "{} is a folder, not a file"),
    "truncated": (NAME, b"PK\3\4", "{} is damaged: File is not a zip file"),
    "another library": (NAME, {"causal_conv1d/a.so": b"no library"}, "readelf cannot read a.so: "),
    "renamed": ("wheel.whl", {}, "wheel.whl is no wheel's name"),
    "a browser's copy": (f"{NAME[:-4]} (1).whl", {}, " (1).whl is no wheel's name"),
}


@pytest.mark.parametrize("name, content, text", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read(errors, tmp_path, name, content, text):
    wheel = tmp_path / name
    if isinstance(content, bytes):
        wheel.write_bytes(content)
    elif content is not None:
        with zipfile.ZipFile(wheel, "w") as archive:
            for file, data in content.items():
                archive.writestr(file, data)
    (error,) = errors(wheel)
    assert text.format(wheel) in error


def test_without_readelf(make, errors, monkeypatch, tmp_path):
    wheel = make()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert errors(wheel) == ["error: there is no program readelf: apt-get install binutils"]


@pytest.mark.parametrize("name", ("cpu", "cuda"))
def test_the_libraries_of_this_package(check_wheel, name):
    import causal_conv1d

    library = Path(causal_conv1d.__file__).with_name(f"libcausal_conv1d_{name}.so")
    if not library.exists():
        pytest.skip(f"there is no {library.name}")
    assert list(check_wheel.hardening_problems(library)) == []


LINKED = {
    "lazy binding": ("-Wl,-z,lazy", "no full RELRO"),
    "no RELRO": ("-Wl,-z,norelro", "no full RELRO"),
    "executable stack": ("-Wl,-z,execstack", "executable stack"),
    "RUNPATH": ("-Wl,-rpath,/opt/lib", "looks for libraries in /opt/lib"),
    "RPATH": ("-Wl,--disable-new-dtags,-rpath,$ORIGIN", "looks for libraries in $ORIGIN"),
}


@pytest.mark.parametrize("option, text", LINKED.values(), ids=LINKED)
def test_how_it_is_linked(make, errors, option, text):
    (error,) = errors(make(options=(*HARDENED, option)))
    assert "libcausal_conv1d_cpu.so" in error and text in error


def test_a_stack_of_which_nothing_is_said(make, errors, tmp_path):
    """Without the note GNU_STACK the kernel makes it executable."""
    wheel = make()
    library = tmp_path / "library.so"
    data = bytearray(library.read_bytes())
    start, size = int.from_bytes(data[32:40], "little"), int.from_bytes(data[54:56], "little")
    for at in range(start, start + size * data[56], size):
        if data[at : at + 4] == 0x6474E551.to_bytes(4, "little"):
            data[at : at + 4] = bytes(4)  # PT_NULL
    library.write_bytes(data)
    pack(wheel, library)
    (error,) = errors(wheel)
    assert "executable stack" in error


EXPORTS = {
    "a function": ('extern "C" EXPORTED void helper() {}', "helper"),
    "a variable": ("EXPORTED int causal_conv1d_counter2[4]; EXPORTED int counter = 3;", "counter"),
    "a mangled name": (
        "namespace causal_conv1d { EXPORTED void f() {} }",
        "_ZN13causal_conv1d1fEv",
    ),
    "a template of libstdc++": (
        '#include <vector>\nextern "C" EXPORTED void causal_conv1d_f(std::vector<void*>& v) '
        "{ v.push_back(nullptr); }",
        "_ZNSt6vectorIPvSaIS0_EE",
    ),
}


@pytest.mark.parametrize("code, name", EXPORTS.values(), ids=EXPORTS)
def test_what_it_exports(make, errors, code, name):
    found = errors(make(SOURCE + code))
    assert found and all("exports " in error for error in found)
    assert any(f"exports {name}" in error for error in found)


@pytest.mark.parametrize(
    "path",
    (
        f"{ROOT}/csrc/anything",
        f"{Path.home()}/anything",
        "/tmp/tmpxft_00001234/update.cudafe1.cpp",
        "/home/someone/causal_conv1d/csrc/check.h",
        "/builds/4/csrc/update.cu",
    ),
)
def test_a_path_in_it(make, errors, path):
    code = f'extern "C" EXPORTED const char* causal_conv1d_path() {{ return "{path}"; }}'
    (error,) = errors(make(SOURCE + code))
    assert error.endswith(f"contains a path of the machine that built it: {path}")


NEEDED = {
    "glibc 2.29": (
        'extern "C" double exp(double); '
        'extern "C" EXPORTED double causal_conv1d_f(double x) { return exp(x); }',
        ("-lm",),
        "needs GLIBC (2, 29), but (2, 28) is the newest it may",
    ),
    "libstdc++ of GCC 11": (
        "#include <exception>\n"
        'extern "C" EXPORTED bool causal_conv1d_f() { auto p = std::current_exception(); '
        "auto q = p; return q != nullptr; }",
        (),
        "needs CXXABI (1, 3, 13), but (1, 3, 11) is the newest it may",
    ),
    "dlsym of glibc 2.34": (
        'extern "C" void* dlsym(void*, const char*); '
        'extern "C" EXPORTED void* causal_conv1d_f() { return dlsym(nullptr, "f"); }',
        (),
        "takes dlopen or dlsym from libc.so.6, where none is before glibc 2.34",
    ),
    # glibc 2.28 looks for this one in libc.so.6 alone, although libdl.so.2 is loaded.
    "an old dlsym of libc.so.6": (
        f'__asm__(".symver dlsym, dlsym@GLIBC_{"2.2.5" if MACHINE == "x86_64" else "2.17"}"); '
        'extern "C" void* dlsym(void*, const char*); '
        'extern "C" EXPORTED void* causal_conv1d_f() { return dlsym(nullptr, "f"); }',
        ("-Wl,--no-as-needed", "-l:libdl.so.2"),
        "takes dlopen or dlsym from libc.so.6, where none is before glibc 2.34",
    ),
}


@pytest.mark.parametrize("code, options, text", NEEDED.values(), ids=NEEDED)
def test_what_an_older_system_lacks(make, errors, check_wheel, code, options, text):
    if tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 34):
        pytest.skip("this system is older, and links what it has")
    tag = f"py3-none-{check_wheel.MANYLINUX}_{MACHINE}"
    found = errors(make(SOURCE + code, (*HARDENED, *options), tag=tag))
    assert any(error.endswith(text) for error in found), found
    if "newest it may" in text:
        assert any(f"the libraries allow linux_{MACHINE}" in error for error in found)


def test_debug_information(make, errors, tmp_path):
    code = f'# 1 "{tmp_path}/source.cpp"\nextern "C" void causal_conv1d_f() {{}}'
    options = ("-g", HARDENED[0])
    found = errors(make(code, options))
    assert found and all(str(tmp_path) in error for error in found)
    assert errors(make(code, (*options, f"-ffile-prefix-map={tmp_path}=."))) == []


def test_relative_paths_and_those_of_the_system_may_be_in_it(make, errors):
    paths = ("csrc/cpu/api.cpp", "../csrc/cpu/api.cpp", "a/b.h", "/proc/self/maps", "/dev/shm")
    code = f'extern "C" EXPORTED const char* causal_conv1d_path() {{ return "{" ".join(paths)}"; }}'
    assert errors(make(SOURCE + code)) == []


def test_symbols_of_torch_and_python(make, errors):
    code = """
extern "C" void aoti_torch_free();
extern "C" void PyErr_Clear();
namespace c10 { void f(); }
extern "C" EXPORTED void causal_conv1d_f() { aoti_torch_free(); PyErr_Clear(); c10::f(); }
"""
    symbols = [error.split()[-1] for error in errors(make(SOURCE + code))]
    assert symbols == ["PyErr_Clear", "_ZN3c101fEv", "aoti_torch_free"]


def test_a_library_that_is_not_always_there(make, errors, tmp_path):
    command = [COMPILER, "-shared", "-fPIC", "-x", "c++", "-", "-o", tmp_path / "libother.so"]
    subprocess.run(command, input="void other() {}", text=True, check=True)
    code = 'void other(); extern "C" EXPORTED void causal_conv1d_f() { other(); }'
    options = (*HARDENED, "-x", "none", "-Wl,--no-as-needed", f"-L{tmp_path}", "-lother")
    found = errors(make(SOURCE + code, options))
    assert any(error.endswith("links libother.so") for error in found), found


def test_the_wheels_name(make, errors):
    other = "aarch64" if MACHINE == "x86_64" else "x86_64"
    (error,) = errors(make(tag=f"py3-none-linux_{other}"))
    assert error.endswith(f"is not for {other}")
    (error,) = errors(make(tag=f"cp310-cp310-linux_{MACHINE}"))
    assert "the tag is cp310-cp310, not py3-none" in error
    (error,) = errors(make(tag="py3-none-any"))
    assert "any is no tag" in error
    found = errors(make(tag=f"py3-none-manylinux_2_99_{MACHINE}"))
    assert any("but the libraries allow manylinux_2_" in error for error in found)


def test_what_is_missing(make, errors):
    (error,) = errors(make(), "--cuda")
    assert error.endswith("there is no libcausal_conv1d_cuda.so")
    found = errors(make(name="cuda"))
    assert [error.split(": ", 1)[1] for error in found] == [
        "libcausal_conv1d_cuda.so has no code for sm_87",
        "libcausal_conv1d_cuda.so has no PTX",
        "there is no libcausal_conv1d_cpu.so",
    ]


def test_parts_without_ptx(make, errors, check_wheel, monkeypatch):
    """Two sources may have none."""
    both, machine_code = {"sm_87", "compute_80"}, {"sm_87"}
    for parts, wrong in (
        ([both, machine_code, machine_code], None),
        ([both, *[machine_code] * 3], "3 sources have no PTX, and two may"),
        ([both, {"compute_80"}], "one source has code for ['compute_80'] alone"),
    ):
        monkeypatch.setattr(check_wheel, "device_code", lambda library, parts=parts: parts)
        found = [error for error in errors(make(name="cuda")) if "source" in error]
        assert [error.split(": ", 2)[2] for error in found] == ([wrong] if wrong else [])


def test_size(make, errors, check_wheel, monkeypatch):
    monkeypatch.setattr(check_wheel, "SMALL", 1000)
    (error,) = errors(make())
    assert error.endswith("larger than 1,000 bytes")
