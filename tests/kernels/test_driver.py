"""Calls of the CUDA driver, with one in its place that reads its arguments as the real one does."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest

from lmcache.core.errors import DeviceError
from lmcache.core.kernels import driver
from lmcache.core.kernels.driver import Driver

STREAM = 0x1234
BATCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_uint64,
)
WORDS_OF_ATTRIBUTES = 6
"""An access order, two locations of a type and a number each, and flags: 32 bits all of them."""


class Library:
    """`libcuda`, as its header describes it; copies at once."""

    def __init__(self, *, has_batch=True, fails=()):
        self.has_batch, self.fails = has_batch, set(fails)
        self.calls, self.orders, self.registered = [], [], {}
        self._batch = BATCH(self._copy_batch)

    def _said(self, name):
        self.calls.append(name)
        return 999 if name in self.fails else 0

    def cuInit(self, flags):
        assert flags == 0
        return self._said("cuInit")

    def cuDriverGetVersion(self, found):
        found._obj.value = 13000
        return self._said("version")

    def cuGetErrorString(self, code, text):
        text._obj.value = b"out of luck" if code == 999 else None
        return 0

    def cuGetProcAddress_v2(self, name, found, version, flags, status):
        assert (name, version.value, flags.value) == (b"cuMemcpyBatchAsync", 12080, 0)
        if not self.has_batch:
            return 500
        found._obj.value = ctypes.cast(self._batch, ctypes.c_void_p).value
        return 0

    def _copy_batch(self, target, source, length, count, attributes, first, kinds, failed, stream):
        assert (kinds, first[0], stream) == (1, 0, STREAM)
        order, *others = (ctypes.c_uint32 * WORDS_OF_ATTRIBUTES).from_address(attributes)
        assert not any(others)
        self.orders.append(order)
        if self._said("batch"):
            failed[0] = 0
            return 999
        for index in range(count):
            ctypes.memmove(target[index], source[index], length[index])
        return 0

    def cuMemcpyAsync(self, target, source, length, stream):
        assert stream.value == STREAM
        if self._said("copy"):
            return 999
        ctypes.memmove(target.value, source.value, length.value)
        return 0

    def cuMemHostRegister_v2(self, address, size, flags):
        assert flags.value == 3
        if self._said("register"):
            return 999
        self.registered[address.value] = size.value
        return 0

    def cuMemHostUnregister(self, address):
        del self.registered[address.value]
        return self._said("unregister")

    def cuMemHostGetDevicePointer_v2(self, found, address, flags):
        assert flags.value == 0
        found._obj.value = address.value + 7
        return self._said("address")

    def cuDeviceGetCount(self, found):
        found._obj.value = 2
        return self._said("count")

    def cuDeviceGet(self, found, ordinal):
        assert ordinal.value in (0, 1)
        found._obj.value = 40 + ordinal.value
        return self._said("device")

    def cuDeviceGetUuid_v2(self, found, device):
        found.raw = bytes([device.value]) * 16
        return self._said("uuid")

    def cuStreamCreate(self, found, flags):
        assert flags.value == 1
        found._obj.value = 0x5000
        return self._said("stream")

    def cuDeviceGetPCIBusId(self, found, size, device):
        assert size.value >= 13
        found.value = f"0000:{device.value:02X}:00.0".encode()
        return self._said("bus")

    def cuDevicePrimaryCtxRetain(self, found, device):
        found._obj.value = 0xC0 + device.value
        return self._said("retain")

    def cuCtxSetCurrent(self, context):
        self.current = context.value
        return self._said("current")

    def cuMemGetAddressRange_v2(self, base, size, address):
        base._obj.value, size._obj.value = address.value & ~0xFFFF, 0x10000
        return self._said("range")

    def cuIpcGetMemHandle(self, handle, address):
        assert not address.value & 0xFFFF, "only a whole allocation has a handle"
        handle._obj.reserved[:] = struct.pack("<Q", address.value) + bytes(56)
        return self._said("share")

    def cuIpcOpenMemHandle_v2(self, found, handle, flags):
        assert flags.value == 1
        [address] = struct.unpack_from("<Q", bytes(handle))
        found._obj.value = address + (1 << 40)
        return self._said("open")

    def cuIpcCloseMemHandle(self, address):
        assert address.value >= 1 << 40
        return self._said("close")


@pytest.mark.parametrize("has_batch", [True, False])
def test_runs_are_copied(has_batch):
    library = Library(has_batch=has_batch)
    source, target = np.arange(1000, dtype=np.uint8), np.zeros(1000, np.uint8)
    starts, lengths = np.array([0, 10, 500]), np.array([3, 100, 250])
    made = Driver(library)
    assert made.copies_batches is has_batch
    made.copy(starts + target.ctypes.data, starts + source.ctypes.data, lengths, STREAM)
    expected = np.zeros(1000, np.uint8)
    for start, length in zip(starts, lengths, strict=True):
        expected[start : start + length] = source[start : start + length]
    assert (target == expected).all()
    assert library.calls == ["cuInit", "batch"] if has_batch else ["cuInit", *["copy"] * 3]


def test_only_a_source_that_stays_may_be_read_early():
    library = Library()
    nothing = np.zeros(0, np.int64)
    for stays in (False, True):
        Driver(library).copy(nothing, nothing, nothing, STREAM, stays=stays)
    assert library.orders == [1, 3]


def test_its_version():
    assert Driver(Library()).version == 13000


def test_memory_is_pinned_and_let_go():
    library = Library()
    made = Driver(library)
    made.register(0x10000, 4096)
    assert library.registered == {0x10000: 4096}
    assert made.device_address(0x10000) == 0x10007
    made.unregister(0x10000)
    assert not library.registered


@pytest.mark.parametrize(
    ("fails", "has_batch", "act"),
    [
        ("cuInit", True, lambda made: None),
        ("batch", True, lambda made: made.copy(*[np.array([8])] * 3, STREAM)),
        ("copy", False, lambda made: made.copy(*[np.array([8])] * 3, STREAM)),
        ("register", True, lambda made: made.register(1 << 20, 4096)),
        ("version", True, lambda made: made.version),
        ("address", True, lambda made: made.device_address(1 << 20)),
        ("count", True, lambda made: made.device_with(bytes(16))),
        ("uuid", True, lambda made: made.identity(1)),
        ("stream", True, lambda made: made.new_stream()),
        ("bus", True, lambda made: made.bus_id(1)),
        ("device", True, lambda made: made.bus_id(1)),
        ("retain", True, lambda made: made.bind(1)),
        ("current", True, lambda made: made.bind(1)),
        ("range", True, lambda made: made.allocation_of(1 << 20)),
        ("share", True, lambda made: made.share(1 << 20)),
        ("open", True, lambda made: made.open_shared(bytes(64))),
        ("close", True, lambda made: made.close_shared(1 << 40)),
    ],
)
def test_an_error_names_the_call_and_the_reason(fails, has_batch, act):
    with pytest.raises(DeviceError, match=r"^cu\w+ failed with 999: out of luck$"):
        act(Driver(Library(has_batch=has_batch, fails=[fails])))


def test_a_thread_means_the_device_it_was_bound_to():
    library = Library()
    made = Driver(library)
    for device in (1, 0, 1):
        made.bind(device)
        assert library.current == 0xC0 + 40 + device
    assert library.calls.count("retain") == 2, "each context is retained once"


def test_a_device_is_found_by_its_identity():
    made = Driver(Library())
    assert made.device_with(made.identity(1)) == 1
    with pytest.raises(DeviceError, match=f"no GPU {'07' * 16} among the 2"):
        made.device_with(b"\7" * 16)


def test_a_stream_of_its_own():
    assert Driver(Library()).new_stream() == 0x5000


def test_where_it_is_plugged_in():
    assert Driver(Library()).bus_id(1) == "0000:29:00.0"


def test_memory_is_shared_by_whole_allocations():
    made = Driver(Library())
    assert made.allocation_of(0x12345678) == (0x12340000, 0x10000)
    there = made.open_shared(made.share(0x12340000))
    assert there == 0x12340000 + (1 << 40)
    made.close_shared(there)


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    with pytest.raises(DeviceError, match=r"no CUDA driver: libcuda.so.1"):
        Driver()


class TestMemoryElsewhere:
    """As on WSL 2, where a device sees pinned memory at an address of its own."""

    class Driver:
        def __init__(self, moved):
            self.moved, self.calls = moved, []

        def bind(self, device):
            pass

        def bus_id(self, device):
            return "0000:00:00.0"

        def register(self, address, size):
            self.calls.append(("register", address, size))

        def unregister(self, address):
            self.calls.append(("unregister", address))

        def device_address(self, address):
            return address + self.moved

    def test_it_is_not_pinned(self):
        from lmcache.core.kernels.cuda import _Registrar

        driver = self.Driver(moved=4096)
        with pytest.raises(DeviceError, match="at another address"):
            _Registrar(driver, 0).register(0x10000, 64)
        assert driver.calls == [("register", 0x10000, 64), ("unregister", 0x10000)]

    def test_but_what_is_where_it_was_is(self):
        from lmcache.core.kernels.cuda import _Registrar

        driver = self.Driver(moved=0)
        _Registrar(driver, 0).register(0x10000, 64)
        assert driver.calls == [("register", 0x10000, 64)]
