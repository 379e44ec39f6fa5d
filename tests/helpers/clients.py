"""A client half in training whose frames the test carries, and the sessions of a server that it talks to."""

import copy
import hashlib
import json
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from snello.codecs import codec_class
from snello.config import FinetuneConfig, ServeConfig, SplitConfig
from snello.config.registry import CODECS
from snello.config.values import from_dict
from snello.models import create_model
from snello.runs.folder import RunFolder
from snello.split.build import cut_model, make_codec
from snello.split.client.link import NetworkLink
from snello.split.learner import SplitLearner
from snello.split.server.registry import Registry, session_name
from snello.split.server.sessions import Answer, TrainingSession
from snello.split.wire import frames
from snello.split.wire.frames import Frame, Kind, control, control_values, weights_of
from snello.split.wire.handshake import Hello, RunShape, Welcome, parse, recipe_values
from snello.train.place import Setup
from snello.train.schedule import Schedule
from snello.vit import ViT

CLASSES = "abc"
CODEC_TEXTS = [f"{name}({codec_class(name).example})" if codec_class(name).example else name for name in CODECS]
SMALL: dict[str, Any] = {
    "model": "test_vit",
    "weights": "none",
    "image_size": 48,
    "method": "full",
    "epochs": 2,
    "batch_size": 4,
    "lr": 1e-2,
    "warmup": 0.0,
    "device": "cpu",
    "precision": "fp32",
    "attention": "explicit",
    "insecure_loopback": True,
}


def serve_config(**options: Any) -> ServeConfig:
    """A server of timm's test ViT, cut after block 4 of 6; options of the cut and of the server."""
    names = ("cut", "codec", "labels", "client", "send_epochs", "replay", "cutmix")
    of_cut = {name: options.pop(name) for name in names if name in options}
    return ServeConfig(
        **{**SMALL, **options}, split=SplitConfig(**{"cut": 4, "codec": "none", "eval_codec": "int8", **of_cut})
    )


def registry_in(folder: Path, **options: Any) -> Registry:
    """Sessions in a folder of their own."""
    return Registry(serve_config(**options), RunFolder(folder / "server"))


_MODELS: dict[Any, torch.nn.Module] = {}


def known_model(*args: Any) -> torch.nn.Module:
    """`create_model`, which takes a tenth of a second, once for every seed and device."""
    key = (args, torch.initial_seed(), torch.empty(0).device)
    if key not in _MODELS:
        _MODELS[key] = create_model(*args)
    return copy.deepcopy(_MODELS[key])


@pytest.fixture(scope="module")
def known_models() -> Iterator[None]:
    """Servers make their models once for every seed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("snello.split.server.half.create_model", known_model)
        yield


class Client:
    """A client half in training on made-up pictures, whose frames the test carries.

    Ten pictures: batches of 4, 4 and 2, two epochs.
    """

    def __init__(
        self,
        registry: Registry,
        name: str = "ann",
        *,
        seed: int = 0,
        num_train: int = 10,
        classes: str = CLASSES,
        **hello: Any,
    ) -> None:
        values = {**recipe_values(registry.config), "compare": False, "device": "cpu", "attention": "explicit"}
        self.config = replace(from_dict(FinetuneConfig, values), weights="none", workers=0)
        self.registry, self.name, self.seed = registry, name, seed
        self.id = uuid.uuid4().hex
        self.place = session_name(name, self.id)
        with torch.device("meta"):
            vit = ViT(known_model(self.config.model, "none", 3, self.config.image_size))
        vit.set_attention_paths(["explicit"] * vit.depth)
        terms = registry.sizes(3).terms
        self.schedule = Schedule.of(self.config, num_train)
        codec = make_codec(self.config, terms.codec, vit.embed_dim)
        lower, _ = cut_model(vit, self.config)
        lower.model.to_empty(device="cpu")
        setup = Setup(self.config, 3, torch.device("cpu"), registry.precision, self.schedule, terms.codec)
        self.remote = SplitLearner(vit, lower, codec, setup, NetworkLink(SimpleNamespace()))  # type: ignore[arg-type]
        for value in self.remote.half.vit.model.state_dict().values():
            value.zero_()  # until the starting weights come it is whatever was in memory
        self.schedule = replace(self.schedule, buffer=self.remote.buffer)
        self.terms, self.plan = terms, RunShape(num_train, self.schedule.total_steps, classes)
        self.sequence = 0
        self.incarnation = ""
        self.session: TrainingSession

    def hello(self, **values: Any) -> Hello:
        return Hello("train", **{"session": self.id, "terms": self.terms, "plan": self.plan, **values})

    def open(self, **values: Any) -> Welcome:
        """Opens the session, and loads the starting weights where they come."""
        _, session, frame = self.registry.open(self.name, self.hello(**values))
        assert isinstance(session, TrainingSession)
        welcome = parse(Welcome, control_values(frame))
        if welcome.fresh:
            self.load(frame)
        self.session, self.incarnation = session, welcome.incarnation
        return welcome

    def load(self, frame: Frame) -> None:
        """Begins with the weights that the server sent, where it did."""
        if weights := weights_of(frame):
            self.remote.half.vit.model.load_state_dict(weights)

    def batches(self, step: int, micro: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pictures and labels of a micro-step, a function of the client's seed and their number."""
        result = []
        for number in self.schedule.batches_of(step, micro):
            in_epoch = number % self.schedule.batches_per_epoch
            size = min(self.config.batch_size, self.schedule.num_train - in_epoch * self.config.batch_size)
            generator = torch.Generator().manual_seed(1000 * self.seed + in_epoch)
            images = torch.randn(size, 3, 48, 48, generator=generator)
            result.append((images, torch.randint(3, (size,), generator=generator)))
        return result

    def step(self) -> Generator[Frame, Frame, None]:
        """One optimizer step: yields the frames to be carried, is sent the answers."""
        remote, step = self.remote, self.remote.step
        remote.begin(step, self.schedule.progress(step), self.schedule.num_micro(step))
        for micro in range(self.schedule.num_micro(step)):
            number = self.schedule.batches_of(step, micro).start
            num_samples = self.schedule.num_samples(step)
            batches = self.batches(step, micro)
            frame: Frame | None = remote.half.start(
                batches, step=step, micro=micro, num_samples=num_samples, seed=77 + number
            )
            while frame is not None:
                frame = remote.half.answer((yield frame))
        remote.clip(self.config.clip_norm)
        remote.update(self.schedule.lr(step, self.config.lr, self.config.warmup))

    def counted(self, carry: Callable[[Frame], Frame]) -> Callable[[Frame], Frame]:
        """`carry`, whose frames this side counts."""
        self.remote.link.exchange = carry  # type: ignore[method-assign]
        return self.remote.exchange

    def carry(self, frame: Frame) -> Frame:
        """Over the bytes to the session and back, with what the server does after its answer."""
        return answer_of(take(self.session, frame))

    def train(self, steps: int = 100, carry: Callable[[Frame], Frame] | None = None) -> None:
        """So many steps, or to the end."""
        for _ in range(min(steps, self.plan.total_steps - self.remote.step)):
            conversation = self.step()
            frame = next(conversation)
            while True:
                try:
                    frame = conversation.send((carry or self.carry)(frame))
                except StopIteration:
                    break

    def request(self, frame: Frame, step: int | None = None) -> Frame:
        """A frame between steps, with a number of its own."""
        self.sequence += 1
        step = self.remote.step if step is None else step
        return Frame(frame.kind, step, self.sequence, frame.arrays, frame.flags)

    def evaluation(self) -> Frame:
        """Activations of held-out pictures."""
        self.remote.half.train(False)
        with torch.no_grad():
            frame = self.remote.half.evaluate(torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(9)))
        self.remote.half.train(True)
        return self.request(frame)

    def save(self, **values: Any) -> Frame:
        return self.request(control(Kind.SAVE, values))

    def left(self) -> int:
        """The steps that the server says it has left to take by itself."""
        left: int = control_values(self.carry(self.request(control(Kind.WAIT, {}))))["left"]
        return left

    def keep(self) -> "Kept":
        """What a checkpoint of this side holds."""
        remote = self.remote
        parts = remote.half.vit.model.state_dict(), remote.half.optimizer.state_dict(), remote.codec.state_dict()
        return Kept(json.dumps(remote.state_dict()), *copy.deepcopy(parts))

    def go_back(self, kept: "Kept") -> None:
        """Stands where this side did when `kept` was made."""
        own, optimizer, codec = copy.deepcopy((kept.model, kept.optimizer, kept.codec))
        self.remote.half.vit.model.load_state_dict(own)
        self.remote.half.optimizer.load_state_dict(optimizer)
        self.remote.codec.load_state_dict(codec)
        self.remote.load_state_dict(json.loads(kept.state))

    @property
    def weights(self) -> str:
        """Digest of this half."""
        return digest(self.remote.half.vit.model.state_dict())


