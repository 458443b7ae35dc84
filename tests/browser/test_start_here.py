"""Notebook 00 in a real browser: all cells run, the slider and the painted mask do what they say, nothing leaves the machine."""

import pytest

from .conftest import assert_nothing_left_the_machine, run_all

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.mark.parametrize("lab", ["00_start_here:8"], indirect=True)
def test_start_here(page, lab):
    run_all(page, lab)
    assert page.locator(".jp-OutputArea-output img[src^='data:image/png']").count() >= 6
    claims = page.locator("text=/[✓✗] layer 0: both flows start alike/")
    assert claims.count() == 1 and claims.inner_text().lstrip().startswith("✓")
    explore_layers(page)
    paint(page)
    assert_nothing_left_the_machine(page)


def explore_layers(page) -> None:
    maps, said = page.locator(".umm-maps"), page.locator(".umm-said", has_text="layer")
    assert said.inner_text() == "layer 0 of 10, image 0"
    before = maps.get_attribute("src")
    handle = page.locator(".umm-layer .noUi-handle")
    handle.focus()
    for layer in (1, 2):
        handle.press("ArrowRight")
        page.locator(".umm-said", has_text=f"layer {layer} of 10").wait_for()
    assert maps.get_attribute("src") != before
    assert maps.evaluate("image => image.complete && image.naturalWidth") > 100


def paint(page) -> None:
    tokens, said = page.locator(".umm-token"), page.locator(".umm-said", has_text="hidden")
    assert tokens.count() == 64
    page.click(".umm-clear")
    page.locator(".umm-said", has_text="0 of 64 tokens hidden").wait_for()
    for number, token in enumerate((0, 9, 18), start=1):
        tokens.nth(token).click()
        page.locator(".umm-said", has_text=f"{number} of 64 tokens hidden").wait_for()
    tokens.nth(9).click()
    page.locator(".umm-said", has_text="2 of 64 tokens hidden").wait_for()
    assert said.count() == 1 and page.locator(".umm-token.mod-active").count() == 2
    # The buttons lie on the picture, one per token.
    canvas, corner = page.locator(".umm-canvas").bounding_box(), tokens.nth(63).bounding_box()
    assert corner["width"] == pytest.approx(canvas["width"] / 8, abs=3)
    assert corner["x"] + corner["width"] == pytest.approx(canvas["x"] + canvas["width"], abs=3)
    before = page.locator(".umm-result").get_attribute("src")
    page.click(".umm-fill")
    page.locator(".umm-said", has_text="filled in 2 tokens").wait_for(timeout=60_000)
    assert page.locator(".umm-result").get_attribute("src") != before
