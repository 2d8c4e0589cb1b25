"""Pages of the site that lie outside `docs/`, and the links between them and those inside."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OTHERS = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "models/**/*.md", "workflows/**/*.md",
    "notebooks/*.md", "benchmarks/results/*.md",
)  # fmt: skip
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")
"""To a file of the repository."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's pages that are no part of `docs/`, and the files that pages name."""
    pages = [path for pattern in OTHERS for path in sorted(ROOT.glob(pattern))]
    named = {
        (page.parent / link[2]).resolve()
        for page in (*pages, *(ROOT / "docs").rglob("*.md"))
        for link in LINK.finditer(page.read_text("utf-8"))
    }
    named = {path for path in named if path.is_file() and ROOT in path.parents}
    inside = {Path(file.abs_src_path) for file in files if file.abs_src_path}
    for path in sorted({*pages, *named} - inside):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    # README is what a visitor sees first
    files.src_uris["index.md"].dest_uri = "documentation.html"
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have a page's links, which hold in the repository, hold on the site."""
    here = posixpath.dirname(page.file.src_uri)
    folder = here if page.file.generated_by else posixpath.join("docs", here)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2])).removeprefix("docs/")
        return link[1] + posixpath.relpath(target, here or ".")

    return LINK.sub(moved, markdown)
