"""Meters of a network on this machine: bytes at a relay, memory of processes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import defaultdict
from pathlib import Path

from fedmezo_jax.deploy.local_network import free_port, split_address

KINDS = {
    "guard.py": "guard",
    "experiments.deploy worker": "worker",
    "flower-supernode": "supernode",
    "flower-superexec": "superexec",
    "flower-superlink": "superlink",
    "flwr-serverapp": "server",
    "installed.py": "clientapp",
    "flwr-clientapp": "clientapp",
}
"""By a part of its command line what a process is; the first that fits."""


class Relay:
    """Passes on TCP connections to a server on this machine, and counts their bytes.

    Attributes:
        address: HOST:PORT where it listens.
        up: bytes that went to the server.
        down: bytes that came from there.
    """

    def __init__(self, target: str):
        """Listens from now on to the end of the process."""
        self.address, self._target = f"127.0.0.1:{free_port()}", target
        self.up = self.down = 0
        listening = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve(listening)), daemon=True).start()
        listening.wait()

    async def _serve(self, listening: threading.Event) -> None:
        server = await asyncio.start_server(self._connect, *split_address(self.address))
        listening.set()
        await server.serve_forever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection(*split_address(self._target))
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pump(reader, to_server, "up"), self._pump(from_server, writer, "down"))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counter: str) -> None:
        try:
            while content := await reader.read(65536):
                setattr(self, counter, getattr(self, counter) + len(content))
                writer.write(content)
                await writer.drain()
        except OSError:
            pass  # one of the ends was killed
        finally:
            writer.close()


def memory_of_children() -> tuple[dict[str, float], float]:
    """Memory of all processes that this one has started, and those have.

    Returns:
        Resident MiB of a process of each kind, the mean; and MiB of all together, shared pages counted once.
    """
    parents, resident, total = {}, defaultdict(list), 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended meanwhile
    for pid in parents:
        if not _descends(pid, parents):
            continue
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        size = {row.split(":")[0]: int(row.split()[1]) / 1024 for row in rows}
        kind = next((name for part, name in KINDS.items() if part in command), None)
        if kind and "Rss" in size:
            resident[kind].append(size["Rss"])
            total += size["Pss"]
    return {kind: sum(sizes) / len(sizes) for kind, sizes in resident.items()}, total


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid := parents.get(pid, 0):
        if pid == os.getpid():
            return True
    return False
