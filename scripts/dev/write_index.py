"""Writes an index of the wheels in a folder, for pip and uv.

    python3 scripts/dev/write_index.py [FOLDER]      # default: dist/

    pip install --no-deps --index-url file:///PATH/TO/dist/simple causal-conv1d

FOLDER/simple/ is a simple repository (PEP 503) of the wheels and source distributions in FOLDER,
with their hashes, to use in place or through any web server. build_wheel.py writes it too.
"""

import argparse
import hashlib
import html
import re
import sys
import urllib.parse
from pathlib import Path

import wheel_files

PAGE = """<!DOCTYPE html>
<html>
<head>
<meta name="pypi:repository-version" content="1.0">
<title>{title}</title>
</head>
<body>
<h1>{title}</h1>
{links}
</body>
</html>
"""


def link(file: Path) -> str:
    if file.suffix == ".whl":
        wheel_files.parse_name(file)
    facts = wheel_files.metadata(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    attributes = f'href="../../{urllib.parse.quote(file.name)}#sha256={digest}"'
    needed = re.search(r"^Requires-Python: *(.+)$", facts, re.MULTILINE)
    if needed:
        attributes += f' data-requires-python="{html.escape(needed[1])}"'
    return f"<a {attributes}>{html.escape(file.name)}</a><br>"


@wheel_files.exits_with_a_sentence
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[2] / "dist"
    parser.add_argument("folder", type=Path, nargs="?", default=default)
    folder = parser.parse_args(arguments).folder
    wheel_files.check_folder(folder)
    projects = {}
    for file in sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")]):
        project = re.sub(r"[-_.]+", "-", file.name.split("-")[0]).lower()  # PEP 503
        try:
            linked = link(file)
        except (wheel_files.Problem, OSError) as problem:
            print(f"warning: {file.name} is left out: {problem}", file=sys.stderr)
        else:
            projects.setdefault(project, []).append(linked)
    if not projects:
        raise wheel_files.Problem(f"there is no wheel in {folder}")
    simple = folder / "simple"
    for project, links in projects.items():
        (simple / project).mkdir(parents=True, exist_ok=True)
        page = PAGE.format(title=f"Links for {project}", links="\n".join(links))
        (simple / project / "index.html").write_text(page, encoding="utf-8")
    links = "\n".join(f'<a href="{project}/">{project}</a><br>' for project in projects)
    (simple / "index.html").write_text(
        PAGE.format(title="Simple index", links=links), encoding="utf-8"
    )
    print(f"{simple}/: {', '.join(projects)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
