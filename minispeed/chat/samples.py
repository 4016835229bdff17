"""Ask a model the same things again and again while it learns, and lay its answers side by side.

RUN/prompts.jsonl   a line per prompt and moment: the step, the prompt, the answer
RUN/samples.md      the same as Markdown, a section per prompt with a table of moments; written anew each time

The lines are what counts: a resumed run drops those that come after its step, and the page follows from them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minispeed.chat.chat_model import ChatModel
from minispeed.chat.conversation import ASSISTANT, TEXT, USER, Conversation, Turn
from minispeed.chat.read import read
from minispeed.chat.score import split_last
from minispeed.errors import UserError

PAGE = "samples.md"


def read_prompts(path: Path, chat: ChatModel) -> list[Conversation]:
    """Read prompts: one a line, or conversations in JSON, whose last answer, if there is one, is what is wanted.

    Returns  conversations that end with the assistant's turn, empty where no answer is known
    Raises   UserError where there is no prompt, or one is too long for the model
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts {path} cannot be read: {error}", fix="a text file with a prompt on each line"
        ) from None
    if text.lstrip()[:1] in ("{", "["):
        prompts = [line.conversation for line in read(path).lines]
    else:
        prompts = [Conversation((Turn(USER, line.strip()),)) for line in text.splitlines() if line.strip()]
    prompts = [_ending_with_answer(prompt) for prompt in prompts]
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt", fix="a prompt on each line")
    most = chat.model.config.max_positions
    for number, prompt in enumerate(prompts, 1):
        length = len(chat.template.prompt(split_last(prompt)[0], chat.tokenizer))
        if length >= most:
            what = f"prompt {number} of {path} has {length} tokens, and the model reads {most}, its answer included"
            raise UserError(what, fix="a shorter one")
    return prompts


def name_of(prompt: Conversation) -> str:
    """Return the turns before the answer as text: what a prompt is known by from one moment to the next."""
    turns = split_last(prompt)[0]
    return turns[0].text if len(turns) == 1 else "\n".join(f"{turn.role}: {turn.text}" for turn in turns)


def page_of(prompts: Sequence[Conversation], lines: Iterable[Mapping[str, Any]]) -> str:
    """Return the answers so far as a page of Markdown: a section per prompt, a row per moment, the oldest first.

    lines  of prompts.jsonl; those of prompts that are not asked any more are left out
    """
    answers: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        answers.setdefault(line["prompt"], []).append(line)
    sections = ["# What the model answers as it learns"]
    for number, prompt in enumerate(prompts, 1):
        name, wanted = name_of(prompt), split_last(prompt)[1]
        rows = [("step", "answer"), ("---:", "---")]
        rows += [(str(line["step"]), _cell(line["answer"], stopped=line["stopped"])) for line in answers.get(name, ())]
        rows += [("wanted", _cell(wanted, stopped=True))] if wanted else []
        quoted = "\n".join(f"> {line}  " for line in _plain(name).splitlines())
        sections.append(f"## Prompt {number}\n\n{quoted}\n\n" + "\n".join(f"| {a} | {b} |" for a, b in rows))
    return "\n\n".join(sections) + "\n"


def _ending_with_answer(prompt: Conversation) -> Conversation:
    """Return the conversation with an empty answer behind it, unless it ends with one."""
    turns = tuple(Turn(USER, turn.text) if turn.role == TEXT else turn for turn in prompt.turns)
    return Conversation(turns if turns[-1].role == ASSISTANT and turns[1:] else (*turns, Turn(ASSISTANT, "")))


def _cell(text: str, *, stopped: bool) -> str:
    """Return text as a cell of a table; an answer that was cut short ends with dots."""
    shown = _plain(text if stopped else text + " …").replace("|", "\\|")
    return "<br>".join(shown.splitlines()) or " "


def _plain(text: str) -> str:
    """Return text that Markdown does not take for HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
