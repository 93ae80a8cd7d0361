"""Tables in Markdown of what the benchmarks measured: one function for each section of their JSON.

A section that a file lacks has no table; one that is not known here is shown as it is.
"""

from __future__ import annotations

import math

LAYOUTS = {"first": "channel-first", "last": "channel-last"}
OPTIONS = {
    "seq_idx": "`seq_idx`, six sequences per row",
    "states": "initial and final states",
    "half of the channels": "x is half of the channels of a tensor",
    "part of the columns": "x is part of the columns of a tensor",
    "from step 1 on": "x begins at an odd step",
}


def table(head, rows) -> str:
    """Columns that are empty in every row are left out."""
    kept = [0, *(i for i in range(1, len(head)) if any(row[i] not in ("", "-") for row in rows))]
    lines = [[head[i] for i in kept], ["---" for _ in kept]]
    lines += [[str(row[i]) for i in kept] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def number(value) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def times(*ratios) -> str:
    """Ratios of times, as in "1.04 / 1.91"; nothing where one is missing."""
    if any(ratio is None for ratio in ratios):
        return "-"
    return " / ".join(number(ratio) if ratio >= 9.995 else f"{ratio:.2f}" for ratio in ratios)


def over(row, key, base):
    """row[key] over row[base], if both were measured."""
    return row[key] / row[base] if row.get(key) and row.get(base) else None


def mean(values):
    """The geometric mean."""
    values = list(values)
    if not values or None in values:
        return None
    return math.exp(sum(map(math.log, values)) / len(values))


def distinct(rows, *keys):
    """The combinations of values that occur, in order."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def cross(word) -> str:
    return " x ".join(map(str, word))


def by_shape(rows, cell, mean_cell):
    """A table with a row for each shape and a column for each type and layout."""
    columns = distinct(rows, "dtype", "layout")
    sizes = distinct(rows, "batch", "dim", "seqlen")
    found = {
        (row["batch"], row["dim"], row["seqlen"], row["dtype"], row["layout"]): row for row in rows
    }
    head = ["batch x dim x seqlen", *(f"{d}, {LAYOUTS.get(n, n)}" for d, n in columns)]
    lines = []
    for size in sizes:
        cells = [found.get((*size, *column)) for column in columns]
        lines.append([cross(size), *("-" if row is None else cell(row) for row in cells)])
    if mean_cell and len(sizes) > 1:
        groups = [[r for r in rows if (r["dtype"], r["layout"]) == column] for column in columns]
        lines.append(["**geometric mean**", *(mean_cell(group) for group in groups)])
    return table(head, lines)


def ratio_by_shape(rows, pairs):
    """by_shape of ratios: pairs of keys, each the one above and the one below the line."""
    return by_shape(
        rows,
        lambda row: times(*(over(row, a, b) for a, b in pairs)),
        lambda group: times(*(mean(over(row, a, b) for row in group) for a, b in pairs)),
    )


# ---------------------------------------------------------------------------------------- sections


def gpu_rows(report):
    rows = report["rows"]
    text = "Forward / backward, as a share of the speed of a copy (1 is the limit):\n\n"
    text += by_shape(
        rows,
        lambda row: times(row["forward_of_copy"], row["backward_of_copy"]),
        lambda group: times(
            *(mean(row[f"{way}_of_copy"] for row in group) for way in ("forward", "backward"))
        ),
    )
    text += "\nThe forward's time in µs, and a copy's:\n\n"
    text += by_shape(
        rows,
        lambda row: f"{number(row['forward_us'])} / {number(row['copy_us'])}",
        None,
    )
    if any("upstream_forward_us" in row for row in rows):
        text += "\nUpstream's time over this library's, forward / backward; above 1 this one is "
        text += "faster:\n\n"
        pairs = [(f"upstream_{way}_us", f"{way}_us") for way in ("forward", "backward")]
        text += ratio_by_shape(rows, pairs)
    with_others = [row for row in rows if row.get("others_us")]
    if with_others:
        names = dict.fromkeys(name for row in with_others for name in row["others_us"])
        text += "\nOther implementations' time over this library's, forward (and backward):\n\n"
        lines = [
            [f"{shape(row)}, {label(row)}", *(other(row, name) for name in names)]
            for row in with_others
        ]
        text += table(["", *names], lines) + absences(with_others)
    return {"Forward and backward": text}


def absences(rows):
    """Why some cells have no number."""
    reasons = {}
    for row in rows:
        missing = dict(row.get("others_missing", {}))
        missing |= {"upstream": row["upstream_missing"]} if "upstream_missing" in row else {}
        if "torch_compile_missing" in row:
            missing["`torch.compile`"] = row["torch_compile_missing"]
        reasons |= {(name, reason): None for name, reason in missing.items()}
    return "".join(f"\n{name} has no number: {reason}.\n" for name, reason in reasons)


def shape(row):
    return cross((row["batch"], row["dim"], row["seqlen"]))


def other(row, name):
    """The times of another implementation over this library's."""
    forward = row.get("others_us", {}).get(name)
    backward = row.get("others_backward_us", {}).get(name)
    cell = times(forward / row["forward_us"]) if forward else "-"
    return f"{cell} / {times(backward / row['backward_us'])}" if backward else cell


def cpu_rows(report):
    text = "Milliseconds; in brackets the forward in copies of x, the backward in 1.5 copies.\n"
    for threads, *sizes in distinct(report["rows"], "threads", "batch", "dim", "seqlen"):
        rows = [
            row
            for row in report["rows"]
            if [row["threads"], row["batch"], row["dim"], row["seqlen"]] == [threads, *sizes]
        ]
        text += f"\n{cross(sizes)}, {threads} thread{'s' if threads > 1 else ''}:\n\n"
        head = ["", "copy", "forward", "backward", "`F.conv1d` + `F.silu`", "`torch.compile`"]
        text += table(head, [[label(row), *cpu_cells(row)] for row in rows])
    return {"Forward and backward": text + absences(report["rows"])}


def cpu_cells(row):
    return [
        number(row["copy_ms"]),
        f"{number(row['forward_ms'])} ({row['forward_copies']:.1f})",
        f"{number(row['backward_ms'])} ({row['backward_copies']:.1f})",
        number(row.get("conv1d_silu_ms")),
        number(row.get("torch_compile_ms")),
    ]


def label(row):
    return f"{row['dtype']}, {LAYOUTS.get(row['layout'], row['layout'])}"


def form(row):
    """How a model calls the convolution."""
    words = [f"W {row['width']}", row["dtype"], row["layout"], *row["options"]]
    if row.get("apart"):
        words.append(f"apart: {row['apart']}")
    return f"{shape(row)}; {', '.join(words)}"


def gpu_models(report):
    rows = report["models"]
    text = "The convolutions of released models, by name. Forward and backward of the row named, "
    text += "and one token for each of a batch (`causal_conv1d_update`); µs, in brackets the share "
    text += "of a copy's speed. Others: their time over this library's, forward / backward.\n\n"
    names = dict.fromkeys(name for row in rows for name in row.get("others_us", {}))
    head = ["model", "batch x dim x seqlen, form", "forward", "backward", "one token", "upstream"]
    lines = []
    for row in rows:
        decode = row.get("decode", {})
        token = f"{number(decode['update_us'])}, batch {decode['batch']}" if decode else "-"
        upstream = times(
            over(row, "upstream_forward_us", "forward_us"),
            over(row, "upstream_backward_us", "backward_us"),
        )
        lines.append(
            [
                row["model"],
                form(row),
                f"{number(row['forward_us'])} ({row['forward_of_copy']:.2f})",
                f"{number(row['backward_us'])} ({row['backward_of_copy']:.2f})",
                token,
                upstream,
                *(other(row, name) for name in names),
            ]
        )
    text += table([*head, *names], lines) + absences(rows)
    return {"By model": text + not_timed(report)}


def cpu_models(report):
    text = "The convolutions of released models, by name, in milliseconds; one token of one "
    text += "sequence (`causal_conv1d_update`) in µs.\n"
    for (threads,) in distinct(report["models"], "threads"):
        rows = [row for row in report["models"] if row["threads"] == threads]
        head = ["model", "batch x dim x seqlen, form", "copy", "forward", "backward"]
        head += ["`F.conv1d`", "`torch.compile`", "one token"]
        lines = []
        for row in rows:
            decode = row.get("decode", {})
            token = number(decode["update_us"]) if decode else "-"
            lines.append([row["model"], form(row), *cpu_cells(row), token])
        text += f"\n{threads} thread{'s' if threads > 1 else ''}:\n\n" + table(head, lines)
    return {"By model": text + absences(report["models"]) + not_timed(report)}


def not_timed(report):
    missing = report.get("models_not_timed", {})
    return "".join(f"\nNot timed: {name}: {reason}.\n" for name, reason in missing.items())


def options(report):
    rows = report["options"]
    found = {}
    text = "Time over that of width 4 without options, forward / backward"
    widths = [row for row in rows if not row["options"] and row["layout"] in LAYOUTS]
    for title, what, chosen in (
        ("What the width costs", "width", widths),
        ("What options cost", "", [row for row in rows if row not in widths]),
    ):
        if not chosen:
            continue
        cells = {}
        for row in chosen:
            ratios = [over_plain(row, way) for way in ("forward", "backward")]
            layout, _, view = row["layout"].partition(": ")
            words = [*row["options"], *([view] if view else [])]
            name = row["width"] if what else ", ".join(OPTIONS.get(word, word) for word in words)
            cells.setdefault(name, {})[layout] = times(*ratios)
        columns = [key for key in LAYOUTS if any(key in by for by in cells.values())]
        head = [what, *(LAYOUTS[key] for key in columns)]
        lines = [[name, *(by.get(key, "-") for key in columns)] for name, by in cells.items()]
        found[title] = f"{text}, {shape(chosen[0])}, {chosen[0]['dtype']}:\n\n" + table(head, lines)
    return found


def over_plain(row, way):
    return row[f"{way}_us"] / row["plain"][f"{way}_us"]


def packed(report):
    text = (
        "Documents packed into one row by `cu_seqlens`, of random lengths: the time over that of "
    )
    text += (
        "the same row as one sequence, forward / backward. FLA: its time over this library's.\n\n"
    )
    rows, cells = report["packed"], {}
    for row in rows:
        name = f"{shape(row)}, {row['dtype']}", row["documents"]
        by = cells.setdefault(name, {})
        by[row["layout"]] = times(*(over_dense(row, way) for way in ("forward", "backward")))
        if row.get("others_us"):
            by["FLA"] = other(row, "FLA")
    head = ["batch x dim x seqlen", "documents", *LAYOUTS.values(), "FLA"]
    lines = [
        [*name, *(by.get(key, "-") for key in (*LAYOUTS, "FLA"))] for name, by in cells.items()
    ]
    # A peer has a reason for one layout and times for the other; that of all rows counts.
    left = [row for row in rows if row.get("others_missing")]
    left = left if not any(row.get("others_us") for row in rows) else []
    return {"Packed sequences": text + table(head, lines) + absences(left)}


def over_dense(row, way):
    return row[f"{way}_us"] / row["dense"][f"{way}_us"]


AROUND = {"pre_gate": "a gate before", "post_gate": "a gate after", "residual": "a residual"}


def gates(report):
    text = "What models have around the convolution, in the same kernels; no bias, no activation. "
    text += "µs, in brackets the share of the speed of a copy of as many bytes as the call reads "
    text += "and writes.\n\n"
    lines = []
    for row in report["gates"]:
        cells = [row["model"], ", ".join(AROUND[name] for name in row["around"])]
        words = f"W {row['width']}, {row['dtype']}, {LAYOUTS[row['layout']]}"
        cells.append(f"{shape(row)}; {words}")
        for way, copy in (("forward", "copy_us"), ("backward", "backward_copy_us")):
            share = row[copy] / row[f"{way}_us"]
            cells.append(f"{number(row[f'{way}_us'])} ({share:.2f})")
        lines.append(cells)
    head = ["model", "around it", "batch x dim x seqlen, form", "forward", "backward"]
    return {"Gates and residual": text + table(head, lines)}


def dilation(report):
    cells = {}
    for row in report["dilation"]:
        name = (
            f"{row['model']}, {row['dilation']}",
            f"{shape(row)}, W {row['width']}, {row['dtype']}",
        )
        ratios = (over_dense(row, way) for way in ("forward", "backward"))
        cells.setdefault(name, {})[row["layout"]] = times(*ratios)
    head = ["model, dilation", "batch x dim x seqlen", *LAYOUTS.values()]
    lines = [[*name, *(by.get(key, "-") for key in LAYOUTS)] for name, by in cells.items()]
    text = "Time over that of the same call without dilation, forward / backward:\n\n"
    return {"Dilation": text + table(head, lines)}


def gpu_update(report):
    head = ["batch x dim", "type, state", "µs", "copy of the bytes read", "upstream"]
    lines = [
        [
            cross((row["batch"], row["dim"])),
            ", ".join([row["dtype"], row["state"], *row["options"]]),
            number(row["update_us"]),
            number(row["copy_us"]),
            number(row.get("upstream_us")),
        ]
        for row in report["update"]
    ]
    return {"Update, one token": "Width and state_len 4.\n\n" + table(head, lines)}


def cpu_update(report):
    columns = distinct(report["update"], "threads")
    head = ["batch x dim, type"]
    for (threads,) in columns:
        many = f"{threads} thread{'s' if threads > 1 else ''}"
        head += [f"{many}: update, µs", "in torch, µs"]
    lines = {}
    for row in report["update"]:
        name = f"{cross((row['batch'], row['dim']))}, {row['dtype']}"
        lines.setdefault(name, {})[row["threads"]] = row
    body = []
    for name, by in lines.items():
        cells = [by.get(threads, {}) for (threads,) in columns]
        values = [number(row.get(key)) for row in cells for key in ("update_us", "torch_us")]
        body.append([name, *values])
    text = 'Width and state_len 4; "in torch" is roll, multiply, sum and SiLU.\n\n'
    return {"Update, one token": text + table(head, body)}


def host(report):
    base = report["host_us"].get("x + x")
    lines = [
        [f"`{name}`", number(us), times(us / base) if base else "-"]
        for name, us in report["host_us"].items()
    ]
    text = "Tiny tensors: what a call costs before the GPU has anything to do.\n\n"
    return {"Time on the host": text + table(["call", "µs", "over `x + x`"], lines)}


def blocks(report):
    shapes = distinct(report["blocks"], "shape")
    lines = {}
    for row in report["blocks"]:
        cell = f"{number(row['forward_ms'])} / {number(row['forward_backward_ms'])}"
        lines.setdefault(row["what"], {})[row["shape"]] = cell
    head = ["batch x seqlen x d_model", *(shape for (shape,) in shapes)]
    body = [[what, *(by.get(shape, "-") for (shape,) in shapes)] for what, by in lines.items()]
    text = "Whole blocks: forward / forward and backward, ms.\n\n"
    return {"Blocks of models": text + table(head, body)}


def as_it_is(name, section):
    """A section that has no table of its own."""
    title = name.replace("_", " ").capitalize()
    if isinstance(section, dict):
        section = [{"": key, name: value} for key, value in section.items()]
    keys = list(dict.fromkeys(key for row in section for key in row))
    lines = [[plain(row.get(key)) for key in keys] for row in section]
    return {title: table([key.replace("_", " ") for key in keys], lines)}


def plain(value):
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return "" if value is None else str(value)


GPU = {
    "rows": gpu_rows,
    "models": gpu_models,
    "options": options,
    "packed": packed,
    "gates": gates,
    "dilation": dilation,
    "update": gpu_update,
    "host_us": host,
    "blocks": blocks,
}
CPU = GPU | {"rows": cpu_rows, "models": cpu_models, "update": cpu_update}
# What is no section: how it was measured.
ABOUT = ("device", "cpu", "sms", "isa", "driver", "torch", "python", "version", "mamba_ssm")
ABOUT += ("transformers", "triton", "date", "clock", "dtype", "command", "note", "peers")
ABOUT += ("models_not_timed", "code")


def sections(report) -> dict[str, str]:
    """Titles and texts of everything that was measured, in the page's order."""
    known = CPU if "cpu" in report else GPU
    found = {}
    for name, function in known.items():
        if report.get(name):
            found |= function(report)
    for name, section in report.items():
        if name not in known and name not in ABOUT and section:
            found |= as_it_is(name, section)
    return found
