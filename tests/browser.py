"""Headless Chromium for whatever has to be seen in a page. Every test file has the fixtures, through conftest.py:

    def test_title(page, served):           # served: a fixture of the test file, made with `serve(folder)`
        page.goto(f"{served}/index.html")
        assert page.title() == "bgrpo_nb"
        assert not page.faults              # errors of the console, of scripts, of requests; requests to other hosts
"""
import os
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium():
    "Path of a Chromium: `$CHROMIUM`, or the first on PATH; None where there is none"
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")  # not "session": while it is open, no other test of this thread can start an event loop
def browser():
    "A Chromium for the tests of one file, or a skip that says what is missing"
    path = find_chromium()
    if not path: pytest.skip("no Chromium: install it (Debian: chromium), or name its executable in $CHROMIUM")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-quic"]
        chromium = playwright.chromium.launch(executable_path=path, args=options)
        yield chromium
        chromium.close()


@contextmanager
def open_page(browser, allow_hosts=("127.0.0.1", "localhost"), **options):
    "A page in a context of its own; `page.faults` collects its errors, and requests to other hosts are refused"
    context = browser.new_context(**{"viewport": DESKTOP, **options})
    page = context.new_page()
    page.set_default_timeout(900_000)
    page.faults = []

    def decide(route):
        if urlsplit(route.request.url).hostname in allow_hosts: return route.continue_()
        page.faults.append(f"request to another host: {route.request.url}")
        route.abort()

    context.route(lambda url: url.startswith(("http:", "https:")), decide)
    def of_console(message):
        if message.type == "error": page.faults.append(f"console: {message.text}")

    def of_response(response):
        if response.status >= 400: page.faults.append(f"{response.status}: {response.url}")

    page.on("console", of_console)
    page.on("pageerror", lambda error: page.faults.append(f"script: {error}"))
    page.on("response", of_response)
    try: yield page
    finally: context.close()


@pytest.fixture
def page(browser):
    "A fresh page, as wide as a desktop's"
    with open_page(browser) as page: yield page


@pytest.fixture
def phone(browser):
    "A fresh page, as wide as a phone's"
    with open_page(browser, viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2) as page: yield page


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@contextmanager
def serve(folder):
    "The address, http://127.0.0.1:PORT, at which a folder's files are served for as long as the block lasts"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
