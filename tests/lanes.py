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

    def put(self, ref, offset, word, when=None):
        self.store(ref, offset, word, 4, when)

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

    def zero(self):
        return np.zeros(len(self._threads), np.float32)

    def insert(self, word, mask: int, bits: int):
        return (word & mask) | bits

    def _halves(self, word):
        word = np.broadcast_to(np.asarray(word, np.int32), self._threads.shape)
        return np.ascontiguousarray(word).view(ml_dtypes.bfloat16).reshape(-1, 2).astype(np.float32)

    def _paired(self, numbers):
        return np.ascontiguousarray(numbers.astype(ml_dtypes.bfloat16)).view(np.int32).reshape(-1)

    def subtract_pair(self, a, b):
        return self._paired(self._halves(a) - self._halves(b))

    def multiply_pair(self, a, b):
        return self._paired(self._halves(a) * self._halves(b))

    def bytes(self, a: int, word, selector: int):
        both = [a >> 8 * i & 255 for i in range(4)] + [word.view(np.uint32) >> 8 * i & 255 for i in range(4)]
        chosen = [np.uint32(both[selector >> 4 * i & 7]) << np.uint32(8 * i) for i in range(4)]
        return (chosen[0] | chosen[1] | chosen[2] | chosen[3]).astype(np.uint32).view(np.int32)

    def matrices(self, ref, offset):
        places = self._places(ref, offset, 16, self._active).reshape(-1, 4, 8, 16)
        tiles = self._bytes(ref)[places].view(np.uint16).astype(np.uint32)  # warp, tile, row, column
        pairs = (tiles[:, :, 0::2] | tiles[:, :, 1::2] << 16).astype(np.uint32)  # warp, tile, c, g
        return list(pairs.transpose(1, 0, 3, 2).reshape(4, -1).view(np.int32))

    def mma(self, total, a, b):
        a = np.stack([self._halves(word) for word in a]).reshape(2, 2, -1, 8, 4, 2)  # j h warp g c e
        a = a.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)  # warp, h g, j c e
        b = np.stack([self._halves(word) for word in b]).reshape(2, -1, 8, 4, 2)  # j warp n c e
        b = b.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)
        found = (a @ b).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)  # h e warp g c
        return [x + y for x, y in zip(total, found.reshape(4, -1), strict=True)]
