"""What a server keeps of a frozen client: a file that only grows, and samples that are drawn and mixed."""

import errno
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from snello.codecs.base import Codec, Context
from snello.errors import CheckpointError, ProtocolError
from snello.runs.folder import RunFolder
from snello.split.store import FRAMES_EACH, Samples, Store, cutmix, draw
from snello.split.wire import frames
from snello.split.wire.frames import Frame, Kind

BATCH, TOKENS, DIM, CLASSES = 4, 10, 8, 3
CONTEXT = Context(num_prefix_tokens=1)


def tokens(number: int, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, TOKENS, DIM, generator=torch.Generator().manual_seed(number))


class Pile:
    """A store of what a codec makes of random tokens."""

    def __init__(self, folder: Path, codec: str = "none", max_memory: int = 1 << 30) -> None:
        folder.mkdir(exist_ok=True)
        self.sender = Codec(codec, embed_dim=DIM)
        self.decoded = 0
        self.restart(folder, max_memory)

    def restart(self, folder: Path, max_memory: int = 1 << 30) -> None:
        """A store as a process has that has just begun."""
        self.archive = self.sender.archive()
        self.archive.format.restore(None)
        self.store = Store(RunFolder(folder), self, max_memory)

    def is_key(self, frame: Frame) -> bool:
        return self.archive.is_key(frame.arrays)

    def snapshot(self) -> Any:
        return self.archive.format.snapshot()

    def restore(self, state: Any) -> None:
        self.archive.format.restore(state)

    def __call__(self, frame: Frame) -> Samples:
        self.decoded += 1
        z = self.archive.decode(frame.arrays, with_gradient=False).z.bfloat16()
        targets = torch.nn.functional.one_hot(torch.arange(len(z)) % CLASSES, CLASSES).float()
        return Samples(z, targets, torch.full((len(z),), float(frame.step + 1)))

    def frame(self, number: int, batch: int = BATCH) -> Frame:
        return Frame(Kind.ACTIVATIONS, number, 0, dict(self.sender.encode(tokens(number, batch), CONTEXT).arrays))

    def add(self, *numbers: int, batch: int = BATCH) -> list[Frame]:
        """Appends frames, and returns them."""
        made = [self.frame(number, batch) for number in numbers]
        for frame in made:
            self.store.append(frame, self(frame))
        self.decoded = 0
        return made


@pytest.fixture
def pile(tmp_path) -> Callable[..., Pile]:
    return lambda codec="none", **options: Pile(tmp_path / "run", codec, **options)


def same(one: Samples, other: Samples) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("z", "targets", "weights")) and (
        one.sizes is None
    ) == (other.sizes is None)


def whole(made: list[Frame]) -> bytes:
    return b"".join(b"".join(frames.write(frame)) for frame in made)


# ------------------------------------------------------------------------------------------------------------- file


@pytest.mark.parametrize("codec", ["none", "int4", "pca(1)", "pca(1, basis=2)"])
def test_the_file_is_the_frames_one_after_the_other(pile, codec):
    it = pile(codec)
    made = it.add(*range(5))
    assert it.store.path.read_bytes() == whole(made) and len(it.store) == 5
    assert it.store.num_bytes == it.store.path.stat().st_size == sum(sum(frames.sizes(f).values()) for f in made)


@pytest.mark.parametrize("codec", ["none", "pca(1, basis=2)"])
def test_what_is_read_again_is_what_came_bit_for_bit(pile, codec):
    it = pile(codec, max_memory=0)
    made = it.add(*range(6))
    kept = [it(frame) for frame in made]
    assert all(same(it.store.samples(index), kept[index]) for index in (3, 0, 5, 1, 4, 2))


