"""Links, headings, files, options of scripts and tests that the pages name exist; pages agree on numbers of photos."""

import json
import re
from pathlib import Path

import pytest

from lorakit.data import checks

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = [path.name for path in [*ROOT.iterdir(), *(ROOT / "lorakit").iterdir()] if path.is_dir()]
# Files of other projects.
FOREIGN = {"train_dreambooth_lora.py", "train_util.py", "external.py"}


def text_of(page: Path) -> str:
    """Return a page's text with continued lines joined."""
    return page.read_text(encoding="utf-8").replace("\\\n", " ")


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub and MkDocs create for a page's headings."""
    lines = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_of_the_repository(page: Path) -> None:
    """Links may not lead to the pages that only the site has."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not re.match(r"https?:|mailto:", link):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{link}: there is no such file"
            assert not anchor or anchor in headings(target), f"{link}: there is no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_named_file_exists(page: Path) -> None:
    text = re.sub(r"https?://\S+", "", text_of(page))
    for name in re.findall(rf"(?<![\w./~:$-])((?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*/])", text):
        is_example = bool(re.search(r"[A-Z]{4}", name)) or (name.startswith("runs/") and not name.endswith(".py"))
        places = [ROOT, ROOT / "lorakit", ROOT / "tests"]
        assert is_example or any(any(place.glob(name)) for place in places), name
    for name in set(re.findall(r"`(\w+\.py)`", text)) - FOREIGN:
        assert any(ROOT.glob(f"[!.]*/**/{name}")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_of_a_script_and_every_named_test_exists(page: Path) -> None:
    for line in re.findall(r"python ((?:benchmarks|tests|scripts|tools)/[^`\n|]*)", text_of(page)):
        script, *words = line.partition("  #")[0].split()
        source = (ROOT / script).read_text(encoding="utf-8")
        for word in words:
            option = word.partition("=")[0].rstrip(";,.)")
            assert not option.startswith("--") or f'"{option}"' in source, f"{script} has no {option}"
    for name, test in re.findall(r"`([\w/]+\.py)::(test_\w+)`", text_of(page)):
        assert f"def {test}(" in (ROOT / "tests" / name).read_text(encoding="utf-8"), f"{name}::{test}"


def test_pages_presets_and_front_end_recommend_the_same_number_of_photos() -> None:
    """A range can have several forms: 5 to 20, 5 到 20, 5～20."""
    ranges = {kind: rf"\b{low}(?: to | 到 |～){high}\b" for kind, (low, high) in checks.ADVISED_PHOTOS.items()}
    both = ["README.md", "README.zh-TW.md", "docs/index.md", "docs/tutorial.md"]
    for name in both:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert all(re.search(pattern, text) for pattern in ranges.values()), name
        assert not re.search(r"dozen photos|十幾張照片", text), name
    for path in (ROOT / "lorakit" / "ui" / "texts").glob("*.json"):
        lead = json.loads(path.read_text(encoding="utf-8"))["texts"]["photos.lead"]
        assert all(re.search(pattern, lead) for pattern in ranges.values()), path.name
    for path in (ROOT / "presets").glob("*.toml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert " from " not in first or re.search(ranges[path.name.partition("-")[0]], first), path.name


def test_the_glossary_explains_each_term_in_both_languages() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| .*\|$", text, re.MULTILINE)
    ]
    terms = [row for row in rows if row[0] not in ("English", "---")]
    assert len(terms) > 60 and all(len(row) == 4 and all(row) for row in terms)
    assert all(re.search(r"[a-z]{3}", row[2]) and re.search(r"[\u4e00-\u9fff]{3}", row[3]) for row in terms)
    names = [name for row in terms for name in row[0].split(", ")]
    assert len(names) == len(set(names)), "a term is explained once"
