"""The entropy coder and the bytes that components travel in: what goes in comes out, and nothing else is taken."""

import hashlib
import itertools
import random
import tracemalloc

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from snello.codecs import components, rans
from snello.codecs.rans import LARGEST, SLOTS, Tables
from snello.errors import ProtocolError

ALPHABET = 2 * LARGEST + 1
SIZES = [0, 1, 2, 3, 255, 2047, 2048, 2049, 5000, 70001]


def laplace(num: int, scale: float, seed: int = 0) -> NDArray[np.int8]:
    """Symbols that become rarer with their size, as those of components do."""
    rng = np.random.default_rng(seed)
    return np.rint(rng.laplace(0, scale, num)).clip(-LARGEST, LARGEST).astype(np.int8)


def rows_of(*lengths: int) -> NDArray[np.int32]:
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def coded(symbols: NDArray[np.int8], rows: NDArray[np.int32]) -> tuple[rans.Bytes, rans.Bytes]:
    """The parameters of tables that fit the symbols, and their bytes."""
    where = rans.places(symbols, rows)
    parameters = rans.fit(rans.histograms(where, int(rows.max()) + 1 if len(rows) else 0))
    return parameters, rans.encode(where, Tables.of(parameters))


def entropy(symbols: NDArray[np.int8], rows: NDArray[np.int32]) -> float:
    """Bytes that an ideal coder takes which knows how often each symbol occurs in each row."""
    counts = rans.histograms(rans.places(symbols, rows), int(rows.max()) + 1).astype(float)
    shares = counts / counts.sum(axis=1, keepdims=True)
    return float(-(counts * np.log2(np.where(counts > 0, shares, 1))).sum() / 8)


FITTED = [[39, 0, 1], [0, 0, 1], [0, 0, 1], [7, 212, 10], [3, 228, 17]]
WRITTEN = (4832, "a8920b981c6142a6")
"""Bytes and digest of what the table of FITTED writes."""
TABLES = "b0abc1dea7d5a6a1"
"""Digest of many tables."""


# ------------------------------------------------------------------------------------------------------------ symbols


