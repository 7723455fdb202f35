"""Ports that nobody listens on."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)
"""Below those that Linux gives to whoever asks for any: a server binds its port when it
has started, up to a minute after it was chosen."""


def free_ports(count: int) -> list[int]:
    """Different ports; engines that start together might choose the same one."""
    # Not of the seeded generator: two test processes would choose alike.
    choice = random.SystemRandom()
    found: set[int] = set()
    while len(found) < count:
        port = choice.choice(PORTS)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.add(port)
    return list(found)
