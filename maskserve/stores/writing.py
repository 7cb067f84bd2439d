"""Objects that are written: whole or not at all, and over another one only where that was asked for. Imports no torch."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import suppress

from maskserve.errors import InputNotFoundError, OutputError, OutputExistsError
from maskserve.payload.files import Exists, failing
from maskserve.payload.writing import Encoded
from maskserve.stores.addresses import STORES, Address, parse
from maskserve.stores.calls import THREADS_OF_ALL, waited
from maskserve.stores.client import PIECE, client_of, part_bytes

SMALL = 16 << 20
"""Bytes up to which an object is sent in one request, from memory."""
MOST_AT_ONCE = 5 * 10**9
"""What a store takes in one request. Only such a one is refused by the store itself where another object stands."""
ABORT_S = 10.0
"""How long the end of an upload that is given up may take."""


class GivenUpError(BaseException):
    """Ends an upload whose writer has been stopped."""


def target(path: str) -> Address:
    """The address of an object that can be written."""
    found = parse(path)
    if found.scheme not in STORES:
        raise OutputError(
            f"{found} cannot be written: outputs go to files, or to {', '.join(STORES)} (s3://BUCKET/KEY)"
        )
    if found.is_folder:
        raise OutputError(f"{found} is a folder; give the object a name: {found}NAME.safetensors")
    if found.is_many:
        raise OutputError(f"{found} cannot be written: *, ? and [ make a pattern of a name; leave them out")
    return found


def is_there(path: str) -> bool:
    """Whether an object stands at an address."""
    address = target(path)
    try:
        waited(lambda: client_of(address).version(address))
    except InputNotFoundError:
        return False
    return True


def stands(path: str, exists: Exists) -> bool:
    """Whether an object stands at an address and is to be left there."""
    if exists == "replace" or not is_there(path):
        return False
    if exists == "error":
        raise taken(target(path))
    return True


def taken(address: Address) -> OutputExistsError:
    return OutputExistsError(f"{address} exists; say replace to overwrite it, or skip to keep it", parameter="exists")


def placed(path: str, make: Callable[[int, str], None], *, exists: Exists = "error") -> bool:
    """Whether what `make(fd, path)` writes into an empty file became the object at an address; the rules are those of files."""
    if stands(path, exists):
        return False
    with tempfile.TemporaryFile() as file:  # without a name: nothing of it is left, however this ends
        make(file.fileno(), f"/proc/self/fd/{file.fileno()}")
        n_bytes = os.fstat(file.fileno()).st_size
        if not n_bytes:
            return put(path, memoryview(b""), exists)
        with failing(f"{target(path)} cannot be written"):
            held = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ)
        view = memoryview(held)
        try:
            return put(path, view, exists)
        finally:
            with suppress(BufferError):  # an upload that is given up may still read it, and ends it then
                view.release()
                held.close()


def save(path: str, encoded: Encoded, *, exists: Exists = "error") -> bool:
    """Whether the payload became the object at an address."""
    if encoded.n_bytes > SMALL:
        return placed(path, lambda fd, _: write_all(fd, encoded), exists=exists)
    if stands(path, exists):
        return False
    return put(path, memoryview(b"".join(encoded.chunks)), exists)


def write_all(fd: int, encoded: Encoded) -> None:
    for chunk in encoded.chunks:
        view = chunk
        with failing("the temporary file of an upload cannot be written"):
            while view.nbytes:
                view = view[os.write(fd, view) :]


def sent(path: str, encoded: Encoded) -> str:
    """The sha256 of a payload that became the object at an address, over one that may stand there."""
    if encoded.n_bytes > SMALL:
        return sent_by(path, lambda fd: write_all(fd, encoded))
    data = b"".join(encoded.chunks)
    put(path, memoryview(data), "replace")
    return hashlib.sha256(data).hexdigest()


def sent_by(path: str, make: Callable[[int], object]) -> str:
    """The same of what `make` writes to a file in any order."""
    found = []

    def made(fd: int, _: str) -> None:
        make(fd)
        with open(fd, "rb", closefd=False) as file:
            file.seek(0)
            found.append(hashlib.file_digest(file, "sha256").hexdigest())

    placed(path, made, exists="replace")
    return found[0]


def sent_file(path: str, made: str) -> str:
    """The same of a file."""

    def copy(fd: int) -> None:
        with open(made, "rb") as file, open(fd, "wb", closefd=False) as into:
            shutil.copyfileobj(file, into, PIECE)

    return sent_by(path, copy)


def put(path: str, data: memoryview, exists: Exists) -> bool:
    """Whether the object was written: False where one stands that is to be left."""
    address = target(path)
    client = client_of(address)
    is_new = exists != "replace"
    if data.nbytes <= SMALL or (is_new and data.nbytes <= MOST_AT_ONCE):
        if waited(lambda: client.put(address, data, is_new=is_new)):
            return True
        if exists == "error":
            raise taken(address)
        return False
    if is_new and stands(path, exists):
        return False
    in_parts(address, data)
    return True


def in_parts(address: Address, data: memoryview) -> None:
    """Uploads an object in parts; whoever stops this thread waits ABORT_S for its upload to be given up.

    obstore asks for the next chunk once a part has been answered for, and hears only there that it is to end.
    """
    client, is_stopped = client_of(address), False

    def chunks() -> Iterator[memoryview]:
        step = part_bytes(data.nbytes)
        for start in range(0, data.nbytes, step):
            if is_stopped:
                raise GivenUpError
            yield data[start : start + step]

    upload = THREADS_OF_ALL.submit(lambda: client.put_parts(address, chunks(), data.nbytes))
    try:
        upload.result()
    except BaseException:
        is_stopped = True
        wait([upload], timeout=ABORT_S)
        raise
