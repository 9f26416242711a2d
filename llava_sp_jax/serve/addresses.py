"""Decides which network addresses a picture may be fetched from: public ones alone."""

from __future__ import annotations

import ipaddress
import re

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NUMERIC = re.compile(r"(\d+|0x[0-9a-f]*)\.?", re.IGNORECASE)


def literal(host: str) -> Address | None:
  """Returns the address that a host of a URL spells, or None for a name.

  Raises: ValueError for a host that is neither, but that some resolvers read as an address, such as
    `0177.0.0.1`, `0x7f.1` or `2130706433`.
  """
  try:
    return ipaddress.ip_address(host)
  except ValueError:
    last = host.removesuffix(".").rpartition(".")[2]
    if not last or ":" in host or _NUMERIC.fullmatch(last):
      raise ValueError(f"{host!r} is no plain address and no name") from None
    return None


def is_public(address: Address) -> bool:
  """Returns whether an address belongs to the public internet, and so does any that it embeds.

  Loopback, private, link-local, shared, multicast, reserved and unspecified addresses do not; an
  IPv6 address that maps or tunnels an IPv4 address is as public as that one. Those that a router
  translates to IPv4 (NAT64) are reserved.
  """
  if isinstance(address, ipaddress.IPv6Address):
    if address.ipv4_mapped is not None:
      return is_public(address.ipv4_mapped)
    embedded = [address.sixtofour, *(address.teredo or ())]
    if address.is_site_local or address.scope_id or not all(is_public(a) for a in embedded if a):
      return False
  return address.is_global and not (
    address.is_multicast or address.is_reserved or address.is_unspecified
  )
