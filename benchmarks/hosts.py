"""Hosts of a benchmark of networks: network namespaces on one machine, on a switch of limited links.

Each host is a namespace with one interface, ``eth0``; the switch is a bridge in a namespace of its own, so that the
machine's own network has neither a new interface nor a new address. Both ends of a link are shaped by ``tc tbf``, which
limits what a host sends and what it is sent, as a full-duplex link does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading

PREFIX = "genfast-bench-"
"""Of the namespaces' names; the process that made them follows."""


class Unavailable(RuntimeError):
    """There can be no such hosts here; the message says why."""


def check() -> None:
    """Unavailable, unless this process may make namespaces and has the tools."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"needs {' and '.join(missing)} (Debian: apt-get install iproute2)")
    if os.geteuid() != 0:
        raise Unavailable("makes network namespaces, for which it must be run as root")


class Hosts:
    """``count`` hosts while the ``with`` block runs; whatever ends it, they and what runs on them are gone after it.

    Args:
        count: hosts, from 1 to 200.
        rate: of every link and direction, as ``tc`` reads it (``"1gbit"``).
    """

    def __init__(self, count: int, rate: str):
        self.rate = rate
        name = f"{PREFIX}{os.getpid()}-"
        self.switch, self.names = f"{name}switch", [f"{name}{k}" for k in range(count)]
        self.addresses = [f"10.213.77.{k + 1}" for k in range(count)]
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        check()
        _remove_orphans()
        self._before = {s: signal.signal(s, _stop) for s in _SIGNALS} if _in_main_thread() else {}
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for s in self._before:
            signal.signal(s, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it
        for process in self._started:
            process.kill()
        for process in self._started:
            process.wait()
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def start(self, host: int, command: list[str], **options) -> subprocess.Popen:
        """A command on one of the hosts; ``options`` are Popen's."""
        process = subprocess.Popen(["ip", "netns", "exec", self.names[host], *command], **options)
        self._started.append(process)
        return process

    def _make(self) -> None:
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        for k, (name, address) in enumerate(zip(self.names, self.addresses)):
            _ip("netns", "add", name)
            port = f"port{k}"
            _ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            for where, device in ((name, "eth0"), (self.switch, port)):
                # The burst is what leaves at once, at full speed, after a pause: little, compared with any bucket.
                shape = ["tbf", "rate", self.rate, "burst", "128kb", "latency", "20ms"]
                _call(["tc", "-n", where, "qdisc", "add", "dev", device, "root", *shape])


_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def _stop(number, frame) -> None:
    raise SystemExit(128 + number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _remove_orphans() -> None:
    """What a process that was killed (SIGKILL) has left."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in (line.split()[0] for line in listed.splitlines() if line.startswith(PREFIX)):
        maker = name.removeprefix(PREFIX).split("-")[0]
        if maker.isdigit() and not os.path.exists(f"/proc/{maker}"):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*arguments: str) -> None:
    _call(["ip", *arguments])


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Unavailable(f"`{' '.join(command)}` fails here: {said[-1]}")
