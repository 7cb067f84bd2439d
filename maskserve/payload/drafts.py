"""Files on their way to their place: without a name until they are whole, where the file system has such files.

A process that is killed then leaves nothing behind. Imports no torch.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES})
NAMELESS = -1


def create(path: str) -> int:
    """A new file, open for writing."""
    # 0o666 lets the kernel apply the umask: reading it would mean setting it, for every thread
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def nameless(folder: str) -> int:
    """A new file of the folder's file system that no folder has, open; NAMELESS, which is none, where there cannot be one."""
    with suppress(OSError):  # why not is told by create
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
        if os.path.exists(by_descriptor(fd)):  # or nothing can give it a name: /proc is not everywhere
            return fd
        os.close(fd)
    return NAMELESS


def by_descriptor(fd: int) -> str:
    """A path of an open file of this process, whether it has a name or none."""
    return f"/proc/self/fd/{fd}"


class Draft:
    """An empty file, open as `fd`; `temp` is its name where it has one, or for the moment in which it replaces another file.

    `needs_name`: who writes it opens it by its `path`, and may put another file there.
    """

    def __init__(self, temp: str, *, needs_name: bool = False) -> None:
        self._temp = temp
        self.fd = NAMELESS if needs_name else nameless(os.path.dirname(temp))
        self._is_nameless = self.fd != NAMELESS
        if not self._is_nameless:
            self.fd = create(temp)

    @property
    def path(self) -> str:
        return by_descriptor(self.fd) if self._is_nameless else self._temp

    def replace(self, target: str) -> None:
        """Puts the file at `target`, in one step."""
        os.replace(self._named(), target)

    def link(self, target: str) -> bool:
        """Whether `target` now is the file; False if one stood there already. rename(2) would overwrite what came meanwhile."""
        try:
            self._link(target)
        except FileExistsError:
            return False
        except OSError as cause:
            if cause.errno not in _NO_LINKS:
                raise
            return self._claim(target)
        return True

    def close(self) -> None:
        """Nothing is left of it but what was put in its place."""
        os.close(self.fd)
        if not self._is_nameless:
            with suppress(OSError):  # mostly gone by now; and what went wrong before is what the caller must hear
                os.unlink(self._temp)

    def _link(self, path: str) -> None:
        # with a descriptor Python calls linkat, which follows the link that /proc has of a nameless file
        os.link(self.path, path, src_dir_fd=self.fd)

    def _named(self) -> str:
        if self._is_nameless:
            try:
                self._link(self._temp)
            except OSError as cause:
                if cause.errno not in _NO_LINKS:
                    raise
                self._copy()
            self._is_nameless = False
        return self._temp

    def _copy(self) -> None:
        """The same file again, with a name, where nothing can give it one."""
        fd, done = create(self._temp), 0
        self._is_nameless = False
        original, self.fd = self.fd, fd
        try:
            while n := os.sendfile(fd, original, done, 1 << 30):
                done += n
            os.fsync(fd)
        finally:
            os.close(original)

    def _claim(self, target: str) -> bool:
        """As link, where the file system has no hard links: an empty file of ours holds the place for a moment."""
        temp = self._named()
        try:
            os.close(create(target))
        except FileExistsError:
            return False
        try:
            os.replace(temp, target)
        except OSError:
            os.unlink(target)
            raise
        return True
