"""The network interface that an address of this machine belongs to, for libraries that want its name."""

from __future__ import annotations

import fcntl
import socket
import struct

SIOCGIFADDR = 0x8915
NAME_BYTES = 256


def sockets_of(address: str) -> dict[str, str]:
    """Environment variables that make gloo and NCCL listen at this IPv4 address of ours: left to themselves they take
    what this machine's name resolves to, which is often loopback. Empty where no interface has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            asked = struct.pack(f"{NAME_BYTES}s", name.encode())
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, asked)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}
