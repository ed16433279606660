"""Files that a crash leaves whole: the old one or the new one, never half of either."""

import contextlib
import os
import tempfile
from collections.abc import Iterable


def replace_file(
    path: str | os.PathLike[str], parts: Iterable[bytes], mode: int, owner: tuple[int, int] | None = None
) -> None:
    """Write beside ``path``, sync, rename, sync the directory: after a crash the old or the new file is there."""
    directory = os.path.dirname(path) or "."
    fd, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=directory)
    try:
        with open(fd, "wb") as file:
            file.writelines(parts)
            status = os.fstat(fd)
            if owner is not None and owner != (status.st_uid, status.st_gid):
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(directory)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Make what was just renamed or removed in ``directory`` last."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
