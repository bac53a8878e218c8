"""The docs: the site builds, its commands run, its messages exist in the code, and its sentences are short."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from trees import nodes_of

from lorakit import config
from lorakit.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ["train.steps=2", "sample.steps=2", "sample.at_start=false", "train.prior=none"]
# Limits for the number of sentences with more than 35 words. The limits may only be lowered.
LONG = {"docs": 0, "docstrings": 0}


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced code blocks with this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Return the lorakit commands in a page's code, without their comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")  # join continued lines
    code = [
        *re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE),
        *re.findall(r"^    (.*)$", text, re.MULTILINE),
    ]
    lines = re.findall(r"^(?:\$ )?(?:\.venv/bin/)?(lorakit [a-z].*)$", "\n".join(code), re.MULTILINE)
    return [re.split(r"\s{2,}[#(]", line)[0] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_has_arguments_that_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {option.key for option in config.options()} | {"section.key"}
    for line in commands(page):
        words = [word for word in shlex.split(line, comments=True)[1:] if word not in ("...", "\\")]
        if words[:1] != ["ui"] and all(re.fullmatch(r"[\w./~:@=,*-]+|.* .*|", word) for word in words):
            arguments = [word if word.isascii() else "x" for word in words]
            try:
                cli.parser().parse_args(arguments)
            except SystemExit as refusal:
                assert refusal.code == 0, f"{line}\n{capsys.readouterr().err}"
        if page.name == "README.md":
            assert {line.split()[1] for line in commands(page)} >= {
                "check",
                "train",
                "resume",
                "sample",
                "inspect",
                "export",
            }
        for key in re.findall(r"--set ([\w.]+)=", line):
            assert key.partition(".")[2].partition(".")[0] and any(key.startswith(name) for name in keys), line


@pytest.mark.slow
@pytest.mark.usefixtures("short_validation")
def test_the_commands_of_the_tutorial_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.cli import demo

    monkeypatch.chdir(tmp_path)
    demo.write_photos("zib", tmp_path / "first" / "photos")  # the photos that the page's demo writes
    lines = [
        line.removeprefix("$ ")
        for block in blocks(ROOT / "docs" / "tutorial.md", "console")
        for line in block.splitlines()
    ]
    assert {line.split()[1] for line in lines} == {"doctor", "check", "train", "inspect", "sample", "export"}
    for line in lines:
        words = shlex.split(line)[1:]
        changes = SHORT if words[0] == "train" else SHORT[1:2] if words[0] == "sample" else []
        words += [f"--set={change}" for change in changes]
        assert cli.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "zib" / "report.html").is_file()
    assert list((tmp_path / "pictures").glob("*.png")) and list((tmp_path / "exported").glob("*.safetensors"))


def test_both_readmes_have_the_same_commands_links_and_tables() -> None:
    pages = [ROOT / name for name in ("README.md", "README.zh-TW.md")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    assert commands(pages[0]) == commands(pages[1])
    for pattern in (r"^\| --- .*$", r"^(##) ", r"^python3? -m .*$"):
        first, second = [re.findall(pattern, text, re.MULTILINE) for text in texts]
        assert first == second, pattern
    first, second = [set(re.findall(r"\]\(([^)]+)\)", text)) for text in texts]
    assert first ^ second <= {"README.md", "README.zh-TW.md", "docs/glossary.md"}


def literals() -> list[str]:
    """Return all strings of the package. "…" stands for each value of an f-string or a template."""
    texts = []
    for path in (ROOT / "lorakit").rglob("*.py"):
        for node in nodes_of(path, ast.JoinedStr, ast.Constant):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(str(part) for part in parts))
            elif isinstance(node.value, str):
                texts.append(re.sub(r"\{[^{}]*\}", "…", node.value))
    return texts


def test_messages_of_the_troubleshooting_page_are_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(messages) > 20
    texts = literals()
    for message in messages:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


def sentences(text: str) -> list[str]:
    """Return the sentences of a page's prose. A code span counts as one word, and a link's target as none."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^(?: {4}|\||#).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", text))
    return [part for paragraph in re.split(r"\n\s*\n", text) for part in re.split(r"(?<=[.!?])\s+", paragraph.strip())]


def docstrings() -> list[str]:
    """Return the docstrings of the package. Each argument or attribute becomes a paragraph."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    paths = (ROOT / "lorakit").rglob("*.py")
    texts = [ast.get_docstring(node) or "" for path in paths for node in nodes_of(path, *kinds)]
    return [re.sub(r"^\s*\w+(?:, \w+)*: ", "\n\n", text, flags=re.MULTILINE) for text in texts]


def test_sentences_have_at_most_35_words() -> None:
    texts = {"docs": [page.read_text(encoding="utf-8") for page in PAGES], "docstrings": docstrings()}
    for kind, limit in LONG.items():
        long = [sentence for text in texts[kind] for sentence in sentences(text) if len(sentence.split()) > 35]
        assert len(long) <= limit, "\n\n".join(long)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the site needs the extra docs")
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    page = (tmp_path / "site" / "commands" / "index.html").read_text(encoding="utf-8")
    assert 'id="train"' in page and "--subject" in page
    page = (tmp_path / "site" / "python" / "index.html").read_text(encoding="utf-8")
    assert "Raises" in page and "lorakit.train" in page


def test_readmes_and_presets_agree_with_the_table_of_memory() -> None:
    """The READMEs have the largest figure of each row; presets have no figure, but a reference to the table."""
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8").partition("## Which preset needs what")[2]
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    peaks = {name: max(map(float, figures)) for name, *figures in rows}
    for page in ("README.md", "README.zh-TW.md"):
        row = re.search(r"which-preset-needs-what\).*\n", (ROOT / page).read_text(encoding="utf-8"))
        names = ("subject-sd15", "subject-sd15-lowmem", "subject-sdxl", "subject-sdxl-lowmem")
        assert row is not None and re.findall(r"\d+\.\d", row[0]) == [str(peaks[name]) for name in names], page
    for preset in (ROOT / "presets").glob("*-sd*.toml"):
        assert "docs/memory.md has a table" in preset.read_text(encoding="utf-8"), preset.name
