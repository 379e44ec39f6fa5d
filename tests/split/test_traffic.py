"""Bytes foretold from shapes are those of real exchanges; labels cross the wire in the fewest bytes, exactly."""

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import tiny_deit, tiny_vit
from helpers.halves import Cut

from snello.codecs.base import Codec, Message, number_type
from snello.config import FinetuneConfig, SplitConfig
from snello.errors import ProtocolError
from snello.split.labels import Targets, labels_from_arrays, labels_to_arrays
from snello.split.traffic import Exchange, exchange_bytes, uncompressed_bytes
from snello.split.wire import frames
from snello.split.wire.frames import UPLINK_KINDS, Kind

CODECS = [
    "none",
    "int4",
    "adc(0.2)+int8",
    "adc(0.2, rule=merge)+int8",
    "topk(0.1)",
    "c3sl(3)",
    "bottlenet(0.2)",
    "fedlite(8)",
]
SHAPE = Exchange(
    num_samples=8, num_tokens=17, embed_dim=32, num_prefix_tokens=1, num_classes=5, labels="server", features=(32,)
)


def make_cut(codec: str, labels: str, model=tiny_vit, num_classes: int = 5, **options) -> Cut:
    config = FinetuneConfig(
        **{"method": "full", "weights": "none", "batch_size": 8, **options},
        split=SplitConfig(cut=2, codec=codec, labels=labels),
    )
    return Cut(model(num_classes=num_classes), config, num_classes=num_classes)


def batch(num: int = 8, num_classes: int = 5):
    generator = torch.Generator().manual_seed(num)
    return torch.randn(num, 3, 16, 16, generator=generator), torch.randint(num_classes, (num,), generator=generator)


def exchange(cut: Cut, num: int = 8) -> tuple[int, int]:
    """Bytes counted up and down in one step of one batch."""
    before = cut.counters.total("uplink"), cut.counters.total("downlink")
    batches = [batch(num, cut.num_classes)]
    cut.begin(0, batches)
    cut.backward(batches, 0, 0, num)
    return cut.counters.total("uplink") - before[0], cut.counters.total("downlink") - before[1]


@pytest.fixture
def written(monkeypatch):
    """Bytes of all buffers that were written, up and down, apart from what counters say."""
    total = [0, 0]
    write = frames.write

    def spy(frame):
        buffers = write(frame)
        total[frame.kind not in UPLINK_KINDS] += len(b"".join(buffers))
        return buffers

    monkeypatch.setattr(frames, "write", spy)
    return total


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("codec", CODECS)
def test_foretold_bytes_are_those_that_are_exchanged(codec, labels, written):
    cut = make_cut(codec, labels)
    for num in (8, 5):
        counted = exchange(cut, num)
        foretold = exchange_bytes(cut.codec, replace(SHAPE, labels=labels, num_samples=num))
        assert foretold == counted
        assert tuple(written) == (cut.counters.total("uplink"), cut.counters.total("downlink"))


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("method", ["head", "last-k"])
@pytest.mark.parametrize("codec", ["none", "int4", "bottlenet(0.2)"])
def test_foretold_bytes_where_the_client_or_both_train_nothing(codec, method, labels, written):
    cut = make_cut(codec, labels, method=method, **({"last_k": 1} if method == "last-k" else {}))
    trains_below = codec.startswith("bottlenet")  # its encoder
    shape = replace(
        SHAPE,
        labels=labels,
        with_gradient=trains_below,
        with_feature_gradient=trains_below or method == "last-k",
    )
    assert exchange_bytes(cut.codec, shape) == exchange(cut) == tuple(written)


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("codec", ["none", "adc(0.2)+int8"])
def test_foretold_bytes_of_two_heads_and_two_prefix_tokens(codec, labels, written):
    cut = make_cut(codec, labels, model=tiny_deit)
    shape = replace(SHAPE, labels=labels, num_tokens=18, num_prefix_tokens=2, features=(2, 32))
    assert exchange_bytes(cut.codec, shape) == exchange(cut) == tuple(written)


@pytest.mark.parametrize("num_classes, width", [(5, 1), (300, 2), (40_000, 4)])
def test_foretold_bytes_of_many_classes(num_classes, width):
    cut = make_cut("adc(0.2)", "server", num_classes=num_classes)
    assert exchange_bytes(cut.codec, replace(SHAPE, num_classes=num_classes)) == exchange(cut)
    assert cut.counters.uplink["labels"] == 8 * width + 3 + 4  # classes, sizes of three rows, share of the step


