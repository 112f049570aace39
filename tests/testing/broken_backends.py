"""Backends in memory that break one rule each."""

from __future__ import annotations

import threading
import time
import weakref
from collections import ChainMap
from typing import ClassVar

from lmcache.backends.memory import MemoryBackend
from lmcache.core.backend import Capabilities, StorageBackend
from lmcache.core.errors import BackendClosed, BackendError

MIB = 1 << 20

BROKEN: dict[type[StorageBackend], set[str]] = {}
"""Backends that break a rule each, and that rule; all rules of sharing, if they do not share."""


def breaks(*rules: str):
    def note(cls: type[StorageBackend]) -> type[StorageBackend]:
        BROKEN[cls] = set(rules)
        return cls

    return note


@breaks("test_what_is_put_is_got")
class SpoilsLargeObjects(MemoryBackend):
    def get_into(self, key, out):
        size = super().get_into(key, out)
        if size == 5 << 20:
            out[-1] ^= 1
        return size


@breaks("test_what_is_put_is_got")
class SaysTrueForALength(MemoryBackend):
    def get_into(self, key, out):
        size = super().get_into(key, out)
        return True if size == 4096 else size


@breaks("test_what_is_put_is_got")
class DoesNotSayThatItStored(MemoryBackend):
    def put(self, key, data):
        return super().put(key, data) if data.nbytes != 4096 else None


@breaks("test_an_empty_object_is_an_object_or_refused")
class LosesEmptyObjects(MemoryBackend):
    def put(self, key, data):
        return super().put(key, data) if data.nbytes else True


@breaks("test_a_large_object_is_stored_or_leaves_what_was_there")
class CutsLargeObjects(MemoryBackend):
    def put(self, key, data):
        return super().put(key, data.cast("B")[: 32 * MIB] if data.nbytes else data)


@breaks("test_a_large_object_is_stored_or_leaves_what_was_there")
class KeepsWhatItRefuses(MemoryBackend):
    def put(self, key, data):
        return super().put(key, data) and data.nbytes <= 32 * MIB


@breaks("test_a_large_object_is_stored_or_leaves_what_was_there")
class MakesRoomInVain(MemoryBackend):
    def put(self, key, data):
        if data.nbytes > 32 * MIB:
            self.remove(key)
            return False
        return super().put(key, data)


@breaks("test_a_miss_leaves_the_buffer_alone")
class ScribblesOnAMiss(MemoryBackend):
    def get_into(self, key, out):
        if not self.contains(key):
            out[0] = 0
        return super().get_into(key, out)


@breaks("test_an_object_larger_than_the_buffer_is_a_miss")
class FillsWhatFits(MemoryBackend):
    def get_into(self, key, out):
        room = memoryview(bytearray(8 << 20))
        size = super().get_into(key, room)
        if size is None or size <= out.nbytes:
            return super().get_into(key, out)
        out[:] = room[: len(out)]
        return len(out)


@breaks("test_an_object_larger_than_the_buffer_is_a_miss")
class FillsWhatFitsOfAMiss(FillsWhatFits):
    def get_into(self, key, out):
        size = super().get_into(key, out)
        return None if size == 4999 else size


@breaks("test_a_larger_buffer_is_filled_at_its_front_only")
class ClearsTheRest(MemoryBackend):
    def get_into(self, key, out):
        size = super().get_into(key, out)
        if size and size >= 5000:
            out[size:] = bytes(len(out) - size)
        return size


@breaks("test_a_larger_buffer_is_filled_at_its_front_only")
class SaysHowLargeTheBufferIs(MemoryBackend):
    def get_into(self, key, out):
        size = super().get_into(key, out)
        return out.nbytes if size == 5000 else size


@breaks("test_put_copies")
class KeepsTheBuffer(MemoryBackend):
    def put(self, key, data):
        if stored := super().put(key, data):
            self._objects[key] = data.cast("B")
        return stored


@breaks("test_a_view_of_any_format_is_its_bytes")
class CountsItems(MemoryBackend):
    def put(self, key, data):
        return super().put(key, memoryview(data.tobytes()[: len(data)]))


