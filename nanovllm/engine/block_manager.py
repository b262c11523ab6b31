"""Paged KV memory: who holds which block, and which prefix a block holds."""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from nanovllm.batch import Key
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import OutOfBlocksError

DIGEST_SIZE = 16


def root_hash(model_id: str, adapter_id: int | None, cache_salt: str | None) -> bytes:
    """Hash what sequences must have in common besides their keys, to share a cached prefix."""
    content = repr((model_id, adapter_id, cache_salt)).encode()
    return blake2b(content, digest_size=DIGEST_SIZE).digest()


def hash_block(parent: bytes, keys: list[Key]) -> bytes:
    """Hash a full block by its keys and all that precede it.

    Token ids and patch digests are tagged, so that no token can stand for a patch.
    """
    try:
        content = b"t" + array("q", keys).tobytes()  # type: ignore[type-var]
    except TypeError:
        content = b"m" + b"".join(
            b"t" + key.to_bytes(8, "little")
            if isinstance(key, int)
            else b"p" + len(key).to_bytes(4, "little") + key
            for key in keys
        )
    return blake2b(parent + content, digest_size=DIGEST_SIZE).digest()


class BlockManager:
    """Fixed set of KV-cache blocks with reference counts and a least-recently-freed prefix cache.

    A block is *held* while a sequence's table has it, *free* otherwise. A held or free block may be
    *published*: known by the chained hash of its keys, and so found by sequences with that prefix.
    A free block that is published keeps its contents until it is handed out; those that are not
    are handed out first.

    Args:
        num_blocks: Blocks in the pool. Block ids are `0 .. num_blocks - 1`.
        block_size: Positions in a block.
        enable_prefix_caching: Whether blocks are published at all.
        max_cached_tokens: Positions that free published blocks may hold at most, rounded up to
            whole blocks; None or 0 is no limit.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        max_cached_tokens: int | None = None,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._publishes = enable_prefix_caching
        self._max_cached = -(-max_cached_tokens // block_size) if max_cached_tokens else num_blocks
        self._ref_counts = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks whose prefix can still be found."""
        return len(self._cached)

    def num_blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.block_size)

    def allocate(self, seq: Sequence, num_reserved: int = 0) -> bool:
        """Give a sequence without blocks all that its positions need, reusing a cached prefix.

        Sets `num_computed` to the positions the cache holds, always short of the last one.

        Args:
            seq: The sequence.
            num_reserved: Free blocks that must remain afterwards.

        Returns:
            Whether there were enough; if not, nothing has changed.
        """
        hits = self._find_prefix(seq)
        if self.num_free < self._num_needed(seq, hits) + num_reserved:
            return False
        num_new = self.num_blocks_for(seq.num_positions) - len(hits)
        for block_id in hits:
            if not self._ref_counts[block_id]:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1
        seq.block_table = hits + [self._take() for _ in range(num_new)]
        seq.capacity = len(seq.block_table) * self.block_size
        seq.num_published = len(hits)
        seq.num_computed = len(hits) * self.block_size
        return True

    def num_to_free(self, seq: Sequence, holders: list[Sequence], num_reserved: int) -> int | None:
        """How many of these sequences, from the first on, to free so that `allocate` succeeds.

        Args:
            seq: The sequence to allocate for.
            holders: Sequences with blocks.
            num_reserved: Free blocks that must remain; one less for each holder that is freed.

        Returns:
            The number, or None if all of them are too few.
        """
        hits = self._find_prefix(seq)
        missing = self._num_needed(seq, hits) + num_reserved - self.num_free
        # A cached block that only holders have comes free, and is then taken: it changes nothing.
        cached, num_released = set(hits), Counter[int]()
        for index, holder in enumerate(holders):
            if missing <= 0:
                return index
            num_released.update(holder.block_table)
            missing -= 1 + sum(
                num_released[block_id] == self._ref_counts[block_id] and block_id not in cached
                for block_id in holder.block_table
            )
        return len(holders) if missing <= 0 else None

    def _num_needed(self, seq: Sequence, hits: list[int]) -> int:
        """Free blocks that a sequence takes, given those that are cached."""
        num_held = sum(bool(self._ref_counts[block_id]) for block_id in hits)
        return self.num_blocks_for(seq.num_positions) - num_held

    def append_block(self, seq: Sequence) -> int:
        """Give a sequence one more block.

        Raises:
            OutOfBlocksError: No block is free.
        """
        block_id = self._take()
        seq.block_table.append(block_id)
        seq.capacity += self.block_size
        return block_id

    def free(self, seq: Sequence) -> None:
        """Take a sequence's blocks back, the end of its prefix to be evicted first."""
        for block_id in reversed(seq.block_table):
            self._ref_counts[block_id] -= 1
            if not self._ref_counts[block_id]:
                if block_id in self._hash_of_block:
                    self._cached[block_id] = None
                else:
                    self._blank.append(block_id)
        seq.block_table = []
        seq.capacity = seq.num_published = 0
        while len(self._cached) > self._max_cached:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
            self._blank.append(block_id)

    def publish(self, seq: Sequence) -> list[int]:
        """Make the blocks findable whose positions are all scheduled and whose keys are all known.

        Returns:
            The blocks that became findable by this call.
        """
        if not self._publishes:
            return []
        num_full = min(seq.num_computed, len(seq.keys)) // self.block_size
        published = []
        for index in range(seq.num_published, num_full):
            digest, block_id = self._hash_of(seq, index), seq.block_table[index]
            if digest not in self._block_of_hash:
                self._block_of_hash[digest] = block_id
                self._hash_of_block[block_id] = digest
                published.append(block_id)
        seq.num_published = max(seq.num_published, num_full)
        return published

    def unpublish(self, block_ids: Iterable[int]) -> None:
        """Forget what these blocks hold, as after a step that failed to write them."""
        for block_id in block_ids:
            self._forget(block_id)
            if block_id in self._cached:
                del self._cached[block_id]
                self._blank.append(block_id)

    def _find_prefix(self, seq: Sequence) -> list[int]:
        """The blocks of the longest known prefix that leaves at least one position to compute."""
        hits: list[int] = []
        if self._publishes and seq.reads_cache:
            known = min(seq.num_positions - 1, len(seq.keys))
            for index in range(known // self.block_size):
                block_id = self._block_of_hash.get(self._hash_of(seq, index))
                if block_id is None:
                    break
                hits.append(block_id)
        return hits

    def _hash_of(self, seq: Sequence, index: int) -> bytes:
        """The chained hash of a sequence's block, computed once."""
        hashes, size = seq.block_hashes, self.block_size
        for i in range(len(hashes), index + 1):
            parent = hashes[-1] if hashes else seq.root_hash
            hashes.append(hash_block(parent, seq.keys[i * size : (i + 1) * size]))
        return hashes[index]

    def _take(self) -> int:
        """Hand out a free block, one without a known prefix if there is any."""
        if self._blank:
            block_id = self._blank.pop()
        elif self._cached:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
        else:
            raise OutOfBlocksError(f"all {self.num_blocks} KV blocks are held")
        self._ref_counts[block_id] = 1
        return block_id

    def _forget(self, block_id: int) -> None:
        digest = self._hash_of_block.pop(block_id, None)
        if digest is not None:
            del self._block_of_hash[digest]