def test_no_more_is_kept_decoded_than_there_is_memory_for(pile):
    one = BATCH * (TOKENS * DIM * 2 + CLASSES * 4 + 4)
    it = pile(max_memory=2 * one)
    it.add(0, 1, 2, 3)
    for index, decoded in ((3, 0), (2, 0), (1, 1), (2, 1), (3, 2), (2, 2)):  # the one used longest ago goes
        it.store.samples(index)
        assert it.decoded == decoded, index
    assert sum(kept.num_bytes for kept in it.store._decoded.values()) == 2 * one
    none = pile(max_memory=0)
    none.store.load_state_dict(it.store.state_dict())
    none.store.samples(1)
    none.store.samples(1)
    assert none.decoded == 1, "those of one frame are kept in any case"


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_what_lies_beyond_a_checkpoint_is_cut_off(pile, tmp_path, at, killed):
    it = pile("pca(1, basis=2)")
    it.add(*range(at))
    state, content = it.store.state_dict(), it.store.path.read_bytes() if at else b""
    sender = it.sender.format.snapshot()
    it.add(*range(at, 7))
    if killed:
        it.restart(tmp_path / "run")
    it.sender.format.restore(sender)
    it.store.load_state_dict(state)
    assert len(it.snapshot()[0][2]) == len(state["keys"]), "no key is known but those in the file"
    assert it.store.path.read_bytes() == content and len(it.store) == at and it.store.state_dict() == state
    it.add(8)
    assert it.store.path.stat().st_size == it.store.num_bytes > len(content)


def test_bases_are_known_again_after_a_restart(pile, tmp_path):
    it = pile("pca(1, basis=2)", max_memory=0)
    made = it.add(*range(7))
    kept, state = [it.store.samples(index) for index in range(7)], it.store.state_dict()
    assert state["keys"] == [0, 2, 4, 6]
    it.restart(tmp_path / "run", 0)
    it.store.load_state_dict(state)
    # The first of a frame that is no key, and of a basis that others have followed.
    assert all(same(it.store.samples(index), kept[index]) for index in (1, 5, 3, 0, 6))
    assert whole(made) == it.store.path.read_bytes()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_the_file_anew(pile, tmp_path):
    it = pile()
    it.add(0, 1, 2)
    it.restart(tmp_path / "run")
    made = it.add(3)
    assert it.store.path.read_bytes() == whole(made)


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def begun_anew(path: Path) -> None:
    path.write_bytes(path.read_bytes()[100:] + bytes(100))


def no_file(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [shortened, flipped, begun_anew, no_file, Path.unlink], ids=lambda f: f.__name__)
def test_a_file_that_is_not_what_it_was(pile, tmp_path, harm):
    it = pile("pca(1)")
    it.add(0, 1, 2)
    state, content = it.store.state_dict(), it.store.path.read_bytes()
    it.add(3)
    before = it.store.path.read_bytes()
    harm(it.store.path)
    left = it.store.path.read_bytes() if it.store.path.is_file() else None
    it.restart(tmp_path / "run")
    if left == before[:-1]:  # all that belongs to the checkpoint is there
        it.store.load_state_dict(state)
        assert it.store.path.read_bytes() == content
        shortened(it.store.path)
        left = it.store.path.read_bytes()
    with pytest.raises(CheckpointError, match=r"store\.frames") as caught:
        it.store.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert left is None or it.store.path.read_bytes() == left, "what is left is not touched: someone may mend it"
    if it.store.path.is_dir():
        it.store.path.rmdir()
    it.store.path.write_bytes(before)
    it.store.load_state_dict(state)
    assert it.store.path.read_bytes() == content


