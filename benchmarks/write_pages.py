"""Writes what the documentation says of speed, from the benchmarks' JSON in docs/.

    python benchmarks/write_pages.py            # writes docs/performance.md, docs/speed.svg and
                                                # the table of speeds in README.md
    python benchmarks/write_pages.py --check    # writes nothing; exit status 1 if one differs

To renew the figures, replace docs/benchmark_*.json by the output of the benchmarks' --json. Any of
their sections may be missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import chart  # noqa: E402
import tables  # noqa: E402

START, END = "<!-- speeds: benchmarks/write_pages.py -->", "<!-- end of speeds -->"
CHART = "docs/speed.svg"
# The shape and type of README's table and chart.
SHAPE, DTYPE = (2, 4096, 8192), "bf16"
CPU_SHAPE = (2, 4096, 4096)
ISAS = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON", "baseline": "no vectors"}
ABOUT = {
    "torch": "torch",
    "python": "Python",
    "driver": "driver",
    "mamba_ssm": "mamba_ssm",
    "transformers": "transformers",
    "triton": "Triton",
    "version": "causal_conv1d",
    "isa": "kernels for",
    "code": "code for",
    "dtype": "type",
    "date": "measured on",
    "clock": "clock",
}
HEAD = f"""# Speed

<!-- Written by benchmarks/write_pages.py from docs/benchmark_*.json: change those instead. -->

The operation is bound by memory: the forward reads x and writes out, the backward reads x and dout
and writes dx. So the measure is a copy of the same bytes in the same run. "Of a copy" is a copy's
time over the forward's, and the time of 1.5 copies over the backward's; 1.00 is the limit. The
backward includes the gradients of weight and bias.

Width 4, bias and SiLU, if nothing else is said. On a GPU: medians of CUDA graph replays over
buffers in turn, so that none is served from L2, with a pause before each timing, without which
the GPU reaches its power limit and lowers its clock. "channel-first" is x as torch's `conv1d` takes
it, (batch, dim, seqlen) contiguous; "channel-last" is (batch, seqlen, dim) transposed, as a linear
layer gives it. **Nothing here was measured on a Jetson.**

![Forward and backward beside a copy]({Path(CHART).name})

What limits the rows that stay behind a copy, and what was tried: [tried.md](tried.md). To measure
on your machine and write this page anew:

```bash
python benchmarks/benchmark.py --json docs/benchmark_h200.json
python benchmarks/benchmark_blocks.py --json docs/benchmark_blocks_h200.json
python benchmarks/benchmark_scan.py --json docs/benchmark_scan_h200.json
python benchmarks/benchmark_cpu.py --json docs/benchmark_cpu.json
python benchmarks/benchmark_scan.py --device cpu --json docs/benchmark_scan_cpu.json
python benchmarks/write_pages.py
```
"""


def load(folder):
    """The reports by file name: GPUs, parts of a GPU, blocks, then CPUs."""
    reports = {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in Path(folder).glob("benchmark_*.json")
    }

    def order(name):
        report = reports[name]
        part = bool(report.get("sms")) or is_ptx_alone(report)
        return ("cpu" in report, part, "rows" not in report, name)

    return {name: reports[name] for name in sorted(reports, key=order)}


def is_ptx_alone(report):
    return bool(report.get("code")) and "sm_" not in report["code"]


def title(report):
    name = f"CPU: {report['cpu']}" if "cpu" in report else report["device"]
    if report.get("sms"):
        name += f", {report['sms']} of its SMs"
    if is_ptx_alone(report):
        name += f", by PTX alone ({report['code']})"
    if "rows" in report:
        return name
    words = {"models": "by model", "blocks": "blocks of models"}
    parts = [words.get(key, key) for key in report if key in tables.GPU or key not in tables.ABOUT]
    return ", ".join([name, *parts[:1]])


def about(name, report):
    """How it was measured, and which other implementations are missing, with the reason."""
    words = [f"{word} {report[key]}" for key, word in ABOUT.items() if report.get(key)]
    text = f"{', '.join(words)}. `{report.get('command', 'no command recorded')}` wrote `{name}`"
    text += f" ({report['note']}).\n" if report.get("note") else ".\n"
    peers = report.get("peers", {})
    there = [f"{peer} {found['version']}" for peer, found in peers.items() if "version" in found]
    if there:
        text += f"\nBeside it: {', '.join(there)}.\n"
    for peer, found in peers.items():
        if "missing" in found:
            text += f"\n**{peer} is missing**: {found['missing']}.\n"
    for peer in unexplained(report):
        text += f"\n**{peer} is missing**: the file does not say why.\n"
    return text


def unexplained(report):
    """Peers of a GPU's rows that the file neither times nor names."""
    if "cpu" in report or "rows" not in report or report.get("sms") or "peers" in report:
        return []
    rows = report["rows"]
    found = {name for row in rows for name in row.get("others_us", {})}
    found |= {"upstream"} if any("upstream_forward_us" in row for row in rows) else set()
    return [name for name in ("upstream", "FLA") if name not in found]


