"""Options of the commands: each declared once, as a field; flags, config blocks, help and the page follow.

    declare   option, Options: an option is one line of a command's frozen dataclass; the check of a value
    parse     words and config files -> options; options <-> JSON
    foreign   what an option is called in transformers, TRL, DeepSpeed-Chat, nanoGPT and litgpt
    page      `--help` and docs/options.md

Standard library only, so that help and a typing mistake are answered at once.
"""

from minispeed.options.declare import Option, Options, command_of, option, options_of
from minispeed.options.page import help_text, page
from minispeed.options.parse import PROVENANCE, from_json, parse, to_json

__all__ = [
    "PROVENANCE",
    "Option",
    "Options",
    "command_of",
    "from_json",
    "help_text",
    "option",
    "options_of",
    "page",
    "parse",
    "to_json",
]
