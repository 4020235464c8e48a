"""Download images from allowed hosts: checks of the URL, of redirects, of the size and of the time.

Paper: none. A client chooses the URL. The rules keep it from reaching what only this machine can reach, and
an allowed host from holding up the server.
"""

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from functools import cache
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import httpcore2 as httpcore

from tinyllava import __version__
from tinyllava.errors import ConfigError, ImageError

_PORTS = {"http": 80, "https": 443}
_MAX_REDIRECTS = 3
_HOLDING_IPV4 = (IPv6Network("64:ff9b::/96"), IPv6Network("::/96"))
"""What a gateway (NAT64) sends to the IPv4 address in the last 32 bits, and the form before it (RFC 4291)."""
_SECONDS = 10.0  # for all images of a request: looking up hosts, connecting, redirects, headers and bodies
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": f"tinyllava/{__version__}"}


class ImageHosts:
    """Opens images at http and https addresses of known hosts.

    An address is refused if its host is not in the list, if it names another port, a user or a password, if
    the host's name leads to an address that is not public (this machine, a private network), or if a redirect
    leads to any of these. The answer has to be an image by its type, and not too large. Environment variables
    for proxies are not read. Time and bytes are limited for all images of a request together.

    Args:
        hosts: names, such as ``images.example.com`` (the ports 80 and 443) or ``images.example.com:8080``. A
            number in place of a name may be private: who lists it means it.
        max_bytes: of the images of one request.

    Raises:
        ConfigError: an entry is not a host.
    """

    def __init__(self, hosts: Sequence[str], max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._allowed = {place for host in hosts for place in _read_entry(host)}
        self._pool: Any = None
        if self._allowed:
            self._pool = httpcore.ConnectionPool(
                ssl_context=_trust(), network_backend=_PublicAddresses(), max_connections=20
            )

    def begin(self, hold: Callable[[int], None] = lambda _: None) -> "Downloads":
        """Return the downloads of a request.

        Args:
            hold: is told the number of bytes before they are kept, and may refuse them.
        """
        return Downloads(self, hold)

    def open(self, url: str, downloads: "Downloads") -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageError: the address is refused, or does not give an image in time.
        """
        name, address = url[:100], url
        for _ in range(_MAX_REDIRECTS + 1):
            self._check(address, name)
            try:
                data, location = self._get(address, name, downloads)
            except httpcore.TimeoutException as error:
                raise ImageError(
                    f"image_url {name!r}: took longer than the {_SECONDS:g} s that all images of a request "
                    "have. Send it as a data URL."
                ) from error
            except (httpcore.NetworkError, httpcore.ProtocolError) as error:
                why = str(error) or type(error).__name__
                raise ImageError(
                    f"image_url {name!r}: cannot be read ({why}). Send it as a data URL."
                ) from error
            if location is None:
                return data
            following = urljoin(address, location)
            if address.startswith("https:") and not following.startswith("https:"):
                raise ImageError(
                    f"image_url {name!r}: redirects from https to {following[:100]!r}. Give that address."
                )
            address = following
        raise ImageError(f"image_url {name!r}: more than {_MAX_REDIRECTS} redirects. Give the last address.")

    def _check(self, address: str, name: str) -> None:
        try:
            parts = urlsplit(address)
            host, port, has_user = _normal(parts.hostname or ""), parts.port, "@" in parts.netloc
        except ValueError as error:  # a port that is none, brackets without an address
            raise ImageError(f"image_url {name!r}: not a valid address ({error}).") from error
        place = (host, port or _PORTS.get(parts.scheme, 0))
        if parts.scheme in _PORTS and not has_user and place in self._allowed:
            return
        where = f" (redirects to {address[:100]!r})" if address[:100] != name else ""
        allowed = ", ".join(sorted({host for host, _ in self._allowed})) or "none"
        raise ImageError(
            f"image_url {name!r}{where}: this server never opens files, and downloads images only from "
            f"allowed hosts (http or https, standard ports, no user name): {allowed}. Send the image itself "
            "as a data URL, data:image/png;base64,iVBORw0..."
        )

    def _get(self, address: str, name: str, downloads: "Downloads") -> tuple[bytes, str | None]:
        """Return a body, or where it is to be found."""
        until = downloads.until
        # Points of time for ``_Timed``: as a number of seconds, each read of a byte would begin them anew.
        timeouts = {**dict.fromkeys(("connect", "read", "write"), until), "pool": _left(until)}
        with self._pool.stream(
            "GET", _ascii(urlsplit(address)), headers=_HEADERS, extensions={"timeout": timeouts}
        ) as got:
            headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in got.headers}
            if got.status in (301, 302, 303, 307, 308) and "location" in headers:
                return b"", headers["location"]
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            encoding = headers.get("content-encoding", "identity").strip().lower()
            if got.status != 200 or not kind.startswith("image/") or encoding != "identity":
                raise ImageError(
                    f"image_url {name!r}: the host answered {got.status} with {kind or 'no type'!r} "
                    f"({encoding}); an image is needed. Check the address."
                )
            data = bytearray()
            for piece in got.iter_stream():
                downloads.add(len(piece), name)
                data += piece
            return bytes(data), None


class Downloads:
    """The images that one request downloads, with the time and bytes that they have together.

    Args:
        hold: is told the number of bytes before they are kept, and may refuse them.
    """

    def __init__(self, hosts: ImageHosts, hold: Callable[[int], None]) -> None:
        self._hosts, self._hold = hosts, hold
        self.until = time.monotonic() + _SECONDS
        self._num_bytes = 0

    def open(self, url: str) -> bytes:
        """Return the bytes of an image; see ``ImageHosts.open`` for the errors."""
        return self._hosts.open(url, self)

    def add(self, num_bytes: int, name: str) -> None:
        """Count the bytes of a piece.

        Raises:
            ImageError: they are too many.
        """
        self._num_bytes += num_bytes
        if self._num_bytes > self._hosts.max_bytes:
            raise ImageError(
                f"image_url {name!r}: larger than {self._hosts.max_bytes:,} bytes, with the request's images "
                "before it. Scale the images down, or send fewer."
            )
        self._hold(num_bytes)


@cache
def _trust() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads a file of certificates for a third of a second


def _left(until: float | None) -> float:
    """Return the seconds until a point of time.

    Raises:
        ReadTimeout: it has passed.
    """
    assert until is not None
    if (seconds := until - time.monotonic()) <= 0:
        raise httpcore.ReadTimeout("no time is left")
    return seconds


class _Timed(httpcore.NetworkStream):
    """A connection whose time limits are points of time (of ``time.monotonic``), not seconds a call."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what has come, after waiting for something."""
        return self._stream.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send bytes."""
        self._stream.write(buffer, _left(timeout))

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> "_Timed":
        """Return the connection, encrypted; Python's handshake keeps to its time as a whole."""
        return _Timed(self._stream.start_tls(ssl_context, server_hostname, _left(timeout)))

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore wants to know of the socket."""
        return self._stream.get_extra_info(info)


class _PublicAddresses(httpcore.NetworkBackend):
    """Connects to the address that was checked: a name that is looked up twice may change in between."""

    def __init__(self) -> None:
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        """Connect to a host, if its address is public, or given as a number."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host}: no such host") from error
        addresses = [str(entry[4][0]) for entry in found]
        if not _is_number(host) and not all(map(_is_public, addresses)):
            raise httpcore.ConnectError(f"{host} resolves to an address that is not public")
        # The system's own limits end a look-up; what it took is taken from the time for the rest.
        options = {"local_address": local_address, "socket_options": socket_options}
        return _Timed(self._backend.connect_tcp(addresses[0], port, timeout=_left(timeout), **options))


