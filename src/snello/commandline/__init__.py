"""What stands in front of the verbs: help, completion, and what is said of a wrong flag. Nothing here needs PyTorch.

settings.py    the settings of a config, one by one: flag, values, default and text, as the dataclass has them
groups.py      which settings come first in help, and the groups of all
help.py        help as text
arguments.py   the words of a command line: names of other tools, unknown flags, misspelt values, unknown verbs
completion.py  scripts for the shells
"""
