"""Download, check and unpack the official archive of a data set."""

import os
import shutil
import socket
import tarfile
from pathlib import Path

from torchvision.datasets.utils import download_url

from core.errors import UserError
from core.files import locked

TIMEOUT = 30  # seconds without a byte


def fetch(folder: Path, url: str, md5: str, download: bool) -> None:
    """Download the archive at `url` and unpack `folder` from it, unless that exists.

    download   whether the user allows it
    UserError with the commands to do it by hand if it fails; nothing is left behind then.
    """
    by_hand = f"fetch {url} yourself and run: tar -xzf FILE -C {folder.parent}"
    if folder.is_dir():
        return
    if not download:
        raise UserError(f"--data-root: no folder {folder}; add --download, or {by_hand}")
    with locked(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():  # made by another process in the meantime
            return
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        try:
            _download(partial, url, md5)
            os.rename(partial / folder.name, folder)
        except OSError as error:
            raise UserError(f"--download: {error}; try again, or {by_hand}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _download(folder: Path, url: str, md5: str) -> None:
    """Unpack the archive into `folder`; OSError if it can't be fetched or has another MD5."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none and would wait forever
    try:
        download_url(url, folder, "archive", md5)
        with tarfile.open(folder / "archive") as archive:
            archive.extractall(folder, filter="data")
    except Exception as error:  # urllib, torchvision and tarfile raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{url}: {reason}") from error
    finally:
        socket.setdefaulttimeout(before)
