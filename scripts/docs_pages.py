"""Generate pages when MkDocs builds the site: the commands, and copies of the pages beside README.

MkDocs calls `on_files` and `on_page_markdown` (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lorakit.cli.main import parser

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "commands.md", content=commands_page()))
    for name in BESIDE:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name.lower(), content=from_root(text)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Rewrite links to pages in the folder of README to their copies in the site."""
    return re.sub(r"\]\(\.\./(\w+\.md)", lambda match: f"]({match[1].lower()}", markdown)


def from_root(text: str) -> str:
    """Rewrite the links in a page beside README so that they are relative to docs/."""
    text = text.replace("](docs/", "](")
    return re.sub(r"\]\(([A-Z_]+\.md)\)", lambda match: f"]({match[1].lower()})", text).replace(
        "](LICENSE)", "](index.md)"
    )


def commands_page() -> str:
    """The page of commands, with the text of `lorakit COMMAND --help` for each."""
    lines = ["# Commands", "", "`lorakit --help` lists them, `lorakit COMMAND --help` has this page's text for one."]
    os.environ["COLUMNS"] = "100"
    seen: set[int] = set()
    for action in parser()._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        for name, command in action.choices.items():
            if id(command) in seen or name == "ui":
                continue
            seen.add(id(command))
            lines += ["", f"## {name}", "", "```text", command.format_help().rstrip(), "```"]
    return "\n".join(lines) + "\n"
