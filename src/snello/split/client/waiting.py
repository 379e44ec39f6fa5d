"""Running coroutines from code that is not asynchronous, on one event loop for the whole process.

gRPC keeps one queue of events for all event loops of a process, and does not survive it when one of them is closed. So
there is one for clients, never closed, which runs in whatever thread is waiting: a thread of its own would cost a tenth
of a 2 MB round trip.
"""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from typing import Any, TypeVar

T = TypeVar("T")
_TAKE_OVER_SECONDS = 0.01

_driving, _making = threading.Lock(), threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine; may be called from any thread, also from inside somebody else's event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _wait_for(coroutine)
    with ThreadPoolExecutor(1) as aside:  # as in a notebook
        return aside.submit(_wait_for, coroutine).result()


def _wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """Of the threads that wait, one drives the loop; when it has what it wants, another takes over."""
    global _loop
    with _making:
        loop = _loop = _loop or asyncio.new_event_loop()
    if _driving.acquire(blocking=False):
        try:
            return loop.run_until_complete(coroutine)
        finally:
            _driving.release()
    future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, loop)
    while True:
        try:
            return future.result(timeout=_TAKE_OVER_SECONDS)
        except TimeoutError:
            if future.done():
                return future.result()
        if _driving.acquire(blocking=False):
            try:
                loop.run_until_complete(asyncio.wait([asyncio.wrap_future(future, loop=loop)]))
            finally:
                _driving.release()
