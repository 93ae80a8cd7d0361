"""scripts/: apply_patches.py, install.py, install_wheels.py, verify.py, errors of build_wheel.py.

The sources they work on here are excerpts made up from the patches' own lines, and small packages
of our own; tests/ecosystem/test_patches.py takes the released mamba_ssm 2.2.4.
"""

import difflib
import errno
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
TOOLS = {
    "git": ("git", "apply", "--check", "--verbose"),
    "patch": ("patch", "-p1", "--dry-run", "--fuzz=0", "-i"),
}


@pytest.fixture(autouse=True)
def scripts_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "dev")
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def apply_patches(scripts_path):
    import apply_patches

    return apply_patches


@pytest.fixture
def sources(tmp_path, apply_patches):
    """A mamba_ssm and a Mamba-YOLO of which only the lines exist that the patches mention."""
    for patch in PATCHES:
        for name, hunks in apply_patches.read_patch(patch).items():
            lines = []
            for start, changes in hunks:
                lines += [b"# line %d\n" % i for i in range(len(lines), start)]
                lines += [text + b"\n" for sign, text in changes if sign != b"+"]
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"".join(lines) + b"# the end\n")
    (tmp_path / "mamba_ssm/__init__.py").write_text('__version__ = "2.2.4"\n')
    (tmp_path / "ultralytics/__init__.py").touch()
    return tmp_path


def snapshot(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run_apply(apply_patches, folder, *options):
    return apply_patches.main(["--mamba-ssm", str(folder), "--mamba-yolo", str(folder), *options])


def test_there_are_three_patches():
    assert [patch.name for patch in PATCHES] == [
        "0001-fix-libc10-so-dependency.patch",
        "0002-fix-torch-distributed-api.patch",
        "0003-fix-selective-scan-cuda-core.patch",
    ]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.name[:4])
def test_patch_is_well_formed(patch, tool, sources, apply_patches):
    """Forward on the original and in reverse on the patched files, by git and by patch."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")

    def accepts(*options):
        command = [*TOOLS[tool], str(patch), *options]
        return subprocess.run(command, cwd=sources, capture_output=True).returncode == 0

    assert accepts() and not accepts("-R")
    assert run_apply(apply_patches, sources) == 0
    assert accepts("-R") and not (tool == "git" and accepts())


def test_apply_equals_what_patch_makes(sources, tmp_path_factory, apply_patches):
    if shutil.which("patch") is None:
        pytest.skip("patch is not installed")
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(sources, other, dirs_exist_ok=True)
    for patch in PATCHES:
        subprocess.run(["patch", "-s", "-p1", "-i", patch], cwd=other, check=True)
    before = snapshot(sources)
    assert run_apply(apply_patches, sources) == 0
    after = snapshot(sources)
    backups = {name.removesuffix(".orig") for name in after if name.endswith(".orig")}
    assert len(backups) == 6
    assert {name: after.pop(f"{name}.orig") for name in backups} == {
        name: before[name] for name in backups
    }
    assert after == snapshot(other) and after != before


def test_apply_twice_and_revert(sources, apply_patches, capsys):
    before = snapshot(sources)
    assert run_apply(apply_patches, sources) == 0
    patched = snapshot(sources)
    assert capsys.readouterr().out.count("\n") == 6
    assert run_apply(apply_patches, sources) == 0
    assert snapshot(sources) == patched
    assert capsys.readouterr().out.count("already patched: ") == 6
    assert run_apply(apply_patches, sources, "--revert") == 0
    assert snapshot(sources) == before
    assert run_apply(apply_patches, sources, "--revert") == 0
    assert snapshot(sources) == before
    assert "not patched: " in capsys.readouterr().out


def test_dry_run_changes_nothing(sources, apply_patches, capsys):
    before = snapshot(sources)
    assert run_apply(apply_patches, sources, "--dry-run") == 0
    assert snapshot(sources) == before
    assert capsys.readouterr().out.count("would be patched: ") == 6
    run_apply(apply_patches, sources)
    patched = snapshot(sources)
    assert run_apply(apply_patches, sources, "--dry-run", "--revert") == 0
    assert snapshot(sources) == patched


@pytest.mark.parametrize("version", ("2.2.5", "2.2.40", "1.2.4"))
def test_another_version_is_refused(sources, apply_patches, version, capsys):
    (sources / "mamba_ssm/__init__.py").write_text(f'__version__ = "{version}"\n')
    before = snapshot(sources)
    assert run_apply(apply_patches, sources) == 1
    assert snapshot(sources) == before
    assert version in capsys.readouterr().err


@pytest.mark.parametrize("options", ((), ("--dry-run",)))
def test_a_hunk_that_does_not_fit_is_named_and_nothing_changes(
    sources, apply_patches, options, capsys
):
    path = sources / "mamba_ssm/ops/selective_scan_interface.py"
    # The backward's call, in the last of the file's six hunks.
    changed = path.read_bytes().replace(b"causal_conv1d_cuda.causal_conv1d_bwd(", b"other(")
    path.write_bytes(changed)
    before = snapshot(sources)
    assert run_apply(apply_patches, sources, *options) == 1
    assert snapshot(sources) == before
    message = capsys.readouterr().err
    assert str(path) in message and "hunk 6 of 6" in message and "0001-" in message


def test_a_partly_patched_file_is_refused(sources, apply_patches, capsys):
    run_apply(apply_patches, sources)
    path = sources / "mamba_ssm/utils/generation.py"
    path.write_bytes(path.read_bytes().replace(b"is_available", b"is_anything"))
    before = snapshot(sources)
    for options in ((), ("--revert",)):
        assert run_apply(apply_patches, sources, *options) == 1
        assert snapshot(sources) == before
        assert "neither as released nor as patched" in capsys.readouterr().err


def test_lines_elsewhere_in_a_file_may_differ(sources, apply_patches):
    """As in another commit of Mamba-YOLO: hunks are found by their lines, and kept by a revert."""
    path = sources / "ultralytics/nn/modules/mamba_yolo.py"
    path.write_bytes(b"# one\n# more\n" + path.read_bytes())
    before = path.read_bytes()
    assert run_apply(apply_patches, sources) == 0
    patched = path.read_bytes()
    assert patched != before
    path.write_bytes(patched + b"# edited since\n")
    assert run_apply(apply_patches, sources, "--revert") == 0
    assert path.read_bytes() == before + b"# edited since\n"
    assert path.with_name("mamba_yolo.py.orig").read_bytes() == before  # no copy of it: kept


def test_a_file_in_the_place_of_the_backup_is_kept(sources, apply_patches, capsys):
    path = sources / "mamba_ssm/utils/generation.py.orig"
    path.write_text("something of the user's")
    before = snapshot(sources)
    assert run_apply(apply_patches, sources) == 1
    assert snapshot(sources) == before
    assert str(path) in capsys.readouterr().err


def whole_tree(folder):
    """What a reader of the folder can tell but times: names, contents, modes and owners."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[path] = (content, status.st_mode, status.st_uid, status.st_gid)
    return found


