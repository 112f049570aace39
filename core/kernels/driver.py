"""The few calls of the CUDA driver that torch has no name for.

The driver's library is there wherever a GPU is, whatever torch was built with: nothing has to be
compiled, and no package to match.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcache.core.errors import DeviceError

if TYPE_CHECKING:
    from lmcache.core.kernels.plan import Int64s

BATCH_SINCE = 12080
"""CUDA 12.8 has the first `cuMemcpyBatchAsync`; later drivers keep that form of it."""
IN_STREAM_ORDER, IN_ANY_ORDER = 1, 3
_PORTABLE_AND_MAPPED = 1 | 2
_LAZY_PEER_ACCESS = 1
_NON_BLOCKING = 1
_BUS_ID_BYTES = 32
HANDLE_BYTES = 64


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    )


def _load() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(f"no CUDA driver: {error}") from error


class Driver:
    """Calls into `libcuda`, on the context that is current on the calling thread."""

    def __init__(self, library: Any = None) -> None:
        """Raises `DeviceError` where there is no CUDA."""
        self._library = library or _load()
        self._check("cuInit", self._library.cuInit(0))
        self._batch = self._find("cuMemcpyBatchAsync", BATCH_SINCE)
        self._contexts: dict[int, ctypes.c_void_p] = {}

    @property
    def copies_batches(self) -> bool:
        """Whether many copies are one call. Otherwise each costs microseconds of the host's."""
        return self._batch is not None

    @property
    def version(self) -> int:
        """The newest CUDA the driver knows: 13000 for 13.0."""
        found = ctypes.c_int()
        self._check("cuDriverGetVersion", self._library.cuDriverGetVersion(ctypes.byref(found)))
        return found.value

    def bind(self, device: int) -> None:
        """Have the other calls of this thread mean a device, by the context that torch uses."""
        if device not in self._contexts:
            self._contexts[device] = self._retain(device)
        self._check("cuCtxSetCurrent", self._library.cuCtxSetCurrent(self._contexts[device]))

    def copy(
        self, target: Int64s, source: Int64s, length: Int64s, stream: int, *, stays: bool = False
    ) -> None:
        """Queue copies of `length[i]` bytes from `source[i]` to `target[i]` on a stream of its own.

        `stays` says that no earlier work of the stream changes the source.
        """
        if self._batch:
            order = IN_ANY_ORDER if stays else IN_STREAM_ORDER
            columns = [np.ascontiguousarray(column) for column in (target, source, length)]
            self._copy_batch(columns, order, stream)
            return
        call = self._library.cuMemcpyAsync
        for a, b, n in zip(target.tolist(), source.tolist(), length.tolist(), strict=True):
            arguments = ctypes.c_uint64(a), ctypes.c_uint64(b), ctypes.c_size_t(n)
            self._check("cuMemcpyAsync", call(*arguments, ctypes.c_void_p(stream)))

    def register(self, address: int, size: int) -> None:
        """Pin a range of host memory for all devices. Takes about 0.3 s for each GiB."""
        code = self._library.cuMemHostRegister_v2(
            ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(_PORTABLE_AND_MAPPED)
        )
        self._check("cuMemHostRegister", code)

    def unregister(self, address: int) -> None:
        """Undo `register`; no copy of the range may be under way."""
        code = self._library.cuMemHostUnregister(ctypes.c_void_p(address))
        self._check("cuMemHostUnregister", code)

    def identity(self, device: int) -> bytes:
        """16 bytes that tell a device from all others, in any process."""
        found = ctypes.create_string_buffer(16)
        code = self._library.cuDeviceGetUuid_v2(found, self._at(device))
        self._check("cuDeviceGetUuid", code)
        return found.raw

    def bus_id(self, device: int) -> str:
        """Where a device is plugged in, like `0000:41:00.0`."""
        found = ctypes.create_string_buffer(_BUS_ID_BYTES)
        code = self._library.cuDeviceGetPCIBusId(found, ctypes.c_int(len(found)), self._at(device))
        self._check("cuDeviceGetPCIBusId", code)
        return found.value.decode()

    def device_with(self, identity: bytes) -> int:
        """The number of a device in this process. Raises `DeviceError` if we have no such one."""
        count = ctypes.c_int()
        self._check("cuDeviceGetCount", self._library.cuDeviceGetCount(ctypes.byref(count)))
        for device in range(count.value):
            if self.identity(device) == identity:
                return device
        raise DeviceError(f"no GPU {identity.hex()} among the {count.value} of this process")

    def allocation_of(self, address: int) -> tuple[int, int]:
        """Address and size of the allocation in which device memory lies."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        code = self._library.cuMemGetAddressRange_v2(
            ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
        )
        self._check("cuMemGetAddressRange", code)
        return base.value, size.value

    def share(self, base: int) -> bytes:
        """A handle of an allocation, for other processes. Virtual memory has none."""
        handle = _Handle()
        code = self._library.cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(base))
        self._check("cuIpcGetMemHandle", code)
        return bytes(handle)

    def open_shared(self, handle: bytes) -> int:
        """Where another process's allocation is from now on, on the device of this thread."""
        found = ctypes.c_uint64()
        code = self._library.cuIpcOpenMemHandle_v2(
            ctypes.byref(found), _Handle.from_buffer_copy(handle), ctypes.c_uint(_LAZY_PEER_ACCESS)
        )
        self._check("cuIpcOpenMemHandle", code)
        return found.value

    def close_shared(self, base: int) -> None:
        """Undo `open_shared`; no work of ours may use the memory any more."""
        code = self._library.cuIpcCloseMemHandle(ctypes.c_uint64(base))
        self._check("cuIpcCloseMemHandle", code)

    def new_stream(self) -> int:
        """On the device of this thread. The streams of torch are shared by all of a process."""
        found = ctypes.c_void_p()
        code = self._library.cuStreamCreate(ctypes.byref(found), ctypes.c_uint(_NON_BLOCKING))
        self._check("cuStreamCreate", code)
        assert found.value
        return found.value

    def device_address(self, address: int) -> int:
        """Where the device sees a registered address; elsewhere on WSL 2, for one."""
        found = ctypes.c_uint64()
        code = self._library.cuMemHostGetDevicePointer_v2(
            ctypes.byref(found), ctypes.c_void_p(address), ctypes.c_uint(0)
        )
        self._check("cuMemHostGetDevicePointer", code)
        return found.value

    # ----

    def _retain(self, device: int) -> ctypes.c_void_p:
        context = ctypes.c_void_p()
        code = self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._at(device))
        self._check("cuDevicePrimaryCtxRetain", code)
        return context

    def _at(self, device: int) -> ctypes.c_int:
        number = ctypes.c_int()
        code = self._library.cuDeviceGet(ctypes.byref(number), ctypes.c_int(device))
        self._check("cuDeviceGet", code)
        return number

    def _copy_batch(self, columns: list[Int64s], order: int, stream: int) -> None:
        attributes = _Attributes(order=order)
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        code = self._batch(
            *(ctypes.c_void_p(column.ctypes.data) for column in columns),
            ctypes.c_size_t(len(columns[0])),
            ctypes.byref(attributes),
            ctypes.byref(first),
            ctypes.c_size_t(1),
            ctypes.byref(failed),
            ctypes.c_void_p(stream),
        )
        self._check("cuMemcpyBatchAsync", code)

    def _find(self, name: str, version: int) -> Any:
        """A function as it was in that version of CUDA, None if the driver is older."""
        found, status = ctypes.c_void_p(), ctypes.c_int()
        code = self._library.cuGetProcAddress_v2(
            name.encode(),
            ctypes.byref(found),
            ctypes.c_int(version),
            ctypes.c_uint64(0),
            ctypes.byref(status),
        )
        if code or not found.value:
            return None
        pointers = [ctypes.c_void_p] * 3, [ctypes.c_void_p] * 2, [ctypes.c_void_p] * 2
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int,
            *pointers[0],
            ctypes.c_size_t,
            *pointers[1],
            ctypes.c_size_t,
            *pointers[2],
        )
        return kind(found.value)

    def _check(self, call: str, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            why = (text.value or b"unknown").decode()
            raise DeviceError(f"{call} failed with {code}: {why}")
