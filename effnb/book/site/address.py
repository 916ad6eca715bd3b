"""Where the repository and the published site are: one setting, from which all ways out follow.

The address of the repository is given (`python -m effnb.book.site --repository URL`, or the
variable `EFFNB_REPOSITORY`), or asked from git. Without one, a page offers its downloads alone.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

VARIABLE = "EFFNB_REPOSITORY"
SITE_VARIABLE = "EFFNB_SITE_ADDRESS"


@dataclass(frozen=True)
class Home:
    """The repository on the web.

    Attributes:
        address: Its page, such as `https://github.com/owner/name`; nothing when unknown.
        branch: The branch that links lead to.
        site: Where the site is published, with a slash at its end; nothing when unknown.
    """

    address: str = ""
    branch: str = "main"
    site: str = ""

    def buttons(self, path: str) -> list[tuple[str, str]]:
        """Words and address of each way from a chapter to its repository.

        Args:
            path: The chapter below `notebooks/`, without an ending.
        """
        if not self.address:
            return []
        source, built = quote(f"notebooks/{path}.py"), quote(f"notebooks/{path}.ipynb")
        slug = re.fullmatch(r"https://github\.com/([^/]+/[^/]+)", self.address)
        if slug:
            colab = f"https://colab.research.google.com/github/{slug[1]}/blob"
            return [
                ("Open in Colab", f"{colab}/{self.branch}/{built}"),
                ("Source", f"{self.address}/blob/{self.branch}/{source}"),
                ("Edit", f"{self.address}/edit/{self.branch}/{source}"),
            ]
        if "gitlab" in self.address:
            return [
                ("Source", f"{self.address}/-/blob/{self.branch}/{source}"),
                ("Edit", f"{self.address}/-/edit/{self.branch}/{source}"),
            ]
        return [("Source", self.address)]


def web_address(remote: str) -> str:
    """The web page of a git remote; nothing when it has none, such as a folder."""
    remote = remote.strip().removesuffix("/").removesuffix(".git")
    found = re.fullmatch(r"(?:ssh://)?git@([\w.-]+)[:/](?:\d+/)?(.+/.+)", remote)
    if found:
        return f"https://{found[1]}/{found[2]}"
    found = re.fullmatch(r"https?://(?:[^@/]+@)?([\w.:-]+/.+)", remote)
    return f"https://{found[1]}" if found else ""


def home(folder: Path, given: str | None = None) -> Home:
    """The repository's home on the web.

    Args:
        folder: A checkout of it.
        given: Its address; the variable, or git's `origin`, is asked when None.

    Raises:
        ValueError: When an address is given that is no web address and no remote of git.
    """
    given = os.environ.get(VARIABLE) if given is None else given
    address = web_address(
        given if given is not None else _git(folder, "remote", "get-url", "origin")
    )
    if given and not address:
        raise ValueError(
            f"{given!r} is no repository's address: give one such as https://host/owner/name."
        )
    head = _git(folder, "symbolic-ref", "--short", "refs/remotes/origin/HEAD")
    site = os.environ.get(SITE_VARIABLE, "")
    pages = re.fullmatch(r"https://github\.com/([^/]+)/([^/]+)", address)
    if not site and pages:
        site = f"https://{pages[1].lower()}.github.io/{pages[2]}/"
    return Home(address, head.rpartition("/")[2] or "main", f"{site.rstrip('/')}/" if site else "")


def _git(folder: Path, *words: str) -> str:
    """What git answers; nothing when there is no git, or it does not know."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if not done.returncode else ""
