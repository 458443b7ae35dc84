"""A notebook in a JupyterLab of its own, and a headless Chromium to read it with."""

import contextlib
import itertools
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


@pytest.fixture
def lab(request, root, tmp_path):
    """The address of one notebook in a JupyterLab of its own, at the tiny preset, in a copy with style and records.

    Ask for it by ``@pytest.mark.parametrize("lab", ["00_start_here"], indirect=True)``, or by "00_start_here:8" for a copy that
    ends before section 8: what no widget needs, test_notebooks.py runs.
    """
    name, _, end = request.param.partition(":")
    (tmp_path / "notebooks").mkdir()
    notebook = jupytext.read(root / f"notebooks/source/{name}.py")
    if end:
        notebook.cells = list(itertools.takewhile(lambda cell: f"## {end}. " not in cell.source, notebook.cells))
    nbformat.write(notebook, tmp_path / f"notebooks/{name}.ipynb")
    for folder in ("figures", "experiments"):
        shutil.copytree(root / folder, tmp_path / folder)
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
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks/{name}.ipynb?token={token}&reset"
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
    """Open a notebook, run all of its cells and see that none failed."""
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
    errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, errors.first.inner_text()


def assert_nothing_left_the_machine(page) -> None:
    asked = [urlsplit(address) for address in page.asked]
    external = [a.geturl() for a in asked if a.scheme not in ("data", "blob") and a.hostname != "127.0.0.1"]
    assert asked and not external
