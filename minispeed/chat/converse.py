"""Talk to a run: one prompt, or a conversation that streams its answers.

The whole conversation goes through the template at every turn, by the code that rendered it for training. When it
outgrows the model's positions the oldest turns are left out, with a printed line.
"""

import sys
from collections.abc import Iterator

import torch

from minispeed.chat.chat_model import ChatModel
from minispeed.chat.commands import ChatOptions
from minispeed.chat.conversation import ASSISTANT, SYSTEM, USER, Turn
from minispeed.chat.run import use_threads
from minispeed.chat.tokenizer import Stream
from minispeed.collective.world import best_device
from minispeed.errors import UserError
from minispeed.model.generate import Sampling, decode

RESERVE = 48  # positions that are kept free for an answer


def converse(options: ChatOptions) -> int:
    """Do `minispeed chat`. Returns the exit code."""
    use_threads(options.threads)
    chat = ChatModel.load(options.run, device=best_device())
    for note in chat.notes:
        print(note, file=sys.stderr)
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    generator = torch.Generator().manual_seed(options.seed)
    turns = [Turn(SYSTEM, options.system)] if options.system else []
    if options.prompt is not None:
        for text in reply(chat, [*turns, Turn(USER, options.prompt)], sampling, generator, options.max_new):
            print(text, end="", flush=True)
        print()
        return 0
    return talk(chat, turns, sampling, generator, options.max_new)


def talk(chat: ChatModel, opening: list[Turn], sampling: Sampling, generator: torch.Generator, max_new: int) -> int:
    """Read lines and answer them until /quit, the end of input, or ctrl-C at the prompt."""
    terminal = sys.stdin.isatty()
    if terminal:
        print("Talk to it; /reset forgets the conversation, /quit leaves.")
    turns = list(opening)
    while True:
        try:
            asked = input("you> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print("\nbye" if terminal else "")
            return 0
        if asked == "/quit":
            return 0
        if asked == "/reset":
            turns = list(opening)
            print("(forgotten)")
        elif asked.startswith("/"):
            print(f"there is no command {asked}; there are /reset and /quit")
        elif asked:
            turns.append(Turn(USER, asked))
            turns.append(Turn(ASSISTANT, print_reply(chat, turns, sampling, generator, max_new)))


def print_reply(
    chat: ChatModel, turns: list[Turn], sampling: Sampling, generator: torch.Generator, max_new: int
) -> str:
    """Print an answer as it comes and return it; ctrl-C ends the answer, not the conversation."""
    said = ""
    try:
        shorten(chat, turns)
        for text in reply(chat, turns, sampling, generator, max_new):
            print(text, end="", flush=True)
            said += text
    except KeyboardInterrupt:
        print(" (interrupted)", end="")
    except UserError as error:
        print(f"({error})", end="")
    print(flush=True)
    return said


def shorten(chat: ChatModel, turns: list[Turn]) -> None:
    """Leave out the oldest exchanges, in place, until an answer fits behind the conversation."""
    dropped = 0
    while len(chat.template.prompt(turns, chat.tokenizer)) + RESERVE > chat.model.config.max_positions:
        start = 1 if turns[0].role == SYSTEM else 0
        if len(turns) - start < 3:
            break  # only the question itself is left: generation says that it is too long
        del turns[start : start + 2]
        dropped += 1
    if dropped:
        print(f"(the conversation is too long: its first {dropped} exchanges are forgotten)")


def reply(
    chat: ChatModel, turns: list[Turn], sampling: Sampling, generator: torch.Generator, max_new: int
) -> Iterator[str]:
    """Yield the text of the answer, whole characters at a time, until the model stops."""
    stop = chat.template.stop_id(chat.tokenizer)
    stream = Stream(chat.tokenizer)
    prompt = chat.template.prompt(turns, chat.tokenizer)
    for chosen in decode(chat.model, [prompt], max_new=max_new, sampling=sampling, generator=generator):
        token = int(chosen[0])
        if token == stop:
            break
        yield stream.feed(token)
    yield stream.flush()
