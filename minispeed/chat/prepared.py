"""The folder of prepared data: what lies in it, how it is opened, and how it comes to be all at once.

OUT/train/, OUT/eval/                 the tokens of both parts, an array a file
OUT/eval/conversations.jsonl          the conversations of the evaluation part: answers are scored against them
OUT/tokenizer.json, template.json     what made the tokens
OUT/report.json                       the key, the options, what was found; without it the folder is no such

It is built in a folder beside and renamed when whole, so a run that dies leaves nothing that could be taken for it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minispeed.chat.conversation import Conversation, Turn
from minispeed.chat.documents import Documents
from minispeed.chat.template import ChatTemplate
from minispeed.chat.templates import load_template
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.errors import UserError

LAYOUT = 1  # of the prepared folder; part of its key
PARTS = ("train", "eval")
CONVERSATIONS = "conversations.jsonl"


@dataclass(frozen=True)
class Prepared:
    """A prepared folder: tokens of both parts, the tokenizer and template that made them, and the report.

    The report is the folder's report.json and "reused": whether `prepare` found the folder as it is.
    """

    folder: Path
    train: Documents
    eval: Documents
    tokenizer: ChatTokenizer
    template: ChatTemplate
    report: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str, *, reused: bool = False) -> "Prepared":
        """Open what `prepare` made.  Raises UserError where there is none."""
        folder = Path(folder)
        report = report_of(folder)
        if report is None or report["layout"] != LAYOUT:
            what = f"{folder} holds no data prepared by this version"
            raise UserError(what, fix=f"minispeed prepare DATA --out {folder}")
        template = load_template(folder / "template.json")
        tokenizer = ChatTokenizer.load(folder / "tokenizer.json", template.tokens)
        pad = template.pad_id(tokenizer)
        try:
            train, held = (Documents.open(folder / part, report["tasks"], pad) for part in PARTS)
        except (OSError, ValueError) as reason:
            raise UserError(f"{folder} is damaged: {reason}", fix="remove it and prepare again") from None
        return cls(folder, train, held, tokenizer, template, report | {"reused": reused})

    def eval_conversations(self) -> list[Conversation]:
        """Return the conversations of the evaluation part, in the order of its documents."""
        with open(self.folder / "eval" / CONVERSATIONS, encoding="utf-8") as file:
            return [_from_json(line) for line in file]


def report_of(folder: Path) -> dict[str, Any] | None:
    """Return the report of a prepared folder; None where the folder is no such."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and {"key", "layout"} <= report.keys() else None


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `out` when the block ends well, and nothing when it does not.

    Raises  UserError where `out` holds something that `prepare` did not make
    """
    if out.exists() and report_of(out) is None and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not prepared data; it is left as it is", fix="another --out")
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's is for its owner alone
        if out.exists():
            out.rename(old := folder.with_name(folder.name + ".old"))
            folder.rename(out)
            shutil.rmtree(old)
        else:
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_beside_documents(
    folder: Path,
    held_out: Iterable[Conversation],
    tokenizer: ChatTokenizer,
    template: ChatTemplate,
    report: dict[str, Any],
) -> None:
    """Write what `Prepared.open` reads, but for the documents of both parts: those save themselves."""
    with open(folder / "eval" / CONVERSATIONS, "w", encoding="utf-8") as file:
        file.writelines(map(_to_json, held_out))
    tokenizer.save(folder / "tokenizer.json")
    template.save(folder / "template.json")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _to_json(conversation: Conversation) -> str:
    """Return a conversation as one line, which `read` also reads where no turn is plain text."""
    messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
    return json.dumps({"messages": messages, "task": conversation.task, "metric": conversation.metric}) + "\n"


def _from_json(line: str) -> Conversation:
    record = json.loads(line)
    turns = tuple(Turn(message["role"], message["content"]) for message in record["messages"])
    return Conversation(turns, record["task"], record["metric"])
