"""Turn files of conversations into memory-mapped tokens, once, and say what was found in them.

Read every file, hold out an evaluation part and train a tokenizer where none is given, encode, count. The
result, a folder (see `prepared`), is keyed by the content of the files and by all options: asked for again, it is
there.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minispeed.chat.conversation import Conversation
from minispeed.chat.documents import Documents, cut_to_fit
from minispeed.chat.pack import Packing
from minispeed.chat.prepared import LAYOUT, PARTS, Prepared, report_of, whole_folder, write_beside_documents
from minispeed.chat.read import SHOWN, Reading, read
from minispeed.chat.show import Entry, Notices, content_digest
from minispeed.chat.template import ChatTemplate, Encoded, Template
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.errors import UserError
from minispeed.version import __version__

HELD_OUT = 0.05  # share of the distinct conversations
CHUNK = 1000  # conversations encoded at a time
SEVERAL = "conversations in a row for each answer: the template writes an answer otherwise once more turns follow"


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
    template: ChatTemplate = Template(),
) -> Prepared:
    """Prepare data files in the folder `out`, or find them prepared there.

    evaluation  where empty, 5 % of the distinct training conversations are held out, by (seed, content)
    tokenizer   a tokenizer.json; None trains one of `vocab_size` ids on the training part
    seq         the context that the report's figures on truncation and padding are for
    workers     1 encodes on one core, more on all cores; the result is the same
    template    one that writes a date is kept with today's: asked for again, the folder is found with that of its day

    Raises  UserError where a file is missing or malformed (unless `skip_bad`), no conversation fits
            the context, or `out` holds something else
    """
    train, evaluation, out = [Path(p) for p in train], [Path(p) for p in evaluation], Path(out)
    if not train:
        raise UserError("no data file is given", fix="minispeed prepare DATA.jsonl --out DIR")
    options = {"vocab_size": vocab_size, "train_on": train_on, "seq": seq, "skip_bad": skip_bad, "seed": seed}
    key = _key(train, evaluation, tokenizer, template, options)
    found = report_of(out)
    if found is not None and found["key"] == key:
        return Prepared.open(out, reused=True)
    template = template.dated()
    with whole_folder(out) as folder:
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
        report |= {"notices": notices.found, "held_out": not evaluation}
        held_out = [entry.conversation for entry in entries["eval"]]
        write_beside_documents(folder, held_out, chat_tokenizer, template, report)
    return Prepared.open(out)


def encode_documents(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, template: ChatTemplate
) -> Documents:
    """Encode conversations in memory, each row a document, their tasks in order of first appearance."""
    entries = [Entry(conversation, 0, "") for conversation in conversations]
    tasks = list(dict.fromkeys(conversation.task for conversation in conversations))
    encoded = template.encode_rows(conversations, tokenizer)
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


def _tokenizer_for(
    entries: list[Entry], tokenizer: Path | None, vocab_size: int, template: ChatTemplate
) -> ChatTokenizer:
    """Load the tokenizer that is given, or train one on the conversations."""
    if tokenizer is not None:
        return ChatTokenizer.load(tokenizer, template.tokens)
    texts = (turn.text for entry in entries for turn in entry.conversation.turns)
    return ChatTokenizer.train(texts, vocab_size, template.tokens)


def _key(
    train: Sequence[Path],
    evaluation: Sequence[Path],
    tokenizer: Path | None,
    template: ChatTemplate,
    options: dict[str, Any],
) -> str:
    """Hash all that the result depends on: names and contents of the files, options, versions."""
    if tokenizer is not None and Path(tokenizer).is_dir():
        tokenizer = Path(tokenizer) / "tokenizer.json"
    files = {"train": train, "eval": evaluation, "tokenizer": [Path(tokenizer)] if tokenizer else []}
    contents = {kind: [(path.name, _content(path)) for path in paths] for kind, paths in files.items()}
    whole = json.dumps([LAYOUT, __version__, contents, template.content(), options], sort_keys=True)
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
    entries: list[Entry], tokenizer: ChatTokenizer, template: ChatTemplate, train_on: str, workers: int, part: str
) -> Iterator[list[Encoded]]:
    """Yield the rows of each conversation, in order."""
    with tqdm(total=len(entries), desc=f"encode {part}", unit=" conversations", disable=None, leave=False) as bar:
        for low in range(0, len(entries), CHUNK):
            chunk = [entry.conversation for entry in entries[low : low + CHUNK]]
            yield from template.encode_rows(chunk, tokenizer, train_on=train_on, workers=workers)
            bar.update(len(chunk))


def _documents(
    entries: list[Entry],
    encoded: Iterable[list[Encoded]],
    notices: Notices,
    tokenizer: ChatTokenizer,
    template: ChatTemplate,
    tasks: list[str],
) -> Documents:
    """Lay the rows of conversations end to end; notice those with nothing to learn, and those with several rows."""
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    tokens, learnt, cuts = [np.empty(0, dtype)], [np.empty(0, np.bool_)], [np.empty(0, np.int32)]
    entry_of: list[Entry] = []
    for entry, rows in zip(entries, encoded, strict=True):
        for one in rows:
            tokens.append(np.array(one.ids, dtype))
            learnt.append(np.array(one.supervised, np.bool_))
            cuts.append(np.array(one.cuts, np.int32))
            entry_of.append(entry)
        if not any(any(one.supervised) for one in rows):
            notices.add("conversations with nothing to learn", entry.where)
        if len(rows) > 1:
            notices.add(SEVERAL, entry.where)
    number = {task: index for index, task in enumerate(tasks)}
    return Documents(
        tokens=np.concatenate(tokens),
        learnt=np.concatenate(learnt),
        offsets=np.cumsum([len(one) for one in tokens]),
        cuts=np.concatenate(cuts),
        cut_offsets=np.cumsum([len(one) for one in cuts]),
        task=np.array([number[entry.conversation.task] for entry in entry_of], np.int32),
        source=np.array([entry.source for entry in entry_of], np.int32),
        tasks=tasks,
        pad=template.pad_id(tokenizer),
    )


def _figures(entries: list[Entry], documents: Documents, seq: int, *, pack: bool) -> dict[str, Any]:
    """Count a part for the report; `pack` also tries how well its rows fill."""
    bins = Counter(1 << max(4, int(length - 1).bit_length()) for length in documents.lengths)
    figures: dict[str, Any] = {
        "conversations": len(entries),
        "documents": len(documents),
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
