"""A report that can be shown to strangers: without the user's name, the machine's, folders, or anything secret."""

from __future__ import annotations

import getpass
import os
import platform
import re
from pathlib import Path

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|AUTH", re.IGNORECASE)
# An address of the web, or a path of two folders at least: one alone (`/tmp`) names nobody.
_PLACE = re.compile(r"(?P<url>\b[a-z][a-z+]*://\S+)|(?P<path>(?:[A-Za-z]:)?(?:[/\\][\w.+@~\-]+){2,})")
_TELLING = frozenset({"bin", "lib", "lib64", "site-packages", "dist-packages"})
_SHORTEST = 3  # shorter values and names are found inside ordinary words


def issue(report: str) -> str:
    """The report as a block of Markdown to paste into an issue."""
    body = redacted(report).replace("```", "'''")
    return f"<details><summary>foldkernels doctor</summary>\n\n```text\n{body}\n```\n\n</details>"


def redacted(text: str) -> str:
    """The text without what names the user or the machine, and without what is secret.

    Of a path the last part stays, and a `site-packages` before it. Values of environment variables whose names speak of
    tokens, keys and passwords are taken out wherever they stand.
    """
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST:
            text = text.replace(value, "<secret>")
    text = text.replace(str(Path.home()) + os.sep, "~/")
    text = _PLACE.sub(_shortened, text)
    for name, instead in ((_user(), "<user>"), (platform.node(), "<host>"), (platform.node().split(".")[0], "<host>")):
        if len(name) >= _SHORTEST and name not in ("root", "localhost"):
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", instead, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):
        return ""


def _shortened(match: re.Match[str]) -> str:
    if match["url"]:
        return re.sub(r"//[^/@\s]*@", "//", match["url"])  # a password stands before the host
    parts = re.split(r"[/\\]", match["path"].rstrip("/\\"))
    return ".../" + "/".join(parts[-2:] if parts[-2] in _TELLING else parts[-1:])
