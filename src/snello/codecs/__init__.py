"""What may stand at the cut: every codec is one small file and one line of CODECS.

Reducers leave fewer numbers (ADC, top-k, C3-SL, BottleNet++); formats say how numbers travel (floats, integers,
FedLite's codebooks). `adc(0.2)+int4` chains them: any number of reducers, at most one format, which comes last.
"""

import inspect
from importlib import import_module
from typing import Any

from snello.config.codec_text import Part
from snello.config.registry import CODECS
from snello.errors import ConfigError


def codec_class(name: str) -> Any:
    """The class behind the name of a codec."""
    module, _, attribute = CODECS[name].partition(":")
    return getattr(import_module(module), attribute)


def build(part: Part, flag: str, **given: Any) -> Any:
    """The codec that `part` describes; `given` are arguments that do not come from the text.

    Raises:
        ConfigError: for an unknown option, or a value that is not in its range.
    """
    cls = codec_class(part.name)
    options = {
        name: parameter
        for name, parameter in inspect.signature(cls).parameters.items()
        if name not in given and name != "self"
    }
    if len(part.positional) > len(options):
        raise ConfigError(f"{flag}: {part.name} has {len(options)} options, got {len(part.positional)} values")
    values = dict(zip(options, part.positional, strict=False))
    for name, value in part.named:
        if name not in options:
            raise ConfigError(f"{flag}: {part.name} has no option {name!r}; known: {', '.join(options) or 'none'}")
        if name in values:
            raise ConfigError(f"{flag}: {part.name} has two values for {name}")
        values[name] = value
    missing = [name for name, p in options.items() if p.default is p.empty and name not in values]
    if missing:
        raise ConfigError(f"{flag}: {part.name} needs a value for {missing[0]}, as {part.name}({missing[0]}=...)")
    accepted = {name: value for name, value in given.items() if name in inspect.signature(cls).parameters}
    try:
        return cls(**values, **accepted)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{flag}: {part}: {error}") from None


__all__ = ["build", "codec_class"]
