"What the tests of the three federated apps share; no test itself."
import json
import time

from gradio_client import Client


def new_page(hub, name):
    "A page of an app, patient while the server imports."
    return Client(f"{hub.url}/{name}/", verbose=False, httpx_kwargs={"timeout": 120})


def chart(figure):
    "A plotly figure as it travels."
    return json.loads(figure["plot"])


def stop_in_round(page, job, words):
    "Wait until a run says these words, stop it, and return what the page says of it."
    begun = time.monotonic()
    while not any(words in output[0] for output in job.outputs()) and time.monotonic() - begun < 120:
        time.sleep(0.2)
    assert job.cancel()
    state, told = page.predict(api_name="/stop")
    assert state == "stopped" and "Stopped. **After" in told
    return told


def finished_page(watched, url):
    "An app's page after its finished run came; nothing stands empty."
    page = watched(url, width=1366, height=768)
    page.locator("#finished img").wait_for(timeout=60_000)
    page.wait_for_function("document.querySelector('#finished img').naturalWidth > 500", timeout=10_000)
    assert empty_boxes(page) == 0
    return page


def empty_boxes(page):
    "Plot or file boxes that stand empty."
    return page.locator(".empty:visible").count()


def ends_on_a_phone(page):
    "The page fits a phone, warns, and nothing went wrong on the way."
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390 and page.get_by_text("Not for diagnosis").count()
    page.close()
    assert page.problems == [] and page.outside == []
