"""The one door for processes. It starts them with an argv list, a given environment and no shell; it does not interpret what they say."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence


async def start_service(argv: Sequence[str], *, control: socket.socket, env: Mapping[str, str]) -> asyncio.subprocess.Process:
    """Start a long-lived child whose standard input is the socket `control` (the only descriptor it inherits besides stderr).

    The child learns of its parent's death by the end of that stream. Raises OSError when the program cannot be started.
    """
    return await asyncio.create_subprocess_exec(
        *argv, stdin=control.fileno(), stdout=asyncio.subprocess.DEVNULL, stderr=None, env=dict(env), close_fds=True, start_new_session=True
    )
