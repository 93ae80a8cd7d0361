"""The benchmarks' rows, and the pages that are written from them. No time is compared."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import benchmark  # noqa: E402
import benchmark_blocks  # noqa: E402
import benchmark_cpu  # noqa: E402
import benchmark_scan  # noqa: E402
import models  # noqa: E402
import option_rows  # noqa: E402
import peers  # noqa: E402
import tables  # noqa: E402
import write_pages  # noqa: E402

import causal_conv1d  # noqa: E402
import causal_conv1d_cuda  # noqa: E402


def run_each(calls):
    for call in calls[:2]:
        call()
    return 2.0


@pytest.fixture
def args(device):
    """As benchmark.main() has them; this library's raw module stands in for upstream's."""
    return argparse.Namespace(
        device=device, others=list(peers.NAMES), upstream=causal_conv1d_cuda, dtypes=["bf16"]
    )


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", ((1, 16, 40), (2, 8, 33)))
    monkeypatch.setattr(benchmark, "OPTIONS_SHAPE", (2, 8, 40))
    monkeypatch.setattr(benchmark, "UPDATE_SHAPES", ((1, 16), (4, 8)))
    monkeypatch.setattr(benchmark, "copies", lambda size: 2)
    # It compiles for a minute, and is no different from the others here.
    monkeypatch.delitem(peers.find()[0], "torch.compile")
    monkeypatch.setattr(option_rows, "PACKED_SHAPES", ((1, 16, 700),))
    monkeypatch.setattr(option_rows, "GATED_SEQLEN", 40)
    gated = [case._replace(dim=case.dim // 256) for case in option_rows.GATED]
    monkeypatch.setattr(option_rows, "GATED", gated)
    monkeypatch.setattr(option_rows, "DILATED", (("a model", (1, 16, 40), 4, 3),))
    shrunk = tuple(model._replace(dim=model.dim // 256) for model in models.MODELS)
    monkeypatch.setattr(models, "MODELS", shrunk)


def measured(args):
    report = {"device": "a GPU", "torch": torch.__version__, "command": "benchmark.py"}
    report["peers"] = peers.described(args.others, args.upstream)
    for name, section in benchmark.MEASURE.items():
        more = {"seqlen": 16, "batch": 2} if name == "models" else {}
        report[name] = list(section(args, run_each, args.dtypes, **more))
    report["models_not_timed"] = models.NOT_TIMED
    return json.loads(json.dumps(report))


def test_every_section_gives_rows_and_a_table(args, small):
    report = measured(args)
    assert [row["model"] for row in report["models"]] == [m.name for m in models.MODELS]
    for row in report["rows"] + report["options"] + report["models"]:
        assert row["copy_us"] == row["forward_us"] == row["backward_us"] == 2.0
    for row, model in zip(report["models"], models.MODELS, strict=True):
        assert row["width"] == model.width and row["decode"]["update_us"] == 2.0
        assert ("upstream_forward_us" in row) is (model.width <= 4)
        assert ("no bias" in row["options"]) is not model.bias
    page = write_pages.performance({"x.json": report})
    for title in ("Forward and backward", "By model", "What the width costs", "What options cost"):
        assert f"### {title}\n" in page
    for model in models.MODELS:
        assert f"| {model.name} |" in page
    assert "upstream has no number: it has no width above 4." in page
    assert "Not timed: Qwen4-Exp's PLE, 10240: it has a dilation" in page
    for title in ("Packed sequences", "Gates and residual", "Dilation"):
        assert f"### {title}\n" in page
    assert "| 1 x 16 x 700, bf16 | 512 | 1.00 / 1.00 | 1.00 / 1.00 |\n" in page
    assert "| LFM3-1.7B | a gate before, a gate after | 4 x 8 x 40; W 7, bf16" in page
    assert "| a model, 3 | 1 x 16 x 40, W 4, bf16 | 1.00 / 1.00 | 1.00 / 1.00 |\n" in page
    for row in report["gates"]:
        assert row["copy_us"] == row["backward_copy_us"] == row["forward_us"] == 2.0


def test_a_copy_by_pieces_is_whole(monkeypatch):
    monkeypatch.setattr(option_rows, "COPIED", 8)
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, of: copied.append((to, of)))
    option_rows.copy_time(3, torch.empty(5, 4), lambda calls: [call() for call in calls])
    # Two pairs of 30 elements.
    assert [len(to) for to, of in copied] == [len(of) for to, of in copied] == [8, 8, 8, 6] * 2
    assert len({(to.data_ptr(), of.data_ptr()) for to, of in copied}) == 8


def test_the_calls_of_option_rows(small, device):
    """What is timed has the values of the public functions."""
    bounds = option_rows.bounds_of(5, 40, device)
    assert bounds[0] == 0 and bounds[-1] == 40 and (bounds.diff() > 0).all()

    def make():
        return torch.randn(1, 8, 40, device=device)

    weight, bias = torch.randn(8, 4, device=device), torch.randn(8, device=device)
    names = ("pre_gate", "post_gate", "residual")
    buffers = option_rows.Buffers(make, weight, bias, names, bounds)
    inputs = [buffers.x, weight, buffers.around["pre_gate"], buffers.around["post_gate"]]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    expected = causal_conv1d.causal_conv1d_varlen_fn(
        *inputs[:2], bias, bounds, None, False, "silu", **buffers.around
    )
    with torch.no_grad():
        buffers.forward(1, True)
        assert torch.equal(buffers.out, expected)
        buffers.backward(1, True)
    found = (buffers.dx, buffers.dweight, *buffers.dgates)
    for a, b in zip(found, torch.autograd.grad(expected, inputs, buffers.out), strict=True):
        assert torch.equal(a, b)


def test_a_peer_that_is_missing_is_named_with_the_reason(args, small, monkeypatch):
    monkeypatch.setattr(peers, "FLA_MODULES", ("no_such_package.conv",))
    found, missing = peers.find.__wrapped__()
    assert "FLA" not in found
    assert missing["FLA"] == (
        "no_such_package.conv: ModuleNotFoundError: No module named 'no_such_package'"
    )
    monkeypatch.setattr(peers, "find", lambda: (found, missing))
    monkeypatch.delitem(found, "torch.compile")
    args.upstream = None
    report = measured(args)
    assert report["peers"]["upstream"] == {"missing": "no --upstream FILE was given"}
    page = write_pages.performance({"x.json": report})
    assert f"**FLA is missing**: {missing['FLA']}.\n" in page
    assert "**upstream is missing**: no --upstream FILE was given.\n" in page
    assert f"FLA has no number: {missing['FLA']}.\n" in page


def test_a_file_that_does_not_say_who_is_missing():
    report = {"device": "a GPU", "rows": [], "update": []}
    page = write_pages.performance({"old.json": report})
    assert "**FLA is missing**: the file does not say why.\n" in page
    assert "**upstream is missing**: the file does not say why.\n" in page


def fake_fla(monkeypatch, name):
    """A module with FLA's functions, computed by torch's operations."""
    module = type(sys)(name)

    def forward(x, weight, bias, residual, activation=None):
        assert residual is None and x.shape[2] == weight.shape[0]
        return peers.conv1d_and_silu(x.mT, weight, bias, activation == "silu").mT, None

    def backward(x, dy, dht, weight, bias, activation=None):
        assert dht is None and dy.shape == x.shape
        return x, weight, bias, None, None

    module.causal_conv1d_fwd, module.causal_conv1d_bwd = forward, backward
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", peers.FLA_MODULES)
def test_fla_is_found_in_each_place_that_it_has_had(name, args, small, monkeypatch):
    for other in peers.FLA_MODULES:
        monkeypatch.setitem(sys.modules, other, None)
    fake_fla(monkeypatch, name)
    found, missing = peers.find.__wrapped__()
    assert name in found["FLA"].version and missing == {}
    monkeypatch.setattr(peers, "find", lambda: ({"FLA": found["FLA"]}, {}))
    report = measured(args)
    for row in report["rows"]:
        last = row["layout"] == "last"
        assert (row["others_us"] == row["others_backward_us"] == {"FLA": 2.0}) is last
        assert ("FLA" in row["others_missing"]) is not last
    assert "| batch x dim x seqlen |" in write_pages.performance({"x.json": report})


def test_a_peer_that_refuses_a_form_ends_no_run(args, small, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no width\n of this kind")

    monkeypatch.setattr(peers, "find", lambda: ({"F.conv1d + silu": peers.Peer("1", refuse)}, {}))
    row = measured(args)["rows"][0]
    reason = {"F.conv1d + silu": "RuntimeError: no width of this kind"}
    assert row["others_us"] == {} and row["others_missing"] == reason


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(benchmark, "time_gpu", run_each)


def test_the_benchmark_writes_every_section(small, fake_gpu, tmp_path, capsys):
    path = tmp_path / "benchmark_x.json"
    benchmark.main(["--device", "cpu:0", "--dtypes", "bf16", "--json", str(path)])
    report = json.loads(path.read_text())
    assert report["device"] == "a GPU" and report["date"] and report["sms"] is None
    for section in (*benchmark.MEASURE, "host_us", "peers", "models_not_timed"):
        assert report[section], section
    assert "FLA" in report["peers"] and "missing" in report["peers"]["upstream"]
    assert "upstream: missing: no --upstream FILE was given\n" in capsys.readouterr().out
    assert "### Time on the host\n" in write_pages.performance(write_pages.load(tmp_path))


def test_blocks_name_a_package_that_is_missing(fake_gpu, tmp_path, monkeypatch):
    def rows(dtype, shapes, repeats):
        yield benchmark_blocks.as_row("Mamba, fused", (1, 2, 3), 0.5, 2.0, 2.0)

    def missing(dtype, shapes, repeats):
        raise ImportError("No module named 'transformers'")
        yield

    parts = {"blocks": rows, "transformers_blocks": missing}
    for name, function in parts.items():
        monkeypatch.setattr(benchmark_blocks, name, function)
    path = tmp_path / "benchmark_blocks.json"
    monkeypatch.setattr(sys, "argv", ["benchmark_blocks.py", "--json", str(path)])
    assert benchmark_blocks.main() == 0
    page = write_pages.performance(write_pages.load(tmp_path))
    assert "## a GPU, blocks of models\n" in page
    assert "**transformers is missing**: ImportError: No module named 'transformers'.\n" in page
    assert "| Mamba, fused | 0.50 / 2.00 |" in page


def test_list_needs_no_gpu(capsys):
    benchmark.main(["--list", "--sections", "models,update", "--dtypes", "bf16"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("models: ")]) == len(models.MODELS)
    assert "update: (256, 8192), bf16, contiguous, ('ring',)" in lines


def test_others_may_be_left_out(small, args):
    args.others = ["F.conv1d + silu"]
    report = measured(args)
    assert [row["others_missing"] for row in report["rows"]] == [{}] * len(report["rows"])
    page = write_pages.performance({"x.json": report})
    assert "**FLA is missing**: left out (--others," in page


@pytest.mark.parametrize(
    "section, title", (("models", "by model"), ("scan", "scan"), ("update", "update"))
)
def test_a_file_without_rows_is_titled_by_what_it_has(section, title):
    assert write_pages.title({"device": "a GPU", "torch": "2", section: [{}]}) == f"a GPU, {title}"


def test_a_file_of_ptx_alone_comes_later_and_says_so(tmp_path):
    report = {"device": "a GPU", "torch": "2", "rows": [], "code": "sm_90 compute_80"}
    (tmp_path / "benchmark_b.json").write_text(json.dumps(report))
    (tmp_path / "benchmark_a.json").write_text(json.dumps(report | {"code": "compute_75"}))
    titles = [write_pages.title(r) for r in write_pages.load(tmp_path).values()]
    assert titles == ["a GPU", "a GPU, by PTX alone (compute_75)"]


def test_an_unknown_section_is_named(capsys):
    for main in (benchmark.main, lambda words: benchmark_cpu.main([*words, "--threads", "1"])):
        with pytest.raises(SystemExit):
            main(["--sections", "speed"])
        assert "--sections: 'speed' is none of rows, models" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark.main(["--others", "fla"])
    assert "--others: 'fla' is none of F.conv1d + silu, torch.compile, FLA" in (
        capsys.readouterr().err
    )


def test_the_cpus_rows(small, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    try:
        rows = list(benchmark_cpu.rows(((1, 8, 20),), ("fp32",), ("first",), (1,), 1, False))
        found = list(benchmark_cpu.model_rows((1,), 1, False, seqlen=16, batch=2))
        updates = list(benchmark_cpu.update_rows(((2, 8),), ("bf16",), (1,)))
        forms_found = [
            benchmark_cpu.form_row((1, 8, 256), "bf16", layout, form, 1, 1)
            for layout in benchmark_cpu.LAYOUTS
            for form in benchmark_cpu.FORMS
        ]
    finally:
        torch.set_num_threads(threads)
    forms = [(row["model"], row["width"], row["dtype"], row["options"]) for row in found]
    assert forms == [(m.name, m.width, m.dtype, list(models.options(m))) for m in models.MODELS]
    sections = {"rows": rows, "model_rows": found, "update_rows": updates, "form_rows": forms_found}
    for name, section in sections.items():
        monkeypatch.setattr(benchmark_cpu, name, lambda *_, section=section, **__: section)
    path = tmp_path / "benchmark_cpu.json"
    benchmark_cpu.main(["--json", str(path)])
    page = write_pages.performance(write_pages.load(tmp_path))
    for text in ("## CPU: ", "1 x 8 x 20, 1 thread:", "### By model", "| 2 x 8, bf16 |"):
        assert text in page
    assert "`torch.compile` has no number: left out.\n" in page


def test_models_are_named_once_and_have_real_forms():
    assert len({model.name for model in models.MODELS}) == len(models.MODELS)
    for model in models.MODELS:
        assert model.layout in (*benchmark.LAYOUTS, *benchmark.VIEWS)
        assert model.dtype in benchmark.DTYPES and model.dtype in benchmark_cpu.DTYPES
    widths = {model.name: model.width for model in models.MODELS}
    assert widths["LFM3-1.7B"] == 7 and widths["LFM2"] == 3


# ------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("name", ["docs/performance.md", "README.md", "docs/speed.svg"])
def test_pages_are_what_the_command_writes(name):
    """If this fails: python benchmarks/write_pages.py"""
    assert write_pages.pages()[name] == (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("benchmark_*.json")), ids=str)
def test_every_file_of_figures_says_where_they_are_from(path):
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report.get("device") or report.get("cpu")
    assert report["torch"] and report["command"]
    assert tables.sections(report)


@pytest.mark.parametrize("left", ["rows", "options", "update", "host_us", "models"])
def test_sections_may_be_absent(left):
    reports = write_pages.load(ROOT / "docs")
    fewer = {
        name: {key: value for key, value in report.items() if key != left}
        for name, report in reports.items()
    }
    page = write_pages.performance(fewer)
    assert page.startswith("# Speed\n")
    write_pages.speeds(fewer)
    assert (write_pages.drawing(fewer) is None) is (left == "rows")


def test_a_new_section_is_shown():
    scan = [{"shape": "1 x 2", "ours_ms": 0.25, "compiled_ms": None, "options": ["z"]}]
    report = {"device": "a GPU", "torch": "2", "scan": scan, "host_us": {}}
    page = write_pages.performance({"scan.json": report})
    assert "### Scan\n\n| shape | ours ms | options |\n" in page
    assert "| 1 x 2 | 0.25 | z |\n" in page


def test_nothing_was_measured():
    assert write_pages.speeds({}).count("\n") == 2
    assert write_pages.drawing({}) is None
    assert "## " not in write_pages.performance({})


def test_the_command_writes_and_checks(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    text = f"before\n{write_pages.START}\n{write_pages.END}\nafter\n"
    (tmp_path / "README.md").write_text(text)
    source = ROOT / "docs" / "benchmark_h200.json"
    (tmp_path / "docs" / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(write_pages, "ROOT", tmp_path)
    monkeypatch.setattr(write_pages.pages, "__defaults__", (tmp_path,))
    assert write_pages.main(["--check"]) == 1
    assert not (tmp_path / "docs" / "performance.md").exists()
    assert write_pages.main([]) == 0
    assert write_pages.main(["--check"]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "NVIDIA H200" in readme
    assert (tmp_path / "docs" / "speed.svg").read_text().startswith("<svg ")


@pytest.mark.parametrize(
    "value, text", ((0.123, "0.12"), (9.996, "10.0"), (99.96, "100"), (1296.4, "1,296"))
)
def test_three_digits(value, text):
    assert tables.number(value) == text


def test_scan_rows_are_of_the_same_computation(monkeypatch):
    """The rows' calls, run on the CPU; a peer with other values is no peer."""
    for name in ("randn", "rand"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *size, real=real, device=None, **more: real(*size, **more)
        )

    def run_each(functions, repeats, calls, graph=True):
        return {name: float(len(function())) for name, function in functions.items()}

    class Peer:
        factor = 1.0

        def forward(self, one):
            inputs = (one[name] for name in benchmark_scan.NAMES)
            return self.factor * causal_conv1d.selective_scan_fn(*inputs, delta_softplus=True)

    monkeypatch.setattr(benchmark_scan, "medians", run_each)
    peer = Peer()
    peer.backward = lambda one: torch.ops.causal_conv1d.scan_backward(
        *(one[name] for name in benchmark_scan.NAMES), None, None, True, one["dout"], None, 1
    )
    row = benchmark_scan.scan_row((1, 16, 40, 16, 1, "bf16", True), peer, 1)
    assert row["z"] == "yes" and row["mamba_ssm_backward_us"] and row["copy_us"]
    assert "mamba_ssm_forward_us" not in benchmark_scan.scan_row(
        (1, 16, 40, 16, 4, "fp32", False), None, 1
    )
    peer.factor = 1.1
    with pytest.raises(AssertionError):
        benchmark_scan.scan_row((1, 16, 40, 16, 1, "bf16", True), peer, 1)
    assert benchmark_scan.update_row((2, 16, 16, "bf16"), 1)["copy_us"]
