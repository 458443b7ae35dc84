"""Notebook 01 in a real browser: all cells run, the explorer answers each slider in picture and words, offline."""

import re

import pytest

from .conftest import assert_nothing_left_the_machine, run_all

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(280)]
ANSWER_MS = 10_000  # under a second on a machine at rest
VERDICT = re.compile("^(not reproduced|reproduced|undecided)$")


@pytest.mark.parametrize("lab", ["01_interference"], indirect=True)
def test_interference(page, lab):
    run_all(page, lab)
    assert page.locator(".jp-OutputArea-output img[src^='data:image/png']").count() >= 8
    assert page.locator("text=/✓ a shuffle changes no feature-space residual/").count() == 1
    assert page.locator(".jp-OutputArea-output td").filter(has_text=VERDICT).count() == 5
    picture, said = page.locator(".umm-interference"), page.locator(".umm-said", has_text="of Nyquist")
    assert said.inner_text().startswith("layer 5 of 10, mask ratio 0.4: ")
    for control, key, words in (
        ("layer", "ArrowRight", "layer 6 of 10, mask ratio 0.4: "),
        ("layer", "ArrowLeft", "layer 5 of 10, mask ratio 0.4: "),
        ("mask-ratio", "ArrowRight", "layer 5 of 10, mask ratio 0.6: "),
        ("cut-off", "ArrowRight", "above 0.6 of Nyquist"),
        ("rank-rule", "End", "outside 64 components of understanding"),
    ):
        move(page, control, key, words, picture)
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 500
    assert_nothing_left_the_machine(page)


def move(page, control: str, key: str, words: str, picture) -> None:
    """One press of a key on a slider, then the words, then another picture."""
    before = picture.get_attribute("src")
    handle = page.locator(f".umm-{control} .noUi-handle")
    handle.focus()
    handle.press(key)
    page.locator(".umm-said", has_text=words).wait_for(timeout=ANSWER_MS)
    assert picture.get_attribute("src") != before
