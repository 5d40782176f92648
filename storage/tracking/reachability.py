"""Whether a tracking server can be talked to, found out within seconds and without MLflow."""

import os
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from stillhouse.storage.tracking.database import sqlite_path

_TIMEOUT = 3.0  # seconds
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_GATEWAY = (502, 503, 504)  # something in front of the server answered for it


def why_unreachable(uri: str) -> str | None:
    """Return None when the server behind `uri` answers, else why not, in words."""
    if (database := sqlite_path(uri)) is not None:
        return _why_not_writable(database)
    scheme = _scheme(uri)
    if scheme in _PORTS:
        return _why_no_connection(uri, _PORTS[scheme])
    return _why_no_answer(uri)


def is_disconnection(error: BaseException) -> bool:
    """Say whether anything in the chain of causes is a connection that broke or timed out."""
    from requests import ConnectionError as NoConnection
    from requests import Timeout

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, NoConnection | Timeout | ConnectionError | TimeoutError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _scheme(uri: str) -> str:
    return uri.partition(":")[0].partition("+")[0].lower()  # postgresql+psycopg2: the driver


def _why_not_writable(database: Path) -> str | None:
    place = database
    while not place.exists():
        place = place.parent
    if os.access(place, os.W_OK) and (place == database or place.is_dir()):
        return None
    return f"{database} cannot be written: {place} is read-only or not a folder"


def _why_no_connection(uri: str, port: int) -> str | None:
    parts = urlsplit(uri)
    address = (parts.hostname or "localhost", parts.port or port)
    try:
        socket.create_connection(address, timeout=_TIMEOUT).close()
    except OSError as error:
        return f"no database answers at {address[0]}:{address[1]}: {error}"
    return None


def _why_no_answer(uri: str) -> str | None:
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]  # credentials are not for a health check
    url = urlunsplit((parts.scheme, host, parts.path.rstrip("/") + "/health", "", ""))
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"{url} answers {error.code}" if error.code in _GATEWAY else None
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
        return f"no server answers at {url}: {getattr(error, 'reason', error)}"
