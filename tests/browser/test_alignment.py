"""Notebook 04 in a real browser: all cells run, both trainings grow their curves, and nothing leaves the machine."""

import pytest

from .conftest import assert_nothing_left_the_machine, run_all

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.mark.parametrize("lab", ["04_alignment"], indirect=True)
def test_alignment(page, lab):
    run_all(page, lab)
    pictures = page.locator(".jp-OutputArea-output img[src^='data:image/png']")
    assert pictures.count() >= 5, "a strip, two trainings, the arrows, the rollouts"
    assert all(pictures.nth(k).evaluate("image => image.complete && image.naturalWidth") > 150 for k in range(pictures.count()))
    assert page.locator("text=/✓ perfect consistency has the highest loss there is/").count() == 1
    assert page.locator("text=/✓ released: no gradient reaches what draws/").count() == 1
    assert_nothing_left_the_machine(page)
