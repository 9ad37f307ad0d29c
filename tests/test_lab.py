"JupyterLab as a newcomer meets it, started by the recipe of `make lab`: no question asked, code in color, a page that runs and answers."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, free_port

PAGE = "vision/10_d2ue.ipynb"  # has sliders, needs no language model
SHOWN = ".jp-NotebookPanel:not(.lm-mod-hidden)"  # other tabs may wait behind it
START_S, RUN_S = 60, 400


def recipe():
    "The command of `make lab`, and the environment it sets."
    lines = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    line = next(line for line in lines if "jupyter lab" in line)
    line = re.sub(r"\S*/jupyter lab", f"{sys.executable} -m jupyterlab", line)
    return line.replace("--notebook-dir=nbs", "--notebook-dir=.")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of a JupyterLab that serves a copy of the notebooks, with nobody's own settings."
    home, port = tmp_path_factory.mktemp("lab"), free_port()
    for folder in ("nbs", "results"):
        shutil.copytree(ROOT / folder, home / folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    environment = {**os.environ, "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"),
                   "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "PYTHONPATH": str(ROOT)}
    command = f"{recipe()} --no-browser --allow-root --ServerApp.port={port} --ServerApp.port_retries=0 --IdentityProvider.token=''"
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(["bash", "-c", f"exec env {command}"], cwd=home / "nbs", env=environment, stdout=log, stderr=subprocess.STDOUT,
                                  stdin=subprocess.DEVNULL, start_new_session=True)
    url, begun = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{url}/api/status", timeout=2) as answer:
                    json.load(answer)
                    break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None or time.monotonic() - begun > START_S:
                    pytest.fail(f"JupyterLab did not answer after {time.monotonic() - begun:.0f} s:\n{(home / 'lab.log').read_text()[-2000:]}", pytrace=False)
            time.sleep(0.3)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.fixture(scope="module")
def page(lab, watched):
    "JupyterLab, opened; the tests use it one after the other."
    page = watched(lab, width=1400, height=1000)
    yield page
    page.close()


def kernel_is_ready(page):
    "Waits until the open notebook has a kernel that answers."
    page.locator(f"{SHOWN} .jp-Notebook-ExecutionIndicator[data-status='idle']").wait_for(timeout=60_000, state="attached")


def asks_nothing(page):
    "No dialog and no box with a button stands over the notebook."
    return page.locator(".jp-Dialog").count() == 0 and page.locator(".jp-toast-button, .jp-Notification-Toast").count() == 0


def test_lab_opens_the_front_page_and_asks_nothing(page):
    page.get_by_role("tab", name="index.ipynb").wait_for(timeout=60_000)
    kernel_is_ready(page)
    page.wait_for_timeout(2500)  # the box about news took two seconds to come
    assert asks_nothing(page) and page.outside == []


def test_pages_open_with_colors_before_any_kernel_is_asked_for(page):
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.get_by_text("Open from Path…", exact=True).click()
    page.locator(".jp-Dialog input").fill(PAGE)
    page.locator(".jp-Dialog input").press("Enter")
    page.get_by_role("tab", name=PAGE.rpartition("/")[2]).wait_for(timeout=60_000)
    words = page.locator(f"{SHOWN} .jp-CodeCell .cm-content span[class*='ͼ']")
    words.nth(30).wait_for(timeout=60_000, state="attached")  # cells come one after the other
    shades = words.evaluate_all("words => [...new Set(words.slice(0, 30).map(word => getComputedStyle(word).color))]")
    assert len(shades) >= 3, shades
    kernel_is_ready(page)
    assert asks_nothing(page)


@pytest.mark.slow
def test_a_method_page_runs_and_its_slider_changes_the_picture(lab, page):
    page.goto(f"{lab}/lab/tree/{PAGE}?reset")
    kernel_is_ready(page)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    slider = page.locator(".widget-slider").last
    slider.locator(".noUi-handle").wait_for(timeout=1000 * RUN_S, state="attached")
    kernel_is_ready(page)
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
    slider.scroll_into_view_if_needed()
    interactive = page.locator(".widget-interact").last
    picture = interactive.locator("img").first
    before = picture.get_attribute("src", timeout=30_000)
    for _ in range(3):
        slider.locator(".noUi-handle").press("ArrowRight")
    page.wait_for_function("([image, old]) => image.isConnected ? image.src !== old : true", arg=[picture.element_handle(), before], timeout=60_000)
    after = interactive.locator("img").first.get_attribute("src", timeout=60_000)
    assert before.startswith("data:image/png") and after.startswith("data:image/png") and after != before
    assert asks_nothing(page) and page.outside == []
