"The hub behind another server, below an address that is kept or cut off: every link arrives, every app is asked at the right place."
import http.client
import re
import sys
import threading
import types
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urljoin, urlparse

import gradio as gr
import httpx
import pytest
import uvicorn
from gradio_client import Client

from conftest import free_port
from hkust_demos.apps import common, hub
from hkust_demos.catalog import METHODS

PREFIX = "/user/ann/proxy/7860"


def tiny_app(method):
    "A page with the head of a method and one endpoint."
    with gr.Blocks() as blocks:
        common.header(method)
        words, answer, picture = gr.Textbox("a"), gr.Textbox(), gr.File()
        gr.Button("Run").click(lambda text: (text[::-1], __file__), words, [answer, picture], api_name="run")
    return blocks


class Front(BaseHTTPRequestHandler):
    "A server in front: passes on what is below the prefix, with or without it."
    protocol_version, target, keeps = "HTTP/1.0", 0, False

    def do_GET(self):
        if not self.path.startswith(PREFIX):
            self.send_error(404)
            return
        path = self.path if self.keeps else self.path.removeprefix(PREFIX)
        upstream = http.client.HTTPConnection("127.0.0.1", self.target, timeout=60)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upstream.request(self.command, path or "/", body, {**self.headers, "Connection": "close"})
        answer = upstream.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        while piece := answer.read1(65536):
            self.wfile.write(piece)
            self.wfile.flush()

    do_POST = do_HEAD = do_GET

    def log_message(self, *args):
        "Nothing to the terminal."


@pytest.fixture(scope="module", params=["cut", "kept"])
def front(request):
    "The address of a hub with one small app, behind a server that cuts the prefix off or keeps it."
    patch = pytest.MonkeyPatch()
    method = replace(METHODS["eora"], app="tiny_app_for_the_prefix")
    module = types.ModuleType(method.app)
    module.build = lambda: tiny_app(method)
    patch.setitem(sys.modules, method.app, module)
    patch.setattr(hub, "METHODS", {"eora": method})
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(hub.build_hub(PREFIX), host="127.0.0.1", port=port, log_level="error"))
    running = threading.Thread(target=server.run, daemon=True)
    running.start()
    while not server.started:
        assert running.is_alive()
    handler = type("Handler", (Front,), {"target": port, "keeps": request.param == "kept"})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}{PREFIX}/"
    proxy.shutdown()
    proxy.server_close()
    server.should_exit = True
    running.join(20)
    patch.undo()


def test_every_link_arrives(front):
    index = httpx.get(front)
    assert index.status_code == 200 and httpx.get(front[:-1], follow_redirects=True).text == index.text
    links = [link for link in re.findall(r'(?:href|src)="([^"]+)"', index.text) if not link.startswith(("https:", "data:"))]
    assert len(links) >= 3
    for link in links:
        assert httpx.get(urljoin(front, link)).status_code == 200, link
    notebook = httpx.get(urljoin(front, "notebooks/llm/10_eora"))
    nav = re.findall(r'href="([^"]+)"', notebook.text[notebook.text.index("<nav>"):notebook.text.index("</nav>")])
    assert [urljoin(str(notebook.url), link) for link in nav] == [front, f"{front}eora/"]


def test_an_address_without_its_last_slash_is_sent_on_below_the_prefix(front):
    answer = httpx.get(f"{front}eora", follow_redirects=True)
    assert answer.status_code == 200 and urlparse(str(answer.url)).path == f"{PREFIX}/eora/"


def test_the_app_is_asked_at_the_right_place(front):
    client = Client(f"{front}eora/", verbose=False)
    assert urlparse(client.config["root"]).path == f"{PREFIX}/eora"
    answer, file = client.predict("abc", api_name="/run")
    assert answer == "cba" and open(file).read() == open(__file__).read()


def test_a_person_presses_the_button(front, browser):
    page, asked = browser.new_page(), []
    page.on("response", lambda answer: asked.append((answer.status, answer.url)))
    page.goto(f"{front}eora/")
    page.get_by_role("button", name="Run").click()
    page.get_by_text("test_hub_prefix").first.wait_for(timeout=30_000)
    page.get_by_role("link", name="all methods").click()
    page.get_by_text("Open the app").wait_for()
    page.close()
    assert [url for status, url in asked if status >= 400] == [] and all(PREFIX in url for _, url in asked if url.startswith("http"))
