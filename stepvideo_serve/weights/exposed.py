"""Files of a server that somebody else could change while the server reads them.

What is compared with a hash is read once where that costs little; an engine of many gigabytes is mapped, and weights of
the backend eager stay mapped as long as the server runs. So nobody but the owner should be able to write them. Rights
are read from modes and owners; access lists, and other ways to a file than its mount here, are not seen.
"""

import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path


def exposed(paths: Iterable[Path]) -> list[str]:
    """A sentence for each file or folder among `paths` in which somebody besides root and this process's user may write
    something, or rename it; none for what is on a read-only mount, or is not there."""
    return [sentence for path in paths if path.exists() and (sentence := _sentence(path)) is not None]


def _sentence(path: Path) -> str | None:
    path = path.resolve()
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return None
    found = [(entry, who) for entry in _parts(path) if (who := _writer(entry)) is not None]
    if not found:
        return None
    first, who = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"{_shown(path)} must be writable for the server's user alone, {who} may write {_shown(first)}{more}, and so "
        "change what the server runs: mount the folder read-only, or take the right away (chmod -R go-w, chown)"
    )


def _shown(path: Path) -> str:
    """Also where this Python's file system encoding is ASCII."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _parts(path: Path) -> Iterator[Path]:
    """What leads to the path, and all in it."""
    yield from reversed(path.parents)
    yield path
    for folder, folders, files in os.walk(path):
        yield from (Path(folder, name) for name in (*folders, *files))


def _writer(path: Path) -> str | None:
    """Who besides root and this process's user may write the file, or exchange what is in the folder."""
    try:
        found = path.stat()
    except OSError:  # gone meanwhile, or a link to nothing
        return None
    if found.st_uid not in (0, os.geteuid()):
        return f"the user {found.st_uid}"
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:  # others may add to the folder, not exchange
        return None
    if found.st_mode & stat.S_IWOTH:
        return "everybody"
    if found.st_mode & stat.S_IWGRP and not _is_alone_in(found.st_gid):
        return f"the group {found.st_gid}"
    return None


def _is_alone_in(group: int) -> bool:
    """Whether a group has no member but root and this process's user, as the one that many systems make for each."""
    if group == 0:
        return True
    try:
        members = {pwd.getpwnam(name).pw_uid for name in grp.getgrgid(group).gr_mem}
    except KeyError:
        return False
    members |= {user.pw_uid for user in pwd.getpwall() if user.pw_gid == group}
    return members <= {0, os.geteuid()}
