"""The block manager alone: who holds which block, and which prefix is found where."""

import pytest

from nanovllm.batch import Key
from nanovllm.engine.block_manager import BlockManager, hash_block
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import OutOfBlocksError
from nanovllm.sampling_params import SamplingParams

BLOCK_SIZE = 4


def make_seq(keys: list[Key], seq_id: int = 0, root_hash: bytes = b"", **options: bool) -> Sequence:
    return Sequence(seq_id, keys, SamplingParams(), max_keys=1000, root_hash=root_hash, **options)


def run(blocks: BlockManager, keys: list[Key], root_hash: bytes = b"") -> Sequence:
    """Allocate, compute and publish all of a sequence."""
    seq = make_seq(keys, root_hash=root_hash)
    assert blocks.allocate(seq)
    compute(blocks, seq)
    return seq


def compute(blocks: BlockManager, seq: Sequence) -> list[int]:
    seq.num_computed = len(seq.keys)
    return blocks.publish(seq)


def keys_from(start: int, count: int) -> list[Key]:
    return list(range(start, start + count))


@pytest.mark.parametrize("num_full", [1, 2, 5])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_block_count_around_a_boundary(num_full: int, beyond: int) -> None:
    blocks = BlockManager(10, BLOCK_SIZE)
    num_keys = num_full * BLOCK_SIZE + beyond
    seq = make_seq(keys_from(0, num_keys))

    assert blocks.allocate(seq)

    num_blocks = num_full + (beyond > 0)
    assert blocks.num_blocks_for(num_keys) == num_blocks
    assert len(seq.block_table) == len(set(seq.block_table)) == num_blocks
    assert seq.capacity == num_blocks * BLOCK_SIZE
    assert blocks.num_free == 10 - num_blocks
    assert len(compute(blocks, seq)) == num_full - (beyond < 0)

    blocks.free(seq)

    assert seq.block_table == []
    assert seq.capacity == 0
    assert blocks.num_free == 10
    assert blocks.num_cached == num_full - (beyond < 0)


def test_append_block_at_the_boundary() -> None:
    blocks = BlockManager(2, BLOCK_SIZE)
    seq = make_seq(keys_from(0, BLOCK_SIZE))
    blocks.allocate(seq)

    block_id = blocks.append_block(seq)

    assert seq.block_table[1] == block_id != seq.block_table[0]
    assert seq.capacity == 2 * BLOCK_SIZE
    with pytest.raises(OutOfBlocksError, match="all 2 KV blocks are held"):
        blocks.append_block(seq)
    assert seq.capacity == 2 * BLOCK_SIZE


def test_allocation_fails_without_a_trace() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    first = run(blocks, keys_from(0, 2 * BLOCK_SIZE))
    large = make_seq(keys_from(0, 4 * BLOCK_SIZE), seq_id=1)

    assert not blocks.allocate(large)

    assert large.block_table == []
    assert large.num_computed == 0
    assert blocks.num_free == 1
    blocks.free(first)
    assert blocks.num_free == 3


def test_reserved_blocks_stay_free() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    seq = make_seq(keys_from(0, 3 * BLOCK_SIZE))

    assert not blocks.allocate(seq, num_reserved=2)
    assert blocks.allocate(seq, num_reserved=1)
    assert blocks.num_free == 1


def test_cached_blocks_that_are_hit_do_not_count_as_free() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    blocks.free(run(blocks, keys_from(0, 2 * BLOCK_SIZE)))
    seq = make_seq(keys_from(0, 2 * BLOCK_SIZE + 1))

    assert not blocks.allocate(seq, num_reserved=1)
    assert blocks.num_cached == 2
    assert blocks.allocate(seq, num_reserved=0)
    assert blocks.num_free == 0


