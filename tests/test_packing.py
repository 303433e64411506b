"""Two codes a byte: the order of the nibbles, odd counts, and reading single codes."""

from __future__ import annotations

import pytest
import torch
from compare import nibbles, normal, random_bytes

from qlora_ref.packing import gather_codes, pack_codes, unpack_codes, unpack_levels

COUNTS = (0, 1, 2, 3, 63, 64, 65)


def test_even_element_sits_in_the_high_nibble() -> None:
    codes = torch.tensor([0x1, 0x2, 0xF, 0x0], dtype=torch.uint8)
    packed = pack_codes(codes, filler=torch.tensor(9, dtype=torch.uint8))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0x12, 0xF0]


def test_odd_count_ends_with_the_filler_in_the_low_nibble() -> None:
    packed = pack_codes(torch.tensor([3, 4, 5]).to(torch.uint8), torch.tensor(7).to(torch.uint8))
    assert packed.tolist() == [0x34, 0x57]


@pytest.mark.parametrize("n", COUNTS)
def test_unpacking_returns_the_codes(n: int) -> None:
    codes = random_bytes(n) & 15
    packed = pack_codes(codes, filler=torch.tensor(0, dtype=torch.uint8))
    assert packed.shape == ((n + 1) // 2,)
    assert torch.equal(unpack_codes(packed, n), codes)


def test_every_byte_unpacks_to_its_two_hexadecimal_digits() -> None:
    packed = torch.arange(256).to(torch.uint8)
    digits = [int(digit, 16) for byte in range(256) for digit in f"{byte:02x}"]
    assert unpack_codes(packed, 512).tolist() == digits


@pytest.mark.parametrize("n", COUNTS)
def test_levels_are_those_of_the_codes(n: int) -> None:
    packed, codebook = random_bytes((n + 1) // 2), normal(16)
    levels = unpack_levels(packed, codebook, n)
    assert levels.tolist() == [codebook[code].item() for code in nibbles(packed, n)]


def test_codes_are_gathered_at_any_positions() -> None:
    packed = random_bytes(40)
    positions = torch.tensor([[0, 79, 1], [78, 33, 33]])
    codes = nibbles(packed, 80)
    expected = [[codes[i] for i in row] for row in positions.tolist()]
    assert gather_codes(packed, positions).tolist() == expected
