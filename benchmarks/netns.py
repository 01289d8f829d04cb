"""Network namespaces on one machine, joined by links of a given rate (Linux, root, iproute2)."""

from __future__ import annotations

import os
import subprocess

# As little of the cores' time as can be: large segments, windows that hold all that is sent at
# once. Data and acknowledgements of both directions share a connection, so a window that waits for
# the latter would halve the rate.
MTU = 65535
WINDOW = 2**24
SETTINGS = {
    "net.ipv4.tcp_congestion_control": "reno",
    "net.ipv4.tcp_slow_start_after_idle": "0",
    "net.ipv4.tcp_rmem": f"4096 {WINDOW} {WINDOW}",
    "net.ipv4.tcp_wmem": f"4096 {WINDOW} {WINDOW}",
}


class Network:
    """`world` namespaces on one bridge. What leaves each is limited to `rate` bytes a second.

    Everything is removed when the block ends.
    """

    interface = "eth0"

    def __init__(self, world: int, rate: float):
        self.world, self.rate = world, rate
        self.name = f"tw{os.getpid() % 100000}"

    @property
    def address(self) -> str:
        """Where processes find each other."""
        return "tcp://10.77.0.1:29517"

    def inside(self, rank: int) -> list[str]:
        """What a command begins with that runs in a namespace."""
        return ["ip", "netns", "exec", f"{self.name}-{rank}"]

    def __enter__(self) -> Network:
        try:
            _run(f"ip link add {self.name} type bridge")
            _run(f"ip link set {self.name} up")
            for rank in range(self.world):
                space, port = f"{self.name}-{rank}", f"{self.name}p{rank}"
                _run(f"ip netns add {space}")
                _run(f"ip link add {port} type veth peer name {self.interface} netns {space}")
                _run(f"ip link set {port} mtu {MTU} master {self.name} up")
                _run(f"ip -n {space} addr add 10.77.0.{rank + 1}/24 dev {self.interface}")
                _run(f"ip -n {space} link set {self.interface} mtu {MTU} up")
                _run(f"ip -n {space} link set lo up")
                _run(f"tc -n {space} qdisc add dev {self.interface} root tbf "
                     f"rate {8 * self.rate:.0f}bit burst 128kb limit {WINDOW}")
                for name, value in SETTINGS.items():
                    subprocess.run([*self.inside(rank), "sysctl", "-qw", f"{name}={value}"],
                                   check=True)  # fmt: skip
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for rank in range(self.world):  # the port first: a namespace goes some time later
            _run(f"ip link del {self.name}p{rank}", check=False)
            _run(f"ip netns del {self.name}-{rank}", check=False)
        _run(f"ip link del {self.name}", check=False)


def _run(command: str, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, capture_output=not check)
