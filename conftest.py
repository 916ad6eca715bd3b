"""What every test and every notebook runs under: no model hub, one thread each, panels that sweep.

Here too is what a whole run says of itself: that a browser is missing, and which chapter's checks
took too long. It lies at the top because pytest's hooks reach only what is below them, and both
`tests/` and `notebooks/` are tested.
"""

import importlib.util
import os
import re
from pathlib import Path

import pytest

# Before anything imports torch, whose thread pools are sized once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
)

ROOT = Path(__file__).resolve().parent
BROWSER_TESTS = ROOT / "tests" / "browser"
NO_BROWSER = "none"
"""Value of EFFNB_BROWSER by which the first process tells the others that there is none."""
MISSING = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    """Let a notebook's kernel start with EFFNB_SWEEP=1: panels visit every position.

    Exercises test themselves there too. One execution of a chapter, nbval's, so serves all checks.
    """
    if item.path.suffix != ".ipynb":
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFNB_SWEEP", "1")
        return (yield)


# --- a browser, or a sentence ---------------------------------------------------------------------


def pytest_configure(config):
    """Look for a browser once, where a test needs one; the other processes inherit the answer."""
    if hasattr(config, "workerinput"):
        return
    config.pluginmanager.register(ChapterTimes(), "chapter times")
    if not _takes_browser_tests(config):
        return
    spec = importlib.util.spec_from_file_location("browser", ROOT / ".make" / "browser.py")
    browser = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(browser)
    found = browser.find()
    os.environ["EFFNB_BROWSER"] = found or NO_BROWSER
    if found is None:
        config.stash[MISSING] = browser.MISSING


def _takes_browser_tests(config):
    """Whether the paths given to pytest reach the browser tests."""
    given = (Path(config.invocation_params.dir, str(a).split("::")[0]) for a in config.args)
    reached = (
        BROWSER_TESTS.is_relative_to(path.resolve()) or path.resolve().is_relative_to(BROWSER_TESTS)
        for path in given
    )
    return BROWSER_TESTS.is_dir() and not config.option.collectonly and any(reached)


def pytest_report_header(config):
    """Say at the start what will be missing at the end."""
    return config.stash.get(MISSING, None)


def pytest_collection_modifyitems(config, items):
    """Leave out what needs a browser where there is none; the run fails for it once, at the end."""
    if os.environ.get("EFFNB_BROWSER") != NO_BROWSER:
        return
    left_out = [item for item in items if "browser" in getattr(item, "fixturenames", ())]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """A run that left tests out has not passed."""
    if MISSING in session.config.stash and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    """Say again what was missing, where it is read."""
    if MISSING in config.stash:
        terminalreporter.section("left out", red=True)
        terminalreporter.line(config.stash[MISSING])


# --- how long each chapter's checks take ----------------------------------------------------------

CHAPTER_SECONDS = 75
"""What the checks of one chapter may take on two idle cores: with 29 chapters, and everything else,
`make test` then takes 45 minutes."""
CHAPTER = re.compile(
    r"notebooks/(?P<path>.+)\.ipynb::|tests/notebooks/test_chapters\.py::Test_(?P<name>\w+)::"
)


class ChapterTimes:
    """Adds up what each chapter's checks took, wherever they ran; names those over their budget."""

    def __init__(self):
        self.seconds = {}
        self.loads = {}

    def pytest_runtest_logreport(self, report):
        """Count one phase of one test."""
        found = CHAPTER.match(report.nodeid)
        if not found:
            return
        chapter = (found["path"] or found["name"]).replace("/", "_")
        self.seconds[chapter] = self.seconds.get(chapter, 0) + report.duration
        self.loads.setdefault(chapter, []).append(load())

    def over(self):
        """The chapters over their budget, each with its seconds and what the load allowed it."""
        for chapter, seconds in sorted(self.seconds.items()):
            slack = max(1.0, sum(self.loads[chapter]) / len(self.loads[chapter]))
            if seconds > CHAPTER_SECONDS * slack:
                yield chapter, seconds, CHAPTER_SECONDS * slack

    def pytest_terminal_summary(self, terminalreporter):
        """Name the chapters whose checks took too long."""
        if not self.seconds:
            return
        terminalreporter.section("the chapters' checks")
        slowest = max(self.seconds, key=self.seconds.get)
        terminalreporter.line(f"slowest: {slowest}, {self.seconds[slowest]:.0f} s")
        for chapter, seconds, allowed in self.over():
            terminalreporter.line(
                f"OVER BUDGET: the checks of {chapter} took {seconds:.0f} s; {CHAPTER_SECONDS} s "
                f"are allowed on two idle cores, {allowed:.0f} s under this load.",
                red=True,
            )


def load():
    """Processes that want a core, for each core there is; 1 where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return 1.0
