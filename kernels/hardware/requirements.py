"""Requirements as pip writes them: `trifast>=0.1.13`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement


@functools.lru_cache(maxsize=256)
def parse(requirement: str) -> Requirement:
    """Read a requirement.

    Raises:
        ValueError: It cannot be read.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(requirement)
    except InvalidRequirement as error:
        raise ValueError(f"{requirement!r} is no requirement: {error}") from error


def check_version(requirement: str, versions: Iterable[tuple[str, str]]) -> str | None:
    """Say why versions do not meet a requirement, or None. Every claim must: two copies may be on the path.

    Args:
        requirement: As for `usable`.
        versions: Pairs of the place where a version was read and the version.
    """
    from packaging.version import InvalidVersion, Version

    specifier = parse(requirement).specifier
    if not specifier:
        return None
    wrong: dict[str, str] = {}  # by version, since both places usually say the same
    right: dict[str, str] = {}
    for place, text in versions:
        try:
            met = specifier.contains(Version(text), prereleases=True)
        except InvalidVersion:
            met = False
        (right if met else wrong).setdefault(text, f"{place} is {text}")
    if wrong:
        sentence = " and ".join(wrong.values()) + "".join(f", though {claim}" for claim in right.values())
        return f"{requirement}: {sentence}"
    return None if right else f"{requirement}: can be imported, but does not tell its version"
