"""Notebook 05 in a real browser: the player follows its sliders, and words and a picture of the reader's own go around."""

import pytest
from PIL import Image

from .conftest import assert_nothing_left_the_machine, run_all

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(280)]
ANSWER_MS = 30_000  # drawing takes seconds on a machine at rest


@pytest.mark.parametrize("lab", ["05_drift"], indirect=True)
def test_drift(page, lab, tmp_path):
    run_all(page, lab)
    assert page.locator(".jp-OutputArea-output img[src^='data:image/png']").count() >= 4
    assert page.locator("text=/✓ two perfect partners lose nothing/").count() == 1
    picture, path = page.locator(".umm-picture"), page.locator(".umm-path")
    said, facts = page.locator(".umm-said", has_text="half-step"), page.locator(".umm-facts")
    assert said.inner_text().startswith("half-step 0 of 4 (text, ok)") and "✓" in facts.inner_text()
    before, way = picture.get_attribute("src"), path.get_attribute("src")
    handle = page.locator(".umm-step .noUi-handle")
    handle.focus()
    handle.press("End")
    page.locator(".umm-said", has_text="half-step 4 of 4").wait_for(timeout=ANSWER_MS)
    assert picture.get_attribute("src") != before and path.get_attribute("src") != way

    strip = page.locator(".umm-strip")
    page.locator(".umm-text input").fill("a small blue square")
    page.locator(".umm-text input").press("Enter")
    page.locator("button.umm-go").click()
    page.locator(".umm-said", has_text="'a small blue square' has become").wait_for(timeout=ANSWER_MS)
    drawn = strip.get_attribute("src")
    Image.new("RGB", (90, 60), "orange").save(tmp_path / "mine.png")
    with page.expect_file_chooser() as chooser:
        page.locator("button.umm-upload").click()
    chooser.value.set_files(tmp_path / "mine.png")
    page.wait_for_function("before => document.querySelector('.umm-strip').src !== before", arg=drawn, timeout=ANSWER_MS)
    assert strip.evaluate("image => image.complete && image.naturalWidth") > 200
    assert_nothing_left_the_machine(page)
