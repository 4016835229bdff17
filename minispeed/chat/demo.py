"""The main job in one command: write conversations, train, score on new ones, answer three live, prove the law, talk.

Everything goes through the code that serves users: the conversations are written as a JSONL file, and `sft` reads it.
Beside the trained model's scores stand those of two that learnt nothing: the same model before training, and the answer
of the most similar training prompt. The law is that layouts of ranks give one and the same model (`proof.py`).
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from minispeed import checkpoint
from minispeed.chat.chat_model import ChatModel
from minispeed.chat.commands import ChatOptions, DemoOptions, SftOptions
from minispeed.chat.conversation import USER, Turn
from minispeed.chat.converse import converse, reply
from minispeed.chat.evaluate import answer_all
from minispeed.chat.opening import cache_folder
from minispeed.chat.pack import Packing
from minispeed.chat.prepared import Prepared
from minispeed.chat.proof import ROWS, STEPS, Proof, prove, rows_of, small
from minispeed.chat.score import Answered, nearest_answers, summarise_tasks
from minispeed.chat.sft import sft
from minispeed.chat.skills import (
    GROUPS,
    LIVE_PROMPTS,
    REFUSAL,
    SKILLS,
    eval_conversations,
    put_before,
    string_together,
    train_conversations,
    write_jsonl,
)
from minispeed.collective.world import best_device
from minispeed.errors import UserError
from minispeed.model.config import GPTConfig
from minispeed.model.generate import Sampling
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.precision import choose_precision

LONGEST_ANSWER = 128  # tokens
UNTRAINED_PROMPTS = 5  # per skill: they are all answered with noise


def demo(options: DemoOptions) -> int:
    """Do `minispeed demo`. Returns the exit code."""
    start = time.perf_counter()
    folder = options.out / "conversations"
    if options.batch % options.ranks:
        options = replace(options, batch=-(-options.batch // options.ranks) * options.ranks)
    preset(options.model)  # what is wrong is said before an earlier demo is replaced
    choose_precision(options.dtype)
    clear(options)
    train = string_together(train_conversations(options.conversations, seed=options.seed), seed=options.seed)
    held_out = put_before(eval_conversations(options.score, seed=options.seed), seed=options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "held-out.jsonl", held_out)
    print(f"wrote {len(train):,} conversations of {len(SKILLS)} skills to {folder / 'train.jsonl'}; one of them:")
    for turn in train[0].turns:
        print(f"    {turn.role:9}  {turn.text}")
    code = sft(training_options(options))
    if code:
        return code
    chat = ChatModel.load(options.out, device=best_device())
    trained = answer_all(chat, held_out, max_new=LONGEST_ANSWER, progress=True)
    few = [c for index, c in enumerate(held_out) if index % options.score < UNTRAINED_PROMPTS]
    untrained_model = GPT(chat.model.config, seed=options.seed).to(chat.model.embed.tokens.weight)
    untrained = answer_all(
        ChatModel(untrained_model, chat.tokenizer, chat.template), few, max_new=LONGEST_ANSWER, progress=True
    )
    scores = Scores(trained, untrained, nearest_answers(train, held_out))
    print("\n" + scores.table())
    figures = json.dumps(scores.figures(), indent=1) + "\n"
    checkpoint.write_whole(options.out / "scores.json", lambda path: path.write_text(figures))
    answer_live(chat)
    proof = show_proof(options, chat.model.config)
    print(f"\n{time.perf_counter() - start:.0f} s in all; everything is in {options.out}")
    if code := conclude(proof):
        return code
    if options.chat and sys.stdin.isatty() and sys.stdout.isatty():
        return converse(ChatOptions(run=options.out))
    return 0


def clear(options: DemoOptions) -> None:
    """Make room for the run.  Raises UserError if the directory holds something that is not a demo's"""
    if options.out.exists() and any(options.out.iterdir()) and not (options.out / "conversations").is_dir():
        raise UserError(f"{options.out} holds something that is not a demo's", fix="another --out")
    checkpoint.remove(options.out)


def training_options(options: DemoOptions) -> SftOptions:
    """Return what `minispeed sft` would be told."""
    folder = options.out / "conversations"
    return SftOptions(
        model=options.model,
        data=[folder / "train.jsonl"],
        eval_data=[folder / "held-out.jsonl"],
        out=options.out,
        cache=options.out / "tokenised",
        vocab_size=options.vocab_size,
        seq=options.seq,
        batch=options.batch,
        lr=options.lr,
        attention=options.attention,
        steps=options.steps,
        minutes=None if options.steps else options.minutes,
        dtype=options.dtype,
        seed=options.seed,
        threads=options.threads,
        ranks=options.ranks,
        zero=options.zero,
        samples=4,
        score=0,
        max_new=LONGEST_ANSWER,
    )


