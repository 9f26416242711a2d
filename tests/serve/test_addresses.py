"""Addresses that pictures are fetched from, and ways to spell the others."""

from __future__ import annotations

import ipaddress

import pytest

from llava_sp_jax.serve import addresses

PUBLIC = ("8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8")
OTHERS = {
  "loopback": "127.0.0.1",
  "all of loopback": "127.255.0.3",
  "loopback, IPv6": "::1",
  "unspecified": "0.0.0.0",
  "unspecified, IPv6": "::",
  "private, 10": "10.1.2.3",
  "private, 172": "172.16.0.1",
  "private, 192": "192.168.1.1",
  "unique local": "fd00::1",
  "the metadata of clouds": "169.254.169.254",
  "link-local, IPv6": "fe80::1",
  "link-local with a zone": "fe80::1%eth0",
  "public with a zone": "2606:4700::1111%eth0",
  "site-local": "fec0::1",
  "shared by providers": "100.64.0.1",
  "multicast": "224.0.0.1",
  "multicast of everyone": "ff0e::1",
  "broadcast": "255.255.255.255",
  "reserved": "240.0.0.1",
  "documentation": "192.0.2.1",
  "IPv4-mapped loopback": "::ffff:127.0.0.1",
  "IPv4-mapped metadata": "::ffff:a9fe:a9fe",
  "IPv4-compatible loopback": "::127.0.0.1",
  "NAT64 of loopback": "64:ff9b::7f00:1",
  "IPv4-mapped loopback with a zone": "::ffff:127.0.0.1%1",
  "local NAT64 of private": "64:ff9b:1::a00:1",
  "6to4 of private": "2002:a00:1::",
  "Teredo of loopback": "2001:0:7f00:1:0:0:f5ff:fffe",
}


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses(text: str) -> None:
  assert addresses.is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS.keys())
def test_other_addresses(text: str) -> None:
  assert not addresses.is_public(ipaddress.ip_address(text))


def test_names_are_no_addresses() -> None:
  for name in ("example.com", "a1.example", "localhost", "0x.example", "1.2.3.4.example"):
    assert addresses.literal(name) is None
  assert str(addresses.literal("8.8.8.8")) == "8.8.8.8"


@pytest.mark.parametrize(
  "host",
  ["0177.0.0.1", "127.1", "2130706433", "0x7f.0.0.1", "0x7f000001", "017700000001", "127.0.0.1.",
   "1.2.3.4.5", "0x", "256.0.0.1", "", ".", "127.0.0.08", "[::1]", "a:b"],
)  # fmt: skip
def test_hosts_that_some_resolvers_read_as_addresses(host: str) -> None:
  with pytest.raises(ValueError, match="no plain address and no name"):
    addresses.literal(host)
