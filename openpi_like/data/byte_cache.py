"""What was read or decompressed last, up to a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable


class ByteCache:
    """The values used last, each known by its owner and a key. May be used from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[tuple[int, Hashable], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, Hashable], read: Callable[[], bytes]) -> bytes:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        data = read()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = data
                self._bytes += len(data)
            while self._bytes > self._limit:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return data

    def forget(self, owner: int) -> None:
        with self._lock:
            for key in [k for k in self._kept if k[0] == owner]:
                self._bytes -= len(self._kept.pop(key))