@dataclass(frozen=True)
class Kept:
    """A checkpoint of a client."""

    state: str
    model: dict[str, Any]
    optimizer: dict[str, Any]
    codec: dict[str, Any]


def to_bytes(frame: Frame) -> bytearray:
    return bytearray(b"".join(frames.write(frame)))


def take(session: Any, frame: Frame) -> Answer:
    """What a server does with a frame."""
    answer: Answer = session.take(to_bytes(frame))
    if answer.after is not None and not answer.repeated:
        answer.after()
    return answer


def answer_of(answer: Answer) -> Frame:
    return frames.read([b"".join(answer.chunks)])


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a structure, those of a mapping in the order of its keys as text."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from tensors_in(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def digest(value: Any) -> str:
    """Of all tensors in a structure, bit for bit."""
    total = hashlib.sha256()
    for tensor in tensors_in(value):
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def weights(session: TrainingSession) -> str:
    """Digest of all that a session's steps move: weights, buffers, moments."""
    upper = session.model
    return digest([upper.half.vit.model.state_dict(), upper.codec.state_dict(), upper.half.optimizer.state_dict()])


def picture(session: TrainingSession) -> dict[str, Any]:
    """All that must be the same before and after a frame that was refused or repeated."""
    upper, steps = session.model, session.steps
    return {
        "weights": weights(session),
        "gradients": digest([p.grad for p in upper.half.parameters() if p.grad is not None]),
        "own": digest(steps._gradients),
        "place": (steps.step, steps.micro, steps.awaited, session.accuracy, session.finished, session.failed),
        "ledger": session.ledger.state_dict(),
        "method": upper.half.method.state_dict(),
        "checkpoints": session.checkpoints.steps(),
        "rows": (session.run.metrics_file.read_text() if session.run.metrics_file.exists() else "").count("\n"),
    }


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What a session with some options ends with when nothing disturbs it."""
    known: dict[str, dict[str, Any]] = {}

    def get(steps: int = 100, **options: Any) -> dict[str, Any]:
        key = repr((steps, sorted(options.items(), key=lambda item: item[0])))
        if key not in known:
            client = Client(registry_in(tmp_path_factory.mktemp("undisturbed"), **options))
            client.open()
            client.train(steps)
            counters = client.session.ledger.state_dict()
            known[key] = {"server": weights(client.session), "client": client.weights, "ledger": counters}
        return known[key]

    return get


def ended(client: Client) -> dict[str, Any]:
    return {
        "server": weights(client.session),
        "client": client.weights,
        "ledger": client.session.ledger.state_dict(),
    }
