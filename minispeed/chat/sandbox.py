"""Compile a chat template, somebody's program from somewhere, so that it can do nothing but write text.

It gets what templates are promised: jinja2 without the line break behind a block and the blanks before one, break and
continue, `raise_exception`, `strftime_now`, and `tojson` that leaves HTML's signs and other alphabets as they are.

https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minispeed.errors import UserError


class Generation(Extension):
    """`{% generation %}` marks an answer for others' trainers: what it holds is rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def compile_template(source: str, day: str | None) -> Template:
    """Return what renders messages, taking `day` ("2026-11-22"; None: today) for now.

    Raises  UserError where the source is no jinja
    """

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def now(form: str) -> str:
        return (datetime.fromisoformat(day) if day else datetime.now()).strftime(form)

    def to_json(value: object, **how: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **how})

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    world.filters["tojson"] = to_json
    world.globals |= {"raise_exception": refuse, "strftime_now": now}
    try:
        return world.from_string(source)
    except TemplateSyntaxError as reason:
        raise UserError(f"the checkpoint's chat template is no jinja: {reason}", fix="--template ours") from None
