"""Packing, the order of batches, and padding: data.py from sequences on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_ref.data import (
    IGNORED_LABEL,
    BatchOrder,
    Example,
    TokenSequence,
    collate,
    pack,
    split_held_out,
)

# ---------------------------------------------------------------- pack

learned = st.lists(st.integers(0, 9), min_size=1, max_size=9).map(lambda i: TokenSequence(i, i))
masked = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=9).map(
    lambda pairs: TokenSequence(
        [token for token, _ in pairs],
        [token if is_target else IGNORED_LABEL for token, is_target in pairs],
    )
)


@settings(max_examples=60, deadline=None)
@given(st.lists(learned, max_size=8), st.integers(2, 7))
def test_packing_keeps_the_stream_of_tokens(sequences: list[TokenSequence], length: int) -> None:
    stream = [token for sequence in sequences for token in sequence.ids]
    packed = pack(sequences, length)
    result = [token for sequence in packed for token in sequence.ids]
    # A single token left over has nothing to predict it from; all else is kept, in order.
    assert result == (stream[:-1] if len(stream) % length == 1 else stream)
    assert [sequence.labels for sequence in packed] == [sequence.ids for sequence in packed]
    assert all(len(sequence.ids) == length for sequence in packed[:-1])


@settings(max_examples=60, deadline=None)
@given(st.lists(masked, max_size=8), st.integers(2, 7))
def test_packing_drops_only_cuts_without_a_target(
    sequences: list[TokenSequence], length: int
) -> None:
    stream = [pair for s in sequences for pair in zip(s.ids, s.labels, strict=True)]
    expected = []
    for start in range(0, len(stream), length):
        cut = stream[start : start + length]
        if any(label != IGNORED_LABEL for _, label in cut[1:]):
            expected.append(cut)
    packed = pack(sequences, length)
    assert [list(zip(s.ids, s.labels, strict=True)) for s in packed] == expected


# ---------------------------------------------------------------- BatchOrder

orders = st.tuples(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(-5, 2**70),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(orders, st.integers(0, 3))
def test_every_epoch_is_a_permutation_in_batches(arguments: Any, epoch: int) -> None:
    lengths, batch_size, _, _ = arguments
    order = BatchOrder(*arguments)
    full, rest = divmod(len(lengths), batch_size)
    assert order.batches_per_epoch == full + (rest > 0)
    first = epoch * order.batches_per_epoch
    batches = [order.batch(first + index) for index in range(order.batches_per_epoch)]
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    sizes = [len(batch) for batch in batches]
    assert sorted(sizes) == sorted([batch_size] * full + [rest] * (rest > 0))


@settings(max_examples=40, deadline=None)
@given(orders, st.lists(st.integers(0, 60), min_size=2, max_size=6))
def test_a_batch_depends_on_its_position_alone(arguments: Any, positions: list[int]) -> None:
    order = BatchOrder(*arguments)
    for position in positions:
        batch = order.batch(position)
        batch_before = list(batch)
        batch.clear()  # the caller's copy
        assert BatchOrder(*arguments).batch(position) == batch_before == order.batch(position)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=120), st.integers(1, 2), st.integers(0, 9))
def test_grouping_puts_the_batch_of_most_padded_tokens_first(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    order = BatchOrder(lengths, batch_size, seed, group_by_length=True)
    batches = [order.batch(index) for index in range(order.batches_per_epoch)]
    padded = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert padded[0] == max(padded)


def test_a_lone_longest_example_is_not_the_largest_batch() -> None:
    # 101 examples in mega-batches of 100: in one seed of 101 the example of 11 is left to itself,
    # and a batch of two tens needs more memory.
    lengths = [11] + [10] * 100
    assert all(len(BatchOrder(lengths, 2, seed, True).batch(0)) == 2 for seed in range(400))


def test_the_smaller_batch_of_a_grouped_epoch_holds_the_shortest() -> None:
    order = BatchOrder(list(range(10)), 4, 0, group_by_length=True)
    batches = sorted(sorted(order.batch(index)) for index in range(3))
    assert batches == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


def count_padding(lengths: list[int], group_by_length: bool) -> int:
    order = BatchOrder(lengths, 8, 0, group_by_length)
    batches = [order.batch(index) for index in range(order.batches_per_epoch)]
    return sum(len(b) * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in batches)


def test_grouping_reduces_padding_on_skewed_lengths() -> None:
    lengths = [10 + 490 * (index % 16 == 0) for index in range(400)]  # one in 16 is long
    # One mega-batch: 25 long ones fill three batches of 8 and begin a fourth, padded by 7 x 490.
    assert count_padding(lengths, group_by_length=True) == 7 * 490
    # Ungrouped, a batch with any long one pads its short ones: 25 long ones meet 50 batches of 8.
    assert count_padding(lengths, group_by_length=False) > 10 * 7 * 490


def test_grouped_batches_are_shuffled_not_sorted() -> None:
    lengths = list(range(1, 101))
    order = BatchOrder(lengths, 4, 0, group_by_length=True)
    longest = [max(lengths[i] for i in order.batch(index)) for index in range(25)]
    assert sorted(longest, reverse=True) == list(range(100, 0, -4))  # one mega-batch, sorted
    assert longest[1:] != sorted(longest[1:], reverse=True)


def test_mega_batches_let_different_examples_meet_in_each_epoch() -> None:
    order = BatchOrder(list(range(300)), 2, 0, group_by_length=True)
    epochs = [{frozenset(order.batch(e * 150 + i)) for i in range(150)} for e in range(2)]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("group_by_length", [False, True])
def test_seeds_and_epochs_all_give_different_orders(group_by_length: bool) -> None:
    orders = [BatchOrder([1] * 50, 50, seed, group_by_length) for seed in range(3)]
    seen = {tuple(order.batch(epoch)) for order in orders for epoch in range(3)}
    assert len(seen) == 9


def test_global_random_state_is_neither_read_nor_changed() -> None:
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        order = BatchOrder(list(range(30)), 3, 0, True)
        examples = [Example("p", f"text {i}") for i in range(30)]
        results.append((order.batch(4), split_held_out(examples, 0.3, 0)))
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchOrder([], 2, 0, False), "need lengths .* got 0, 2"),
        (lambda: BatchOrder([3], 0, 0, False), "batch_size >= 1, got 1, 0"),
        (lambda: BatchOrder([3], 1, 0, False).batch(-1), "counts batches from 0, got -1"),
    ],
)
def test_an_impossible_order_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- collate


def test_collate_pads_on_the_right() -> None:
    sequences = [TokenSequence([5, 6, 7], [IGNORED_LABEL, 6, 7]), TokenSequence([8], [8])]
    batch = collate(sequences, pad_id=3)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 3, 3]],
        "labels": [[IGNORED_LABEL, 6, 7], [8, IGNORED_LABEL, IGNORED_LABEL]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


@settings(max_examples=40, deadline=None)
@given(st.lists(masked, min_size=1, max_size=6), st.integers(0, 9))
def test_the_mask_selects_the_sequences_again(sequences: list[TokenSequence], pad_id: int) -> None:
    batch = collate(sequences, pad_id)
    shape = (len(sequences), max(len(sequence.ids) for sequence in sequences))
    assert {(tensor.dtype, tuple(tensor.shape)) for tensor in batch.values()} == {
        (torch.int64, shape)
    }
    inside = batch["attention_mask"].bool()
    for row, sequence in enumerate(sequences):
        assert batch["input_ids"][row][inside[row]].tolist() == sequence.ids
        assert batch["labels"][row][inside[row]].tolist() == sequence.labels
    assert (batch["input_ids"][~inside] == pad_id).all()
    assert (batch["labels"][~inside] == IGNORED_LABEL).all()


@pytest.mark.parametrize(("longest", "width"), [(5, 8), (8, 8), (9, 16)])
def test_the_width_is_rounded_up_to_a_multiple_with_masked_padding(
    longest: int, width: int
) -> None:
    sequences = [TokenSequence([1] * longest, [1] * longest), TokenSequence([2, 2], [2, 2])]
    batch = collate(sequences, 7, multiple_of=8)
    assert batch["input_ids"].shape == (2, width)
    assert batch["attention_mask"].sum(dim=1).tolist() == [longest, 2]
    assert batch["input_ids"][batch["attention_mask"] == 0].eq(7).all()
    assert batch["labels"][batch["attention_mask"] == 0].eq(IGNORED_LABEL).all()
