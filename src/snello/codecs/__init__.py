"""What may stand at the cut: every codec is one small file and one line of `snello.config.registry.CODECS`.

base.py       what reducers and formats promise, and the chain of them; begin here
adc.py        reducer: similar samples merge, little attended tokens are dropped
topk.py       reducers: the largest numbers of every sample; or some of them random
c3sl.py       reducer: samples bound by circular convolution and summed
bottlenet.py  reducer: a trained encoder and decoder
floats.py     formats: numbers as they are, or in 16 bits
integers.py   formats: 8, 4 or 2 bits, really packed
fedlite.py    format: indices into a codebook
pca.py        format: principal components, rounded and entropy-coded; with bases.py, which both sides have,
              frequencies.py, a cosine transform over the patches, and components.py and rans.py, which write them

`adc(0.2)+int4` chains them: any number of reducers, which leave fewer numbers, and at most one format, which comes last
and says how those travel.
"""

import inspect
from typing import Any

from snello.config.codec_text import Part
from snello.config.registry import CODECS, find
from snello.errors import ConfigError


def codec_class(name: str) -> Any:
    """The class behind the name of a codec."""
    return find(CODECS[name])


def build(part: Part, flag: str, **given: Any) -> Any:
    """The codec that `part` describes; `given` are arguments that do not come from the text.

    Raises:
        ConfigError: for an unknown option, or a value that is not in its range.
    """
    cls = codec_class(part.name)
    parameters = inspect.signature(cls).parameters
    options = {name: parameter for name, parameter in parameters.items() if name not in given}
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
    accepted = {name: value for name, value in given.items() if name in parameters}
    try:
        return cls(**values, **accepted)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{flag}: {part}: {error}") from None


__all__ = ["build", "codec_class"]
