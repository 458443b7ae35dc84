"""Notebook 00 in a real browser: all cells run, the slider and the painted mask do what they say, nothing leaves the machine."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import jupytext
import nbformat
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
RUN_SECONDS = 150  # for all cells at the tiny preset, on a slow shared machine
STEP_SECONDS = 30
UNFINISHED = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')]
    .filter(c => !/\\[\\d+\\]/.test(c.querySelector('.jp-InputArea-prompt').innerText)).length"""

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture
def lab(root, tmp_path):
    """A JupyterLab of its own, in a copy of the notebook and its style; yields its address."""
    (tmp_path / "notebooks").mkdir()
    notebook = jupytext.read(root / "notebooks/source/00_start_here.py")
    nbformat.write(notebook, tmp_path / "notebooks/00_start_here.ipynb")
    shutil.copytree(root / "figures", tmp_path / "figures")
    settings = tmp_path / "settings/@jupyterlab/notebook-extension"
    settings.mkdir(parents=True)
    # Cells outside the window stay in the page, so that the page itself tells which have run.
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | folders | {
        "UMM_KIT_PRESET": "tiny", "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_NO_CONFIG": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    log = tmp_path / "lab.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for_server(f"http://127.0.0.1:{port}/api?token={token}", server, log)
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks/00_start_here.ipynb?token={token}&reset"
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()


def wait_for_server(address: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert server.poll() is None, f"JupyterLab ended: {log.read_text()[-2000:]}"
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.3)
    raise AssertionError(f"JupyterLab did not answer within 60 s: {log.read_text()[-2000:]}")


@pytest.fixture
def page(tmp_path):
    """A page of a headless Chromium, with every address it asked for in ``page.asked``."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium); nothing else is tested here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(1000 * STEP_SECONDS)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("websocket", lambda websocket: page.asked.append(websocket.url))
        try:
            yield page
        finally:
            browser.close()


def run_all(page, address: str) -> None:
    page.goto(address, timeout=90_000)
    page.wait_for_selector(".jp-NotebookPanel .jp-Notebook .jp-Cell", timeout=90_000)
    page.wait_for_function("() => /Python 3/.test(document.querySelector('.jp-Toolbar-kernelName')?.innerText)", timeout=60_000)
    # The lamp of an idle kernel lights before the page's own connection is up: ask the server.
    idle = """async () => { const r = await fetch('/api/sessions'); const s = await r.json();
        return s.length && s[0].kernel.execution_state === 'idle' && s[0].kernel.connections >= 1 }"""
    page.wait_for_function(idle, polling=300, timeout=60_000)
    page.wait_for_timeout(500)
    page.click("text=Run")
    page.click(".lm-Menu-item[data-command='runmenu:run-all']")
    page.wait_for_function(f"() => ({UNFINISHED})() === 0", polling=500, timeout=1000 * RUN_SECONDS)


def test_start_here(page, lab):
    run_all(page, lab)
    errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, errors.first.inner_text()
    assert page.locator(".jp-OutputArea-output img[src^='data:image/png']").count() >= 8
    claims = page.locator("text=/[✓✗] layer 0: both flows start alike/")
    assert claims.count() == 1 and claims.inner_text().lstrip().startswith("✓")
    explore_layers(page)
    paint(page)
    asked = [urlsplit(address) for address in page.asked]
    external = [a.geturl() for a in asked if a.scheme not in ("data", "blob") and a.hostname != "127.0.0.1"]
    assert asked and not external


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