@breaks("test_a_view_of_any_format_is_its_bytes")
class NeedsAWritableBuffer(MemoryBackend):
    def put(self, key, data):
        if data.nbytes == 64 and data.readonly:
            raise TypeError("a writable buffer is needed")
        return super().put(key, data)


@breaks("test_a_view_of_any_format_is_its_bytes")
class NeedsABufferOfBytes(MemoryBackend):
    def get_into(self, key, out):
        if out.format != "B":
            raise TypeError("a buffer of bytes is needed")
        return super().get_into(key, out)


@breaks("test_a_view_of_a_part_is_that_part")
class ReadsFromWhereTheBufferBegins(MemoryBackend):
    def put(self, key, data):
        return super().put(key, memoryview(data.obj).cast("B")[: data.nbytes])


@breaks("test_a_view_of_a_part_is_that_part")
class WritesToWhereTheBufferBegins(MemoryBackend):
    def get_into(self, key, out):
        return super().get_into(key, memoryview(out.obj).cast("B")[: out.nbytes])


@breaks("test_putting_again_changes_nothing")
class RefusesWhatItHas(MemoryBackend):
    def put(self, key, data):
        return not self.contains(key) and super().put(key, data)


@breaks("test_putting_again_changes_nothing")
class Appends(MemoryBackend):
    def put(self, key, data):
        if data.nbytes == 5000:
            data = memoryview(self._objects.get(key, b"") + bytes(data))
        return super().put(key, data)


@breaks("test_an_object_of_another_length_leaves_nothing_of_the_old_one")
class LeavesTheEndOfTheOld(MemoryBackend):
    def put(self, key, data):
        old = self._held().get(key, b"")
        if (len(old), data.nbytes) == (7000, 3000):
            data = memoryview(bytes(data) + old[3000:])
        return super().put(key, data)


@breaks("test_putting_again_shows_neither_a_mixture_nor_a_gap")
class LeavesAGap(MemoryBackend):
    def put(self, key, data):
        self.remove(key)
        time.sleep(0.001)
        return super().put(key, data)


@breaks("test_putting_again_shows_neither_a_mixture_nor_a_gap")
class WritesInPlace(MemoryBackend):
    def put(self, key, data):
        half = data.nbytes // 2
        if data.nbytes == 1 << 20 and self.contains(key):
            super().put(key, memoryview(bytes(data[:half]) + self._objects[key][half:]))
            time.sleep(0.001)
        return super().put(key, data)


