"""What mkdocs calls while it builds the site: pages that stand elsewhere in the checkout become pages of it, too."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

#: Files beside docs/, and what they are called in the site.
ADOPTED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/small_multiflow/README.md": "small-model.md",
}
#: What they show.
PICTURES = {"examples/small_multiflow/training/losses.png": "training/losses.png"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the checkout's files."""
    root = Path(config.config_file_path).parent
    for name, page in (ADOPTED | PICTURES).items():
        files.append(File.generated(config, page, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that work in a checkout to where the site has the file."""
    up = "../" * page.file.src_uri.count("/")
    for name, adopted in ADOPTED.items():
        markdown = markdown.replace(f"]({up}../{name})", f"]({up}{adopted})")
    if page.file.src_uri in ADOPTED.values():  # those lie above docs/ in the checkout
        markdown = markdown.replace("](docs/", "](")
    return markdown
