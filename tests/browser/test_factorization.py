"""Notebook 03 in a real browser: cells run up to the training and with it; the microscope changes term and step, offline."""

import pytest

from .conftest import assert_nothing_left_the_machine, run_all

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(280)]
ANSWER_MS = 10_000  # about a second on a machine at rest


@pytest.mark.parametrize("lab", ["03_factorization:4"], indirect=True)
def test_factorization(page, lab):
    run_all(page, lab)
    assert page.locator(".jp-OutputArea-output img[src^='data:image/png']").count() >= 6
    assert page.locator("text=/✓ a fixed critic drives partners to opposite sides/").count() == 1
    picture, said = page.locator(".umm-arrows"), page.locator(".umm-said", has_text="Look for:")
    assert "step 0 of 30" in said.inner_text()
    before = picture.get_attribute("src")
    handle = page.locator(".umm-step .noUi-handle")
    handle.focus()
    handle.press("End")
    page.locator(".umm-said", has_text="step 30 of 30").wait_for(timeout=ANSWER_MS)
    last = picture.get_attribute("src")
    assert last != before
    page.locator(".umm-term select").select_option(index=2)
    page.locator(".umm-said", has_text="step 0 of 40").wait_for(timeout=ANSWER_MS)
    assert picture.get_attribute("src") != last and picture.evaluate("image => image.complete && image.naturalWidth") > 300
    assert_nothing_left_the_machine(page)