@dataclass(frozen=True)
class Scores:
    """Answers to the held-out prompts by the trained model and by two that learnt nothing."""

    trained: Sequence[Answered]
    untrained: Sequence[Answered]
    looked_up: Sequence[Answered]

    def figures(self) -> dict[str, Any]:
        """Return all scores as plain values: per skill, per group, refusals."""
        tables = {
            "trained": summarise_tasks(self.trained),
            "untrained": summarise_tasks(self.untrained),
            "looked_up": summarise_tasks(self.looked_up),
        }
        groups = {
            group: {who: mean(table, [s for s in SKILLS if SKILLS[s].group == group]) for who, table in tables.items()}
            for group in GROUPS
        }
        rules = [task for task in tables["trained"] if SKILLS[task].group == "rules"]
        return {
            "skills": tables,
            "groups": groups,
            "all_looked_up": mean(tables["looked_up"], list(tables["looked_up"])),
            "worst_rule": min(tables["trained"][task]["right"] for task in rules),
            "stopped": sum(a.stopped for a in self.trained) / len(self.trained),
            "wrongly_refused": wrongly_refused(self.trained),
        }

    def table(self) -> str:
        """Lay the scores out, group by group."""
        figures = self.figures()
        trained, untrained, looked_up = figures["skills"].values()
        lines = ["right answers to held-out questions       trained  untrained  most similar prompt's answer"]
        for group in GROUPS:
            note = {"memory": " (known facts, new wording)", "rules": " (new instances)"}.get(group, "")
            lines.append(f"{group}{note}")
            for task in (name for name in trained if SKILLS[name].group == group):
                row = trained[task]
                extra = (
                    f"   precision {row['precision']:.2f}, recall {row['recall']:.2f}, F1 {row['f1']:.2f}"
                    if "f1" in row
                    else ""
                )
                lines.append(
                    f"  {task:14} {row['metric']:8} of {row['count']:3}          {row['right']:7.0%}  "
                    f"{untrained[task]['right']:9.0%}  {looked_up[task]['right']:9.0%}{extra}"
                )
            means = figures["groups"][group]
            lines.append(
                f"  {'average':37} {means['trained']:7.0%}  {means['untrained']:9.0%}  {means['looked_up']:9.0%}"
            )
        lines.append(
            f"answers that stopped by themselves {figures['stopped']:.1%}; "
            f"questions within its skills that it refused {figures['wrongly_refused']:.1%}"
        )
        return "\n".join(lines)


def mean(table: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> float:
    """Return the plain average of the share of right answers over tasks."""
    shares = [table[task]["right"] for task in tasks if task in table]
    return sum(shares) / max(1, len(shares))


def wrongly_refused(answered: Sequence[Answered]) -> float:
    """Return the share of questions within the skills that were answered with the refusal."""
    within = [one for one in answered if SKILLS[one.task].group != "off topic"]
    return sum(one.answer.startswith(REFUSAL) for one in within) / max(1, len(within))


def answer_live(chat: ChatModel) -> None:
    """Print three prompts and what the model says to them now."""
    for prompt in LIVE_PROMPTS:
        print(f"\nyou> {prompt}")
        for text in reply(chat, [Turn(USER, prompt)], Sampling(), torch.Generator(), LONGEST_ANSWER):
            print(text, end="", flush=True)
        print()


def show_proof(options: DemoOptions, config: GPTConfig) -> Proof:
    """Train a small model of the same family on the first rows of the run, under four layouts; print what came out.

    Writes  timeline.svg in the run's directory, if matplotlib is there
    """
    prepared = Prepared.open(cache_folder(training_options(options)))
    steps = rows_of(Packing(prepared.train, seq=options.seq, batch=ROWS, seed=options.seed))
    print(f"\nthe same {STEPS} steps in float64, AdamW and clipping, on ranks that are threads of this process")
    proof = prove(small(config, seq=options.seq), steps, seed=options.seed)
    print(f"\n{proof.table()}\n{proof.draw(options.out / 'timeline.svg')}")
    return proof


def conclude(proof: Proof) -> int:
    """Print the last line, as an error where layouts disagree. Returns the exit code."""
    if proof.holds:
        print(proof.sentence)
        return 0
    print(f"minispeed: {proof.sentence}", file=sys.stderr)
    return 1