@pytest.mark.parametrize("labels", ["server", "client"])
def test_without_a_codec_all_is_sent_as_it_is_and_the_ratio_is_one(labels):
    cut = make_cut("none", labels)
    up, down = exchange(cut)
    tokens, features = 8 * 17 * 32 * 4, 8 * 32 * 4
    if labels == "server":
        expected = {"activations": tokens, "labels": 8 + 4}, {"gradients": tokens + 4}
    else:
        expected = {"activations": tokens, "gradients": features}, {"activations": features, "gradients": tokens}
    for counter, kinds in zip((cut.counters.uplink, cut.counters.downlink), expected, strict=True):
        assert {kind: size for kind, size in counter.items() if kind != "headers"} == kinds
        assert 0 < counter["headers"] < 1000
    assert cut.ledger.uncompressed == uncompressed_bytes(replace(SHAPE, labels=labels)) == up + down
    exchange(cut, 5)
    summary = cut.learner.traffic()
    assert summary["ratio"] == 1 and isinstance(summary["ratio"], float)
    assert summary["uplink_bytes"] + summary["downlink_bytes"] == summary["uncompressed_bytes"] > up + down


@pytest.mark.parametrize("method", ["head", "last-k"])
@pytest.mark.parametrize("labels", ["server", "client"])
def test_ratio_is_one_too_where_less_is_trained(labels, method):
    cut = make_cut("none", labels, method=method, **({"last_k": 1} if method == "last-k" else {}))
    exchange(cut)
    assert cut.learner.traffic()["ratio"] == 1


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("codec", CODECS[1:])
def test_with_a_codec_the_ratio_is_counted_over_uncompressed(codec, labels):
    cut = make_cut(codec, labels)
    up, down = exchange(cut)
    assert cut.ledger.uncompressed == uncompressed_bytes(replace(SHAPE, labels=labels))
    assert cut.learner.traffic()["ratio"] == (up + down) / cut.ledger.uncompressed < 1


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("codec", ["none", "adc(0.2)+int8", "bottlenet(0.2)"])
def test_evaluation_is_counted_apart(codec, labels, written):
    cut = make_cut(codec, labels)
    counted = exchange(cut)
    cut.evaluator.eval()
    with torch.no_grad():
        cut.evaluator(batch(6)[0])
    assert (cut.counters.total("uplink"), cut.counters.total("downlink")) == counted
    apart = cut.counters.uplink["evaluation"], cut.counters.downlink["evaluation"]
    assert apart == (written[0] - counted[0], written[1] - counted[1]) and min(apart) > 0
    assert cut.learner.traffic()["eval_bytes"] == sum(apart)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_bytes_are_the_same_where_they_are_only_counted(labels, written):
    cut = make_cut("adc(0.2)+int8", labels)
    counted = exchange(cut)
    silent = make_cut("adc(0.2)+int8", labels)
    silent.link._bytes = False
    assert exchange(silent) == counted == tuple(written)
    assert silent.counters == cut.counters


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("codec", CODECS)
def test_foretelling_leaves_codec_and_random_numbers_as_they_were(codec, training):
    made = Codec(codec, embed_dim=32).train(training)
    state, rng = {name: value.clone() for name, value in made.state_dict().items()}, torch.get_rng_state()
    first = exchange_bytes(made, SHAPE)
    assert torch.equal(torch.get_rng_state(), rng) and made.training == training
    assert exchange_bytes(made, SHAPE) == first and made.metrics() == {}
    assert all(p.grad is None for p in made.parameters())
    changed = [name for name, value in made.state_dict().items() if not torch.equal(value, state[name])]
    assert not changed


# ---------------------------------------------------------------------------------------------------------- labels


def message(groups: torch.Tensor | None, num_rows: int) -> Message:
    return Message({}, torch.zeros(()), groups, num_rows)


