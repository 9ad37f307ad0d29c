"The hub in a real browser: nothing fails, nothing leaves the machine, everything fits."
import json
import time
import urllib.error
import urllib.request

import pytest
from gradio_client import Client
from gradio_client.utils import Status

from hkust_demos.catalog import METHODS

SIZES = {"laptop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def tab(watched):
    "One page for all tests."
    page = watched()
    yield page
    page.close()


@pytest.fixture()
def page(tab):
    "The page, empty and with nothing remembered."
    tab.goto("about:blank")
    tab.set_viewport_size(SIZES["laptop"])
    tab.problems.clear(), tab.outside.clear()
    return tab


def get(url):
    "(status, text) of an address."
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_health(hub):
    status, text = get(f"{hub.url}/health")
    assert status == 200 and "eora" in json.loads(text)["ready"]


def test_memory_after_the_start(hub):
    assert hub.memory_at_start < 1.2e9


NOTEBOOKS = {f"/{method.notebook.removeprefix('nbs/').removesuffix('.ipynb')}": method for method in METHODS.values() if method.ready}


@pytest.mark.parametrize("address", ["/", *(f"/notebooks{place}" for place in NOTEBOOKS)])
def test_pages_open_without_error_or_outside_request(hub, page, address):
    "Front page and notebooks; the apps are opened by test_apps_alive."
    words = NOTEBOOKS[address.removeprefix("/notebooks")].title if address != "/" else "EoRA"
    page.goto(f"{hub.url}{address}")
    page.get_by_text(words.removeprefix("Memristor ")).first.wait_for()
    page.wait_for_timeout(500)
    assert page.problems == [] and page.outside == []
    for size in SIZES:
        page.set_viewport_size(SIZES[size])
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"]


def test_cards_and_what_one_tells_was_measured(hub, page):
    page.goto(hub.url)
    assert page.locator("article").count() == len(METHODS)
    for name, method in METHODS.items():
        links = page.locator(f"#{name} a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
        assert (f"{name}/" in links) == method.ready and method.url in links

    card = page.locator("#d2ue")
    assert not card.get_by_text("Where it does not hold").is_visible()
    card.get_by_text("What was measured here").click()
    assert card.get_by_text("Where it does not hold").is_visible() and "AUROC" in card.inner_text()


def test_keyboard_reaches_the_first_app_and_a_person_presses_its_button(hub, page):
    page.goto(hub.url)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "eora/"
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Compress and repair").wait_for()
    page.get_by_label("Model").fill("what is this?")
    page.get_by_role("button", name="Compress and repair").click()
    page.get_by_text("neither a folder").first.wait_for(timeout=60_000)
    assert page.outside == []


@pytest.mark.parametrize("address", ["/notebooks/../settings.ini", "/notebooks/%2e%2e/settings", "/notebooks//etc/passwd", "/gallery/..%2f..%2fcli.png",
                                     "/gallery/nothing.png", "/docs"])
def test_nothing_else_is_served(hub, address):
    assert get(f"{hub.url}{address}")[0] == 404


def test_a_second_visitor_waits_and_sees_the_place(hub):
    pages = [Client(f"{hub.url}/memristor/", verbose=False) for _ in range(2)]
    running = pages[0].submit(90, 2, api_name="/lottery")
    while running.status().code not in (Status.PROCESSING, Status.PROGRESS):
        assert not running.done()
    waiting, ranks = pages[1].submit(90, 2, api_name="/lottery"), []
    while not running.done():
        ranks.append(waiting.status().rank)
        time.sleep(0.05)
    assert running.result(timeout=300) == waiting.result(timeout=300)  # the same chips
    assert 0 in ranks