def states(apply_patches, sources, revert):
    """The options, the tree as it is now, and as the script makes it, which undoes that again."""
    options, back = ([], ["--revert"]) if not revert else (["--revert"], [])
    if revert:
        run_apply(apply_patches, sources)
    before = whole_tree(sources)
    assert run_apply(apply_patches, sources, *options) == 0
    after = whole_tree(sources)
    assert run_apply(apply_patches, sources, *back) == 0
    assert whole_tree(sources) == before != after
    return options, before, after


@pytest.fixture
def two_files(apply_patches, monkeypatch):
    """These tests run the script some hundred times."""
    monkeypatch.setattr(apply_patches, "MAMBA_SSM", ("0002-fix-torch-distributed-api.patch",))
    monkeypatch.setattr(apply_patches, "MAMBA_YOLO", ())


@pytest.mark.parametrize("revert", (False, True), ids=("apply", "revert"))
def test_interrupted_at_any_line_it_is_all_or_none(sources, apply_patches, two_files, revert):
    """KeyboardInterrupt in front of the n-th line of what writes, for every n."""
    options, before, after = states(apply_patches, sources, revert)
    functions = (apply_patches.write_all, apply_patches.write_like, apply_patches.with_backups)
    codes = {function.__code__ for function in functions}
    lines_left = 0

    def trace(frame, event, _):
        nonlocal lines_left
        if frame.f_code not in codes:
            return None
        if event == "line":
            lines_left -= 1
            if lines_left == 0:
                raise KeyboardInterrupt
        return trace

    outcomes, previous = [], sys.gettrace()
    for lines in range(1, 10_000):
        lines_left = lines
        sys.settrace(trace)
        try:
            run_apply(apply_patches, sources, *options)
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(previous)
        found = whole_tree(sources)
        assert found in (before, after), f"line {lines}"
        outcomes.append(found == after)
        if found == after:
            run_apply(apply_patches, sources, *([] if revert else ["--revert"]))
    assert whole_tree(sources) == after
    assert outcomes.count(False) > 60 and sorted(outcomes) == outcomes


