"""A caption that is typed belongs to the photo it was typed for, whatever the page shows by the time it is saved."""

from pathlib import Path

import pytest
from PIL import Image
from test_browser import Person

pytestmark = pytest.mark.slow


def test_a_caption_stays_with_its_photo_when_another_folder_comes(chromium, front_end, tmp_path: Path):
    for name, colour in (("A", "red"), ("B", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / name / "00.png")
    person = Person(chromium, front_end(tmp_path).address)
    field = person.page.locator("textarea[data-photo='00.png']")
    person.choose("photos-folder", tmp_path / "A")
    field.wait_for()
    field.fill("written for A")
    person.choose("photos-folder", tmp_path / "B")
    person.page.locator(f"textarea[data-file='{tmp_path}/B/00.png']").wait_for()
    assert field.input_value() == ""
    assert person.page.locator(".lk-save").is_hidden()
    person.choose("photos-folder", tmp_path / "A")
    person.page.locator(f"textarea[data-file='{tmp_path}/A/00.png']").wait_for()
    assert field.input_value() == "written for A"
    # The folder's field has the other folder, but its cards have not come yet.
    person.page.locator("#photos-folder input").fill(str(tmp_path / "B"))
    person.page.locator(".lk-save").click()
    person.says("photos-message", "Caption of A/00.png saved.")
    assert (tmp_path / "A" / "00.txt").read_text() == "written for A\n" and not (tmp_path / "B" / "00.txt").exists()
    person.context.close()
