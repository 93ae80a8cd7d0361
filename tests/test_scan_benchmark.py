"""benchmarks/benchmark_scan.py on the CPU."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import benchmark_scan  # noqa: E402
import benchmark_scan_cpu  # noqa: E402
import tables  # noqa: E402


def test_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_scan_cpu, "SHAPES", ((1, 8, 20),))
    monkeypatch.setattr(benchmark_scan_cpu, "UPDATES", ((2, 8),))
    assert benchmark_scan.main(["--device", "cpu", "--json", str(tmp_path / "cpu.json")]) == 0
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["threads"] for row in report["scan"]] == [1, 2]
    for row in report["scan"]:
        assert row["forward_ms"] > 0 and row["backward_ms"] > 0 and row["plain_forward_ms"] > 0
    assert len(report["state_update"]) == 4
    assert set(tables.sections(report)) == {"Scan", "State update"}


def test_a_threads_clock_sees_one_thread(capsys):
    with pytest.raises(SystemExit):
        benchmark_scan_cpu.main(["--clock", "thread", "--threads", "1,2"])
    assert "--clock thread needs --threads 1" in capsys.readouterr().err