@pytest.mark.parametrize("revert", (False, True), ids=("apply", "revert"))
@pytest.mark.parametrize("late", (False, True), ids=("not done", "done"))
@pytest.mark.parametrize("error", (OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()))
@pytest.mark.parametrize("step", ("mkdir", "open", "fsync", "chown", "utime", "replace", "unlink"))
def test_a_step_that_fails_leaves_all_as_it_was(
    sources, apply_patches, two_files, monkeypatch, capsys, step, error, late, revert
):
    """Each use of each function of the system in turn raises, the step itself done or not."""
    options, before, after = states(apply_patches, sources, revert)
    owner = apply_patches.Path if step in ("open", "unlink") else os
    genuine, calls = getattr(owner, step), []

    def fail(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == which and not late:
            raise error
        result = genuine(*arguments, **keywords)
        if len(calls) == which:
            if step == "open":
                result.close()
            raise error
        return result

    which, status = 0, 1
    while status != 0:
        which += 1
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, fail)
            try:
                status = run_apply(apply_patches, sources, *options)
            except KeyboardInterrupt:
                status = 1
        if status == 0:
            continue
        if step == "mkdir" and late:  # a folder made, of whose name nobody heard
            for path in sources.rglob(".apply_patches-*"):
                path.rmdir()
        assert whole_tree(sources) == before
        assert isinstance(error, KeyboardInterrupt) or "nothing was changed" in (
            capsys.readouterr().err
        )
    assert whole_tree(sources) == after
    assert which > 2 or (step == "unlink" and not revert)


def test_a_file_that_cannot_be_put_back_is_named(sources, apply_patches, monkeypatch, capsys):
    replace, calls = os.replace, []

    def fail(old, new):
        calls.append(new)
        if len(calls) >= 4:  # the second file, and every attempt to put the first back
            raise PermissionError("not allowed")
        replace(old, new)

    monkeypatch.setattr(apply_patches.os, "replace", fail)
    assert run_apply(apply_patches, sources) == 1
    message = capsys.readouterr().err
    assert f"{calls[1]} could not be put back" in message and "nothing was changed" not in message


def run_killed(sources, code, *options):
    """The script in a process of its own, running code before it renames a file."""
    script = f"""
import os, signal, sys, apply_patches
replace, calls = os.replace, []
def replace_and_more(old, new):
    calls.append(new)
    {code}
    replace(old, new)
os.replace = replace_and_more
sys.exit(apply_patches.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", script, "--mamba-ssm", sources, "--mamba-yolo", sources]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    return subprocess.run(
        [*command, *options],
        env=environment,
        capture_output=True,
        # A test run in the background ignores it, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ).returncode


@pytest.mark.parametrize("name", ("SIGINT", "SIGTERM", "SIGHUP"))
def test_a_signal_waits_until_all_is_written(sources, apply_patches, name):
    _, _, after = states(apply_patches, sources, False)
    code = f"os.kill(os.getpid(), signal.{name})"
    status = run_killed(sources, code)
    assert status == -getattr(signal, name)
    assert whole_tree(sources) == after


def test_a_backup_is_whole_also_if_the_process_dies(sources, apply_patches):
    """os._exit, as kill -9 or a power failure; the same command then finishes the work."""
    _, before, after = states(apply_patches, sources, False)
    for count in (1, 2, 5, 6, 11, 12):
        assert run_killed(sources, f"if len(calls) == {count}: os._exit(77)") == 77
        found = [path for path in sources.rglob("*.orig") if ".apply_patches-" not in str(path)]
        assert len(found) == count // 2
        assert all(path.read_bytes() == before[path.with_suffix("")][0] for path in found)
        assert run_apply(apply_patches, sources) == 0
        for path in sources.rglob(".apply_patches-*"):
            shutil.rmtree(path)
        assert whole_tree(sources) == after
        assert run_apply(apply_patches, sources, "--revert") == 0


def mixed(content):
    lines = content.split(b"\n")
    return b"\n".join(line + b"\r" * (i % 3 == 0) for i, line in enumerate(lines[:-1])) + b"\n"


ENCODINGS = {
    "CRLF": lambda content: content.replace(b"\n", b"\r\n"),
    "Latin-1": lambda content: b"# caf\xe9\x85\x0c\n" + content + b"# \xff\n",
    "UTF-8 with its mark": lambda content: b"\xef\xbb\xbf" + content,
    "no newline at the end": lambda content: content.removesuffix(b"\n"),
}


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
def test_encodings_and_line_endings_are_kept(sources, apply_patches, encode):
    _, before, after = states(apply_patches, sources, False)
    for path in sources.rglob("*.py"):
        path.write_bytes(encode(path.read_bytes()))
    assert run_apply(apply_patches, sources) == 0
    names = {path for path in after if path.suffix in (".py", ".orig")}
    assert {path: path.read_bytes() for path in names} == {
        path: encode(after[path][0]) for path in names
    }
    for path in sources.rglob("*.orig"):
        path.unlink()  # without which the revert must do as well
    assert run_apply(apply_patches, sources, "--revert") == 0
    for path in sources.rglob("*.py"):
        assert path.read_bytes() == encode(before[path][0])


def test_mixed_line_endings(sources, apply_patches):
    """Lines that no patch changes keep their own; the revert brings back those of the others."""
    _, released, after = states(apply_patches, sources, False)
    patched = {path for path in released if after[path] != released[path]}
    for path in patched:
        path.write_bytes(mixed(path.read_bytes()))
    before = whole_tree(sources)
    assert run_apply(apply_patches, sources) == 0
    for path in patched:
        was, now = before[path][0], path.read_bytes()
        assert now.replace(b"\r\n", b"\n") == after[path][0]
        old, new = released[path][0].splitlines(), after[path][0].splitlines()
        same = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
        assert len(same) > 2
        for i, j, length in same:
            kept = was.splitlines(True)[i : i + length], now.splitlines(True)[j : j + length]
            assert kept[0] == kept[1]
    assert run_apply(apply_patches, sources, "--revert") == 0
    assert whole_tree(sources) == before


@pytest.mark.parametrize(
    ("signs", "before", "after"),
    (
        (" -+", b"a\nb", b"a\nc"),
        (" -+", b"a\r\nb", b"a\r\nc"),
        ("  +", b"a\nb", b"a\nb\nc"),
        ("  +", b"a\r\nb", b"a\r\nb\r\nc"),
        ("--+", b"a\nb\n", b"c\n"),
        ("--+", b"\xef\xbb\xbfa\nb\n", b"\xef\xbb\xbfc\n"),
    ),
)
def test_hunks_at_the_end_of_a_file(apply_patches, signs, before, after):
    texts = (b"a", b"b", b"c")
    hunk = (0, list(zip((sign.encode() for sign in signs), texts, strict=True)))
    assert apply_patches.apply_hunks(before, [hunk]) == after
    assert apply_patches.apply_hunks(after, [apply_patches.reversed_hunk(hunk)]) == before


@pytest.mark.parametrize("options", ((), ("--dry-run",)))
def test_links_and_read_only_files_are_refused(sources, apply_patches, capsys, options):
    path = sources / "mamba_ssm/utils/generation.py"
    other = sources / "generation_elsewhere.py"
    path.rename(other)
    path.symlink_to(other)
    before = whole_tree(sources)
    assert run_apply(apply_patches, sources, *options) == 1
    assert f"{path} is a symbolic link" in capsys.readouterr().err
    assert whole_tree(sources) == before

    path.unlink()
    other.rename(path)
    path.chmod(0o444)
    before = whole_tree(sources)
    assert run_apply(apply_patches, sources, *options) == 1
    assert f"{path} is read-only" in capsys.readouterr().err
    assert whole_tree(sources) == before


def test_modes_and_owners_are_kept(sources, apply_patches):
    paths = sorted(path.relative_to(sources) for path in sources.rglob("*.py"))
    for number, path in enumerate(paths):
        (sources / path).chmod(0o640 + number)
        if os.geteuid() == 0:
            os.chown(sources / path, 1234 + number, 4321 - number)
    before = whole_tree(sources)
    assert run_apply(apply_patches, sources) == 0
    for path, (content, *status) in whole_tree(sources).items():
        original = before[path.with_suffix("") if path.suffix == ".orig" else path]
        assert status == list(original[1:])
        assert path.suffix != ".orig" or content == original[0]
    assert run_apply(apply_patches, sources, "--revert") == 0
    assert whole_tree(sources) == before


def test_the_patched_file_is_newer(sources, apply_patches):
    """For Python the compiled file is still good if the source's time and size are the same."""
    path = sources / "mamba_ssm/utils/generation.py"
    os.utime(path, (1e9, 1e9))
    assert run_apply(apply_patches, sources) == 0
    assert path.stat().st_mtime > 1.5e9


