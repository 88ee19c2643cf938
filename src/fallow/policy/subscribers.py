"""Whom a bound on strangers belongs to.

Whoever has one address of IPv6 usually has 2^64 of them, so that a bound per address would bound nobody there.

Pure.
"""

import ipaddress


def subscriber_of(host: str) -> str:
    """Whose connection it is: an IPv4 address, or the first 64 bits of an IPv6 address as hex; other text as it is."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return address.compressed
    return address.ipv4_mapped.compressed if address.ipv4_mapped else address.packed[:8].hex()
