"What every test shares: nothing leaves the machine, a hub that runs once, a browser where there is one."
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

for name, value in {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False",
                    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

import psutil  # noqa: E402  (the environment above comes before anything that reads it)
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                     "--disable-component-update", "--disable-sync"]
HUB_START_S = 120  # patience, not the promise


@pytest.fixture(scope="session")
def root():
    "The repository."
    return ROOT


def free_port():
    "A port that nobody listens on."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def no_browser(reason):
    "Skip, or fail where a browser is required."
    if os.environ.get("HKUST_REQUIRE_BROWSER") == "1":
        pytest.fail(f"HKUST_REQUIRE_BROWSER=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser():
    "A headless Chromium (playwright); tests open pages of their own and close them."
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        no_browser(f"no browser found ({', '.join(BROWSERS)}); `make test` installs one where apt-get can")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        no_browser("playwright is not installed (make install)")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=BROWSER_ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def watched(browser):
    "Opens a page that notes its errors (`problems`) and the requests that leave the machine (`outside`); whoever opens it closes it."
    local = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")

    def open_page(url=None, *, width=1280, height=900, spare=None):  # a console error with the word `spare` does not count
        page = browser.new_page(viewport={"width": width, "height": height})
        page.problems, page.outside = [], []
        page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" and not (spare and spare in message.text) else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(local) else page.outside.append(request.url))
        if url:
            page.goto(url)
        return page

    return open_page


class Hub:
    "A running `hkust-demos demo`."

    def __init__(self, process, url, log, started_s):
        self.process, self.url, self.log_path, self.started_s = process, url, log, started_s
        self.memory_at_start = self.memory()

    def memory(self):
        "Resident bytes of the server and its children."
        process = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])

    @property
    def log(self):
        "What the server has printed so far."
        return self.log_path.read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    "The hub in a process of its own, prepared and started as `make demo` does it, polled until /health answers."
    command = [sys.executable, "-c", "import sys; from hkust_demos.cli import main; sys.exit(main())"]
    subprocess.run([*command, "prepare"], check=True, stdout=subprocess.DEVNULL)
    port, log = free_port(), tmp_path_factory.mktemp("hub") / "hub.log"
    url, begun = f"http://127.0.0.1:{port}", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen([*command, "demo", "--port", str(port)],
                                   stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        break
            except (urllib.error.URLError, OSError):
                pass
            waited = time.monotonic() - begun
            if process.poll() is not None or waited > HUB_START_S:
                pytest.fail(f"the hub did not answer on {url}/health after {waited:.0f} s:\n{log.read_text()[-3000:]}", pytrace=False)
            time.sleep(0.2)
        started_s = time.monotonic() - begun
        time.sleep(5)  # the libraries that the server imports after it answers belong to its start
        yield Hub(process, url, log, started_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Costs:
    "CPU seconds of every test file, for the time budget: this process, the children it waited for and those that still run."

    def __init__(self):
        self.by_file, self.current, self.mark = {}, None, self.now()

    @staticmethod
    def now():
        "CPU seconds so far, this process and all below it."
        waited = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = time.process_time() + waited.ru_utime + waited.ru_stime
        for child in psutil.Process().children(recursive=True):
            try:
                total += sum(child.cpu_times()[:4])  # its own, and those of children that it waited for
            except psutil.Error:  # it ended meanwhile
                continue
        return total

    def turn_to(self, name):
        "From here on the costs belong to another name; what ran until now belongs to the last one."
        if name == self.current:
            return
        now = self.now()
        if self.current is not None:
            self.by_file[self.current] = self.by_file.get(self.current, 0.0) + max(0.0, now - self.mark)
        self.current, self.mark = name, now

    def write(self, path):
        "The costs of the files that ran, beside those of files that ran earlier."
        self.turn_to(None)
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**earlier, **{name: round(cost, 2) for name, cost in self.by_file.items()}}, indent=1), encoding="utf-8")

    def pytest_collection(self, session):
        self.turn_to("imports of all test files")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self.turn_to(item.nodeid.split("::")[0])
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        "What a whole session shares (the hub's start, the browser's) has a row of its own."
        if fixturedef.scope != "session":
            return (yield)
        before = self.current
        self.turn_to("the shared hub and browser")
        try:
            return (yield)
        finally:
            self.turn_to(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item, nextitem):
        if nextitem is None:  # the hub and the browser end now, and what they had cost until here is to be known before
            self.turn_to("the shared hub and browser")
        return (yield)

    def pytest_sessionfinish(self, session):
        self.write(ROOT / "build" / "budget" / "tests.json")


def pytest_configure(config):
    config.pluginmanager.register(Costs())  # as a plugin: a conftest below the root is not asked about fixtures of the session
