"""The one place that speaks HTTP: every transfer has a deadline for the whole of it and a limit in bytes, whatever the server does."""

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx

from catlib.errors import CatlibError

CONNECT_S = 10.0
REPLY_BYTES = 4_000_000  # an answer in JSON is far shorter
LONGEST_PAUSE_S = 30.0
T = TypeVar("T")


class TransferError(CatlibError):
    """No whole reply: no connection, too slow, too long, or broken off. Another try may succeed."""


@dataclass(frozen=True)
class Reply:
    """A whole reply. `body` is empty where it went to a sink."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the server did what it was asked for; a redirection is never followed, and is no success."""
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", errors="replace")

    @property
    def retry_after(self) -> float:
        """Seconds that the server asks to wait, at most LONGEST_PAUSE_S; 0 for anything but a plain whole number."""
        asked = self.headers.get("retry-after", "")
        return min(float(asked), LONGEST_PAUSE_S) if re.fullmatch(r"[0-9]{1,9}", asked) else 0.0


class Client:
    """Transfers by a thread of its own, so that they work where an event loop runs already; may be used from several threads.

    Neither proxies nor credentials are taken from the environment. Headers given here go to no other server, since redirections
    are not followed.
    """

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="transfers", daemon=True)
        self._thread.start()
        self._http = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **(headers or {})},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            timeout=httpx.Timeout(None, connect=CONNECT_S),  # the deadline is the time-out
            follow_redirects=False,
            trust_env=False,
        )

    def send(
        self,
        method: str,
        url: str,
        *,
        within_s: float,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        most: int = REPLY_BYTES,
        sink: Callable[[Reply], Callable[[bytes], Any]] | None = None,
    ) -> Reply:
        """The reply to a request with `body` as JSON, all of it within `within_s` seconds and at most `most` bytes long.

        `sink`: told status and headers of a success, gives what is called with each block, which is then not kept. Raises
        TransferError, and httpx.InvalidURL for what is no URL.
        """

        async def transfer() -> Reply:
            blocks: list[bytes] = []
            count = 0
            async with (
                asyncio.timeout(within_s),
                self._http.stream(method, url, json=body, headers=headers) as response,
            ):
                told = Reply(response.status_code, response.headers, b"")
                write = sink(told) if sink and told.ok else blocks.append
                async for block in response.aiter_raw():
                    count += len(block)
                    if count > most:
                        raise TransferError(f"the reply is longer than {most:,} bytes")
                    write(block)
            return replace(told, body=b"".join(blocks))

        try:
            return self._run(transfer())
        except TimeoutError:
            raise TransferError(f"no whole reply within {within_s:g} s") from None
        except httpx.TransportError as error:
            raise TransferError(f"{type(error).__name__}: {error}".rstrip(": ")) from None

    def close(self) -> None:
        """Close the connections and end the thread; a second time nothing is done. A process ends without it, too."""
        if not self._loop.is_closed():
            self._run(self._http.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # at Ctrl-C what is on the wire is given up
            raise

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