def some(num: int, num_rows: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, the largest class among them, and groups of which none is empty."""
    generator = torch.Generator().manual_seed(num)
    labels = torch.randint(num_classes, (num,), generator=generator)
    labels[0] = num_classes - 1
    groups = torch.cat((torch.arange(num_rows), torch.randint(num_rows, (num - num_rows,), generator=generator)))
    return labels, groups[torch.randperm(num, generator=generator)]


@pytest.mark.parametrize("num_classes, dtype", [(5, torch.uint8), (300, torch.int16), (40_000, torch.int32)])
def test_labels_of_unmerged_rows_come_back(num_classes, dtype):
    labels, _ = some(20, 20, num_classes)
    arrays = labels_to_arrays(labels, message(None, 20), num_classes)
    assert arrays.keys() == {"labels"} and arrays["labels"].dtype == dtype
    targets = labels_from_arrays(arrays, num_classes, 20)
    assert torch.equal(targets.values, labels) and targets.values.dtype == torch.int64 and targets.sizes is None


@pytest.mark.parametrize("num, rows", [(20, 1), (20, 6), (20, 20), (300, 7)])
@pytest.mark.parametrize("num_classes, dtype", [(5, torch.uint8), (300, torch.int16), (40_000, torch.int32)])
def test_labels_of_merged_rows_come_back_as_soft_labels(num_classes, dtype, num, rows):
    labels, groups = some(num, rows, num_classes)
    arrays = labels_to_arrays(labels, message(groups, rows), num_classes)
    assert arrays.keys() == {"labels", "labels.sizes"} and arrays["labels"].dtype == dtype
    assert arrays["labels.sizes"].dtype == (torch.uint8 if num < 256 else torch.int16)
    targets, expected = labels_from_arrays(arrays, num_classes, rows), Targets.of(labels, groups, rows, num_classes)
    assert torch.equal(targets.values, expected.values) and torch.equal(targets.sizes, expected.sizes)
    assert targets.values.shape == (rows, num_classes)
    assert torch.equal(targets.sizes, groups.bincount().float())


def test_soft_labels_are_shares_of_the_classes_in_a_row():
    labels, groups = torch.tensor([0, 2, 2, 1, 0]), torch.tensor([1, 0, 0, 1, 1])
    arrays = labels_to_arrays(labels, message(groups, 2), 3)
    assert arrays["labels"].tolist() == [2, 2, 0, 0, 1] and arrays["labels.sizes"].tolist() == [2, 3]
    targets = labels_from_arrays(arrays, 3, 2)
    torch.testing.assert_close(targets.values, torch.tensor([[0.0, 0.0, 1.0], [2 / 3, 1 / 3, 0.0]]))
    assert targets.sizes.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("largest", [0, 1, 255, 256, 2**15 - 1, 2**15, 2**31 - 1])
def test_numbers_travel_in_the_smallest_type_that_holds_them(largest):
    candidates = [torch.uint8, torch.int16, torch.int32]
    smallest = next(dtype for dtype in candidates if torch.iinfo(dtype).max >= largest)
    assert number_type(largest) == smallest
    assert torch.tensor(largest).to(number_type(largest)).item() == largest


def test_missing_labels_are_refused():
    with pytest.raises(ProtocolError, match="without labels"):
        labels_from_arrays({"labels.sizes": torch.tensor([2, 3])}, 5, 2)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("values", [[0, 5], [0, 255], [-1, 0], [0, 2**31], [-(2**63), 0], [[0, 1]], 0], ids=str)
def test_labels_out_of_range_are_refused(values, merged):
    arrays = {"labels": torch.tensor(values)} | ({"labels.sizes": torch.tensor([1, 1])} if merged else {})
    with pytest.raises(ProtocolError, match=r"labels must be in 0\.\.4"):
        labels_from_arrays(arrays, 5, arrays["labels"].numel() if not merged else 2)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [7],
        [9],
        [4, 5],
        [4, 3],
        [8, 0],
        [0, 8],
        [9, -1],
        [-8, 16],
        [2**62, 4],
        8,
        [[4, 4]],
        [[4], [4]],
        [4, 2**63 - 1, 2**63 - 1, 6],  # the sum wraps around to 8
    ],
    ids=str,
)
def test_sizes_that_do_not_add_up_are_refused(values):
    arrays = {"labels": torch.zeros(8, dtype=torch.uint8), "labels.sizes": torch.tensor(values, dtype=torch.int64)}
    with pytest.raises(ProtocolError, match="sizes of merged rows"):
        labels_from_arrays(arrays, 5, arrays["labels.sizes"].numel())


def test_labels_of_other_rows_are_refused_before_memory_is_taken():
    for arrays in (
        {"labels": torch.zeros(8, dtype=torch.uint8)},
        {"labels": torch.zeros(8), "labels.sizes": torch.ones(8)},
    ):
        arrays = {name: value.to(torch.uint8) for name, value in arrays.items()}
        with pytest.raises(ProtocolError, match="labels of 8 rows came with activations of 3"):
            labels_from_arrays(arrays, 2**40, 3)


def test_a_batch_with_nothing_to_merge_sends_its_labels_as_they_are():
    cut = make_cut("adc(0.2)+int8", "server")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert exchange(cut, 2) == exchange_bytes(cut.codec, replace(SHAPE, num_samples=2))
    assert cut.counters.uplink["labels"] == 2 + 4


def test_frames_of_activations_carry_labels_only_where_the_server_has_the_loss():
    for labels, expected in (("server", {"labels", "labels.sizes", "labels.share"}), ("client", set())):
        cut = make_cut("adc(0.2)", labels)
        cut.begin(0.0)
        first = cut.client.start([batch()], step=0, micro=0, num_samples=8, seed=0)
        assert first.kind == Kind.ACTIVATIONS
        assert {name for name in first.arrays if name.startswith("labels")} == expected
