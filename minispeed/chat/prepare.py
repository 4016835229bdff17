"""Turn files of conversations into memory-mapped tokens, once, and say what was found in them.

Read every file, hold out an evaluation part and train a tokenizer where none is given, encode, count. The
result is keyed by the content of the files and by all options: asked for again, it is there. It is built in a
folder beside and renamed when whole, so a run that dies leaves nothing that could be taken for a result.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minispeed import __version__
from minispeed.chat.conversation import Conversation, Turn
from minispeed.chat.pack import Documents, Packing, cut_to_fit
from minispeed.chat.read import SHOWN, Reading, read
from minispeed.chat.show import Entry, Notices, content_digest, report_text as report_text
from minispeed.chat.template import Encoded, Template
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.errors import UserError

LAYOUT = 1  # of the prepared folder; part of its key
PARTS = ("train", "eval")
HELD_OUT = 0.05  # share of the distinct conversations
CHUNK = 1000  # conversations encoded at a time


@dataclass(frozen=True)
class Prepared:
    """A prepared folder: tokens of both parts, the tokenizer and template that made them, and the report.

    The report is the folder's report.json and "reused": whether `prepare` found the folder as it is.
    """

    folder: Path
    train: Documents
    eval: Documents
    tokenizer: ChatTokenizer
    template: Template
    report: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str, *, reused: bool = False) -> "Prepared":
        """Open what `prepare` made.  Raises UserError where there is none."""
        folder = Path(folder)
        report = _report_of(folder)
        if report is None or report["layout"] != LAYOUT:
            what = f"{folder} holds no data prepared by this version"
            raise UserError(what, fix=f"minispeed prepare DATA --out {folder}")
        template = Template.load(folder / "template.json")
        tokenizer = ChatTokenizer.load(folder / "tokenizer.json", template.tokens)
        pad = template.pad_id(tokenizer)
        try:
            train, held = (Documents.open(folder / part, report["tasks"], pad) for part in PARTS)
        except (OSError, ValueError) as reason:
            raise UserError(f"{folder} is damaged: {reason}", fix="remove it and prepare again") from None
        return cls(folder, train, held, tokenizer, template, report | {"reused": reused})

    def eval_conversations(self) -> list[Conversation]:
        """Return the conversations of the evaluation part, in the order of its documents."""
        with open(self.folder / "eval" / "conversations.jsonl", encoding="utf-8") as file:
            return [_from_json(line) for line in file]


def prepare(
    train: Sequence[Path],
    evaluation: Sequence[Path],
    out: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int = 8192,
    train_on: str = "assistant",
    seq: int = 512,
    skip_bad: bool = False,
    workers: int = 1,
    seed: int = 0,
    template: Template = Template(),
) -> Prepared:
    """Prepare data files in the folder `out`, or find them prepared there.

    evaluation  where empty, 5 % of the distinct training conversations are held out, by (seed, content)
    tokenizer   a tokenizer.json; None trains one of `vocab_size` ids on the training part
    seq         the context that the report's figures on truncation and padding are for
    workers     1 encodes on one core, more on all cores; the result is the same

    Raises  UserError where a file is missing or malformed (unless `skip_bad`), no conversation fits
            the context, or `out` holds something else
    """
    train, evaluation, out = [Path(p) for p in train], [Path(p) for p in evaluation], Path(out)
    if not train:
        raise UserError("no data file is given", fix="minispeed prepare DATA.jsonl --out DIR")
    options = {"vocab_size": vocab_size, "train_on": train_on, "seq": seq, "skip_bad": skip_bad, "seed": seed}
    key = _key(train, evaluation, tokenizer, template, options)
    found = _report_of(out)
    if found is not None and found["key"] == key:
        return Prepared.open(out, reused=True)
    with _whole_folder(out) as folder:
        files, entries = _read_parts(train, evaluation, skip_bad, seed)
        chat_tokenizer = _tokenizer_for(entries["train"], tokenizer, vocab_size, template)
        notices = Notices(entries["train"], entries["eval"])
        tasks = list(dict.fromkeys(entry.conversation.task for part in PARTS for entry in entries[part]))
        report = {"key": key, "layout": LAYOUT, "version": __version__, **options, "tasks": tasks}
        report |= {"tokenizer": chat_tokenizer.digest, "vocabulary": chat_tokenizer.size}
        for part in PARTS:
            encoded = _encode(entries[part], chat_tokenizer, template, train_on, workers, part)
            documents = _documents(entries[part], encoded, notices, chat_tokenizer, template, tasks)
            documents.save(folder / part)
            figures = _figures(entries[part], documents, seq, pack=part == "train")
            report[part] = {"files": files[part], **figures}
        with open(folder / "eval" / "conversations.jsonl", "w", encoding="utf-8") as file:
            file.writelines(_to_json(entry.conversation) for entry in entries["eval"])
        chat_tokenizer.save(folder / "tokenizer.json")
        template.save(folder / "template.json")
        report |= {"notices": notices.found, "held_out": not evaluation}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return Prepared.open(out)


def encode_documents(conversations: Sequence[Conversation], tokenizer: ChatTokenizer, template: Template) -> Documents:
    """Encode conversations in memory, each a document, their tasks in order of first appearance."""
    entries = [Entry(conversation, 0, "") for conversation in conversations]
    tasks = list(dict.fromkeys(conversation.task for conversation in conversations))
    encoded = template.encode_batch(conversations, tokenizer)
    return _documents(entries, encoded, Notices([], []), tokenizer, template, tasks)


# ---- what goes in


def _read_parts(
    train: Sequence[Path], evaluation: Sequence[Path], skip_bad: bool, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[Entry]]]:
    """Return what the report says of the files of each part, and the conversations of each part."""
    files, entries = {}, {}
    for part, paths in zip(PARTS, (train, evaluation), strict=True):
        files[part], entries[part] = _gather(paths, skip_bad)
    if not evaluation:
        entries["train"], entries["eval"] = _hold_out(entries["train"], seed)
    return files, entries


def _gather(paths: Sequence[Path], skip_bad: bool) -> tuple[list[dict[str, Any]], list[Entry]]:
    """Read files; return what the report says of each, and their conversations."""
    files: list[dict[str, Any]] = []
    entries: list[Entry] = []
    for source, path in enumerate(tqdm(paths, "read", unit="file", disable=None, leave=False)):
        reading: Reading = read(path, skip_bad=skip_bad)
        entries += (Entry(line.conversation, source, f"{path.name}:{line.number}") for line in reading.lines)
        about = {"name": path.name, "format": reading.format, "conversations": len(reading.lines)}
        left_out = [number for number, _ in reading.bad]
        files.append({**about, "malformed": len(left_out), "malformed_at": left_out[:SHOWN]})
    return files, entries


def _hold_out(entries: list[Entry], seed: int) -> tuple[list[Entry], list[Entry]]:
    """Split off an evaluation part by content: equal conversations stay together, in whatever order.

    Where there are two distinct conversations or more, each part gets at least one.
    """
    numbers = [int.from_bytes(content_digest([seed, e.conversation.turns]), "big") for e in entries]
    distinct = sorted(set(numbers))
    held = [number for number in distinct if number < HELD_OUT * 2**128] or distinct[:1]
    chosen = set(held[: len(distinct) - 1])
    parts: tuple[list[Entry], list[Entry]] = ([], [])
    for number, entry in zip(numbers, entries):
        parts[number in chosen].append(entry)
    return parts


def _tokenizer_for(entries: list[Entry], tokenizer: Path | None, vocab_size: int, template: Template) -> ChatTokenizer:
    """Load the tokenizer that is given, or train one on the conversations."""
    if tokenizer is not None:
        return ChatTokenizer.load(tokenizer, template.tokens)
    texts = (turn.text for entry in entries for turn in entry.conversation.turns)
    return ChatTokenizer.train(texts, vocab_size, template.tokens)


def _key(
    train: Sequence[Path],
    evaluation: Sequence[Path],
    tokenizer: Path | None,
    template: Template,
    options: dict[str, Any],
) -> str:
    """Hash all that the result depends on: names and contents of the files, options, versions."""
    if tokenizer is not None and Path(tokenizer).is_dir():
        tokenizer = Path(tokenizer) / "tokenizer.json"
    files = {"train": train, "eval": evaluation, "tokenizer": [Path(tokenizer)] if tokenizer else []}
    contents = {kind: [(path.name, _content(path)) for path in paths] for kind, paths in files.items()}
    whole = json.dumps([LAYOUT, __version__, contents, asdict(template), options], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _content(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as reason:
        raise UserError(f"{path} cannot be read: {reason.strerror or reason}") from None
    return digest.hexdigest()


# ---- what comes out


def _encode(
    entries: list[Entry], tokenizer: ChatTokenizer, template: Template, train_on: str, workers: int, part: str
) -> Iterator[Encoded]:
    """Yield the tokens of each conversation, in order."""
    with tqdm(total=len(entries), desc=f"encode {part}", unit=" conversations", disable=None, leave=False) as bar:
        for low in range(0, len(entries), CHUNK):
            chunk = [entry.conversation for entry in entries[low : low + CHUNK]]
            yield from template.encode_batch(chunk, tokenizer, train_on=train_on, workers=workers)
            bar.update(len(chunk))


def _documents(
    entries: list[Entry],
    encoded: Iterable[Encoded],
    notices: Notices,
    tokenizer: ChatTokenizer,
    template: Template,
    tasks: list[str],
) -> Documents:
    """Lay encoded conversations end to end, and notice those with nothing to learn."""
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    tokens, learnt, cuts = [np.empty(0, dtype)], [np.empty(0, np.bool_)], [np.empty(0, np.int32)]
    for entry, one in zip(entries, encoded, strict=True):
        tokens.append(np.array(one.ids, dtype))
        learnt.append(np.array(one.supervised, np.bool_))
        cuts.append(np.array(one.cuts, np.int32))
        if not any(one.supervised):
            notices.add("conversations with nothing to learn", entry.where)
    number = {task: index for index, task in enumerate(tasks)}
    return Documents(
        tokens=np.concatenate(tokens),
        learnt=np.concatenate(learnt),
        offsets=np.cumsum([len(one) for one in tokens]),
        cuts=np.concatenate(cuts),
        cut_offsets=np.cumsum([len(one) for one in cuts]),
        task=np.array([number[entry.conversation.task] for entry in entries], np.int32),
        source=np.array([entry.source for entry in entries], np.int32),
        tasks=tasks,
        pad=template.pad_id(tokenizer),
    )


def _figures(entries: list[Entry], documents: Documents, seq: int, *, pack: bool) -> dict[str, Any]:
    """Count a part for the report; `pack` also tries how well its rows fill."""
    bins = Counter(1 << max(4, int(length - 1).bit_length()) for length in documents.lengths)
    figures: dict[str, Any] = {
        "conversations": len(documents),
        "turns": sum(len(entry.conversation.turns) for entry in entries),
        "tokens": len(documents.tokens),
        "supervised": int(documents.learnt.sum()),
        "lengths": {str(length): bins[length] for length in sorted(bins)},  # by the power of two at or above
        "seq": seq,
        "truncated": cut_to_fit(documents, seq).truncated._asdict(),
    }
    if pack:
        packing = Packing(documents, seq=seq, batch=1)
        figures |= {"rows": packing.steps_per_epoch(), "waste": packing.waste}
    return figures


def _to_json(conversation: Conversation) -> str:
    """Return a conversation as one line, which `read` also reads where no turn is plain text."""
    messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
    return json.dumps({"messages": messages, "task": conversation.task, "metric": conversation.metric}) + "\n"


def _from_json(line: str) -> Conversation:
    record = json.loads(line)
    turns = tuple(Turn(message["role"], message["content"]) for message in record["messages"])
    return Conversation(turns, record["task"], record["metric"])


# ---- the folder


def _report_of(folder: Path) -> dict[str, Any] | None:
    """Return the report of a prepared folder; None where the folder is no such."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and {"key", "layout"} <= report.keys() else None


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `out` when the block ends well, and nothing when it does not.

    Raises  UserError where `out` holds something that `prepare` did not make
    """
    if out.exists() and _report_of(out) is None and not (out.is_dir() and not any(out.iterdir())):
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