@pytest.mark.parametrize("num_keys", [1, 3, 4, 5, 7, 8, 9, 12, 13])
def test_a_hit_leaves_one_position_to_compute(num_keys: int) -> None:
    blocks = BlockManager(20, BLOCK_SIZE)
    run(blocks, keys_from(0, 12))
    seq = make_seq(keys_from(0, num_keys), seq_id=1)

    blocks.allocate(seq)

    expected = min((num_keys - 1) // BLOCK_SIZE, 3) * BLOCK_SIZE
    assert seq.num_computed == expected
    assert seq.num_computed < seq.num_positions


def test_shared_blocks_are_counted_and_freed_once_all_let_go() -> None:
    blocks = BlockManager(10, BLOCK_SIZE)
    first = run(blocks, keys_from(0, 10))
    second = make_seq([*keys_from(0, 8), 77], seq_id=1)
    blocks.allocate(second)

    shared = first.block_table[:2]
    assert second.block_table[:2] == shared
    assert second.block_table[2] != first.block_table[2]
    assert [blocks._ref_counts[block_id] for block_id in shared] == [2, 2]
    assert blocks.num_free == 6

    blocks.free(first)
    assert [blocks._ref_counts[block_id] for block_id in shared] == [1, 1]
    assert blocks.num_free == 7
    assert blocks.num_cached == 0

    blocks.free(second)
    assert blocks.num_free == 10
    assert blocks.num_cached == 2


def test_the_tail_of_a_prefix_is_evicted_first() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    blocks.free(run(blocks, keys_from(0, 12)))
    assert len(blocks._find_prefix(make_seq(keys_from(0, 13)))) == 3

    blocks.allocate(make_seq([99]))

    assert len(blocks._find_prefix(make_seq(keys_from(0, 13)))) == 2


def test_the_least_recently_freed_prefix_is_evicted_first() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    prompts = [keys_from(start, 5) for start in (0, 100, 200)]
    seqs = [make_seq(keys[:4]) for keys in prompts]
    for seq in seqs:
        blocks.allocate(seq)
        compute(blocks, seq)
    for seq in (seqs[1], seqs[0], seqs[2]):
        blocks.free(seq)

    taken = make_seq([99])
    blocks.allocate(taken)
    found = [bool(blocks._find_prefix(make_seq(keys))) for keys in prompts]
    assert found == [True, False, True]

    # Using a prefix again makes it the most recent one.
    again = make_seq(prompts[0])
    blocks.free(taken)
    assert blocks.allocate(again)
    blocks.free(again)
    for start in (300, 400):
        blocks.allocate(make_seq(keys_from(start, 2)))
    found = [bool(blocks._find_prefix(make_seq(keys))) for keys in prompts]
    assert found == [True, False, False]


def test_blank_blocks_are_taken_before_cached_ones() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    blocks.free(run(blocks, keys_from(0, 6)))
    assert (blocks.num_free, blocks.num_cached) == (3, 1)

    blocks.allocate(make_seq(keys_from(50, 8)))

    assert blocks.num_cached == 1


def test_a_block_taken_again_forgets_its_prefix() -> None:
    blocks = BlockManager(1, BLOCK_SIZE)
    blocks.free(run(blocks, keys_from(0, 4)))
    other = make_seq(keys_from(50, 2))
    blocks.allocate(other)

    assert blocks._find_prefix(make_seq(keys_from(0, 5))) == []
    blocks.free(other)
    assert (blocks.num_free, blocks.num_cached) == (1, 0)


@pytest.mark.parametrize(
    ("max_cached_tokens", "num_kept"),
    [(None, 4), (0, 4), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (1000, 4)],
)
def test_max_cached_tokens_rounds_up_to_blocks(
    max_cached_tokens: int | None, num_kept: int
) -> None:
    blocks = BlockManager(6, BLOCK_SIZE, max_cached_tokens=max_cached_tokens)
    seq = run(blocks, keys_from(0, 18))

    blocks.free(seq)

    assert blocks.num_cached == num_kept
    assert blocks.num_free == 6
    # What is kept is the beginning: a block without those before it is never found.
    assert len(blocks._find_prefix(make_seq(keys_from(0, 18)))) == num_kept


def test_held_blocks_do_not_count_against_max_cached_tokens() -> None:
    blocks = BlockManager(8, BLOCK_SIZE, max_cached_tokens=4)
    run(blocks, keys_from(0, 12))

    seq = make_seq(keys_from(0, 13), seq_id=1)
    blocks.allocate(seq)

    assert seq.num_computed == 12


def test_without_prefix_caching_nothing_is_published() -> None:
    blocks = BlockManager(8, BLOCK_SIZE, enable_prefix_caching=False)
    first = run(blocks, keys_from(0, 8))
    second = make_seq(keys_from(0, 9), seq_id=1)
    blocks.allocate(second)

    assert second.num_computed == 0
    assert not set(first.block_table) & set(second.block_table)
    blocks.free(first)
    assert blocks.num_cached == 0


def test_a_sequence_may_bypass_the_cache() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    run(blocks, keys_from(0, 8))
    seq = make_seq(keys_from(0, 9), reads_cache=False)

    blocks.allocate(seq)

    assert seq.num_computed == 0
    # The first block with a hash keeps it; the copy is blank once it is free.
    assert compute(blocks, seq) == []
    blocks.free(seq)
    assert blocks.num_cached == 0


def test_publishing_goes_as_far_as_keys_and_positions_do() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    seq = make_seq(keys_from(0, 9))
    blocks.allocate(seq)

    seq.num_computed = 3
    assert blocks.publish(seq) == []
    seq.num_computed = 4
    assert blocks.publish(seq) == seq.block_table[:1]
    assert blocks.publish(seq) == []
    seq.num_computed = 9
    assert blocks.publish(seq) == seq.block_table[1:2]
    # Three positions are scheduled ahead of their keys.
    seq.num_computed, seq.num_positions = 12, 12
    assert blocks.publish(seq) == []
    seq.keys += [9, 10, 11]
    assert blocks.publish(seq) == seq.block_table[2:3]


def test_unpublished_blocks_are_not_found() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    seq = make_seq(keys_from(0, 8))
    blocks.allocate(seq)
    published = compute(blocks, seq)

    blocks.unpublish(published[1:])
    assert len(blocks._find_prefix(make_seq(keys_from(0, 9)))) == 1
    blocks.free(seq)
    assert (blocks.num_free, blocks.num_cached) == (8, 1)

    blocks.unpublish(published)
    assert (blocks.num_free, blocks.num_cached) == (8, 0)
    assert blocks._find_prefix(make_seq(keys_from(0, 9))) == []
    # All blocks can still be handed out, each once.
    everything = make_seq(keys_from(0, 32))
    assert blocks.allocate(everything)
    assert sorted(everything.block_table) == list(range(8))


def test_sequences_below_different_roots_share_nothing() -> None:
    blocks = BlockManager(16, BLOCK_SIZE)
    first = run(blocks, keys_from(0, 8), root_hash=b"salt a")
    other = make_seq(keys_from(0, 9), root_hash=b"salt b")
    same = make_seq(keys_from(0, 9), root_hash=b"salt a")

    blocks.allocate(other)
    blocks.allocate(same)

    assert other.num_computed == 0
    assert same.block_table[:2] == first.block_table


def test_a_block_is_found_only_behind_the_same_prefix() -> None:
    blocks = BlockManager(16, BLOCK_SIZE)
    run(blocks, [1, 1, 1, 1, 7, 7, 7, 7])
    run(blocks, [2, 2, 2, 2, 8, 8, 8, 8])
    seq = make_seq([1, 1, 1, 1, 8, 8, 8, 8, 0])

    blocks.allocate(seq)

    assert seq.num_computed == BLOCK_SIZE


def test_tokens_and_patches_of_the_same_bytes_differ() -> None:
    tokens: list[Key] = [1, 2]
    patches: list[Key] = [(1).to_bytes(8, "little"), (2).to_bytes(8, "little")]
    mixed: list[Key] = [1, patches[1]]
    swapped: list[Key] = [patches[0], 2]

    hashes = {hash_block(b"", keys) for keys in (tokens, patches, mixed, swapped)}

    assert len(hashes) == 4


def test_patches_are_delimited() -> None:
    assert hash_block(b"", [b"ab", b"c"]) != hash_block(b"", [b"a", b"bc"])


def test_hash_depends_on_parent_keys_and_order() -> None:
    base = hash_block(b"parent", [1, 2])

    assert base == hash_block(b"parent", [1, 2])
    assert base != hash_block(b"other", [1, 2])
    assert base != hash_block(b"parent", [2, 1])
    assert base != hash_block(b"parent", [1, 2, 0])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (-1, 4), (4, 0)])
def test_sizes_are_checked(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1, got (0|-1)"):
        BlockManager(num_blocks, block_size)
