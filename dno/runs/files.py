"""Files that are whole or not there at all, whatever stops the process."""

import contextlib
import errno
import os


def write(path, data, fsync=False):
    """Write the bytes in place; with fsync they are on the disk itself when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        if fsync:
            file.flush()
            os.fsync(file.fileno())


def write_whole(path, data, fsync=False):
    """Write the bytes aside, to `.<name>.part`, and rename: `path` has all of them, or what it had before."""
    aside = path.with_name(f".{path.name}.part")
    try:
        write(aside, data, fsync)
        os.replace(aside, path)
        if fsync:
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the error of the writing is the one to see
            aside.unlink(missing_ok=True)


def sync_folder(folder):
    """Bring the names in a folder to the disk itself, where the system can: Windows and some network disks cannot."""
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
