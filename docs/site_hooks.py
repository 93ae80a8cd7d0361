"""For MkDocs: pages of the repository's root are part of the site, and links to them are followed.

In the repository a page of docs/ is linked as docs/X.md from the root, and a page of the root as
../X.md from docs/. On the site both lie in one folder.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files, config):
    for name in PAGES:
        content = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, **_):
    if page.file.src_uri in PAGES:
        return markdown.replace("](docs/", "](")
    return markdown.replace("](../", "](")


def on_page_content(html, **_):
    """Docstrings have a few words of Sphinx: roles, and marks of a block of text."""
    html = re.sub(r":(?:func|class|mod|meth):(?=<code)", "", html)
    return re.sub(r"<p>\.\. code-block:: \w+</p>", "", html).replace("Example::", "Example:")
