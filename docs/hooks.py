"""What the site takes from outside docs/: readmes of other folders become pages of it."""

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "data/README.md": "data.md",
    "data/demo/README.md": "demo.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "extending.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")


def on_files(files: Any, config: Any) -> Any:
    """Add them; the site has an index of its own."""
    for source, page in PAGES.items():
        if page != "index.md":
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=links(text, Path(source).parent)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of the pages in docs/ to them too."""
    here = page.file.src_uri in PAGES.values() and page.file.src_uri != "index.md"
    return markdown if here else links(markdown, Path("docs"))


def links(text: str, folder: Path) -> str:
    """Relative links from a folder of the repository as the site has them.

    What is no page of it, such as a script, becomes its path in the repository, as code.
    """

    def replaced(match: re.Match[str]) -> str:
        start, target, end = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = (ROOT / folder / target).resolve().relative_to(ROOT).as_posix()
        if path in PAGES:
            return f"{start}{PAGES[path]}{end}"
        if path.startswith("docs/"):
            return f"{start}{path.removeprefix('docs/')}{end}"
        return f"]<!-- -->(`{path}`)"

    text = LINK.sub(replaced, text)
    return re.sub(r"\[([^\]]+)\]<!-- -->", r"\1 ", text)


def on_page_content(html: str, **_: Any) -> str:
    """Equations as MathML, which browsers draw by themselves."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(unescape(match[2]).strip(), display=display)

    return re.sub(
        r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', drawn, html, flags=re.S
    )
