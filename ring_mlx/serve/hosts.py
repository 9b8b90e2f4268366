"""The names by which a server may be addressed, so that a web page cannot reach it by a name of its own.

A page may load its own name, change what that name resolves to, and so ask a server on this machine as if it were its
own (DNS rebinding). The browser still sends the page's name as ``Host``. An IP address cannot be made to point elsewhere.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from ring_mlx.errors import OptionError

AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.%-]+)?)\]|([A-Za-z0-9._-]+))(?::([0-9]{0,5}))?")
ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#@]+)")
ANY = "*"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Hosts:
    """Which ``Host`` and ``Origin`` headers are accepted.

    Args:
        bound: Where the server listens. A wildcard such as ``0.0.0.0`` admits every IP address, but no further name.
        allowed: Further names; ``*`` admits all.
        origins: Pages of other places, as browsers name them (``https://ui.example.com``); ``*`` admits all.

    Raises:
        OptionError: If one of them is more than a name, and so would never match, or no origin.
    """

    def __init__(self, bound: str, allowed: Iterable[str] = (), origins: Iterable[str] = ()) -> None:
        self._origins = frozenset(map(_origin, origins))
        address = _name(bound or "::")
        self._any_address = not isinstance(address, str) and address.is_unspecified
        self._all = ANY in allowed
        self._names = {"localhost", address, *map(_plain, allowed)}

    def grants(self, origin: str | None) -> bool:
        """Whether pages of this ``Origin`` may also read answers."""
        return origin is not None and (ANY in self._origins or origin.lower() in self._origins)

    def allows(self, authority: str) -> bool:
        """Whether ``name``, ``name:port``, ``address:port`` or ``[address]:port`` is this server; any port will do."""
        if self._all:
            return True
        match = AUTHORITY.fullmatch(authority)
        if match is None or int(match[3] or 0) > 65535:
            return False
        name = _name(match[1] or match[2])
        if name in self._names:
            return True
        return not isinstance(name, str) and (name.is_loopback or self._any_address)

    def allows_origin(self, origin: str) -> bool:
        """Whether a page of this ``Origin`` is served by this machine or an allowed name, or is allowed itself."""
        match = ORIGIN.fullmatch(origin)
        return self._all or self.grants(origin) or (match is not None and self.allows(match[1]))


def _plain(name: str) -> str | Address:
    match = AUTHORITY.fullmatch(name)
    if isinstance(_name(name), str) and name != ANY and (match is None or match[3] is not None):
        raise OptionError(
            f"allowed host {name!r} is not a plain name; give names without https://, port or part of a name in *."
        )
    return _name(match[1] or match[2] if match else name)


def _origin(text: str) -> str:
    if text not in (ANY, "null") and not ORIGIN.fullmatch(text):
        raise OptionError(
            f"allowed origin {text!r} is not an origin; give one as browsers do: https://ui.example.com, or *."
        )
    return text.lower()


def _name(text: str) -> str | Address:
    """An address without zone, or a name as it is compared: in small letters, without the dot at its end."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return text.lower().removesuffix(".")
    return getattr(address, "ipv4_mapped", None) or address