def performance(reports):
    page = HEAD
    for name, report in reports.items():
        page += f"\n## {title(report)}\n\n{about(name, report)}"
        for heading, text in tables.sections(report).items():
            page += f"\n### {heading}\n\n{text}"
    return page


def one(rows, **wanted):
    """The row with these values, or None."""
    found = (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))
    return next(found, None)


def whole_gpu(reports):
    found = (r for r in reports.values() if "cpu" not in r and not r.get("sms") and r.get("rows"))
    return next(found, None)


def speeds(reports):
    """README's small table: times, a copy's, and those of others."""
    lines = []
    gpu = whole_gpu(reports)
    batch, dim, seqlen = SHAPE
    for way, copies in (("forward", 1), ("backward", 1.5)):
        for layout in tables.LAYOUTS:
            row = gpu and one(
                gpu["rows"], batch=batch, dim=dim, seqlen=seqlen, dtype=DTYPE, layout=layout
            )
            if row:
                name = f"{way}, {tables.cross(SHAPE)}, {tables.LAYOUTS[layout]}"
                others = row.get("others_us" if way == "forward" else "others_backward_us", {})
                lines.append(
                    [
                        f"{gpu['device']}: {name}",
                        us(row[f"{way}_us"]),
                        us(copies * row["copy_us"]),
                        us(row.get(f"upstream_{way}_us")),
                        us(others.get("F.conv1d + silu")),
                    ]
                )
    for report in reports.values():
        row = one(report.get("update", []), batch=256, dim=8192, dtype=DTYPE, options=[])
        if row and "cpu" not in report and not report.get("sms"):
            values = (row["update_us"], row["copy_us"], row.get("upstream_us"), None)
            lines.append([f"{report['device']}: one token, 256 x 8192", *map(us, values)])
            break
    cpu = next((r for r in reports.values() if "cpu" in r and r.get("rows")), None)
    batch, dim, seqlen = CPU_SHAPE
    for way, copies in (("forward", 1), ("backward", 1.5)):
        row = cpu and one(
            cpu["rows"],
            batch=batch,
            dim=dim,
            seqlen=seqlen,
            dtype=DTYPE,
            layout="last",
            threads=max(r["threads"] for r in cpu["rows"]),
        )
        if row:
            there = f"CPU, {row['threads']} threads, {ISAS[cpu['isa']]}"
            plain = row.get("conv1d_silu_ms") if way == "forward" else None
            values = (row[f"{way}_ms"], copies * row["copy_ms"], None, plain)
            name = f"{there}: {way}, {tables.cross(CPU_SHAPE)}, channel-last"
            lines.append([name, *(us(v and v * 1e3) for v in values)])
    head = [f"{DTYPE}, width 4, bias, SiLU", "this library", "a copy", "upstream", "torch's ops"]
    return tables.table(head, lines)


def us(value):
    if value is None:
        return "-"
    return f"{tables.number(value)} µs" if value < 999.5 else f"{tables.number(value / 1e3)} ms"


def drawing(reports):
    """The chart of a GPU's channel-last rows; None without them."""
    gpu = whole_gpu(reports)
    rows = [r for r in gpu["rows"] if (r["dtype"], r["layout"]) == (DTYPE, "last")] if gpu else []
    if not rows:
        return None
    names = {"this library": lambda row, way: row[f"{way}_of_copy"]}
    names["upstream"] = lambda row, way: of_copy(row, way, row.get(f"upstream_{way}_us"))
    for name in dict.fromkeys(name for row in rows for name in row.get("others_us", {})):
        names[name] = lambda row, way, name=name: of_copy(row, way, others(row, way).get(name))
    names = {
        name: value
        for name, value in names.items()
        if any(value(row, way) for row in rows for way in ("forward", "backward"))
    }
    panels = {
        f"{way}, as a share of a copy's speed": {
            tables.cross((row["batch"], row["dim"], row["seqlen"])): [
                value(row, way) for value in names.values()
            ]
            for row in rows
        }
        for way in ("forward", "backward")
    }
    return chart.svg(f"{gpu['device']}, {DTYPE}, channel-last", list(names), panels)


def others(row, way):
    return row.get("others_us" if way == "forward" else "others_backward_us", {})


def of_copy(row, way, time):
    return (row["copy_us"] if way == "forward" else 1.5 * row["copy_us"]) / time if time else None


def pages(root=ROOT) -> dict[str, str]:
    """What each file should hold, by its path."""
    reports = load(Path(root) / "docs")
    readme = (Path(root) / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(START)
    after = rest.split(END)[1]
    found = {
        "docs/performance.md": performance(reports),
        "README.md": f"{before}{START}\n\n{speeds(reports)}\n{END}{after}",
    }
    svg = drawing(reports)
    return found | ({CHART: svg} if svg else {})


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    differ = []
    for name, text in pages().items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            differ.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    print(
        "\n".join(f"{'differs' if check else 'written'}: {name}" for name in differ) or "as it is"
    )
    return int(check and bool(differ))


if __name__ == "__main__":
    sys.exit(main())
