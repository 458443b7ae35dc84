"""Notebook 02 in a real browser: all cells run, the slider moves, a lasso picks points, nothing leaves the machine."""

import re

import pytest

from .conftest import assert_nothing_left_the_machine, run_all

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.mark.parametrize("lab", ["02_latent_space:4"], indirect=True)
def test_latent_space(page, lab):
    run_all(page, lab)
    assert page.locator(".jp-OutputArea-output img[src^='data:image/png']").count() >= 4
    claims = page.locator("text=/[✓✗] every map is more faithful than a random one/")
    assert claims.count() == 1 and "✓ every map" in claims.inner_text()
    choose_maps(page)
    pick(page)
    assert_nothing_left_the_machine(page)


def choose_maps(page) -> None:
    said = page.locator(".umm-said", has_text="trustworthiness")
    assert said.inner_text().startswith("layer 0, PCA, coloured by flow: trustworthiness 0.")
    handle = page.locator(".umm-layer .noUi-handle")
    handle.focus()
    for layer in (1, 2):
        handle.press("ArrowRight")
        page.locator(".umm-said", has_text=f"layer {layer}, PCA").wait_for()
    page.locator(".umm-method select").select_option("t-SNE")
    page.locator(".umm-said", has_text="layer 2, t-SNE, coloured by flow").wait_for()
    page.locator(".umm-colour select").select_option("count")
    page.locator(".umm-said", has_text="layer 2, t-SNE, coloured by count").wait_for()


def pick(page) -> None:
    said, pictures = page.locator(".umm-said", has_text="picked"), page.locator(".umm-picked img")
    assert said.inner_text().startswith("picked 1: 1 of understanding, 0 of generation"), "the notebook's own choice"
    assert pictures.count() == 4 and page.locator(".umm-picked").inner_text().count("near in generation") >= 2
    before = pictures.first.get_attribute("src")
    # A lasso around the lower right quarter of the map, then around all of it.
    canvas = page.locator(".umm-scatter canvas").first
    canvas.scroll_into_view_if_needed()
    page.click(".umm-scatter button[title='Activate lasso selection']")
    page.wait_for_timeout(500)  # its tooltip and the button's own state
    counts = []
    for left in (0.5, 0.02):
        box, previous = canvas.bounding_box(), said.inner_text()
        corners = [(left, left), (0.98, left), (0.98, 0.98), (left, 0.98), (left, left + 0.03)]
        across = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
        page.mouse.move(*across[0])
        page.mouse.down()
        for corner in across[1:]:
            page.mouse.move(*corner, steps=12)
            page.wait_for_timeout(100)
        page.mouse.up()
        page.wait_for_function("was => ![...document.querySelectorAll('.umm-said')].some(e => e.innerText === was)", arg=previous)
        found = re.match(r"picked (\d+): (\d+) of understanding, (\d+) of generation", said.inner_text())
        assert found and int(found[1]) == int(found[2]) + int(found[3])
        counts.append(int(found[1]))
    assert 1 <= counts[0] < counts[1] > 100, counts  # 64 scenes in two flows
    assert "; the first 3 are shown" in said.inner_text() and pictures.count() == 12
    assert pictures.first.get_attribute("src").startswith("data:image/png") and pictures.nth(4).get_attribute("src") != before
