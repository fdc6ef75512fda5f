"""All threads of a launch as numpy arrays: the machine on which tests run kernels that are written in a lane's numbers."""

import contextlib

import ml_dtypes
import numpy as np

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class Lanes:
    """The instructions of `optx.pallas.threads_sm90.Threads`, on all threads of `blocks` blocks of `size` at once.

    Every address of an active thread must lie inside its ref; shuffles ask that a warp's threads are active alike; no two
    threads may store to one byte. What is shared within a block, float32[blocks, numbers], is seen after a barrier.
    """

    def __init__(self, blocks: int, refs, size: int = 128):
        """refs: writable numpy arrays; they are told apart by identity."""
        self._size = size
        self._threads = np.arange(blocks * size, dtype=np.int32)
        self._active = np.ones(blocks * size, bool)
        self._pending, self._fetched = [], []
        self._written = {id(ref): np.zeros(ref.nbytes, bool) for ref in refs}

    def block(self):
        return self._threads // self._size

    def thread(self):
        return self._threads % self._size

    @contextlib.contextmanager
    def when(self, condition):
        before = self._active
        self._active = before & condition
        warps = self._active.reshape(-1, 32)
        assert (warps == warps[:, :1]).all(), "branches are those of whole warps"
        yield
        self._active = before

    def wide(self, x):
        assert (x[self._active] >= 0).all()
        return x.astype(np.int64)

    def where(self, condition, a, b):
        return np.where(condition, a, np.asarray(b, a.dtype))

    def _bytes(self, ref):
        return ref.reshape(-1).view(np.uint8)

    def _places(self, ref, offset, size, active):
        at = offset[active][:, None] + np.arange(size)
        assert not at.size or (at.min() >= 0 and at.max() < ref.nbytes), "an address outside of the ref"
        assert not (offset[active] % size).any(), "an address that is no multiple of what is moved"
        return at

    def load(self, ref, offset, count: int):
        found = np.zeros((len(self._threads), 4 * count), np.uint8)
        found[self._active] = self._bytes(ref)[self._places(ref, offset, 4 * count, self._active)]
        return list(found.view(np.int32).T)

    load_early = load

    def fetch(self, ref, offset, to, place, when=None):
        active = self._active if when is None else self._active & when
        self._fetched.append(
            (to, self._places(to, place, 16, active), self._bytes(ref)[self._places(ref, offset, 16, active)])
        )

    def fetched(self):
        for to, places, found in self._fetched:
            self._bytes(to)[places] = found
        self._fetched = []

    def store(self, ref, offset, word, size: int, when=None):
        active = self._active if when is None else self._active & when
        at = self._places(ref, offset, size, active)
        assert np.unique(at).size == at.size and not self._written[id(ref)][at].any(), "a byte with two writers"
        self._written[id(ref)][at] = True
        self._bytes(ref)[at] = np.ascontiguousarray(word).view(np.uint8).reshape(-1, 4)[active, :size]

    def store_words(self, ref, offset, words, when=None):
        size = 4 * len(words)
        active = self._active if when is None else self._active & when
        at = self._places(ref, offset, size, active)
        assert np.unique(at).size == at.size and not self._written[id(ref)][at].any(), "a byte with two writers"
        self._written[id(ref)][at] = True
        self._bytes(ref)[at] = np.stack(words, axis=-1).view(np.uint8)[active]

    def share(self, ref, index, x, when):
        active = self._active & when
        at = (self.block()[active], index[active])
        assert len(set(zip(*at, strict=True))) == active.sum(), "a number with two writers"
        self._pending.append((ref, at, x[active]))

    def shared(self, ref, start: int):
        return list(ref[self.block(), start : start + 4].T)

    def barrier(self):
        assert self._active.all(), "a barrier is for all threads"
        for ref, at, x in self._pending:
            ref[at] = x
        self._pending = []

    def exp2(self, x):
        return np.exp2(x)

    def reciprocal(self, x):
        return 1 / x

    def shuffle(self, x, distance: int):
        return x.reshape(-1, 32)[:, np.arange(32) ^ distance].reshape(-1)

    def minimum(self, a, b):
        return np.minimum(a, np.float32(b))

    def maximum(self, a, b):
        return np.maximum(a, np.float32(b))

    def abs(self, x):
        return np.abs(x)

    def rsqrt(self, x):
        return (1 / np.sqrt(x.astype(np.float64))).astype(np.float32)

    def round(self, x):
        return np.rint(x)

    def int(self, x):
        return np.where(np.isnan(x), 0, x).astype(np.int32)

    def float(self, word):
        return np.ascontiguousarray(word).view(np.float32)

    def bits(self, x):
        return x.view(np.int32)

    def pack(self, pair, dtype: str):
        halves = [x.astype(DTYPES[dtype]).view(np.uint16).astype(np.uint32) for x in pair]
        return (halves[0] | halves[1] << 16).view(np.int32)

    def unpack(self, word, dtype: str):
        halves = np.ascontiguousarray(word).view(np.uint16).reshape(-1, 2)
        return [np.ascontiguousarray(x).view(DTYPES[dtype]).astype(np.float32) for x in halves.T]

    def e4m3(self, pair):
        codes = []
        for x in pair:
            clipped = np.clip(x, -448, 448)
            codes.append(clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(np.int32))
        return codes[0] | codes[1] << 8
