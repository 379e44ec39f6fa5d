"""LoRA: low-rank adapters beside the frozen linear layers of the blocks, through peft.

Paper: LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685. peft puts the adapters in; what is ours is
that they only go into blocks (`proj` alone would also match timm's `patch_embed.proj`), that a name which matches
nothing is an error, and that what is saved is the plain model, merged, beside the adapters in peft's own format.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import override

from snello.config import LoraConfig, Recipe
from snello.errors import CheckpointError, ConfigError, ModelError, SnelloError
from snello.files import load_tensors, replacing
from snello.methods import Method
from snello.methods.alast import AlastMethod
from snello.vit import ViT
from snello.vit.times import Times

NAME = "default"
"""peft's name for the adapters of a model that has only one set of them."""
PEFT_PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "snello_base"
"""In the metadata of WEIGHTS: digest of the weights that the adapters belong to."""


class Adapters:
    """The adapters of a model: its blocks train through them alone, its classifier as it is.

    `model_name` is what the model is called, for peft's config.

    Raises:
        ConfigError: where a target matches no linear layer of the blocks, or `start` is of other settings.
        ModelError: where the model is attached to something, or already has adapters.
        CheckpointError: where the adapters in `start` cannot be read, or belong to other weights.
        SnelloError: without peft.
    """

    def __init__(self, vit: ViT, config: LoraConfig, model_name: str = "") -> None:
        peft = _peft()
        if vit.attached:
            raise ModelError("the model is attached to ALaST already: apply LoRA first, then attach")
        if has_adapters(vit.model):
            raise ModelError("the model has adapters already")
        self.vit, self.config = vit, config
        self._trained_before = {id(p) for p in vit.model.parameters() if p.requires_grad}
        self.targets = target_layers(vit, config.target_modules)
        common: dict[str, Any] = {"r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
        self.peft_config = peft.LoraConfig(
            **common,
            target_modules=self.targets,
            modules_to_save=sorted({name.split(".")[0] for name, _ in self._heads()}),
            base_model_name_or_path=model_name or None,
        )
        # Without modules_to_save: peft would wrap the classifier and so rename it.
        inner = peft.LoraConfig(**common, target_modules=self.targets)
        peft.inject_adapter_in_model(inner, vit.model, adapter_name=NAME)
        for _, parameter in self._heads():
            parameter.requires_grad_(id(parameter) in self._trained_before)
        if config.start is not None:
            self._load(config.start)

    @functools.cached_property
    def base(self) -> str:
        """Digest of the weights that the adapters belong to, which never change: all but the classifier's."""
        made = hashlib.sha256()
        named = {name.replace(".base_layer.", "."): value for name, value in self.vit.model.state_dict().items()}
        for name, value in sorted(named.items()):
            if not self.vit.family.is_head(name) and ".lora_" not in name:
                made.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                made.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
        return made.hexdigest()

    def _heads(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.vit.model.named_parameters() if self.vit.family.is_head(name)]

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Adapters and classifier, under the names that peft's files give them."""
        adapters = [(name, p) for name, p in self.vit.model.named_parameters() if ".lora_" in name]
        return {PEFT_PREFIX + name.replace(f".{NAME}.", "."): p for name, p in [*adapters, *self._heads()]}

    def save(self, folder: Path) -> None:
        """Writes what peft's `PeftModel.from_pretrained` reads: weights and config."""
        folder.mkdir(exist_ok=True)
        with replacing(folder / WEIGHTS) as temporary:
            values = {name: p.detach().contiguous() for name, p in self._parameters().items()}
            save_file(values, temporary, metadata={"format": "pt", BASE: self.base})
        text = json.dumps(self.peft_config.to_dict() | {"inference_mode": True}, indent=2, default=sorted)  # of sets
        with replacing(folder / CONFIG) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def _load(self, folder: Path) -> None:
        try:
            saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"--lora.start {folder} holds no adapters: {error}") from error
        wanted = self.peft_config.to_dict()
        for key, flag in (("r", "--lora.r"), ("lora_alpha", "--lora.alpha")):
            if saved.get(key) != wanted[key]:
                raise ConfigError(f"{flag} must be that of the adapters in {folder}: {saved.get(key)}")
        if set(saved.get("target_modules") or ()) != set(self.targets):
            raise ConfigError(f"--lora.target-modules must be those of the adapters in {folder}, on the same blocks")
        state, _ = load_tensors(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get(BASE, self.base) != self.base:
            theirs = saved.get("base_model_name_or_path") or "another model"
            raise CheckpointError(
                f"the adapters in {folder} belong to other weights than those of this model: they were trained beside "
                f"{theirs} (digest {metadata[BASE][:12]}, here {self.base[:12]}); give its --model and --weights"
            )
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                value = state.get(name)
                if value is not None and value.shape == parameter.shape:
                    parameter.copy_(value)
                elif ".lora_" in name:  # a classifier may be for other classes
                    raise CheckpointError(f"the adapters in {folder} do not fit the model: {name}")

    def remove(self) -> None:
        """Leaves the model as it was found: without adapters, everything that was trainable trainable again."""
        for name in self.targets:
            adapted: Any = self.vit.model.get_submodule(name)
            parent, _, own = name.rpartition(".")
            setattr(self.vit.model.get_submodule(parent), own, adapted.get_base_layer())
        for parameter in self.vit.model.parameters():
            parameter.requires_grad_(id(parameter) in self._trained_before)


class Lora(Method):
    """Adapters in the blocks and the classifier train."""

    def __init__(self, vit: ViT, config: Recipe, times: Times | None = None) -> None:
        self.adapters = Adapters(vit, config.lora, config.model)
        super().__init__(vit, config, times)

    @override
    def save(self, folder: Path) -> None:
        self.adapters.save(folder)

    @override
    def detach(self) -> None:
        super().detach()
        self.adapters.remove()


class AlastLora(Lora, AlastMethod):
    """The adapters of the blocks that ALaST draws train, and the classifier."""


def target_layers(vit: ViT, wanted: tuple[str, ...]) -> list[str]:
    """The full names of the linear layers of the blocks that `wanted` names.

    `attention`, `mlp`, `all`, or names as in the block, from any dot on: `attn.qkv`, `fc1`, `q_proj`.

    Raises:
        ConfigError: for one that matches nothing, listing what there is.
    """
    first = [name for name, module in vit.blocks[0].named_modules() if isinstance(module, nn.Linear)]
    groups = {
        "attention": [name for name in first if name in vit.family.attention_modules],
        "mlp": [name for name in first if name not in vit.family.attention_modules],
        "all": first,
    }
    chosen: set[str] = set()
    for one in wanted:
        matched = groups.get(one) or [name for name in first if name == one or name.endswith("." + one)]
        if not matched:
            known = f"attention, mlp, all, {', '.join(first)}"
            raise ConfigError(f"--lora.target-modules {one} matches no linear layer of the blocks; there are: {known}")
        chosen.update(matched)
    return [f"{vit.family.block_prefix}{i}.{name}" for i in range(vit.depth) for name in first if name in chosen]


def has_adapters(model: nn.Module) -> bool:
    """Whether LoRA is in the model."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the plain model, adapters merged, under its own names; the model stays as it is."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            weight = layer.get_base_layer().weight.detach()
            state[f"{name}.base_layer.weight"] = weight + layer.get_delta_weight(NAME).detach().to(weight.dtype)
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise SnelloError(f"LoRA needs peft ({error.name} is missing): pip install 'snello[lora]'") from error
    return peft
