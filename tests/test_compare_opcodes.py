"""scripts/dev/compare_opcodes.py, with what cuobjdump prints as canned text."""

from collections import Counter
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts" / "dev"
SASS = """
Fatbin elf code:
================
arch = sm_80
code for sm_80
		Function : other
        /*0000*/                   EXIT ;                                /* 0x000000000000794d */

code for sm_87
	.target	sm_87

		Function : forward
	.headerflags	@"EF_CUDA_SM87 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                /* 0x00000a0000017a02 */
                                                                         /* 0x000fe40000000f00 */
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;               /* 0x0000000402047981 */
        /*0020*/             @!UP0 UMOV UR4, 0x1 ;                       /* 0x0000000100048882 */
        /*0030*/                   FFMA R4, R5, R6, R4 ;                 /* 0x0000000605047223 */
        /*0040*/                   FFMA R4, R7, R8, R4 ;                 /* 0x0000000807047223 */
        /*0050*/                   STL [R1+0x4], R2 ;                    /* 0x0000040201007387 */
        /*0060*/               @P1 EXIT ;                                /* 0x000000000000194d */
        /*0070*/                   NOP ;                                 /* 0x0000000000007918 */
		Function : backward
        /*0000*/                   EXIT ;                                /* 0x000000000000794d */
"""
USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function forward:
  REG:26 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:464 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function backward:
  REG:40 STACK:0 SHARED:512 LOCAL:0 CONSTANT[0]:464 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
OLD = (
    "void conv::(anonymous namespace)::last<__half, {}>(conv::(anonymous namespace)::Args<__half>)"
)
NEW = "void conv::last<conv::Variant<__half, {}> >(conv::Args<conv::Variant<__half, {}>::Element>)"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import compare_opcodes

    return compare_opcodes


def kernel(tool, name, **opcodes):
    return tool.Kernel(name, Counter(opcodes), 32)


def test_it_counts_opcodes_of_the_architecture(tool):
    found = tool.read_sass(SASS, "sm_87")
    assert list(found) == ["forward", "backward"]
    ones = ("MOV", "LDG.E.128", "UMOV", "STL", "EXIT")
    assert found["forward"] == Counter({"FFMA": 2, **dict.fromkeys(ones, 1)})
    assert list(tool.read_sass(SASS, "sm_80")) == ["other"]
    assert tool.Kernel("forward", found["forward"]).spills == 1


def test_it_reads_registers(tool):
    assert tool.read_registers(USAGE) == {"forward": 26, "backward": 40}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        (OLD.format("4, true"), "last"),
        (NEW.format("4, true", "4, true"), "last"),
        ("conv::find(int, unsigned char*)", "find"),
        ("plain", "plain"),
    ],
)
def test_a_kernel_is_known_by_its_own_name(tool, name, base):
    assert tool.base_name(name) == base


def test_renamed_kernels_are_matched_by_their_values_then_by_the_nearest_counts(tool):
    before = [
        kernel(tool, OLD.format("8, 4, true"), FFMA=100),
        kernel(tool, OLD.format("8, 4, false"), FFMA=104),
        kernel(tool, "void conv::gone<float>(int)", EXIT=1),
    ]
    after = [
        kernel(tool, NEW.format("4, false", "4, false"), FFMA=100),
        kernel(tool, NEW.format("4, true", "4, true"), FFMA=104),
        kernel(tool, "void conv::gone<double>(int)", EXIT=1),  # of another type
    ]
    pairs, only_before, only_after = tool.match_kernels(before, after)
    assert {(a.name, b.name) for a, b in pairs} == {
        (before[0].name, after[1].name),
        (before[1].name, after[0].name),
    }
    assert (only_before, only_after) == ([before[2]], [after[2]])
    # Without values in common the counts decide.
    after = [kernel(tool, NEW.format("5", "5"), FFMA=n) for n in (104, 100)]
    pairs, *_ = tool.match_kernels(before[:2], after)
    assert all(tool.change(a, b) == 0 for a, b in pairs)


def test_one_opcode_in_place_of_another_is_one_change(tool):
    a, b = kernel(tool, "k", FFMA=98, MOV=2), kernel(tool, "k", FFMA=98, IADD=2)
    assert tool.change(a, b) == 0.02


def test_the_report_tells_shares_and_what_changed(tool):
    before = [kernel(tool, f"k{i}", FFMA=1000, MOV=1) for i in range(3)]
    after = [
        kernel(tool, "k0", FFMA=1000, MOV=1),
        kernel(tool, "k1", FFMA=1000, MOV=2),
        kernel(tool, "k2", FFMA=900, MOV=1, LDL=3),
    ]
    lines = tool.report(before, after).splitlines()
    assert lines[0].split() == ["9.99%", "k2"]
    assert "instructions 1001 -> 904, registers 32 -> 32, spills 0 -> 3" in lines[1]
    assert any(line.split() == ["FFMA", "1000", "->", "900"] for line in lines)
    assert not any(line.endswith("k0") for line in lines)
    assert lines[-1].startswith(
        "3 kernels in both: 1 with the same opcodes, 1 changed by up to 1 %, 1 by more; 0 gone"
    )
    assert lines[-1].endswith("spilling 0 -> 1")


def test_it_compares_two_builds(tool, tmp_path, monkeypatch, capsys):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "forward.cubin").touch()

    def cuobjdump(option, file, architecture):
        return SASS if option == "-sass" else USAGE

    monkeypatch.setattr(tool, "cuobjdump", cuobjdump)
    assert tool.main([str(tmp_path / "before"), str(tmp_path / "after")]) == 0
    assert "2 kernels in both: 2 with the same opcodes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no kernels for sm_90"):
        tool.main([str(tmp_path / "before"), str(tmp_path / "after"), "--arch", "sm_90"])
