"""Atomic file writes: a file is whole, or as it was before, whenever the process stops."""

import contextlib
import errno
import os
import secrets


def write_whole(path, data, fsync=False):
    """Write the bytes to `.<name>.<unique>.part` beside `path`, then rename it: `path` is never half written.

    fsync: bytes and name are on the disk itself when this returns, and survive a power failure.
    Two processes (or threads) that write the same file do not meet: the last to finish wins, as a whole.
    On any exception, KeyboardInterrupt included, the part file is removed and `path` is as it was. Raises OSError.
    """
    # The pid alone is not unique: containers that share a folder may all have the same.
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
        if fsync:
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to see
            part.unlink(missing_ok=True)


def sync_folder(folder):
    """Flush the names in a folder to the disk, if the system can: Windows and some network disks cannot."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
