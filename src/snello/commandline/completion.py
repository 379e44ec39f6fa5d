"""Completion of verbs, flags and values for the shells: a script that holds all words and starts no Python.

Where it has no words, the shell offers files.
"""

from collections.abc import Mapping
from typing import Any

from snello.commandline.groups import FIRST
from snello.commandline.help import HELP, by_group
from snello.commandline.settings import settings_of
from snello.config.names import near_text
from snello.errors import ConfigError

SHELLS = ("bash", "zsh")
_FILES = {"bash": "~/.bashrc", "zsh": "~/.zshrc"}

_BASH = """\
# Completion of snello; in {file}: eval "$(snello --print-completion {shell})"
_snello() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}} words=
  COMPREPLY=()
  if [[ $cur == = ]]; then  # bash splits --flag=value into three words
    cur=
  elif [[ $before == = ]]; then
    before=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  if (( COMP_CWORD == 1 )); then
    words={verbs}
  elif [[ $cur == -* ]]; then
    case $verb in
{flags}
    esac
  else
    case "$verb $before" in
{values}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o bashdefault -o default -F _snello snello
"""
_ZSH = """\
(( $+functions[compdef] )) || { autoload -U +X compinit && compinit }
autoload -U +X bashcompinit && bashcompinit
"""


def completion(shell: str, verbs: Mapping[str, type[Any]]) -> str:
    """The script for a shell, with the configs of all verbs.

    Raises:
        ConfigError: for a shell that there is none for.
    """
    if shell not in SHELLS:
        near = near_text(shell, SHELLS)
        raise ConfigError(f"--print-completion must be one of {', '.join(SHELLS)}, got {shell or 'nothing'}{near}")
    flags: dict[str, list[str]] = {}
    # By what stands before: the verb, and the flag or the verb itself.
    values = {"help help": [*verbs], "--print-completion --print-completion": [*SHELLS]}
    for verb, cls in verbs.items():
        settings = settings_of(cls)
        flags[verb] = [*(one for setting in settings for one in setting.flags), *HELP[1:]]
        values |= {f"{verb} {s.flags[0]}": [*s.choices] for s in settings if s.choices and s.flags}
        values |= {f"{verb} --help": [*by_group(settings)]} if verb in FIRST else {}
    first = f"'{' '.join([*verbs, '--help', '--version', '--print-completion'])}'"
    script = _BASH.format(file=_FILES[shell], shell=shell, verbs=first, flags=_cases(flags), values=_cases(values))
    return _ZSH + script if shell == "zsh" else script


def _cases(words: Mapping[str, list[str]]) -> str:
    return "\n".join(f"      '{case}') words='{' '.join(of)}' ;;" for case, of in words.items())