def test_hard_links_keep_their_content(sources, apply_patches):
    """Some installers link files from a cache that all environments share."""
    path = sources / "mamba_ssm/utils/generation.py"
    cached = sources.parent / "cached.py"
    cached.unlink(missing_ok=True)
    os.link(path, cached)
    before = cached.read_bytes()
    run_apply(apply_patches, sources)
    assert path.read_bytes() != before and cached.read_bytes() == before


def test_the_installed_package_is_found_but_not_imported(sources, apply_patches, monkeypatch):
    (sources / "mamba_ssm/__init__.py").write_text('__version__ = "2.2.4"\nraise ImportError\n')
    monkeypatch.syspath_prepend(sources)
    assert apply_patches.main([]) == 0
    assert apply_patches.main(["--revert"]) == 0


def test_a_folder_that_pip_left_behind_is_no_package(sources, apply_patches, monkeypatch, capsys):
    """pip uninstall leaves the backups, and Python takes their folder for a package."""
    import install

    for name in ("mamba_ssm", "ultralytics"):
        (sources / name / "__init__.py").unlink()
    monkeypatch.syspath_prepend(sources)
    assert apply_patches.main([]) == 1
    assert "installed" in capsys.readouterr().err
    assert install.patch_mamba_ssm() == 0
    assert "mamba_ssm is not installed" in capsys.readouterr().out


