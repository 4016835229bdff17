"""What a conversation is: turns, each with a role, and the task that its scores are kept under.

Every reader produces these and everything after (template, tokens, rows, scores) starts from them.
"""

from dataclasses import dataclass
from typing import NamedTuple

SYSTEM, USER, ASSISTANT, TEXT = ROLES = ("system", "user", "assistant", "text")


class Turn(NamedTuple):
    """One message. Role "text" is a plain document: it stands alone and all of it is learnt."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; `task` names the table row of its loss and scores, `metric` how an answer is scored.

    metric  "exact": the whole answer; "label": the answer is one of few classes (accuracy, precision, recall, F1);
            "opening": only the text up to the first full stop counts (used where the rest may vary)
    """

    turns: tuple[Turn, ...]
    task: str = ""
    metric: str = "exact"
