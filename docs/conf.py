"""How Sphinx makes the site: `make docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from sphinx.application import Sphinx

import mopo_kernels

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]

project = "mopo_kernels"
author = "the maintainers of mopo_kernels"
release = version = mopo_kernels.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "command_line",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "mopo_kernels"
html_show_copyright = False

myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

copybutton_prompt_text = "$ "

# Documents outside docs, which GitHub's readers follow links to, and the pages that include them.
PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "SECURITY.md": "security",
    "examples/paper/README.md": "paper_experiment",
    "studies/architectures/README.md": "architectures",
    "studies/language_model/README.md": "language_model",
    **{
        f"studies/canonical_structures/results/{page.name}": f"canonical_structures/{page.stem}"
        for page in (ROOT / "docs" / "canonical_structures").glob("*.md")
    },
}


def link_pages(text: str, file: PurePosixPath, page: PurePosixPath) -> str:
    """A document's text with links for the page that shows it.

    Args:
        text: Markdown.
        file: where it stands in the repository: its links start there.
        page: the page that shows it, from the root of the repository: there they are to start.
    """

    def link(match: re.Match[str]) -> str:
        target = normpath(str(file.parent / match["path"]))
        target = f"docs/{PAGES[target]}.md" if target in PAGES else target
        return match["before"] + relpath(target, page.parent)

    return re.sub(r"""(?P<before>\]\(|src=")(?![a-z]+:|#)(?P<path>[^)"\s#]+)""", link, text)


def read_source(app: Sphinx, name: str, content: list[str]) -> None:
    path = PurePosixPath("docs") / f"{name}.md"
    content[0] = link_pages(content[0], path, path)


def read_included(app: Sphinx, path: Path, name: str, content: list[str]) -> None:
    file = PurePosixPath((ROOT / "docs" / path).resolve().relative_to(ROOT).as_posix())
    # MyST names the page without its folder.
    content[0] = link_pages(content[0], file, PurePosixPath("docs") / f"{app.env.docname}.md")


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_source)
    app.connect("include-read", read_included)
