"""What each command of the line can be told, one dataclass a command, and where its work is done.

Nothing heavy is imported here: `--help` must not wait for torch.
"""

from dataclasses import dataclass
from pathlib import Path

from minispeed.chat.sft_options import SftOptions as SftOptions
from minispeed.options import Options, option
from minispeed.pipeline.schedule import SCHEDULES

SIMULATING = "Simulating a pipeline"
FIXED = "Choices that are made already"


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(Options):
    """Tokenise conversations once, and report what is in them.

    minispeed prepare chats.jsonl --out prepared
    """

    data: list[Path] = option(positional=True, help="files of conversations: JSONL or JSON, plain or .gz")
    out: Path = option(help="directory to write to", metavar="DIR")
    eval_data: list[Path] = option([], help="files to score on; without any, 5 % is held out", metavar="FILE")
    tokenizer: Path | None = option(None, help="a tokenizer.json; without one, it is learnt from the data")
    vocab_size: int = option(4096, help="size of a tokenizer that is learnt", unit="tokens", low=262)
    train_on: str = option("assistant", help="which turns are learnt", choices=("assistant", "all"))
    seq: int = option(512, help="length of a row, for the report on truncation and waste", unit="tokens", low=2)
    skip_bad: bool = option(False, help="count malformed lines instead of stopping at them")
    workers: int = option(2, help="threads that tokenise", low=1)


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Options):
    """Print a few conversations as the model sees them: what is learnt, what is context, what is special.

    minispeed show chats.jsonl --count 3
    """

    data: Path = option(positional=True, help="a file of conversations")
    count: int = option(3, help="conversations to print", low=1)
    tokenizer: Path | None = option(None, help="a tokenizer.json; without one, it is learnt from the file")
    train_on: str = option("assistant", help="which turns are learnt", choices=("assistant", "all"))
    colour: bool | None = option(None, help="with colours, or with marks; without either: colours on a terminal")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Options):
    """Score a run on held-out conversations: answers, stopping, loss.

    minispeed eval runs/first --data test.jsonl
    """

    run: Path = option(positional=True, help="the directory of a run")
    data: list[Path] = option([], help="files to score on; without any, what the run held out", metavar="FILE")
    score: int = option(100, help="prompts per task that are answered; 0 for all", low=0)
    max_new: int = option(256, help="longest answer", unit="tokens", low=1)
    temperature: float = option(0.0, help="0 always takes the likeliest token; small models then repeat", low=0)
    top_k: int = option(0, help="draw from the k likeliest tokens; 0 for all", low=0)
    top_p: float = option(1.0, help="draw from the likeliest tokens with this probability together", low=0, high=1)
    seed: int = option(0, help="of the drawing", low=0)
    pattern: str | None = option(None, help="also report the share of answers that this regular expression finds")
    json: bool = option(False, help="print JSON in place of the table")
    threads: int = option(0, help="threads that torch computes with; 0 takes every core", low=0)


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Options):
    """Talk to a run. /reset forgets the conversation, /quit leaves.

    minispeed chat runs/first
    """

    run: Path = option(positional=True, help="the directory of a run")
    prompt: str | None = option(None, help="answer this and leave", metavar="TEXT")
    system: str | None = option(None, help="what the model is told before the conversation", metavar="TEXT")
    temperature: float = option(0.0, help="0 always takes the likeliest token", low=0)
    top_k: int = option(0, help="draw from the k likeliest tokens; 0 for all", low=0)
    top_p: float = option(1.0, help="draw from the likeliest tokens with this probability together", low=0, high=1)
    max_new: int = option(256, help="longest answer", unit="tokens", low=1)
    seed: int = option(0, help="of the drawing", low=0)
    threads: int = option(0, help="threads that torch computes with; 0 takes every core", low=0)


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Watch a small GPT learn to chat, see its scores on held-out questions, and talk to it.

    minispeed demo
    """

    out: Path = option(Path("runs/demo"), help="directory that the run writes to, replaced if it is a demo's")
    model: str = option("tiny", help="a preset")
    minutes: float = option(4.2, help="time to train for", low=0.05)
    steps: int | None = option(None, help="updates to make, in place of --minutes", low=1)
    conversations: int = option(60000, help="how many to write for training", low=100)
    score: int = option(50, help="held-out prompts per skill", low=1)
    lr: float | None = option(None, help="learning rate at its highest", low=0)
    batch: int = option(5, help="rows per step", unit="rows", low=1)
    seq: int = option(192, help="length of a row, and of a conversation that it can follow", unit="tokens", low=64)
    vocab_size: int = option(400, help="size of the tokenizer", unit="tokens", low=262)
    attention: str = option(
        "reference", help="which implementation", choices=("fused", "tiled", "reference")
    )  # bf16 rows of 128 on a CPU: 3.2 ms a layer and step, the fused kernel 7.6
    dtype: str = option(
        "auto", help="of parameters and products; auto measures", choices=("auto", "bf16", "fp16", "fp32", "fp64")
    )
    ranks: int = option(1, help="processes that share the training; on 2 cores one is faster", low=1)
    zero: int = option(0, help="ZeRO stage: what the ranks cut among them", choices=(0, 1, 2, 3))
    seed: int = option(0, help="the same seed gives the same weights, bit for bit", low=0)
    threads: int = option(0, help="threads that torch computes with; 0 takes every core", low=0)
    chat: bool = option(True, help="talk to it at the end, if there is a terminal")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    """Say what a bug report needs: versions, devices, dtypes, disk, and how fast processes speak.

    minispeed doctor
    """

    json: bool = option(False, help="print JSON in place of the text")
    ranks: int = option(2, help="processes between which bandwidth is measured; 0 skips it", low=0)


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(Options):
    """Measure this machine with all its ranks busy: products, memory, operations, messages. Takes about a minute.

    minispeed calibrate

    The profile is what planning and simulating compute with: --profile measured.
    """

    ranks: list[int] = option([], help="numbers of ranks to measure with; 1 2 4, or as many as GPUs, if absent", low=1)
    out: Path | None = option(
        None, help="JSON file to write; ~/.cache/minispeed/profile.json when absent", metavar="FILE"
    )
    threads: int = option(0, help="threads of each rank; 0 shares the cores out, as in training", low=0)
    quick: bool = option(False, help="see that all of it runs, in seconds; the figures mean nothing")


@dataclass(frozen=True, kw_only=True)
class SimulateOptions(Options):
    """Say how long a training step takes on machines that are not there, who waits for whom, and draw it.

    minispeed simulate --model llama-3.2-1b --devices 64 --profile h100 --pp 4 --tp 4 --batch 256 --out step.svg

    The machines are a published kind, a profile that `minispeed calibrate` wrote, or "measured": what it measured here.
    A step is described by these options, by a block "simulate" of them in a JSON file (--config), or, what concerns
    the batch, the dtype and ZeRO, by a DeepSpeed configuration (--deepspeed).
    """

    model: str = option(help="a preset, a model's directory, or a JSON file of a shape", group="What is trained")
    devices: int = option(8, help="devices of the cluster: dp x pp x sp x tp", low=1, group="On what")
    profile: str = option(
        "h100", help="v100, a100-40gb, a100-80gb, h100, h200, b200, l4, measured, or a file", group="On what"
    )
    deepspeed: Path | None = option(
        None, help="a DeepSpeed configuration, in JSON", metavar="FILE", group="What is trained"
    )
    batch: int | None = option(
        None,
        help="rows per step, all ranks together; 4 micro-batches a stage when absent",
        unit="rows",
        low=1,
        group="What is trained",
    )
    micro_batch: int | None = option(
        None, help="rows that go through the model at once; 1 when absent", unit="rows", low=1, group="What is trained"
    )
    seq: int | None = option(
        None,
        help="length of a row; 1024 when absent, or less if the model reads less",
        unit="tokens",
        low=2,
        group="What is trained",
    )
    dtype: str | None = option(
        None,
        help="of parameters and products; bf16 when absent, or fp16 where the machine has no bf16",
        choices=("bf16", "fp16", "fp32", "fp64"),
        group="What is trained",
    )
    recompute: str = option(
        "none", help="none, all, attention, or every so many layers: computed again in the backward", group="How"
    )
    zero: int | None = option(None, help="ZeRO stage; 0 when absent", choices=(0, 1, 2, 3), group="How")
    offload_optimizer: bool = option(False, help="masters and moments live, and step, on the CPU", group="How")
    pp: int = option(1, help="ranks that share the model's depth: a pipeline", low=1, group="How")
    pipeline_schedule: str = option("1f1b", help="in which order they compute", choices=tuple(SCHEDULES), group="How")
    virtual_stages: int = option(1, help="stages on each rank of a pipeline: gpipe, interleaved", low=1, group="How")
    sp: int = option(1, help="ranks that share each row's tokens", low=1, group="How")
    sequence: str = option("ulysses", help="how they attend to each other's", choices=("ulysses", "ring"), group="How")
    tp: int = option(1, help="ranks that share each layer's width", low=1, group="How")
    sequence_parallel: bool = option(False, help="between the layers that tp cuts, cut by tokens", group="How")
    out: Path | None = option(None, help="picture to write: .svg, .png or .pdf; drawn in letters when absent")
    width: int = option(96, help="letters of a line of the timeline", low=8, high=1000)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """Say which layout to train a model with: all of them ranked, and why each other loses. No accelerator is needed.

    minispeed plan --model llama-3.2-1b --devices 8 --memory 24GB --seq 2048 --batch 128
    """

    model: str = option(help="a preset, the directory of a run or of a HuggingFace model, or a JSON file of a shape")
    devices: int = option(help="how many share the work", low=1)
    memory: str | None = option(None, help="of each device; the profile's if absent", metavar="24GB")
    seq: int = option(help="length of a row", unit="tokens", low=2)
    batch: int = option(help="rows per step, all devices together", unit="rows", low=1)
    profile: str | None = option(
        None,
        help="how fast the devices are: h100, a100-80gb, ... or a file of `minispeed calibrate`; measured: its last; "
        "the published one of about --memory if absent",
        metavar="NAME|FILE",
    )
    dtype: str = option("bf16", help="of parameters and products", choices=("bf16", "fp16", "fp32", "fp64"))
    attention: str | None = option(
        None, help="which implementation; the model's if absent", choices=("fused", "tiled", "reference")
    )
    lora_rank: int = option(0, help="of adapters that alone are trained; 0: all is", low=0)
    top: int = option(10, help="layouts to show", low=1)
    out: Path | None = option(None, help="write the best as a configuration of sft and simulate", metavar="FILE")
    json: bool = option(False, help="print JSON in place of the text")
    dp: int | None = option(None, help="replicas: leave the rest open", low=1, group=FIXED)
    pp: int | None = option(None, help="ranks that share the depth", low=1, group=FIXED)
    sp: int | None = option(None, help="ranks that share each row", low=1, group=FIXED)
    tp: int | None = option(None, help="ranks that share each layer's width", low=1, group=FIXED)
    zero: int | None = option(None, help="ZeRO stage", choices=(0, 1, 2, 3), group=FIXED)
    micro_batch: int | None = option(None, help="rows at once", low=1, group=FIXED)
    recompute: str | None = option(None, help="none, all, attention, or every so many layers", group=FIXED)
    offload: str | None = option(None, help="to the host", choices=("none", "optimizer", "all"), group=FIXED)
    pipeline_schedule: str | None = option(None, help="of a pipeline", choices=tuple(SCHEDULES), group=FIXED)
    sequence: str | None = option(None, help="attention over cut rows", choices=("ulysses", "ring"), group=FIXED)


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(Options):
    """Say what a DeepSpeed configuration comes to here: every value, where it is from, and what it costs.

    minispeed explain ds_config.json --ranks 4 --parameters 124M
    """

    file: Path | None = option(None, positional=True, help="a DeepSpeed configuration, in JSON", metavar="FILE")
    ranks: int = option(1, help="data-parallel ranks", low=1)
    pp: int = option(1, help="ranks that share the model's depth: stages of a pipeline", low=1)
    parameters: str | None = option(None, help="how many the model has, for its memory in all", metavar="124M")
    keys: bool = option(False, help="print every key that a configuration may have (docs/config.md), and stop")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Write a run as a directory that transformers loads: model, tokenizer, chat template, and where to stop.

    minispeed export runs/first --out first-for-transformers
    """

    run: Path = option(positional=True, help="the run's directory")
    out: Path = option(help="directory to write to; it must not hold anything", metavar="DIR")
    dtype: str | None = option(None, help="of the weights; as the run wrote them", choices=("bf16", "fp16", "fp32"))
    checkpoint: str | None = option(
        None, help="masters of this checkpoint, in place of the finished model", choices=("last", "best")
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """List what checkpoints hold, and compare every byte with its checksum. Nothing is changed.

    minispeed checkpoint runs/first
    """

    directory: Path = option(
        positional=True, help="a run, its checkpoints/, one checkpoint, or a DeepSpeed-style folder"
    )
    tensors: bool = option(False, help="a line for each tensor: name, shape, dtype")


@dataclass(frozen=True, kw_only=True)
class TimelineOptions(Options):
    """Draw what each rank did when: of the trace files of runs, one above the other, or of a simulated pipeline.

    minispeed timeline --schedule 1f1b --ranks 4 --micros 8 --out 1f1b.svg
    minispeed timeline run.json simulated.json --out both.svg
    """

    files: list[Path] = option([], positional=True, help="traces: JSON in the Chrome trace format", metavar="FILE")
    out: Path | None = option(None, help="picture to write: .svg, .png or .pdf; without one, only a line is printed")
    same_scale: bool = option(False, help="an inch is the same time in all runs; a simulated unit counts as a second")
    schedule: str | None = option(None, help="what to simulate", choices=SCHEDULES, group=SIMULATING)
    ranks: int | None = option(None, help="ranks of the pipeline; 4 when absent", low=1, group=SIMULATING)
    micros: int | None = option(None, help="micro-batches of a step; 8 when absent", low=1, group=SIMULATING)
    virtual: int | None = option(None, help="stages on each rank; 1 when absent", low=1, group=SIMULATING)
    cost_f: list[float] = option(
        [], help="time of a forward; 1 when absent; one number, or one a stage", low=0, high=1e9, group=SIMULATING
    )
    cost_b: list[float] = option([], help="of a backward; 2 when absent; likewise", low=0, high=1e9, group=SIMULATING)
    cost_bi: list[float] = option(
        [], help="zb_h1: of the gradients of a stage's input; 1 when absent", low=0, high=1e9, group=SIMULATING
    )
    cost_bw: list[float] = option(
        [], help="zb_h1: of the gradients of its weights; 1 when absent", low=0, high=1e9, group=SIMULATING
    )
    cost_send: list[float] = option(
        [], help="of a message from a stage to the next or the last; 0 when absent", low=0, high=1e9, group=SIMULATING
    )
    cost_reduce: list[float] = option(
        [], help="of summing a stage's gradients over replicas; not done when absent", low=0, high=1e9, group=SIMULATING
    )
    trace_out: Path | None = option(
        None, help="file for the simulated pipeline, in the Chrome trace format", metavar="FILE", group=SIMULATING
    )


def sft(options: SftOptions) -> int:
    from minispeed.chat.sft import sft

    return sft(options)


def prepare(options: PrepareOptions) -> int:
    from minispeed.chat.prepare import prepare
    from minispeed.chat.show import report_text

    prepared = prepare(
        options.data,
        options.eval_data,
        options.out,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        train_on=options.train_on,
        seq=options.seq,
        skip_bad=options.skip_bad,
        workers=options.workers,
    )
    print(report_text(prepared.report))
    return 0


def show(options: ShowOptions) -> int:
    import sys

    from minispeed.chat.read import read
    from minispeed.chat.show import show
    from minispeed.chat.template import Template
    from minispeed.chat.tokenizer import ChatTokenizer

    reading = read(options.data)
    conversations = [line.conversation for line in reading.lines]
    texts = (turn.text for conversation in conversations for turn in conversation.turns)
    tokenizer = (
        ChatTokenizer.load(options.tokenizer) if options.tokenizer else ChatTokenizer.train(texts, vocab_size=4096)
    )
    colour = sys.stdout.isatty() if options.colour is None else options.colour
    print(f"{options.data}: {reading.format}, {len(conversations)} conversations")
    print(show(conversations[: options.count], tokenizer, Template(), colour=colour))
    return 0


def eval(options: EvalOptions) -> int:  # noqa: A001 the command's name
    from minispeed.chat.evaluate import evaluate_run

    return evaluate_run(options)


def chat(options: ChatOptions) -> int:
    from minispeed.chat.converse import converse

    return converse(options)


def demo(options: DemoOptions) -> int:
    from minispeed.chat.demo import demo

    return demo(options)


def doctor(options: DoctorOptions) -> int:
    from minispeed.chat.doctor import doctor

    return doctor(options)


def calibrate(options: CalibrateOptions) -> int:
    from minispeed.chat.calibrate import calibrate

    return calibrate(options)


def simulate(options: SimulateOptions) -> int:
    from minispeed.chat.simulate import simulate

    return simulate(options)


def plan(options: PlanOptions) -> int:
    from minispeed.chat.plan import plan

    return plan(options)


def explain(options: ExplainOptions) -> int:
    from minispeed.chat.explain import explain

    return explain(options)


def export(options: ExportOptions) -> int:
    from minispeed.chat.export import export

    return export(options)


def checkpoint(options: CheckpointOptions) -> int:
    from minispeed.chat.checkpoints import checkpoint

    return checkpoint(options)


def timeline(options: TimelineOptions) -> int:
    from minispeed.chat.timeline import timeline

    return timeline(options)