def _is_public(address: str) -> bool:
    number: Any = ip_address(address.partition("%")[0])
    number = getattr(number, "ipv4_mapped", None) or getattr(number, "sixtofour", None) or number
    if any(number in network for network in _HOLDING_IPV4):
        number = IPv4Address(int(number) % 2**32)
    return bool(number.is_global and not number.is_multicast)


def _is_number(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _normal(host: str) -> str:
    return host.lower().rstrip(".")


def _ascii(parts: SplitResult) -> str:
    """Return an address as it goes over the wire: without fragment, and escaped."""
    host = (
        (parts.hostname or "").encode("idna").decode() if "[" not in parts.netloc else f"[{parts.hostname}]"
    )
    port = f":{parts.port}" if parts.port else ""
    query = f"?{quote(parts.query, safe='=&%+,:;/@!$~*()-._')}" if parts.query else ""
    return f"{parts.scheme}://{host}{port}{quote(parts.path or '/', safe='/%:@!$&+,;=~*()-._')}{query}"


def _read_entry(entry: str) -> list[tuple[str, int]]:
    try:
        parts = urlsplit(f"//{entry}")
        host, port = _normal(parts.hostname or ""), parts.port
    except ValueError:
        host, port = "", None
    if not host or parts.path or "@" in entry or "*" in host:
        raise ConfigError(
            f"--allow-image-hosts {entry!r}: expected a host, such as images.example.com or "
            "images.example.com:8080, without http:// and without a path."
        )
    return [(host, port)] if port else [(host, 80), (host, 443)]
