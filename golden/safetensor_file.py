"""Safetensors files, read by memory map and written tensor by tensor, so that neither takes more memory than a piece of one tensor.

The safetensors package reads FP8 and BF16 only into a framework that has them (NumPy has not) and writes only what fits in memory.
"""

import json
import mmap
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

# The format's dtypes: their bits, and the NumPy dtype of an array (None: parts of a byte; bf16 and FP8 come as bit patterns).
_NAMES = "F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64"
BITS = {"BOOL": 8} | {name: int(name.split("_")[0].lstrip("BCFIU")) for name in _NAMES.split()}
KINDS = {"BOOL": "?", "BF16": "<u2", "C64": "<c8", **{f"{k}{b}": f"<{k.lower()}{b // 8}" for k in "UIF" for b in (8, 16, 32, 64)}}
DTYPES = {name: None if bits < 8 else np.dtype(KINDS.get(name, "u1")) for name, bits in BITS.items()}
MAX_HEADER = 100_000_000  # bytes, says the format
FIELDS = {"dtype", "shape", "data_offsets"}
PIECE = 1 << 22  # bytes that a long write hands to the system at a time, so that an interrupt is heard


class Entry(NamedTuple):
    """One tensor of a file; start and end are its bytes, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def size_of(dtype: str, shape: Sequence[int]) -> int | None:
    """The bytes of a tensor, or None if they are no whole number, or beyond what any file holds."""
    count = BITS[dtype]
    for n in shape if 0 not in shape else (0,):
        count *= n
        if count >> 66:  # a damaged header can spell products of millions of digits
            return None
    return None if count % 8 else count // 8


class Reader:
    """The tensors of a safetensors file, not copied: `array(name)` is a read-only view of the file, whole or not at all.

    ValueError, which names the file, the tensor, what was found and what was expected, if the file is not what the format says it is:
    every tensor's bytes must be as many as its dtype and shape need, and all of them together must cover the data once.

    Arrays stay valid after `close`; the file is unmapped when the last of them goes. As with any memory map, the file must not be
    shortened while it is read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with open(self.path, "rb", opener=lambda p, flags: os.open(p, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                self.refuse("is no regular file", "a safetensors file")
            self.size = about.st_size
            if self.size < 8:
                self.refuse(f"has {self.size} bytes", "a header's length in the first 8")
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            length = int.from_bytes(self._map[:8], "little")
            if length > min(MAX_HEADER, self.size - 8):
                self.refuse(f"has a header of {length} bytes", f"at most {min(MAX_HEADER, self.size - 8)}")
            self._data = 8 + length
            self.metadata, self.entries = self._parse(self._map[8 : self._data])
        except BaseException:
            self.close()
            raise

    def refuse(self, found: str, expected: str, tensor: str | None = None) -> NoReturn:
        """ValueError "file: tensor found; expected ..."."""
        raise ValueError(f"{self.path}: {'' if tensor is None else short(tensor, 200) + ' '}{found}; expected {expected}")

    def _parse(self, header: bytes) -> tuple[dict[str, str] | None, dict[str, Entry]]:
        """Metadata and entries, these in the order of their bytes."""

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):
                name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
                self.refuse(f"has the key {short(name)} twice in its header", "each key once")
            return found

        def integer(digits: str) -> int:
            if len(digits) > 19:
                self.refuse(f"has the number {short(digits)} in its header", "none beyond 64 bits")
            return int(digits)

        try:
            text = header.decode()
            found = json.loads(text, object_pairs_hook=unique, parse_int=integer)
            if "\\u" in text:  # half a surrogate pair would be a name that cannot be printed
                json.dumps(found, ensure_ascii=False).encode()
        except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
            self.refuse(f"has a damaged header ({type(error).__name__}: {str(error)[:100]})", "JSON in UTF-8")
        if not isinstance(found, dict) or not text.startswith("{"):
            self.refuse(f"has a header that starts with {text[:1]!r}", "a JSON object")
        metadata = found.pop("__metadata__", None)
        if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
            self.refuse(f"is {short(metadata)}", "a JSON object of strings", "__metadata__")
        size = self.size - self._data
        entries = {name: self._entry(name, about, size) for name, about in found.items()}
        entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
        at = 0
        for name, entry in entries.items():
            if entry.start != at:
                self.refuse(f"starts at byte {entry.start} of the data", f"{at}, where the tensor before it ends", name)
            at = entry.end
        if at != size:
            self.refuse(f"has {size} bytes of data", f"the {at} bytes that its tensors have")
        return metadata, entries

    def _entry(self, name: str, about: Any, size: int) -> Entry:
        if not isinstance(about, dict) or about.keys() != FIELDS:
            self.refuse(f"is {short(about)}", "an object of dtype, shape and data_offsets", name)
        dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            self.refuse(f"has dtype {short(dtype)}", f"one of {', '.join(BITS)}", name)
        if not isinstance(shape, list) or not all(is_count(n) for n in shape):
            self.refuse(f"has shape {short(shape)}", "a list of integers of at least 0", name)
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(n) for n in offsets):
            self.refuse(f"has data_offsets {short(offsets)}", "two integers of at least 0", name)
        start, end = offsets
        if not start <= end <= size:
            self.refuse(f"has data_offsets {offsets}", f"a range within the {size} bytes of data", name)
        if (needed := size_of(dtype, shape)) != end - start:
            what = f"{needed} bytes" if needed is not None else "a whole number of bytes, below 2^63,"
            self.refuse(f"has {end - start} bytes", f"{what} for {dtype} of shape {short(shape)}", name)
        return Entry(dtype, tuple(shape), start, end)

    def keys(self) -> list[str]:
        """The names of the tensors, in the order of their bytes in the file."""
        return list(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def entry(self, name: str) -> Entry:
        """dtype, shape and place of a tensor; ValueError if there is none of this name."""
        if name not in self.entries:
            self.refuse("is not in the file", f"one of its {len(self.entries)} tensors", name)
        return self.entries[name]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor."""
        entry = self.entry(name)
        if self._map is None:
            self.refuse("is closed", "an open file")
        return np.frombuffer(self._map, np.uint8, entry.end - entry.start, self._data + entry.start)

    def array(self, name: str) -> NDArray[Any]:
        """A tensor as a NumPy view: bf16 as uint16, FP8 as uint8. It may be unaligned, if the file is."""
        entry = self.entry(name)
        dtype = DTYPES[entry.dtype]
        if dtype is None:
            self.refuse(f"has dtype {entry.dtype}", "one of at least a byte (raw() gives the bytes of any)", name)
        try:
            return self.raw(name).view(dtype).reshape(entry.shape)
        except ValueError as error:
            self.refuse(f"has shape {short(entry.shape)}", f"one that NumPy can hold ({error})", name)

    def release(self, name: str) -> None:
        """Says that a tensor will not be read again soon: its pages no longer count as this process's memory. Views stay valid."""
        entry = self.entry(name)
        start, end = (self._data + at & -mmap.PAGESIZE for at in (entry.start, entry.end))
        if self._map is not None and end > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        held, self._map = self._map, None
        try:
            if held is not None:
                held.close()
        except BufferError:  # arrays still look at it; the last one takes it along
            pass

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_count(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0


def short(value: Any, most: int = 60) -> str:
    """How a message shows what may be long."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


class Writer:
    """A new safetensors file, written tensor by tensor: first what there will be, (name, dtype, shape) each, then the values.

        with Writer(path, [("norm.weight", "BF16", (7168,))], metadata={"format": "pt"}) as file:
            file.write("norm.weight", bits)

    Tensors may be written in any order. Within the file the widest dtype comes first, so that all are aligned. The file appears under
    its name, in the place of what was there, when the block ends and every tensor has been written; after any exception nothing was
    changed and nothing is left. ValueError for a name twice, a dtype that the format does not have, values that do not fit.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path}: is no regular file; expected a file to replace, or a new name")
        if not self.path.parent.is_dir():
            raise ValueError(f"{self.path}: there is no {self.path.parent}; expected a directory")
        if metadata is not None and not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError(f"{self.path}: metadata is {short(metadata)}; expected strings by strings")
        at = 0
        for name, dtype, shape in sorted(tensors, key=lambda t: -BITS.get(t[1], 0)):
            if name in self.entries or name == "__metadata__":
                raise ValueError(
                    f"{self.path}: {name!r} cannot be the name of another tensor; expected each name once, and no __metadata__"
                )
            if dtype not in BITS:
                raise ValueError(f"{self.path}: {name!r} has dtype {dtype!r}; expected one of {', '.join(BITS)}")
            if not all(is_count(n) for n in shape) or (size := size_of(dtype, shape)) is None:
                raise ValueError(f"{self.path}: {name!r} has shape {shape}; expected integers of at least 0, whole bytes of {dtype}")
            self.entries[name] = Entry(dtype, tuple(shape), at, at + size)
            at += size
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
        for name, entry in self.entries.items():
            header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.end]}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % 8)  # so that the data are aligned
        if len(self._header) > MAX_HEADER:
            raise ValueError(f"{self.path}: its header would have {len(self._header)} bytes; expected at most {MAX_HEADER}")
        self.size = 8 + len(self._header) + at
        self._missing = set(self.entries)
        self._fd: int | None = None
        self._part: Path | None = None

    def __enter__(self) -> "Writer":
        self._fd = self._open()
        try:
            self._put(memoryview(len(self._header).to_bytes(8, "little") + self._header), 0)
        except BaseException:
            self._discard()
            raise
        return self

    def _open(self) -> int:
        """A file without a name where the system has them: nothing of it remains, however the process ends."""
        try:
            fd = os.open(self.path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
            if os.path.exists(f"/proc/self/fd/{fd}"):  # the way to name it later
                return fd
            os.close(fd)
        except (AttributeError, OSError):
            pass
        self._part = self._beside()
        return os.open(self._part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)

    def _beside(self) -> Path:
        return self.path.parent / f".leadline-{secrets.token_hex(8)}.part"

    def _put(self, data: memoryview, at: int) -> None:
        assert self._fd is not None
        while data:
            done = os.pwrite(self._fd, data[:PIECE], at)
            data, at = data[done:], at + done

    def stream(self, name: str, parts: Iterable[NDArray[Any]]) -> Iterator[int]:
        """Writes a tensor from parts of it, in order; yields the bytes of each part once they are written (so exhaust it)."""
        if self._fd is None or name not in self.entries:
            raise ValueError(f"{self.path}: {name!r} cannot be written; expected an open Writer that was given this name")
        entry = self.entries[name]
        at, end = (8 + len(self._header) + n for n in (entry.start, entry.end))
        for part in parts:
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            if len(data) > end - at:
                raise ValueError(f"{self.path}: {name!r} gets more than its {entry.end - entry.start} bytes; expected as many")
            self._put(data, at)
            at += len(data)
            yield len(data)
        if at != end:
            raise ValueError(f"{self.path}: {name!r} lacks {end - at} of its {entry.end - entry.start} bytes; expected all")
        self._missing.discard(name)

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Writes a tensor: an array of its shape, and of its dtype (bf16 as uint16 and FP8 as uint8 bit patterns)."""
        entry, values = self.entries.get(name), np.asarray(values)
        if entry is not None and (values.shape != entry.shape or values.dtype != DTYPES[entry.dtype]):
            wanted = f"{DTYPES[entry.dtype]} of shape {entry.shape} for {entry.dtype}"
            raise ValueError(f"{self.path}: {name!r} is {values.dtype} of shape {values.shape}; expected {wanted}")
        for _ in self.stream(name, [values]):
            pass

    def _commit(self) -> None:
        if self._missing:
            raise ValueError(f"{self.path}: {min(self._missing)!r} was not written; expected all {len(self.entries)} tensors")
        assert self._fd is not None
        if self._part is None:
            self._part = self._beside()
            # a directory is named, though not needed, because without one Python links to the symbolic link itself
            os.link(f"/proc/self/fd/{self._fd}", self._part, src_dir_fd=self._fd, follow_symlinks=True)
        fd, self._fd = self._fd, None
        os.close(fd)
        os.replace(self._part, self.path)

    def _discard(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None
        if self._part is not None:
            self._part.unlink(missing_ok=True)

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._discard()
