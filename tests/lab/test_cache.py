"""The cache of computed folders: damage, full disks, haste and sudden death cannot spoil it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from effnb.lab import _cache
from effnb.lab._cache import CacheUnwritable, cached_folder, is_whole

CONTENT = {"weights": b"w" * 100_000, "about.json": b'{"layers": 2}'}


def write(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFNB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def holds(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in CONTENT}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_filled_once(cache):
    calls = []
    for _ in range(3):
        folder = cached_folder("tiny", lambda folder: (calls.append(folder), write(folder)))
        assert folder == cache / "tiny"
        assert holds(folder) == CONTENT
    assert len(calls) == 1
    assert calls[0] != folder, "it was filled under another name"
    assert {path.name for path in cache.iterdir()} == {"tiny", "tiny.lock"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: flip(f / "weights"),
        lambda f: flip(f / "about.json"),
        lambda f: (f / "weights").write_bytes(b""),
        lambda f: (f / "weights").unlink(),
        lambda f: (f / _cache.SUMS).unlink(),
        lambda f: (f / _cache.SUMS).write_text("{}"),
        lambda f: (f / _cache.SUMS).write_text("[1, 2"),
        lambda f: (f / _cache.SUMS).write_text('{"weights": 3}'),
    ],
    ids=["one bit", "small file", "empty", "gone", "no sums", "empty sums", "cut", "odd sums"],
)
def test_a_damaged_folder_is_filled_anew(cache, spoil):
    folder = cached_folder("tiny", write)
    spoil(folder)
    assert not is_whole(folder)
    assert cached_folder("tiny", write) == folder
    assert is_whole(folder)
    assert holds(folder) == CONTENT
    assert {path.name for path in cache.iterdir()} == {"tiny", "tiny.lock"}


def test_a_failure_leaves_nothing(cache):
    def fail(folder):
        (folder / "weights").write_bytes(b"half")
        raise KeyError("something else went wrong")

    with pytest.raises(KeyError, match="something else"):
        cached_folder("tiny", fail)
    assert [path.name for path in cache.iterdir()] == ["tiny.lock"]
    assert holds(cached_folder("tiny", write)) == CONTENT


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_no_room_is_one_sentence(cache, number):
    def fail(folder):
        (folder / "weights").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(CacheUnwritable) as caught:
        cached_folder("tiny", fail)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("or set the variable EFFNB_CACHE to a folder on another disk.")
    assert os.strerror(number) in message
    assert str(cache) in message
    assert [path.name for path in cache.iterdir()] == ["tiny.lock"]


def test_a_cache_that_is_a_file_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFNB_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheUnwritable, match="EFFNB_CACHE"):
        cached_folder("tiny", write)


WORKER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from effnb.lab._cache import cached_folder

    log, start = (Path(p) for p in sys.argv[1:])
    held = start.with_name("held")
    def write(folder):
        (folder / "weights").write_bytes(b"w" * 50_000)
        with log.open("a") as lines:
            lines.write(f"{os.getpid()}\\n")
        time.sleep(1)
        while held.exists():
            time.sleep(0.01)
        (folder / "weights").write_bytes(b"w" * 100_000)
        (folder / "about.json").write_bytes(b'{"layers": 2}')
    print("ready", flush=True)
    while not start.exists():
        time.sleep(0.001)
    print(cached_folder("tiny", write))
    """
)


def start_worker(cache: Path, log: Path, start: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(log), str(start)],
        env=os.environ | {"EFFNB_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("before", ["nothing", "a damaged folder", "what a killed process left"])
def test_four_processes_at_once(cache, tmp_path, before):
    """All are let loose on the cache together: one fills it, all get the whole folder."""
    if before == "a damaged folder":
        flip(cached_folder("tiny", write) / "weights")
    elif before == "what a killed process left":
        write_to = cache / ".tiny-abandoned" / "new"
        write_to.mkdir(parents=True)
        write(write_to)
    log, start = tmp_path / "log", tmp_path / "start"
    workers = [start_worker(cache, log, start) for _ in range(4)]
    for process in workers:
        assert process.stdout.readline() == "ready\n"
    start.touch()
    results = [process.communicate(timeout=240) for process in workers]
    assert [process.returncode for process in workers] == [0] * 4, results
    assert [out for out, _ in results] == [f"{cache / 'tiny'}\n"] * 4
    assert len(log.read_text().splitlines()) == 1, "the others waited for the first"
    assert holds(cache / "tiny") == CONTENT
    assert {path.name for path in cache.iterdir()} == {"tiny", "tiny.lock"}


def test_a_process_killed_in_the_middle(cache, tmp_path):
    """Its half of a folder is never taken for the whole, holds no one up, and is cleared away."""
    log, start = tmp_path / "log", tmp_path / "start"
    start.touch()
    (tmp_path / "held").touch()
    process = start_worker(cache, log, start)
    deadline = time.monotonic() + 240
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=240)
    assert any(path.name.startswith(".tiny-") for path in cache.iterdir()), "killed too late"
    assert not (cache / "tiny").exists()
    assert holds(cached_folder("tiny", write)) == CONTENT
    assert {path.name for path in cache.iterdir()} == {"tiny", "tiny.lock"}


def test_a_lock_that_is_never_given_back(cache, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(_cache, "WAIT_SECONDS", 0.1)
    cache.mkdir()
    with (
        FileLock(cache / "tiny.lock"),
        pytest.raises(CacheUnwritable, match=r"another process has held tiny\.lock"),
    ):
        cached_folder("tiny", write)


def test_a_cache_that_cannot_be_written_still_serves(cache):
    """A teacher's shared cache: the lock cannot be taken, and need not be."""
    folder = cached_folder("tiny", write)
    (cache / "tiny.lock").unlink()
    (cache / "tiny.lock").mkdir()  # no process can open it as a file
    assert cached_folder("tiny", write) == folder
    flip(folder / "weights")
    with pytest.raises(CacheUnwritable):
        cached_folder("tiny", write)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "~/.cache/effnb"),
        ("linux", {"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/effnb"),
        ("darwin", {"XDG_CACHE_HOME": "/elsewhere"}, "~/Library/Caches/effnb"),
        ("win32", {}, "~/AppData/Local/effnb"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/effnb"),
        ("linux", {"EFFNB_CACHE": "~/mine"}, "~/mine"),
    ],
)
def test_the_cache_lies_where_the_platform_keeps_such(monkeypatch, platform, variables, expected):
    for name in ("EFFNB_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert _cache.cache_folder() == Path(expected).expanduser()