def test_nothing_to_patch_is_an_error(tmp_path, apply_patches, monkeypatch, capsys):
    monkeypatch.setattr(apply_patches.importlib.util, "find_spec", lambda name: None)
    assert apply_patches.main([]) == 1
    assert "installed" in capsys.readouterr().err
    assert apply_patches.main(["--mamba-ssm", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


# ----------------------------------------------------------------------- the patched names by value


def test_patched_mamba_yolo_scans_with_mamba_ssms_module(sources, apply_patches, monkeypatch):
    """0003: where there is no core module, the arguments arrive in selective_scan_cuda's places."""
    run_apply(apply_patches, sources)
    lines = (sources / "ultralytics/nn/modules/common_utils_mbyolo.py").read_text().splitlines()
    start = lines.index("    class selective_scan_cuda_core:")
    stop = next(i for i in range(start, len(lines)) if lines[i].startswith("    # from mamba_ssm"))

    class Scan:
        fwd = staticmethod(lambda *arguments: ("fwd", *arguments))
        bwd = staticmethod(lambda *arguments: ("bwd", *arguments))

    names = {"selective_scan_cuda": Scan}
    exec("if True:\n" + "\n".join(lines[start:stop]), names)
    core = names["selective_scan_cuda_core"]
    inputs = ("u", "delta", "A", "B", "C", "D")
    assert core.fwd(*inputs, "bias", True, 1) == ("fwd", *inputs, None, "bias", True)
    assert core.bwd(*inputs, "bias", "dout", "x", True, 1) == (
        *("bwd", *inputs, None, "bias", "dout", "x"),
        *(None, None, True, False),
    )


def test_patched_mamba_ssm_without_torch_distributed(sources, apply_patches, monkeypatch):
    """0002: names that torch lacks raise when they are called; those it has stay."""
    run_apply(apply_patches, sources)
    code = (sources / "mamba_ssm/distributed/distributed_utils.py").read_text()
    code = code.replace("# line 0\n", "import torch\n", 1)
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this torch has no distributed")
    whole = distributed.all_gather_into_tensor
    exec(code, {})
    assert distributed.all_gather_into_tensor is whole
    for name in ("all_gather_into_tensor", "_all_gather_base", "reduce_scatter_tensor"):
        monkeypatch.delattr(distributed, name)
    exec(code, {})
    with pytest.raises(RuntimeError, match="all_gather_into_tensor"):
        distributed.all_gather_into_tensor(1, 2)
    assert distributed.reduce_scatter_tensor is distributed._reduce_scatter_base
    monkeypatch.undo()


# -------------------------------------------------------------------------- install, install_wheels


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


# -------------------------------------------------------------------------------------- build_wheel


def nvcc_that_says(text):
    return f"#!/bin/sh\necho '{text}'\n"


NVCC = {
    "no such file": ("/nope/nvcc", None, "CUDACXX is /nope/nvcc, and there is no such program"),
    "not on PATH": ("nope-nvcc", None, "CUDACXX is nope-nvcc, and there is no such program"),
    "silent": ("nvcc", nvcc_that_says(""), "nvcc --version tells of no release of CUDA"),
    "no program": ("nvcc", "text", "nvcc --version tells of no release of CUDA"),
    "CUDA 11": ("nvcc", nvcc_that_says("release 11.4"), "CUDA 11: CUDA 12 or 13 is needed"),
}


@pytest.fixture
def build_wheel_says(tmp_path, monkeypatch, capsys):
    """A function that returns the sentence that build_wheel.py ends with."""
    import build_wheel

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: types.SimpleNamespace(origin="x"))
    monkeypatch.setattr(build_wheel.check_wheel, "output_of", lambda *_: "")
    monkeypatch.setattr(build_wheel.platform, "machine", lambda: "x86_64")

    def run(out=tmp_path / "out", machine="x86_64"):
        command = ["build_wheel.py", "--machine", machine, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        assert build_wheel.main() == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return run


@pytest.mark.parametrize("nvcc, script, text", NVCC.values(), ids=NVCC)
def test_build_wheel_without_an_nvcc_of_use(
    build_wheel_says, tmp_path, monkeypatch, nvcc, script, text
):
    if script is not None:
        nvcc = tmp_path / nvcc
        nvcc.write_text(script)
        nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert text in build_wheel_says()


def test_build_wheel_into_what_is_no_folder(build_wheel_says, tmp_path):
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file is a file: give --out a folder" in build_wheel_says(tmp_path / "file")
    assert "--out /proc/out cannot be made: " in build_wheel_says("/proc/out")


@pytest.mark.parametrize(
    "line, text",
    (
        ("CMake failed as told above; if it is about CUDA, CAUSAL_CONV1D_CUDA=0 builds without.",)
        + ("CMake failed.",),
        ("The compiler failed as told above; if it was killed for memory, set MAX_JOBS=1.",)
        + ("The compiler failed; if it was killed for memory, set MAX_JOBS=1.",),
        ("something else", "the build failed."),
    ),
)
def test_build_wheel_names_the_log_of_what_failed(
    build_wheel_says, tmp_path, monkeypatch, line, text
):
    """`build` is stood in for, which runs setup.py; these are sentences of that."""
    import build_wheel

    if "failed" in line:
        assert line in (ROOT / "setup.py").read_text()
        line = f"error: {line}"

    def run(command, stdout, **_):
        stdout.write(f"nvcc fatal\n{line}\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(build_wheel, "find_nvcc", lambda: ("nvcc", 13))
    monkeypatch.setattr(build_wheel.subprocess, "run", run)
    log = tmp_path / "out/build-cu13-x86_64.log"
    assert build_wheel_says() == f"error: {text} The output is in {log}.\n"


# ------------------------------------------------------------------------------------------- verify


SCAN = '''
"""selective_scan_cuda by the plain version of verify.py."""
import torch
from verify import selective_scan

def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

def fwd(*inputs):
    out, state = scan(*inputs[:6], None, *inputs[7:])
    x = torch.zeros(*state.shape[:2], 1, 2 * state.shape[2])
    x[:, :, 0, 1::2] = state
    return [out, x] if inputs[6] is None else [out, x, scan(*inputs)[0]]

def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, softplus, recompute):
    inputs = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, delta_bias)]
    gates = [] if z is None else [z.detach().requires_grad_()]
    with torch.enable_grad():
        y, _ = scan(*inputs[:6], gates[0] if gates else None, inputs[6], softplus)
        return list(torch.autograd.grad(y, [*inputs, *gates], dout))
'''

MAMBA = '''
"""mamba_ssm's Mamba by the plain version of verify.py."""
import torch
from torch import nn
from verify import mamba_block

class Mamba(nn.Module):
    def __init__(self, d_model, d_state):
        super().__init__()
        inner, rank = 2 * d_model, 4
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.rand(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, x):
        return mamba_block(dict(self.named_parameters()), x)
'''

YOLO = '''
"""Modules with Mamba-YOLO's names, options and calls of the scan."""
import torch
from torch import nn
import selective_scan_cuda_core

class SelectiveScanCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, backnrows, oflex):
        out, x = selective_scan_cuda_core.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, 1)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        ctx.delta_softplus = delta_softplus
        return out

    @staticmethod
    def backward(ctx, dout):
        u, delta, A, B, C, D, delta_bias, x = ctx.saved_tensors
        grads = selective_scan_cuda_core.bwd(
            u, delta, A, B, C, D, delta_bias, dout, x, ctx.delta_softplus, 1
        )
        return (*grads, None, None, None, None)

class SS2D(nn.Module):
    def __init__(self, d_model, d_state):
        super().__init__()
        self.scan = SelectiveScanCore
        self.proj = nn.Conv2d(d_model, d_model + 2 * d_state, 1)
        self.sizes = [d_model, d_state, d_state]
        self.A_logs = nn.Parameter(torch.rand(d_model, d_state))
        self.Ds = nn.Parameter(torch.ones(d_model))
        self.dt_bias = nn.Parameter(torch.rand(d_model))

    def forward(self, x):
        delta, B, C = self.proj(x).flatten(2).split(self.sizes, dim=1)
        B, C = B[:, None].contiguous(), C[:, None].contiguous()
        y = self.scan.apply(
            x.flatten(2), delta, -self.A_logs.exp(), B, C, self.Ds, self.dt_bias, True, 1, 1, False
        )
        return y.view_as(x)

class VSSBlock(nn.Module):
    def __init__(self, in_channels, hidden_dim, ssm_d_state):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, hidden_dim, 1)
        self.op = SS2D(hidden_dim, ssm_d_state)

    def forward(self, x):
        x = self.conv(x)
        return x + self.op(x)
'''

CORE = """
import selective_scan_cuda

def fwd(u, delta, A, B, C, D, delta_bias, softplus, nrows):
    return selective_scan_cuda.fwd(u, delta, A, B, C, D, None, delta_bias, softplus)

def bwd(u, delta, A, B, C, D, delta_bias, dout, x, softplus, nrows):
    return selective_scan_cuda.bwd(
        u, delta, A, B, C, D, None, delta_bias, dout, x, None, None, softplus, False
    )
"""

FILES = {
    "selective_scan_cuda.py": SCAN,
    "selective_scan_cuda_core.py": CORE,
    "mamba_ssm/__init__.py": "",
    "mamba_ssm/modules/__init__.py": "",
    "mamba_ssm/modules/mamba_simple.py": MAMBA,
    "yolo/nn/mamba_yolo.py": YOLO,
}
NAMES = ("causal_conv1d_fn", "Mamba module", "selective_scan_cuda", "SS2D", "VSSBlock_YOLO")


@pytest.fixture
def stand_ins(tmp_path):
    """Packages with the right names and values, in plain PyTorch."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def replace_in(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def signs_of(output):
    """The sign in front of each name in what verify.py prints."""
    lines = output.splitlines()[1:]
    assert len(lines) == len(NAMES), output
    signs = {}
    for name, line in zip(NAMES, lines, strict=True):
        sign, rest = line.split(" ", 1)
        assert rest.startswith(f"{name} "), output
        signs[name] = sign
    return signs


@pytest.fixture
def run_verify(stand_ins, scripts_path, monkeypatch, capsys):
    """verify.py's exit status, signs and output, run where the stand-ins are what is installed."""
    import verify

    monkeypatch.syspath_prepend(stand_ins)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the loops over time are of tiny operations

    def forget():
        packages = {name.split(".")[0].split("/")[0] for name in FILES} | {"mamba_yolo_tree"}
        for name in list(sys.modules):
            if name.split(".")[0] in packages:
                del sys.modules[name]

    def run(*options):
        forget()
        status = verify.main(["--device", "cpu", *options])
        forget()
        output = capsys.readouterr().out
        return status, signs_of(output), output

    yield run
    torch.set_num_threads(threads)


def test_verify_ticks_all(stand_ins, run_verify):
    status, signs, _ = run_verify("--mamba-yolo", str(stand_ins / "yolo"))
    assert status == 0 and signs == dict.fromkeys(NAMES, "✓")


def test_verify_without_mamba_yolo(stand_ins, run_verify):
    status, signs, output = run_verify()
    assert status == 0
    assert signs == dict.fromkeys(NAMES[:3], "✓") | dict.fromkeys(NAMES[3:], "-")
    assert output.count("not installed") == 2


@pytest.mark.parametrize("left", ("nothing", "a folder without modules"))
def test_verify_without_mamba_ssm(stand_ins, run_verify, left):
    shutil.rmtree(stand_ins / "mamba_ssm")
    if left != "nothing":
        (stand_ins / "mamba_ssm/utils").mkdir(parents=True)
        (stand_ins / "mamba_ssm/utils/generation.py.orig").touch()
    status, signs, output = run_verify("--mamba-yolo", str(stand_ins / "yolo"))
    assert status == 0
    assert signs == dict.fromkeys(NAMES, "✓") | {"Mamba module": "-"}
    assert output.count("not installed") == 1

    replace_in(stand_ins / "selective_scan_cuda.py", "x[:, :, 0, 1::2] = state", "pass")
    status, signs, _ = run_verify()
    assert status == 1 and signs["Mamba module"] == "-" and signs["selective_scan_cuda"] == "✗"


def test_verify_with_half_a_mamba_ssm(stand_ins, run_verify):
    (stand_ins / "mamba_ssm/modules/mamba_simple.py").unlink()
    status, signs, output = run_verify()
    assert status == 1 and signs["Mamba module"] == "✗"
    assert "No module named 'mamba_ssm.modules.mamba_simple'" in output


IMPORTS = """
import triton
from einops import rearrange
from transformers.generation import GreedySearchDecoderOnlyOutput
try:
    import packaging
except ImportError:
    pass
    import huggingface_hub
"""


def test_verify_names_what_mamba_ssm_lacks_before_it_is_imported(
    stand_ins, run_verify, monkeypatch
):
    (stand_ins / "mamba_ssm/__init__.py").write_text(
        '__version__ = "2.2.4"\nimport mamba_ssm.ops\n'
    )
    (stand_ins / "mamba_ssm/ops.py").write_text(IMPORTS)
    genuine = importlib.util.find_spec
    there = set()

    def find_spec(name, *arguments):
        if name in ("triton", "einops", "transformers", "packaging", "huggingface_hub"):
            return types.SimpleNamespace(origin="there") if name in there else None
        return genuine(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.24.0")

    def said():
        status, signs, output = run_verify()
        assert status == 1 and signs["Mamba module"] == "✗"
        return next(line for line in output.splitlines() if "Mamba module" in line).split(None, 3)[
            3
        ]

    assert said() == (
        "mamba_ssm 2.2.4 cannot be imported without einops and transformers and triton: pip "
        "install einops 'transformers<5' triton (Triton for a Jetson: from the index that its "
        "torch came from)"
    )
    there |= {"transformers", "triton"}
    assert said() == "mamba_ssm 2.2.4 cannot be imported without einops: pip install einops"
    there |= {"einops"}
    assert said() == (
        "mamba_ssm 2.2.4 cannot be imported with transformers 5.24.0, which has no "
        "GreedySearchDecoderOnlyOutput: pip install 'transformers<5'"
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "crosses"),
    (
        pytest.param(
            "selective_scan_cuda.py",
            "return list(torch.autograd.grad(y, [*inputs, *gates], dout))",
            "return [2 * g for g in torch.autograd.grad(y, [*inputs, *gates], dout)]",
            NAMES[2:],
            id="wrong gradients, right values",
        ),
        pytest.param(
            "selective_scan_cuda.py",
            "x[:, :, 0, 1::2] = state",
            "pass",
            NAMES[2:3],
            id="wrong last state",
        ),
        pytest.param(
            "mamba_ssm/modules/mamba_simple.py",
            "return mamba_block(dict(self.named_parameters()), x)",
            "return 1.001 * mamba_block(dict(self.named_parameters()), x)",
            NAMES[1:2],
            id="values wrong by a thousandth",
        ),
        pytest.param(
            "mamba_ssm/modules/mamba_simple.py",
            "return mamba_block(dict(self.named_parameters()), x)",
            "return mamba_block(dict(self.named_parameters()), x.detach())",
            NAMES[1:2],
            id="no gradient",
        ),
        pytest.param(
            "selective_scan_cuda_core.py",
            "dout, x, None, None, softplus, False",
            "dout, x, softplus, 1",
            NAMES[3:],
            id="the published wrapper's backward",
        ),
        pytest.param("mamba_ssm/__init__.py", "", "import nowhere", NAMES[1:2], id="import error"),
    ),
)
def test_verify_crosses_what_is_wrong(stand_ins, run_verify, file, old, new, crosses):
    replace_in(stand_ins / file, old, new) if old else (stand_ins / file).write_text(new)
    status, signs, output = run_verify("--mamba-yolo", str(stand_ins / "yolo"))
    assert status == 1, output
    assert {name for name in NAMES if signs[name] == "✗"} == set(crosses), output


def test_verify_accepts_the_other_name_of_the_block(stand_ins, run_verify):
    file = stand_ins / "yolo/nn/mamba_yolo.py"
    replace_in(file, "class VSSBlock(", "class VSSBlock_YOLO(")
    status, signs, _ = run_verify("--mamba-yolo", str(file))
    assert status == 0 and signs["VSSBlock_YOLO"] == "✓"


def test_verify_of_a_folder_without_mamba_yolo(run_verify, tmp_path):
    status, signs, output = run_verify("--mamba-yolo", str(tmp_path / "mamba_ssm"))
    assert status == 1 and signs["SS2D"] == signs["VSSBlock_YOLO"] == "✗"
    assert "no mamba_yolo.py" in output


def test_verify_as_a_command_on_an_ascii_terminal(stand_ins):
    folders = [str(stand_ins), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    environment |= {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "scripts/verify.py", "--device", "cpu"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert found.returncode == 0, found.stdout + found.stderr
    signs = signs_of(found.stdout)
    assert list(signs.values()) == ["ok", "ok", "ok", "-", "-"]


@pytest.mark.parametrize("left", ("nothing", "a folder without modules", "a broken library"))
@pytest.mark.parametrize("installed", (True, False), ids=("installed", "from the sources"))
def test_verify_without_torch(tmp_path, left, installed):
    """-S and -I: a Python that has nothing, but what is put on its path here."""
    if left != "nothing":
        (tmp_path / "torch").mkdir()
    if left == "a broken library":
        (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart is missing')\n")
    paths = [str(ROOT / "scripts"), str(tmp_path), *([str(ROOT)] if installed else [])]
    code = f"import sys; sys.path[:0] = {paths}; import verify"
    done = subprocess.run([sys.executable, "-SIc", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    wanted = "error: causal_conv1d needs PyTorch >= 2.5, and pip does not install it"
    if left == "a broken library":
        wanted = "error: causal_conv1d: importing torch failed: libcudart is missing"
    assert done.stderr.startswith(wanted)


def test_the_plain_versions_of_verify(device):
    """Against PyTorch's own convolution and a recurrence written another way."""
    import verify

    x, weight, bias = (torch.randn(s, device=device) for s in ((2, 6, 9), (6, 4), (6,)))
    own = torch.nn.Conv1d(6, 6, 4, padding=3, groups=6, device=device)
    own.weight.data, own.bias.data = weight[:, None], bias
    expected = torch.nn.functional.silu(own(x)[..., :9])
    assert torch.allclose(verify.causal_conv1d(x, weight, bias), expected, atol=1e-5)

    u, delta, z = torch.randn(3, 1, 1, 5, device=device)
    A, B, C, D, shift = (torch.randn(s, device=device) for s in ((1, 1), 5, 5, 1, 1))
    dt, h, expected = torch.log1p(torch.exp(delta + shift))[0, 0], 0.0, []
    for t in range(5):
        h = torch.exp(dt[t] * A[0, 0]) * h + dt[t] * B[t] * u[0, 0, t]
        gate = z[0, 0, t] / (1 + torch.exp(-z[0, 0, t]))
        expected.append((C[t] * h + D[0] * u[0, 0, t]) * gate)
    shape = (1, 1, 1, 5)
    out, last = verify.selective_scan(u, delta, A, B.view(shape), C.view(shape), D, z, shift, True)
    assert torch.allclose(out[0, 0], torch.stack(expected), atol=1e-5)
    assert torch.allclose(last[0, 0, 0], h, atol=1e-5)