SYMBOLS = {
    "few": lambda num: laplace(num, 0.2),
    "some": lambda num: laplace(num, 3),
    "wide": lambda num: laplace(num, 60),
    "uniform": lambda num: np.random.default_rng(0).integers(-LARGEST, LARGEST + 1, num).astype(np.int8),
    "ones": lambda num: np.ones(num, np.int8),
    "highest": lambda num: np.full(num, LARGEST, np.int8),
    "lowest": lambda num: np.full(num, -LARGEST, np.int8),
    "either end": lambda num: np.where(np.arange(num) % 2, LARGEST, -LARGEST).astype(np.int8),
    "one that is not zero": lambda num: (np.arange(num) == num // 2).astype(np.int8),
}


@pytest.mark.parametrize("num", SIZES)
@pytest.mark.parametrize("name", SYMBOLS)
def test_there_and_back(name, num):
    symbols = SYMBOLS[name](num)
    rows = np.zeros(num, np.int32)
    parameters, data = coded(symbols, rows)
    decoded = rans.decode(data, rows, Tables.of(parameters))
    assert decoded.dtype == np.int8 and np.array_equal(decoded, symbols)
    assert data.dtype == np.uint8 and data.ndim == 1


def test_tables_of_their_own_for_each_row():
    lengths = [1, 4000, 0, 17, 9000]
    parts = [laplace(num, scale, 3) for num, scale in zip(lengths, (50, 0.3, 1, 120, 4), strict=True)]
    symbols, rows = np.concatenate(parts), rows_of(*lengths)
    parameters, data = coded(symbols, rows)
    assert len({bytes(row) for row in parameters}) == len(lengths)
    assert np.array_equal(rans.decode(data, rows, Tables.of(parameters)), symbols)
    mixed = np.random.default_rng(1).permutation(len(rows))  # in any order
    parameters, data = coded(symbols[mixed], rows[mixed])
    assert np.array_equal(rans.decode(data, rows[mixed], Tables.of(parameters)), symbols[mixed])


def test_zeros_alone_cost_next_to_nothing():
    rows, tables = np.zeros(100_000, np.int32), Tables.of(np.array([[255, 0, 1]], np.uint8))
    data = rans.encode(rans.places(np.zeros(100_000, np.int8), rows), tables)
    assert len(data) < 2 * rans.num_lanes(100_000) * 2 + 40
    assert not rans.decode(data, rows, tables).any()


@pytest.mark.parametrize("scale", [0.25, 0.5, 1, 2, 8, 25])
def test_close_to_the_entropy(scale):
    """Of a frame's size, with 100 tables; the bytes of the coder's many lanes included."""
    lengths = [128 * 30] * 100
    symbols = np.concatenate([laplace(num, scale * (1.3 - row / 100), row) for row, num in enumerate(lengths)])
    rows = rows_of(*lengths)
    parameters, data = coded(symbols, rows)
    ideal = entropy(symbols, rows)
    assert ideal < len(data) < 1.03 * ideal + 2 * rans.num_lanes(len(symbols)), len(data) / ideal
    assert parameters.nbytes == 3 * len(lengths)


def test_a_normal_distribution_costs_little_more():
    rng, rows = np.random.default_rng(0), np.zeros(400_000, np.int32)
    for deviation, most in ((0.5, 1.02), (2, 1.06), (10, 1.06)):
        symbols = np.rint(rng.normal(0, deviation, 400_000)).clip(-LARGEST, LARGEST).astype(np.int8)
        _, data = coded(symbols, rows)
        assert len(data) < most * entropy(symbols, rows), deviation


def test_the_bytes_are_those_of_every_version():
    """Both sides of a network may have other versions of snello: whoever changes this changes the protocol."""
    lengths = [3000, 0, 1, 7000, 500]
    values = [(index * index + 3 * index) % 97 % (row * row + 2) for row, n in enumerate(lengths) for index in range(n)]
    signs = [1 - 2 * (index % 2) for index in range(len(values))]
    symbols, rows = (np.array(values) * signs).astype(np.int8), rows_of(*lengths)
    parameters, data = coded(symbols, rows)
    assert parameters.tolist() == FITTED
    assert (len(data), hashlib.sha256(data.tobytes()).hexdigest()[:16]) == WRITTEN


def test_all_tables_are_those_of_every_version():
    total = hashlib.sha256()
    shares = np.arange(256).reshape(8, 32)
    for largest, some in itertools.product((1, 2, 9, 30, 127), shares):
        parameters = np.array([(*pair, largest) for pair in itertools.product(some, range(256))], np.uint8)
        tables = Tables.of(parameters)
        frequency = tables.frequency.reshape(-1, ALPHABET).astype(np.int64)
        there = np.abs(np.arange(ALPHABET) - LARGEST) <= largest
        assert (frequency[:, there] >= 1).all() and not frequency[:, ~there].any()
        assert (frequency.sum(axis=1) == SLOTS).all() and frequency.max() < SLOTS
        assert (frequency == frequency[:, ::-1]).all()
        magnitudes = frequency[:, LARGEST + 1 :]
        assert (np.diff(magnitudes, axis=1) <= 0).all()  # rarer and rarer
        start = tables.start.reshape(-1, ALPHABET)
        assert (start == frequency.cumsum(axis=1) - frequency).all()
        total.update(tables.frequency.tobytes())
    assert total.hexdigest()[:16] == TABLES


def test_a_slot_says_what_its_table_does():
    parameters = np.array([[0, 255, 127], [200, 3, 1], [90, 128, 12]], np.uint8)
    tables = Tables.of(parameters)
    slots = tables.slots.reshape(3, SLOTS)
    for row, table in enumerate(slots):
        for slot in (0, 1, 700, SLOTS // 2, SLOTS - 1):
            symbol = int(table[slot] & 0xFF)
            frequency, start = (int(x[row * ALPHABET + symbol]) for x in (tables.frequency, tables.start))
            assert start <= slot < start + frequency
            assert table[slot] >> 20 == frequency and (table[slot] >> 8 & (SLOTS - 1)) == slot - start


@pytest.mark.parametrize("largest", [0, 128, 255])
def test_impossible_tables(largest):
    with pytest.raises(ProtocolError, match="largest symbol"):
        Tables.of(np.array([[3, 3, 5], [3, 3, largest]], np.uint8))


def test_shares_reach_from_nearly_all_to_almost_nothing():
    assert len(rans.SHARES) == 256 and (np.diff(rans.SHARES) < 0).sum() > 200 and (np.diff(rans.SHARES) <= 0).all()
    assert rans.SHARES[0] == 4000 < SLOTS and rans.SHARES[-1] == 1


def refused(data: bytes | rans.Bytes, rows: NDArray[np.int32], parameters: rans.Bytes) -> None:
    """The bytes are refused, by a ProtocolError and nothing else."""
    with pytest.raises(ProtocolError):
        rans.decode(np.frombuffer(bytes(data), np.uint8), rows, Tables.of(parameters))


class TestHostile:
    symbols, rows = laplace(30_000, 2), rows_of(10_000, 20_000)
    parameters, data = coded(symbols, rows)

    @pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 8, 1000, 5000])
    def test_cut_off(self, num):
        refused(self.data[:-num], self.rows, self.parameters)
        refused(self.data[num:], self.rows, self.parameters)

    @pytest.mark.parametrize("num", [1, 2, 4, 8, 1000, 200_000])
    def test_too_long(self, num):
        refused(bytes(self.data) + bytes(num), self.rows, self.parameters)
        refused(bytes(num) + bytes(self.data), self.rows, self.parameters)
        refused(bytes(self.data[:600]) + bytes(self.data), self.rows, self.parameters)

    def test_nothing_at_all(self):
        refused(b"", self.rows, self.parameters)
        refused(b"", self.rows[:0], self.parameters)

    def test_other_numbers_of_symbols(self):
        for num in (0, 1, 29_999):
            refused(self.data, self.rows[:num], self.parameters)
        refused(self.data, np.append(self.rows, self.rows), self.parameters)

    def test_other_tables(self):
        for change in ([1, 0, 0], [0, 1, 0], [0, 0, 1]):
            refused(self.data, self.rows, self.parameters + np.array(change, np.uint8))
        refused(self.data, self.rows, self.parameters[::-1])

    def test_flipped_bits(self):
        """What is damaged is found where it ends, but for one in 65536 that happens to end well."""
        rng, found = random.Random(1), 0
        for _ in range(80):
            broken = bytearray(self.data.tobytes())
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            refused(broken, self.rows, self.parameters)
            found += 1
        assert found == 80

    def test_random_bytes(self):
        rng = random.Random(2)
        for _ in range(100):
            length = rng.choice([rng.randint(0, 200), rng.randint(200, 40_000), len(self.data)])
            refused(rng.randbytes(length), self.rows, self.parameters)

    def test_states_that_no_coder_has(self):
        lanes = rans.num_lanes(len(self.rows))
        for fill in (0, 255):
            broken = self.data.copy()
            broken[: 4 * lanes] = fill
            refused(broken, self.rows, self.parameters)

    def test_the_end_is_where_the_coder_began(self):
        """The last words of all are of the states that it begins with."""
        rows = np.zeros(3, np.int32)
        tables = Tables.of(np.array([[0, 0, 1]], np.uint8))
        data = rans.encode(rans.places(np.array([1, 0, -1], np.int8), rows), tables)
        right = data.view(np.uint32)[0]
        others = 0
        for state in {int(right) ^ 1 << bit for bit in range(32)}:
            refused(np.array([state], np.uint32).tobytes(), rows, np.array([[0, 0, 1]], np.uint8))
            others += 1
        assert others == 32 and len(data) == 4

    def test_it_takes_no_more_memory_than_the_symbols_do(self):
        num = 2_000_000
        rows = np.zeros(num, np.int32)
        parameters = np.array([[255, 0, 1]], np.uint8)  # a word in 20000 symbols: few bytes for many
        data = rans.encode(rans.places(np.zeros(num, np.int8), rows), Tables.of(parameters))
        assert len(data) < num / 100
        tracemalloc.start()
        try:
            rans.decode(data, rows, Tables.of(parameters))
            assert tracemalloc.get_traced_memory()[1] < 8 * num
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            refused(data[:-2], rows, parameters)
            refused(bytes(data) + bytes(8 * num), rows, parameters)
            assert tracemalloc.get_traced_memory()[1] - before < 20 * num
        finally:
            tracemalloc.stop()

    def test_tables_take_little_more_than_their_slots(self):
        parameters = np.tile(np.array([[3, 250, 127]], np.uint8), (1000, 1))
        tracemalloc.start()
        try:
            Tables.of(parameters).slots.sum()
            assert tracemalloc.get_traced_memory()[1] < 3 * 1000 * SLOTS * 4
        finally:
            tracemalloc.stop()


