"Every ready app opens alive: its finished example is there before a click, nothing stands empty, and programs get the same courtesy."
import functools
import importlib
import re

import pytest
from gradio_client import Client

from hkust_demos.catalog import METHODS, ready_methods

PHONE = {"width": 390, "height": 844}
OPENING_MS = 60_000  # patience, not the promise: benchmarks/apps.py measures
FINISHED = """() => [...document.querySelectorAll('#finished img, #finished svg')].some(picture => {
    const box = picture.getBoundingClientRect();
    return box.width >= 100 && box.height >= 40 && (picture.tagName !== 'IMG' || (picture.complete && picture.naturalWidth > 0));
})"""
EMPTY = """() => [...document.querySelectorAll('[aria-label="Empty value"], .plot-container, .image-container, .js-plotly-plot, img')].filter(box => {
    const place = box.getBoundingClientRect();
    if (place.width < 2 || place.height < 2 || getComputedStyle(box).visibility === 'hidden') return false;
    if (box.matches('img')) return box.complete && box.naturalWidth === 0;
    if (box.matches('.js-plotly-plot')) return !box.querySelector('.plot, .gl-container, .heatmaplayer, .main-svg');
    return box.matches('[aria-label="Empty value"]');
}).map(box => box.closest('.block')?.innerText || box.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module", params=ready_methods())
def page(hub, watched, request):
    "A page that opened the app; nobody clicked. It is closed before the next one opens."
    page = watched(f"{hub.url}/{request.param}/")
    yield page
    page.close()


@pytest.fixture(scope="module")
def client(hub):
    "name -> a client of the app."
    return functools.cache(lambda name: Client(f"{hub.url}/{name}/", verbose=False))


def test_the_finished_example_is_there_before_any_click(page):
    page.wait_for_function(FINISHED, timeout=OPENING_MS)
    assert page.locator("#finished").count() == 1 and page.locator("#finished").is_visible()


def test_nothing_stands_empty_fails_leaves_the_machine_or_sticks_out_of_a_phone(page):
    page.wait_for_function(FINISHED, timeout=OPENING_MS)
    page.wait_for_timeout(2500)  # what follows the first picture has come
    assert page.evaluate(EMPTY) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.problems == [] and page.outside == []


@pytest.mark.parametrize("name", ready_methods())
def test_every_parameter_of_every_endpoint_has_a_name_and_a_default(client, name):
    endpoints = client(name).view_api(print_info=False, return_format="dict")["named_endpoints"]
    assert {"/live", "/run"} <= {*endpoints}
    parameters = [(endpoint, parameter) for endpoint, about in endpoints.items() for parameter in about["parameters"]]
    nameless = [endpoint for endpoint, parameter in parameters if re.fullmatch(r"param_\d+|args?_?\d*|x\d*", parameter["parameter_name"] or "param_0")]
    required = [(endpoint, parameter["parameter_name"]) for endpoint, parameter in parameters if not parameter["parameter_has_default"]]
    assert nameless == [] and required == []


@pytest.mark.parametrize("name", ready_methods())
def test_live_answers_without_an_argument_and_follows_each_knob(client, name):
    page, knobs = client(name), importlib.import_module(METHODS[name].app).LIVE_KNOBS
    first = page.predict(api_name="/live")
    assert first and knobs
    for knob, values in knobs.items():
        least, most = (page.predict(**{knob: value}, api_name="/live") for value in (values[0], values[-1]))
        assert str(least) != str(most), f"{knob} changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", ready_methods())
def test_run_answers_without_an_argument(client, name):
    assert client(name).predict(api_name="/run")
