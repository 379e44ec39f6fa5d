"""One Vision Transformer in two halves that know of each other only the frames they exchange.

    labels on the server      activations, labels ->                     <- gradients, loss
    labels on the client      activations ->  <- features                feature gradients ->  <- gradients
    (U-shape)

An exchange is a conversation: the client starts it, and each side answers the other's frame until the client has
nothing more to say. Where the frames travel is another's business.

B: samples, N: tokens, D: embed dim, R: rows after merging (B where nothing merges), C: classes.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from snello.codecs.base import Codec, Context, Decoded, Message
from snello.codecs.frequencies import grid_side
from snello.config import Recipe
from snello.data.loaders import Batch
from snello.devices import Precision, autocast
from snello.errors import ConfigError, ProtocolError, SnelloWarning
from snello.methods import make_method
from snello.seeds import mix
from snello.split.labels import Labels, Targets, labels_from_arrays, labels_to_arrays, share_of
from snello.split.store import MIXED, Samples, cutmix
from snello.split.wire.frames import NOTHING, Flags, Frame, Kind
from snello.train.optim import make_optimizer, set_lr
from snello.vit import Counting, ViT


class Half:
    """What both sides have: a part of the model on its device, its method, its optimizer, and the codec.

    Each side's optimizer holds all parameters of its part and of the codec's; labels and the classifier's loss are on
    one of them. What crosses the cut is free of the factor on the loss against underflow in half precision.

    Raises:
        ConfigError: where codec, method and model do not fit each other.
    """

    side: Literal["client", "server"]
    codec_part: str
    """What the names of the codec's weights on this side contain."""
    _pending: object | None = None  # the exchange under way

    def __init__(
        self, part: ViT, config: Recipe, codec: Codec, num_classes: int, device: torch.device, precision: Precision
    ) -> None:
        if codec.merges_tokens and part.family.pools_patches:
            refused = "rule must be drop for this model: its classifier averages patch tokens"
            raise ConfigError(f"--split.codec {codec.text}: {refused}")
        self.vit, self.config, self.codec, self.num_classes, self.device = part, config, codec, num_classes, device
        self.labels: Labels = config.split.labels
        self.autocast = partial(autocast, device, precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.scaler.scale(torch.zeros((), device=device))  # it is lazy, and halves scale by themselves
        self.scale = self.scaler.get_scale
        """The factor on the loss: 1 but in half precision."""
        own = codec.client_parameters() if self.side == "client" else codec.server_parameters()
        decays = {"weight_decay": config.weight_decay, "layer_decay": config.layer_decay}
        self.optimizer = make_optimizer(part, lr=config.lr, device=device, others=own, **decays)
        where = "server" if config.split.freezes else config.split.alast  # a half that is frozen has nothing to budget
        attached = config.method_name != "alast" or where in (self.side, "both")
        self.method = make_method(part, config, config.method_name if attached else "full")
        self.max_rows = config.batch_size * codec.buffer
        """Rows that the activations of an exchange may have."""
        self.overflow = False
        """Whether a gradient of the step under way overflowed in half precision, here or on the other side."""
        self._trains = [p for p in self.parameters() if p.requires_grad]
        self._frozen = False

    def freeze(self, on: bool) -> None:
        """Trains nothing from now on, or what it did before."""
        if on != self._frozen:
            self._frozen = on
            for parameter in self._trains:
                parameter.requires_grad_(not on)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that this side's optimizer holds."""
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def weights(self) -> dict[str, Tensor]:
        """The weights themselves, by their names in the whole model; the codec's begin with `codec.`"""
        codec = {f"codec.{name}": value for name, value in self.codec.state_dict().items() if self.codec_part in name}
        return {**self.vit.model.state_dict(), **codec}

    def train(self, mode: bool = True) -> None:
        """Training or eval mode, as in PyTorch."""
        self.vit.model.train(mode)
        self.codec.train(mode)

    def begin(self, lr: float, progress: float) -> None:
        """Once per optimizer step, before its first exchange; see `Method.step`."""
        self.overflow = False
        self.train()
        self.method.step(lr, self.optimizer, progress)

    def clip(self, max_norm: float) -> Tensor:
        """Clips this side's gradients by their own norm (0: not), and returns what it was, () float32."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(list(self.parameters()), max_norm or float("inf"))

    def update(self, lr: float, overflow: bool) -> None:
        """Moves the weights, unless a gradient overflowed, and drops the gradients."""
        if not overflow:
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        trained = any(parameter.grad is not None for parameter in self.parameters())
        self.optimizer.zero_grad(set_to_none=True)
        # It refuses to go by gradients where a step has none here, as with the head alone in the other half.
        self.scaler.update(self.scale() / 2 if overflow else None if trained else self.scale())

    def forget(self) -> None:
        """Drops the exchange under way."""
        self._pending = None

    def _loss(self, logits: Tensor, targets: "Targets") -> Tensor:
        """Cross-entropy, mean over rows, or weighted by their number of samples where the codec says so."""
        smoothing = self.config.label_smoothing
        if targets.sizes is None or self.codec.weighting == "rows":
            return cross_entropy(logits.float(), targets.values, label_smoothing=smoothing)
        losses = cross_entropy(logits.float(), targets.values, label_smoothing=smoothing, reduction="none")
        return (losses * targets.sizes).sum() / targets.sizes.sum()

    @contextmanager
    def _decoding(self, what: str) -> Iterator[None]:
        """Makes a ProtocolError of whatever arrays from the other side end in."""
        try:
            yield
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            text = f"the {what} cannot be decoded by {self.codec.text}: {type(error).__name__} {error}"
            raise ProtocolError(" ".join(text.split())[:300]) from error

    def _on_device(self, frame: Frame) -> dict[str, Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in frame.arrays.items()}


@dataclass
class _Pending:
    """An exchange that the client waits on."""

    step: int
    micro: int
    message: Message
    targets: Targets
    share: float
    features: Tensor | None = None


class ClientHalf(Half):
    """Embeddings and first blocks, on the side that has the pictures; in U-shape the classifier too."""

    side = "client"
    codec_part = ".encoder."
    _pending: _Pending | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.loss = torch.zeros(())
        """The last exchange's loss, times its share of the step."""
        self._encode: Callable[[], Frame]
        if self.codec.score is not None:
            self.vit.watch(self.vit.depth - 1)

    def start(self, batches: Sequence[Batch], *, step: int, micro: int, num_samples: int, seed: int) -> Frame:
        """Runs the client's blocks on one or more batches and encodes what comes out, as one exchange.

        Args:
            batches: normalised pictures (B, 3, H, W) and labels (B,) int64, on the half's device.
            num_samples: pictures in the whole step.
            seed: of everything random in the codec.

        Raises:
            TrainingError: where the activations are not finite.
        """
        z, context = self._activations([images for images, _ in batches], seed)
        labels = torch.cat([labels for _, labels in batches])
        self._encode = partial(self._first_frame, z, context, labels, step, micro, len(labels) / num_samples)
        return self._encode()

    def again(self) -> Frame:
        """The frame that the exchange under way began with, to be understood without those before."""
        self.codec.forget()
        return self._encode()

    def _first_frame(self, z: Tensor, context: Context, labels: Tensor, step: int, micro: int, share: float) -> Frame:
        message = self.codec.encode(z, context)
        targets = Targets.of(labels, message.groups, message.num_rows, self.num_classes)
        self._pending = _Pending(step, micro, message, targets, share)
        arrays = dict(message.arrays)
        if self.labels == "server":
            arrays |= labels_to_arrays(labels, message, self.num_classes)
            arrays["labels.share"] = torch.tensor([share])
        flags = NOTHING if message.sent.requires_grad else Flags.FORWARD_ONLY
        return Frame(Kind.ACTIVATIONS, step, micro, arrays, flags)

    def answer(self, frame: Frame) -> Frame | None:
        """Goes on with an exchange as the server's frame asks; None ends it.

        Raises:
            ProtocolError: for a frame that does not belong to the exchange under way.
        """
        pending = self._pending
        if pending is None or (pending.step, pending.micro) != (frame.step, frame.micro):
            raise ProtocolError(f"a frame of step {frame.step}.{frame.micro} came, which is not under way")
        self.overflow |= Flags.OVERFLOW in frame.flags
        arrays = self._on_device(frame)
        if frame.kind == Kind.FEATURES and self.labels == "client" and pending.features is None:
            return self._take_loss(pending, frame, arrays)
        if frame.kind != Kind.GRADIENTS:
            raise ProtocolError(f"a frame of kind {frame.kind.name} came, where gradients were waited for")
        self._pending = None
        if self.labels == "server":
            self.loss = _array(arrays, "gradients.loss", (1,)).squeeze(0)
        if "gradients" in arrays and not self.overflow:
            gradient = self._decode_gradient(pending.message, arrays)
            torch.autograd.backward(pending.message.sent, gradient * self.scale())
        return None

    def _decode_gradient(self, message: Message, arrays: dict[str, Tensor]) -> Tensor:
        with self._decoding("gradients"):
            shape = self.codec.gradient_shape(arrays)  # before memory is taken: few bytes may describe much
            if shape != tuple(message.sent.shape):
                shapes = f"{tuple(shape)} came for activations of shape {tuple(message.sent.shape)}"
                raise ProtocolError(f"gradients of shape {shapes}")
            return self.codec.decode_gradient(message, arrays)

    def evaluate(self, images: Tensor) -> Frame:
        """The activations of normalised pictures (B, 3, H, W) in the format of evaluation; after `train(False)`."""
        z, context = self._activations([images], 0)
        return Frame(Kind.EVALUATION, 0, 0, self.codec.encode(z, context).arrays)

    def logits(self, frame: Frame) -> Tensor:
        """Logits (B, C) of the pictures of `evaluate`, from the server's answer."""
        values = _array(self._on_device(frame), "activations")
        if self.labels == "server":
            return values
        with self.autocast():
            return self.vit.head(values)

    def _activations(self, pictures: Iterable[Tensor], seed: int) -> tuple[Tensor, Context]:
        """The tokens of all pictures in one tensor (B, N, D), and what the codec may know of them."""
        z, attention, positions = [], [], []
        training = self.vit.model.training
        for images in pictures:
            with self.autocast():
                z.append(self.vit.tokens(images))
            if training and self.codec.score is not None:
                attention.append(self.vit.cls_attention(self.vit.depth - 1, self.codec.score))
            if training and (where := self.vit.context.positions) is not None:
                positions.append(where)
        context = Context(
            num_prefix_tokens=self.vit.num_prefix_tokens,
            attention=torch.cat(attention) if attention else None,
            positions=torch.cat(positions) if positions else None,
            num_positions=self.vit.num_prefix_tokens + self.vit.num_patches,
            seed=seed,
        )
        return torch.cat(z), context

    def _take_loss(self, pending: _Pending, frame: Frame, arrays: dict[str, Tensor]) -> Frame | None:
        """The classifier and the loss on features that came down, and the features' gradient if it is wanted."""
        features = _array(arrays, "activations").float().requires_grad_()
        with self.autocast():
            logits = self.vit.head(features)
        loss = self._loss(logits, pending.targets) * pending.share
        self.loss = loss.detach()
        torch.autograd.backward(loss * self.scale())
        if Flags.FORWARD_ONLY in frame.flags:
            self._pending = None
            return None
        assert features.grad is not None
        pending.features = features
        gradient = features.grad / self.scale()
        flags = NOTHING
        if not bool(gradient.isfinite().all()) and self.scale() != 1:
            self.overflow, flags = True, Flags.OVERFLOW
        values = {"gradients": gradient.to(self.codec.feature_dtype)}
        return Frame(Kind.FEATURE_GRADIENTS, pending.step, pending.micro, values, flags)


def _array(arrays: dict[str, Tensor], name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """The array of that name, and shape where one is told; where there is none, that is the other side's error."""
    if name not in arrays or shape not in (None, tuple(arrays[name].shape)):
        raise ProtocolError(f"a frame came without {name}")
    return arrays[name]


def overflowed(gradients: Iterable[Tensor | None]) -> bool:
    """Whether a gradient, of any shape, holds NaN or infinite values."""
    return not all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)


class ServerHalf(Half):
    """The other blocks and, but in U-shape, the classifier; it never sees a picture."""

    side = "server"
    codec_part = ".decoder."
    _pending: tuple[Frame, Tensor, Tensor] | None = None  # activations' frame, leaf, features

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.codec.merges_tokens and self.vit.observer is None:  # under ALaST they count sizes anyway
            self.vit.attach(Counting())

    def answer(self, frame: Frame) -> Frame:
        """The server's part of an exchange: gradients of activations, or in U-shape features first.

        Raises:
            ProtocolError: for a frame that does not fit the exchange.
            TrainingError: where the gradient is not finite.
        """
        arrays = self._on_device(frame)
        if frame.kind == Kind.EVALUATION:
            return self._evaluate(arrays)
        if frame.kind == Kind.ACTIVATIONS:
            return self._forward(frame, arrays)
        if frame.kind == Kind.FEATURE_GRADIENTS and self._pending is not None:
            return self._backward(frame, arrays)
        raise ProtocolError(f"a frame of kind {frame.kind.name} came out of turn")

    def _forward(self, frame: Frame, arrays: dict[str, Tensor]) -> Frame:
        decoded = self._decode(arrays, with_gradient=Flags.FORWARD_ONLY not in frame.flags)
        if self.labels == "client":
            with self.autocast():
                features = self.vit.features(self.vit.tokens(decoded.z, decoded.sizes))
            self._pending = frame, decoded.leaf, features
            flags = NOTHING if features.requires_grad else Flags.FORWARD_ONLY
            values = features.detach().to(self.codec.feature_dtype)
            return Frame(Kind.FEATURES, frame.step, frame.micro, {"activations": values}, flags)
        targets = labels_from_arrays(arrays, self.num_classes, len(decoded.z))
        share, mixed = share_of(arrays), self.config.split.cutmix
        if mixed and self.mixes(decoded.z.shape[1]):
            samples, seed = self._samples(decoded, targets), mix(self.config.seed, MIXED, frame.step, frame.micro)
            loss = self.learn(cutmix(samples, mixed, self.vit.num_prefix_tokens, seed), share)
        else:
            with self.autocast():
                logits = self.vit.head(self.vit.features(self.vit.tokens(decoded.z, decoded.sizes)))
            loss = self._loss(logits, targets) * share
            if loss.requires_grad:
                torch.autograd.backward(loss * self.scale())
        answer = self._gradients(frame, decoded.leaf)
        answer.arrays["gradients.loss"] = loss.detach().view(1)
        return answer

    def _samples(self, decoded: Decoded, targets: "Targets") -> Samples:
        """Tokens and targets as samples that can be mixed."""
        shares = targets.values
        if shares.ndim == 1:
            shares = one_hot(shares, self.num_classes).float()
        weighs = targets.sizes if self.codec.weighting == "sizes" else None
        weights = torch.ones(len(shares), device=shares.device) if weighs is None else weighs
        return Samples(decoded.z, shares, weights, decoded.sizes)

    @torch.no_grad()
    def samples(self, frame: Frame, codec: Codec) -> Samples:
        """What a frame of a frozen client holds, decoded by `codec`, to be learned from now and later.

        Raises:
            ProtocolError: for a frame that holds none.
        """
        arrays = self._on_device(frame)
        decoded = self._decode(arrays, with_gradient=False, codec=codec)
        targets = labels_from_arrays(arrays, self.num_classes, len(decoded.z))
        samples = self._samples(replace(decoded, z=decoded.z.bfloat16()), targets)
        return samples.to(torch.device("cpu"))

    def mixes(self, num_tokens: int) -> bool:
        """Whether samples of so many tokens can be mixed: every patch of a square grid must be there."""
        patches = num_tokens - self.vit.num_prefix_tokens
        whole = patches == self.vit.num_patches and grid_side(patches) > 0
        if not whole:
            text = "--split.cutmix has no effect where the codec drops patches, or their grid is not square"
            warnings.warn(text, SnelloWarning, stacklevel=2)
        return whole

    def overflows(self) -> bool:
        """Whether a gradient overflowed in half precision."""
        return self.scaler.is_enabled() and overflowed(p.grad for p in self.parameters())

    def learn(self, samples: Samples, share: float) -> Tensor:
        """Adds the gradient of samples that are `share` of a step; returns their part of its loss, () float32."""
        samples = samples.to(self.device)
        with self.autocast():
            logits = self.vit.head(self.vit.features(self.vit.tokens(samples.z.float(), samples.sizes)))
        losses = cross_entropy(
            logits.float(), samples.targets, label_smoothing=self.config.label_smoothing, reduction="none"
        )
        loss = (losses * samples.weights).sum() / samples.weights.sum() * share
        if loss.requires_grad:
            torch.autograd.backward(loss * self.scale())
        return loss.detach()

    def answer_stored(self, frame: Frame, samples: Samples) -> Frame:
        """Learns from the samples of a frame, and answers it: nothing but the loss goes down."""
        loss = self.learn(samples, share_of(frame.arrays))
        return Frame(Kind.GRADIENTS, frame.step, frame.micro, {"gradients.loss": loss.view(1)})

    def _decode(self, arrays: dict[str, Tensor], *, with_gradient: bool = True, codec: Codec | None = None) -> Decoded:
        """What the codec makes of the arrays of a frame, whatever they are: a batch of tokens, or a ProtocolError."""
        codec = codec or self.codec
        with self._decoding("activations"):
            self._require_room(arrays)
            decoded = codec.decode(arrays, with_gradient=with_gradient)
        shape = tuple(decoded.z.shape)
        if decoded.z.dtype != torch.float32:
            raise ProtocolError(f"activations decode to {decoded.z.dtype}, where float32 was due")
        if len(shape) != 3 or not 1 <= shape[1] <= self._num_tokens or shape[2] != self.vit.embed_dim or not shape[0]:
            raise ProtocolError(f"activations of shape {shape} are no tokens for this model")
        return decoded

    def _require_room(self, arrays: dict[str, Tensor]) -> None:
        """Refuses, before memory is taken, what would decode to more than a batch: few bytes may describe much."""
        if "activations" not in arrays:
            raise ProtocolError("a frame came without activations")
        shape = self.codec.decoded_shape(arrays)
        largest = (self.max_rows, self._num_tokens, self.vit.embed_dim)
        if len(shape) != 3 or any(n > most for n, most in zip(shape, largest, strict=True)):
            raise ProtocolError(f"activations that decode to the shape {shape} are more than a batch of this model")
        sizes = self.codec.sizes(arrays)
        if sizes is not None and bool((sizes.sum(dim=1) > self._num_tokens).any()):
            raise ProtocolError(f"the sizes of merged tokens add up to more than the {self._num_tokens} of this model")

    @property
    def _num_tokens(self) -> int:
        return self.vit.num_prefix_tokens + self.vit.num_patches

    def _backward(self, frame: Frame, arrays: dict[str, Tensor]) -> Frame:
        assert self._pending is not None
        first, leaf, features = self._pending
        if (frame.step, frame.micro) != (first.step, first.micro):
            raise ProtocolError(f"a frame of step {frame.step}.{frame.micro} came, which is not under way")
        gradient = arrays.get("gradients")
        overflow = self.overflow or Flags.OVERFLOW in frame.flags
        if not overflow and (gradient is None or gradient.shape != features.shape):
            raise ProtocolError(f"gradients of features of shape {tuple(features.shape)} were due")
        self._pending, self.overflow = None, overflow
        if features.requires_grad and not self.overflow:
            assert gradient is not None
            torch.autograd.backward(features, (gradient.float() * self.scale()).to(features.dtype))
        return self._gradients(first, leaf)

    def _gradients(self, frame: Frame, leaf: Tensor) -> Frame:
        """What goes down at the end of an exchange; nothing where the client wants none, or after an overflow."""
        arrays: dict[str, Tensor] = {}
        if leaf.grad is not None:
            gradient = leaf.grad / self.scale()
            if self.scale() != 1 and not bool(gradient.isfinite().all()):
                self.overflow = True
            else:
                context = Context(num_prefix_tokens=self.vit.num_prefix_tokens, seed=frame.step)
                arrays = self.codec.encode_gradient(gradient, context)
        flags = Flags.OVERFLOW if self.overflow else NOTHING
        return Frame(Kind.GRADIENTS, frame.step, frame.micro, arrays, flags)

    def _evaluate(self, arrays: dict[str, Tensor]) -> Frame:
        z = self._decode(arrays).z
        with self.autocast():
            features = self.vit.features(self.vit.tokens(z))
            answer = self.vit.head(features) if self.labels == "server" else features
        return Frame(Kind.EVALUATED, 0, 0, {"activations": answer.detach().float()})