@pytest.mark.parametrize("harm", [shortened, flipped, begun_anew, no_file, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("codec", ["none", "pca(1)"])
def test_a_file_that_is_damaged_while_it_is_in_use(pile, harm, codec):
    it = pile(codec, max_memory=0)
    it.add(0, 1, 2)
    harm(it.store.path)
    with pytest.raises(CheckpointError, match=r"store\.frames"):
        for index in range(3):
            it.store._decoded.clear()
            it.store.samples(index)


def test_a_file_that_is_gone_when_a_checkpoint_is_due(pile):
    it = pile()
    it.add(0)
    it.store.sync()
    it.store.path.unlink()
    with pytest.raises(CheckpointError, match=r"store\.frames"):
        it.store.sync()


def test_more_than_it_may_have_is_refused(pile):
    it = pile()
    it.add(0)
    it.store.max_disk = 2 * it.store.num_bytes
    it.add(1)
    state, frame = it.store.state_dict(), it.frame(2, batch=1)
    with pytest.raises(ProtocolError, match=r"more than the \d+ bytes that it was given"):
        it.store.append(frame, it(frame))
    assert it.store.state_dict() == state and it.store.path.stat().st_size == it.store.num_bytes


def test_a_full_disk_leaves_it_as_it_was(pile, monkeypatch):
    it = pile("pca(1, basis=2)")
    made = it.add(0, 1)
    state, content = it.store.state_dict(), it.store.path.read_bytes()
    opened = Path.open

    class Full:
        """A file into which half of what is written goes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    frame = it.frame(2)
    samples = it(frame)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *args, **options: Full(opened(self, *args, **options)))
        with pytest.raises(CheckpointError, match=r"could not write .*store\.frames: No space left on device"):
            it.store.append(frame, samples)
    assert it.store.state_dict() == state and len(it.store) == 2
    assert it.store.path.read_bytes()[: len(content)] == content and it.store.path.stat().st_size > len(content)
    it.store.append(frame, samples)
    assert it.store.path.read_bytes() == whole([*made, frame]) and it.store.state_dict()["keys"] == [0, 2]


# ------------------------------------------------------------------------------------------------------------- draws


def names(samples: Samples) -> list[float]:
    """Where the samples are from: the frame's number and one."""
    return samples.weights.tolist()


def test_a_draw_has_no_sample_twice(pile):
    it = pile()
    it.add(*range(3))
    drawn = draw(it.store, 12, 0)
    assert (
        len({tuple(z.flatten().tolist()) for z in drawn.z}) == 12
        and sorted(names(drawn)) == [1] * 4 + [2] * 4 + [3] * 4
    )


def test_a_draw_depends_on_its_seed_alone(pile, tmp_path):
    it = pile("pca(1, basis=2)", max_memory=0)
    it.add(*range(12))
    drawn = {seed: draw(it.store, BATCH, seed) for seed in range(20)}
    state = it.store.state_dict()
    it.restart(tmp_path / "run")
    it.store.load_state_dict(state)
    torch.manual_seed(5)
    assert all(same(draw(it.store, BATCH, seed), drawn[seed]) for seed in (7, 3, 19, 0))
    assert len({str(names(samples)) for samples in drawn.values()}) > 15
    assert {name for samples in drawn.values() for name in names(samples)} == set(range(1, 13)), "all are drawn"


def test_a_draw_decodes_few_frames(pile):
    it = pile(max_memory=0)
    it.add(*range(3 * FRAMES_EACH))
    drawn = draw(it.store, BATCH, 0)
    assert it.decoded == FRAMES_EACH and len(drawn.z) == BATCH


def test_a_draw_takes_as_many_frames_as_a_step_has_samples(pile):
    it = pile()
    it.add(*range(3 * FRAMES_EACH))
    num = 2 * FRAMES_EACH * BATCH - 1
    drawn = draw(it.store, num, 0)
    assert len(drawn.z) == num and len(set(names(drawn))) == 2 * FRAMES_EACH


def test_a_draw_of_more_than_there_is_is_all_there_is(pile):
    it = pile()
    it.add(0, 1)
    it.add(2, batch=1)
    assert sorted(names(draw(it.store, 100, 0))) == [1.0] * 4 + [2.0] * 4 + [3.0]


# ------------------------------------------------------------------------------------------------------------- CutMix


def samples(num: int = 64, side: int = 4, prefix: int = 1) -> Samples:
    """Samples whose tokens say which one they are from, and whose targets are all different."""
    which = torch.arange(num, dtype=torch.float32)
    z = which.view(num, 1, 1).expand(num, prefix + side * side, 2).clone()
    return Samples(z, torch.eye(num), torch.ones(num))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("side", [1, 2, 4, 7])
def test_the_share_of_the_label_is_that_of_the_patches(side, prefix):
    plain = samples(side=side, prefix=prefix)
    mixed = cutmix(plain, 1.0, prefix, 0)
    part = (mixed.z[:, prefix:, 0] != plain.z[:, prefix:, 0]).float().mean(dim=1)
    own = mixed.targets.diagonal()
    assert torch.allclose(own, 1 - part) and torch.allclose(mixed.targets.sum(dim=1), torch.ones(64))
    if side > 1:
        assert len(part.unique()) >= side and bool((part > 0).any()) and float(part.mean()) < 0.75
    other = (mixed.targets - torch.diag(own)).argmax(dim=1)
    for index in part.nonzero().flatten().tolist():
        taken = mixed.z[index, prefix:, 0].unique().tolist()
        assert set(taken) <= {float(index), float(other[index])}, "patches are those of two samples as they are"
        if prefix:
            between = torch.lerp(plain.z[index, 0], plain.z[other[index], 0], part[index])
            assert torch.allclose(mixed.z[index, :prefix], between.expand(prefix, 2)), "prefix tokens go by the area"


def test_what_is_cut_in_is_a_square_at_its_own_place():
    plain = samples(side=6)
    plain.z[:, 1:, 1] = torch.arange(36.0)  # where a patch stood
    mixed = cutmix(plain, 1.0, 1, 3)
    assert torch.equal(mixed.z[:, 1:, 1], plain.z[:, 1:, 1])
    sides = set()
    for cut in (mixed.z[:, 1:, 0] != plain.z[:, 1:, 0]).view(-1, 6, 6):
        rows, columns = cut.any(dim=1), cut.any(dim=0)
        length = int(rows.sum())
        assert length == int(columns.sum()) and int(cut.sum()) == length**2
        assert not length or torch.equal(cut, rows.unsqueeze(1) & columns)
        sides.add(length)
    assert sides >= {0, 1, 2, 3, 4, 5}


def test_a_share_of_nothing_changes_nothing():
    plain = samples()
    mixed = cutmix(plain, 0.0, 1, 0)
    assert same(mixed, plain)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_so_many_are_mixed(share):
    plain = samples(num=1000)
    part = 1 - cutmix(plain, share, 1, 0).targets.diagonal()
    assert abs(float((part > 0).float().mean()) - share) < 0.1  # some squares are too small for a patch


def test_cutmix_depends_on_its_seed_alone():
    plain = samples()
    torch.manual_seed(1)
    one, other = cutmix(plain, 0.5, 1, 0), cutmix(plain, 0.5, 1, 1)
    torch.manual_seed(2)
    assert same(cutmix(plain, 0.5, 1, 0), one) and not torch.equal(one.z, other.z)


def test_the_gradient_flows_to_both_samples():
    plain = samples(num=8)
    z = plain.z.clone().requires_grad_()
    mixed = cutmix(Samples(z, plain.targets, plain.weights), 1.0, 1, 0)
    mixed.z[:, 1:].sum().backward()
    assert z.grad is not None and float(z.grad.sum()) == pytest.approx(8 * 16 * 2)
    own = torch.zeros(8).index_add_(0, torch.arange(8), (mixed.z[:, 1:, 0] == plain.z[:, 1:, 0]).float().sum(dim=1))
    assert not torch.equal(z.grad[:, 1:].sum(dim=(1, 2)) / 2, own), "a part of it is another sample's"
    assert math.isclose(float(z.grad[:, 1:].sum()) / 2, 8 * 16)


def test_weights_are_mixed_by_the_area_too():
    plain = samples(num=8)
    plain.weights.copy_(torch.arange(1.0, 9.0))
    mixed = cutmix(plain, 1.0, 1, 0)
    assert torch.allclose(mixed.weights, mixed.targets @ plain.weights)
