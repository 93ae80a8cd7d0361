"""A bar chart as SVG, by string formatting alone: readable on a light and on a dark page."""

from __future__ import annotations

from html import escape

WIDTH, PANEL, LEFT, TOP = 860, 210, 52, 64
COLOURS = ("#2f7d4f", "#c4622d", "#7a5ea8", "#8a8f98", "#3b76b5")
STYLE = """
    svg { font: 12px system-ui, sans-serif; }
    .page { fill: #ffffff; } text { fill: #24292f; } .line { stroke: #d0d7de; }
    .limit { stroke: #24292f; stroke-dasharray: 4 3; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117; } text { fill: #e6edf3; } .line { stroke: #30363d; }
      .limit { stroke: #e6edf3; }
    }
"""


def text(x, y, words, anchor="middle", size=12, weight="normal"):
    return (
        f'  <text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}">{escape(words)}</text>\n'
    )


def panel(title, groups, top):
    """Bars for each group's values, from 0 to 1; None has no bar."""
    bottom = top + PANEL - 46
    height = bottom - top - 20

    def y(value):
        return bottom - value * height

    drawn = text(LEFT, top + 6, title, "start", 13, "bold")
    for value in (0, 0.25, 0.5, 0.75):
        drawn += f'  <line class="line" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y(value):.1f}" '
        drawn += f'y2="{y(value):.1f}"/>\n' + text(LEFT - 6, y(value) + 4, f"{value:g}", "end")
    drawn += f'  <line class="limit" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y(1):.1f}" '
    drawn += f'y2="{y(1):.1f}"/>\n' + text(LEFT - 6, y(1) + 4, "copy", "end")
    step = (WIDTH - 12 - LEFT) / len(groups)
    for i, (name, values) in enumerate(groups.items()):
        bar = step * 0.84 / len(values)
        x = LEFT + (i + 0.08) * step
        for j, value in enumerate(values):
            if value is not None:
                drawn += f'  <rect x="{x + j * bar:.1f}" y="{y(min(value, 1.1)):.1f}" '
                drawn += f'width="{bar - 1:.1f}" height="{min(value, 1.1) * height:.1f}" '
                drawn += f'fill="{COLOURS[j]}"/>\n'
        drawn += text(LEFT + (i + 0.5) * step, bottom + 16, name, size=11)
    return drawn


def svg(title, names, panels) -> str:
    """panels: {title: {group: [a value for each of names, of a copy's speed]}}."""
    height = TOP + PANEL * len(panels)
    drawn = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
    drawn += f'role="img" aria-label="{escape(title)}">\n  <style>{STYLE}  </style>\n'
    drawn += f'  <rect class="page" width="{WIDTH}" height="{height}"/>\n'
    drawn += text(LEFT, 22, title, "start", 14, "bold")
    x = LEFT
    for name, colour in zip(names, COLOURS, strict=False):
        drawn += f'  <rect x="{x}" y="34" width="11" height="11" fill="{colour}"/>\n'
        drawn += text(x + 16, 44, name, "start")
        x += 36 + 7 * len(name)
    for i, (name, groups) in enumerate(panels.items()):
        drawn += panel(name, groups, TOP + 6 + i * PANEL)
    return drawn + "</svg>\n"
