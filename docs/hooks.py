"""What MkDocs does beyond its configuration: pages that are made from the sources, and links out of docs/."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "sqa"
NOT_PYTHON_API = {"cli", "modeling_sqa", "modeling_sqa_bert"}  # the last two are shipped with models
PAGES = {f"{name}.md": f"{name.upper()}.md" for name in ("changelog", "contributing", "security")}
"""Pages of the site that are files of the repository's root."""


def reference() -> dict[str, list[str]]:
    """The public modules by page, one page for each that lies directly in the package."""
    pages: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts and not NOT_PYTHON_API.intersection(parts) and not any(part.startswith("_") for part in parts):
            pages.setdefault(parts[0], []).append(".".join(("sqa", *parts)))
    return pages


def _fill(nav: list[Any]) -> list[Any]:
    """`nav` with the entry `reference/` replaced by the generated pages."""
    pages = [{f"sqa.{name}": f"reference/{name}.md"} for name in reference()]
    return [
        {title: [{"sqa": "reference/index.md"}, *pages] if target == "reference/" else target}
        for entry in nav
        for title, target in entry.items()
    ]


def on_config(config: MkDocsConfig) -> None:
    config.nav = _fill(config.nav or [])


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add PAGES, the commands and the API reference, which are not written in docs/."""
    for page, file in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    files.append(File.generated(config, "commands.md", content=_commands()))
    content = "# The package\n\n::: sqa\n    options: { members: false, show_root_heading: false }\n\n"
    content += "What `from sqa import ...` gives:\n\n" + "\n".join(f"- {line}" for line in _exported()) + "\n"
    files.append(File.generated(config, "reference/index.md", content=content))
    for name, modules in reference().items():
        first, *rest = modules
        parts = [f"::: {first}\n    options: {{ heading_level: 1 }}", *(f"::: {module}" for module in rest)]
        content = "\n\n".join(parts) + "\n"
        files.append(File.generated(config, f"reference/{name}.md", content=content))


def _commands() -> str:
    """Every command of `sqa` with its options, from their help texts."""
    import typer
    from typer.cli import get_docs_for_click

    from sqa.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="sqa"), name="sqa", title="Commands")
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)  # cut off after some words; the contents name them all
    return without_tags(text)


def without_tags(markdown: str) -> str:
    """Markdown in which `<` outside code is a character: in help texts, `<plan>` is a word and no HTML."""
    return re.sub(r"(```.*?```|`[^`\n]*`)|<", lambda match: match[1] or "&lt;", markdown, flags=re.DOTALL)


def _exported() -> list[str]:
    """The names of `sqa.__all__`, each with a link to the module that defines it."""
    import sqa

    lines = []
    for name in sqa.__all__:
        if not name.startswith("_"):
            module = getattr(getattr(sqa, name), "__module__", "sqa.variants")  # a table has no module of its own
            lines.append(f"[`{name}`][{module}.{name}]")
    return lines


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository that are no pages become their names; a file that is missing is an error."""
    if page.file.src_uri in PAGES:
        return markdown.replace("](docs/", "](")
    here = posixpath.dirname(page.file.src_uri)
    pages = {"README.md": "index.md"} | {file: page for page, file in PAGES.items()}

    def replace(match: re.Match[str]) -> str:
        text, (path, hash_sign, anchor) = match[1], match[2].partition("#")
        target = posixpath.normpath(posixpath.join("docs", here, path))
        if target.startswith("docs/"):
            return match[0]
        if target in pages:
            return f"[{text}]({posixpath.relpath(pages[target], here or '.')}{hash_sign}{anchor})"
        if not (ROOT / target).exists():
            raise PluginError(f"{page.file.src_uri}: no {target} in the repository")
        return text if text.strip("`") == target else f"{text} (`{target}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)\s]+)\)", replace, markdown)