# --------------------------------------------------------------------------------------------------------- components


B, N, K = 6, 10, 7
GROUPS = {
    "one": (np.arange(N),),
    "prefix and patches": (np.arange(1), np.arange(1, N)),
    "no prefix": (np.arange(0), np.arange(N)),
    "bands": (np.array([0]), np.array([1, 4, 7]), np.array([9, 2]), np.array([3, 5, 6, 8])),
}


def codes_of(*, largest: int = 5, seed: int = 0) -> components.Codes:
    """Codes (B, N, K), of which the last components are zero in some groups."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-largest, largest + 1, (B, N, K)).astype(np.int32)
    codes[..., -1] = 0
    codes[:, 1:, -2] = 0
    return codes


def parts_of(codes: components.Codes, groups: components.Groups) -> tuple[rans.Bytes, dict[str, torch.Tensor]]:
    side, arrays = components.write(codes, groups)
    return np.frombuffer(side, np.uint8), dict(arrays)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("largest", [0, 1, 5, 126, 127, 128, 100_000, 2**31 - 128])
def test_components_there_and_back(name, largest):
    codes, groups = codes_of(largest=largest), GROUPS[name]
    codes[2, 3, 0], codes[0, 0, 1] = largest, -largest
    side, arrays = parts_of(codes, groups)
    assert ("indices.outliers" in arrays) == (largest >= LARGEST)
    assert np.array_equal(components.read(side, arrays, groups, (B, N, K)), codes)
    num_used = sum((codes[:, tokens] != 0).any(axis=(0, 1)).sum() for tokens in groups)
    assert len(side) == -(-len(groups) * K // 8) + 3 * num_used


def test_components_that_are_not_there_cost_a_bit():
    codes = np.zeros((B, N, 800), np.int32)
    codes[..., 3] = 1
    side, arrays = parts_of(codes, GROUPS["bands"])
    assert len(side) == 4 * 100 + 4 * 3 and arrays["values"].numel() < 20


def changed_side(side: rans.Bytes, at: int, value: int) -> rans.Bytes:
    side = side.copy()
    side[at] = value
    return side


class TestHostileComponents:
    codes, groups = codes_of(largest=200), GROUPS["bands"]
    side, arrays = parts_of(codes, groups)
    mask_bytes = -(-len(groups) * K // 8)

    def refused(self, side: rans.Bytes, **arrays: torch.Tensor | None) -> None:
        named = {"values": arrays.get("values"), "indices.outliers": arrays.get("outliers")}
        values = {**self.arrays, **{name: value for name, value in named.items() if value is not None}}
        if "outliers" in arrays and arrays["outliers"] is None:
            del values["indices.outliers"]
        with pytest.raises(ProtocolError):
            components.read(side, values, self.groups, (B, N, K))

    def test_it_is_taken_as_it_is(self):
        assert np.array_equal(components.read(self.side, self.arrays, self.groups, (B, N, K)), self.codes)

    def test_masks(self):
        for at in range(self.mask_bytes):
            for bit in range(8):
                if 8 * at + bit < len(self.groups) * K:
                    self.refused(changed_side(self.side, at, self.side[at] ^ 128 >> bit))
        self.refused(changed_side(self.side, 0, 0))
        swapped = self.side.copy()
        bits = np.unpackbits(swapped[: self.mask_bytes])
        bits[[5, 6]] = bits[[6, 5]]  # as many tables, for other components
        swapped[: self.mask_bytes] = np.packbits(bits)
        if not np.array_equal(swapped, self.side):
            assert not np.array_equal(components.read(swapped, self.arrays, self.groups, (B, N, K)), self.codes)

    def test_lengths(self):
        for num in (0, 1, self.mask_bytes - 1, self.mask_bytes, self.mask_bytes + 1, len(self.side) - 1):
            self.refused(self.side[:num])
        for more in (1, 2, 3, 300):
            self.refused(np.append(self.side, np.ones(more, np.uint8)))

    def test_parameters(self):
        for at in range(self.mask_bytes, len(self.side)):
            self.refused(changed_side(self.side, at, self.side[at] ^ 1))
        for largest in (0, 128, 255):
            self.refused(changed_side(self.side, self.mask_bytes + 2, largest))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.float32, torch.bfloat16, torch.bool])
    def test_words_of_another_type(self, dtype):
        self.refused(self.side, values=self.arrays["values"].to(dtype))

    def test_words_of_another_shape(self):
        values = self.arrays["values"]
        for other in (values[None], values[:0], values[:-2], torch.cat([values, values]), values[0]):
            self.refused(self.side, values=other)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64, torch.float32, torch.bfloat16])
    def test_outliers_of_another_type(self, dtype):
        self.refused(self.side, outliers=self.arrays["indices.outliers"].to(dtype))

    def test_outliers_of_another_number(self):
        rare = self.arrays["indices.outliers"]
        for other in (None, rare[:0], rare[:-1], torch.cat([rare, rare[:1]]), rare[None], rare[0]):
            self.refused(self.side, outliers=other)

    def test_outliers_where_none_are_due(self):
        codes = codes_of()
        side, arrays = parts_of(codes, self.groups)
        arrays["indices.outliers"] = torch.zeros(1, dtype=torch.int32)
        with pytest.raises(ProtocolError, match="outliers"):
            components.read(side, arrays, self.groups, (B, N, K))

    def test_shapes_and_groups_of_another_frame(self):
        for shape in ((B + 1, N, K), (B - 1, N, K), (B, N, K + 1), (B, N, K - 1)):
            with pytest.raises(ProtocolError):
                components.read(self.side, self.arrays, self.groups, shape)
        for groups in (GROUPS["one"], GROUPS["no prefix"]):
            with pytest.raises(ProtocolError):
                components.read(self.side, self.arrays, groups, (B, N, K))