@breaks("test_an_object_appears_whole")
class AppearsInPieces(MemoryBackend):
    def __init__(self):
        super().__init__()
        self._known = set()

    def put(self, key, data):
        if data.nbytes == MIB and key not in self._known:
            self._known.add(key)
            super().put(key, memoryview(bytes(data[: MIB // 2]) + b"\xff" * (MIB // 2)))
            time.sleep(0.001)
        return super().put(key, data)


class Common(MemoryBackend):
    """Sound: one memory for all of this process."""

    capabilities = Capabilities(persistent=True, shared=True)
    everything: ClassVar[dict[bytes, bytes]] = {}

    def __init__(self):
        super().__init__()
        self._objects = self.everything


@breaks("test_an_object_appears_whole_to_others_if_shared")
class LocksOutOnlyItsOwnReaders(Common):
    everything: ClassVar[dict[bytes, bytes]] = {}

    def __init__(self):
        super().__init__()
        self._mine = threading.RLock()

    def put(self, key, data):
        with self._mine:
            if data.nbytes == MIB:
                super().put(key, memoryview(bytes(data[: MIB // 2]) + b"\xff" * (MIB // 2)))
                time.sleep(0.001)
            return super().put(key, data)

    def get_into(self, key, out):
        with self._mine:
            return super().get_into(key, out)


@breaks("test_an_object_vanishes_whole")
class ErasesBeforeItRemoves(MemoryBackend):
    def remove(self, key):
        if len(old := self._held().get(key, b"")) == MIB:
            super().put(key, memoryview(old[: MIB // 2] + b"\xff" * (MIB // 2)))
            time.sleep(0.001)
        return super().remove(key)


@breaks("test_keys_that_differ_in_one_bit_do_not_meet")
class DropsABit(MemoryBackend):
    def put(self, key, data):
        return super().put(key[:-1] + bytes([key[-1] & 0xFE]), data)

    def get_into(self, key, out):
        return super().get_into(key[:-1] + bytes([key[-1] & 0xFE]), out)

    def contains(self, key):
        return super().contains(key[:-1] + bytes([key[-1] & 0xFE]))

    def remove(self, key):
        return super().remove(key[:-1] + bytes([key[-1] & 0xFE]))


@breaks("test_any_bytes_make_a_key")
class CutsKeysAtZeros(MemoryBackend):
    def put(self, key, data):
        return super().put(key.partition(bytes(4))[0], data)

    def get_into(self, key, out):
        return super().get_into(key.partition(bytes(4))[0], out)

    def contains(self, key):
        return super().contains(key.partition(bytes(4))[0])


class CountsRight(MemoryBackend):
    def count_leading(self, keys):
        present = [MemoryBackend.contains(self, key) for key in keys]
        return (*present, False).index(False)


@breaks("test_contains_what_was_put_and_nothing_else")
class ContainsEverything(CountsRight):
    def contains(self, key):
        return super().contains(key) or True


@breaks("test_contains_what_was_put_and_nothing_else")
class ContainsNothing(CountsRight):
    def contains(self, key):
        return super().contains(key) and False


@breaks("test_count_leading_stops_at_the_first_gap")
class CountsBeyondTheGap(MemoryBackend):
    def count_leading(self, keys):
        return sum(map(self.contains, keys))


@breaks("test_count_leading_of_no_keys_is_zero")
class NeedsAKeyToCount(CountsRight):
    def count_leading(self, keys):
        return super().count_leading(keys) if keys[0] else 0


@breaks("test_count_leading_takes_many_keys")
class CountsAThousandAtMost(CountsRight):
    def count_leading(self, keys):
        if len(keys) > 1000:
            raise BackendError("too many variables")
        return super().count_leading(keys)


@breaks("test_remove_if_promised", "test_what_was_damaged_is_gone")
class RemovesNothing(MemoryBackend):
    def remove(self, key):
        return self.contains(key)


@breaks("test_remove_if_promised", "test_what_was_damaged_is_gone")
class SaysItRemovedWhatWasNotThere(MemoryBackend):
    def remove(self, key):
        return super().remove(key) or True


@breaks("test_remove_if_promised")
class RemovesWithoutAPromise(MemoryBackend):
    capabilities = Capabilities(removal=False)


@breaks("test_what_was_damaged_is_gone")
class LeavesWhatIsDamaged(MemoryBackend):
    def discard_damaged(self, key):
        return self.contains(key)


@breaks("test_what_was_damaged_is_gone")
class DiscardsEverything(MemoryBackend):
    def discard_damaged(self, key):
        found = self.contains(key)
        for other in list(self._held()):
            self.remove(other)
        return found


@breaks("test_removing_one_leaves_the_others")
class RemovesWhatBeginsAlike(MemoryBackend):
    def remove(self, key):
        removed = super().remove(key)
        for other in [other for other in self._held() if other[:16] == key[:16]]:
            super().remove(other)
        return removed


@breaks("test_objects_outlive_their_writer_if_promised")
class PromisesToPersist(MemoryBackend):
    capabilities = Capabilities(persistent=True)


@breaks("test_objects_outlive_their_writer_if_promised")
class PersistsWithoutAPromise(Common):
    capabilities = Capabilities(shared=True)
    everything: ClassVar[dict[bytes, bytes]] = {}


@breaks(
    "test_two_at_once_share_if_promised",
    "test_what_one_removes_is_gone_for_all",
    "test_an_object_appears_whole_to_others_if_shared",
)
class PromisesToShare(MemoryBackend):
    capabilities = Capabilities(shared=True)


@breaks("test_two_at_once_share_if_promised")
class SharesWithoutAPromise(Common):
    capabilities = Capabilities(persistent=True)
    everything: ClassVar[dict[bytes, bytes]] = {}


@breaks("test_two_at_once_share_if_promised")
class SharesOneWay(Common):
    """Who comes later sees what the first one puts, and keeps its own until it is closed."""

    everything: ClassVar[dict[bytes, bytes]] = {}
    first: ClassVar[MemoryBackend | None] = None

    def __init__(self):
        super().__init__()
        if self.first is None or self.first._objects is None:
            type(self).first = self
        else:
            self._objects = ChainMap({}, self.everything)

    def close(self):
        if isinstance(self._objects, ChainMap):
            self.everything.update(self._objects.maps[0])
        super().close()


@breaks("test_what_one_removes_is_gone_for_all")
class RemembersWhatItRead(Common):
    everything: ClassVar[dict[bytes, bytes]] = {}

    def __init__(self):
        super().__init__()
        self._read = {}

    def put(self, key, data):
        self._read.pop(key, None)
        return super().put(key, data)

    def get_into(self, key, out):
        if data := self._held().get(key, self._read.get(key)):
            self._read[key] = data
            if len(data) <= out.nbytes:
                out.cast("B")[: len(data)] = data
                return len(data)
        return super().get_into(key, out)

    def remove(self, key):
        self._read.pop(key, None)
        return super().remove(key)


@breaks("test_closing_one_leaves_the_others_open")
class ClosesAll(MemoryBackend):
    everybody: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self):
        super().__init__()
        self.everybody.add(self)

    def close(self):
        for one in list(self.everybody):
            MemoryBackend.close(one)


@breaks("test_closed_means_closed")
class AnswersWhenClosed(MemoryBackend):
    def remove(self, key):
        return bool(self._objects) and super().remove(key)


@breaks("test_closed_means_closed")
class FailsOddlyWhenClosed(MemoryBackend):
    def remove(self, key):
        self._objects.get(key)  # an error of Python's once it is None
        return super().remove(key)


@breaks("test_closing_twice_is_harmless")
class ClosesOnce(MemoryBackend):
    def close(self):
        if self._objects is None:
            raise BackendClosed("closed already")
        super().close()


@breaks("test_threads_do_not_get_in_each_others_way")
class KeepsItsPlaceInAnAttribute(MemoryBackend):
    def put(self, key, data):
        self._data = bytes(data)
        time.sleep(0.0001)
        return super().put(key, memoryview(self._data))


@breaks("test_closing_ends_the_calls_of_others")
class FailsOddlyWhenClosedMeanwhile(MemoryBackend):
    def contains(self, key):
        self._held()
        time.sleep(0.005)
        return key in self._objects


@breaks("test_closing_ends_the_calls_of_others")
class AnswersAsIfEmptyWhenClosedMeanwhile(MemoryBackend):
    """And never says that it is closed to those who were there."""

    def __init__(self):
        super().__init__()
        self._callers = set()

    def contains(self, key):
        caller = threading.get_ident()
        if self._objects is None and caller in self._callers:
            return False
        found = super().contains(key)
        self._callers.add(caller)
        return found


@breaks("test_closing_ends_the_calls_of_others")
class NeverClosesUnderACall(MemoryBackend):
    deadline_s = 5

    def __init__(self):
        super().__init__()
        self._calls = set()

    def contains(self, key):
        call = object()
        self._calls.add(call)
        try:
            time.sleep(0.005)
            return super().contains(key)
        finally:
            self._calls.discard(call)

    def close(self):
        for _ in range(20):  # between two calls there is none
            if self._calls:
                threading.Event().wait()
            time.sleep(0.001)
        super().close()


@breaks("test_any_history_shows_only_what_was_put")
class BringsBackWhatWasRemovedBefore(MemoryBackend):
    def __init__(self):
        super().__init__()
        self._bin = None

    def remove(self, key):
        data = self._held().get(key)
        removed = super().remove(key)
        if self._bin is not None:
            super().put(*self._bin)
        self._bin = None if data is None else (key, memoryview(data))
        return removed


@breaks("test_any_history_shows_only_what_was_put")
class KnowsAKeyForGood(MemoryBackend):
    """What was removed comes back when something else is put there."""

    def __init__(self):
        super().__init__()
        self._removed = {}

    def put(self, key, data):
        return super().put(key, memoryview(self._removed.get(key, data)))

    def remove(self, key):
        if key in self._held():
            self._removed[key] = self._held()[key]
        return super().remove(key)
