"""scripts/apply_patches.py, on excerpts made up from the patches' own lines.

tests/ecosystem/test_patches.py takes the released mamba_ssm 2.2.4.
"""

import difflib
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
TOOLS = {
    "git": ("git", "apply", "--check", "--verbose"),
    "patch": ("patch", "-p1", "--dry-run", "--fuzz=0", "-i"),
}

pytestmark = pytest.mark.usefixtures("scripts_path")


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
