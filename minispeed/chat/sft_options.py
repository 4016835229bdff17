"""What `minispeed sft` can be told: an option a field, in groups as `--help` shows them.

Nothing heavy is imported here: `--help` must not wait for torch. An option whose default is None takes a value from the
case (from scratch, from a checkpoint, the model's size), and the run prints which and why.
"""

from dataclasses import dataclass
from pathlib import Path

from minispeed.options import Options, option
from minispeed.pipeline.schedule import SCHEDULES

MODEL, LEARNING, DATA, RUNNING, WRITING = "Model", "Learning", "Data", "Running", "Writing"
MEMORY, LAYOUT, LORA = "Memory and messages", "Ranks", "LoRA"
FREEZE_STEP = 100
PLANNED = (
    *("dp", "pp", "sp", "tp", "zero", "micro_batch", "pipeline_schedule", "virtual_stages", "sequence"),
    *("sequence_parallel", "recompute", "offload_optimizer", "offload_param"),
)


@dataclass(frozen=True, kw_only=True)
class SftOptions(Options):
    """Fine-tune a model on your conversations, or train a small one from scratch.

    minispeed sft --model tiny --data chats.jsonl --out runs/first --minutes 5
    """

    model: str = option(
        help="a preset (nano, tiny, small, medium, gpt2, ...), the directory of a run, or a HuggingFace model: its "
        "directory, or its name on the hub",
        group=MODEL,
    )
    data: list[Path] = option(
        help="files of conversations to learn from: JSONL or JSON, plain or .gz", group=DATA, metavar="FILE..."
    )
    out: Path = option(help="directory that the run writes to", group=RUNNING, metavar="RUN")
    eval_data: list[Path] = option(
        [],
        help="files to score on, each on its own; the first decides which checkpoint is the best; without any, 5 % of "
        "--data is held out",
        group=DATA,
        metavar="FILE...",
    )
    weights: list[float] = option([], help="one per --data file: how often each is drawn", group=DATA, low=0)
    tokenizer: Path | None = option(None, help="a tokenizer.json; without one, it is learnt from --data", group=DATA)
    vocab_size: int = option(4096, help="size of a tokenizer that is learnt", group=DATA, unit="tokens", low=262)
    train_on: str = option("assistant", help="which turns are learnt", choices=("assistant", "all"), group=DATA)
    seq: int | None = option(None, by_case=True, help="length of a row", unit="tokens", low=2, group=DATA)
    template: str = option(
        "auto",
        help="how a conversation is written: auto, as the checkpoint's chat template says, or ours; ours; or a file",
        group=DATA,
        metavar="auto|ours|FILE",
    )
    skip_bad: bool = option(False, help="count malformed lines instead of stopping at them", group=DATA)
    cache: Path | None = option(None, help="where tokenised data is kept for the next run", group=DATA, metavar="DIR")
    steps: int | None = option(None, help="updates to make", low=1, group=LEARNING)
    epochs: int | None = option(None, help="passes over the data (in place of --steps)", low=1, group=LEARNING)
    minutes: float | None = option(None, help="time to train for (in place of --steps)", low=0.05, group=LEARNING)
    batch: int | None = option(
        None, by_case=True, help="rows per step, all ranks together", unit="rows", low=1, group=LEARNING
    )
    micro_batch: int | None = option(
        None,
        by_case=True,
        help="rows that go through the model at once",
        unit="rows",
        low=1,
        open_to="auto",
        group=LEARNING,
    )
    lr: float | None = option(None, by_case=True, help="learning rate at its highest", low=0, group=LEARNING)
    warmup: int | None = option(
        None, by_case=True, help="steps over which the learning rate rises", low=0, group=LEARNING
    )
    lr_schedule: str = option(
        "cosine", help="how it falls afterwards", choices=("cosine", "linear", "constant"), group=LEARNING
    )
    weight_decay: float | None = option(None, by_case=True, help="AdamW's decay of matrices", low=0, group=LEARNING)
    clip: float = option(1.0, help="largest norm of the gradient; 0 leaves it", low=0, group=LEARNING)
    attention: str = option("fused", help="which implementation", choices=("fused", "tiled", "reference"), group=MODEL)
    deep: str = option(
        "none",
        help="a new model's deep connections: which earlier layers each reads",
        choices=("none", "x0", "unet", "dwa"),
        group=MODEL,
    )
    deep_dilation: int = option(1, help="dwa: every so many of the earlier layers", low=1, group=MODEL)
    deep_period: int = option(1, help="dwa: after every so many layers", low=1, group=MODEL)
    dropout: float | None = option(
        None, by_case=True, help="share of the features that are dropped in training", low=0, high=0.99, group=MODEL
    )
    lora_rank: int = option(
        0, help="train adapters of this rank beside the frozen model; 0: all of it", low=0, group=LORA
    )
    lora_alpha: float | None = option(None, help="they count alpha / rank times; twice the rank if absent", group=LORA)
    lora_dropout: float = option(0.0, help="share of their inputs that is dropped", low=0, high=0.99, group=LORA)
    lora_targets: list[str] = option(
        [],
        help="which Linears have one: ends of names, * for any; every layer's if absent",
        group=LORA,
        metavar="NAME...",
    )
    lora_lr: float | None = option(None, help="their learning rate; --lr if absent", low=0, group=LORA)
    dtype: str = option(
        "auto",
        help="of parameters and products; auto measures",
        choices=("auto", "bf16", "fp16", "fp32", "fp64"),
        group=RUNNING,
    )
    ranks: int | None = option(
        None, by_case=True, help="processes on this machine that share the work: dp x pp x sp x tp", low=1, group=LAYOUT
    )
    auto: list[str] = option(
        [],
        help="let the planner choose how ranks share the work: all that is not said, or these options (or --zero auto)",
        bare="all",
        choices=("all", *PLANNED),
        metavar="NAME...",
        group=LAYOUT,
    )
    profile: str | None = option(
        None,
        help="how fast this machine is, for --auto and MFU: a file of `minispeed calibrate`, measured (its last), "
        "h100, a100-80gb, ...; the measured one, or this GPU's, if absent",
        metavar="NAME|FILE",
        group=LAYOUT,
    )
    dp: int | None = option(
        None, by_case=True, help="replicas of the model, or ZeRO's shards", low=1, open_to="auto", group=LAYOUT
    )
    zero: int = option(
        0, help="ZeRO stage: what the replicas cut among them", choices=(0, 1, 2, 3), open_to="auto", group=LAYOUT
    )
    pp: int = option(1, help="ranks that share the model's depth: a pipeline", low=1, open_to="auto", group=LAYOUT)
    pipeline_schedule: str = option(
        "1f1b", help="in which order they compute", choices=tuple(SCHEDULES), open_to="auto", group=LAYOUT
    )
    virtual_stages: int = option(
        1, help="stages on each rank of a pipeline: gpipe, interleaved", low=1, open_to="auto", group=LAYOUT
    )
    sp: int = option(1, help="ranks that share each row's tokens", low=1, open_to="auto", group=LAYOUT)
    sequence: str = option(
        "ulysses", help="how they attend to each other's", choices=("ulysses", "ring"), open_to="auto", group=LAYOUT
    )
    tp: int = option(1, help="ranks that share each layer's width", low=1, open_to="auto", group=LAYOUT)
    sequence_parallel: bool = option(
        False, help="between the layers that tp cuts, cut by tokens (Megatron's)", open_to="auto", group=LAYOUT
    )
    bucket: int | None = option(
        None,
        help="stages 0 to 2: parameters summed together; by layer when absent",
        unit="elements",
        low=1,
        group=MEMORY,
    )
    reduce_dtype: str = option(
        "auto",
        help="gradients are summed over ranks in it; auto: the --dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
        group=MEMORY,
    )
    compression: str = option(
        "none",
        help="onebit: gradients travel as signs, what that leaves out is added to the next; stages 0 and 1, not fp16",
        choices=("none", "onebit"),
        group=MEMORY,
    )
    freeze_step: int = option(
        FREEZE_STEP,
        help="onebit: so many updates are made in full before, also after --resume; then AdamW's second moment stays",
        unit="steps",
        low=0,
        group=MEMORY,
    )
    overlap: bool = option(True, help="compute goes on while gradients are summed", group=MEMORY)
    prefetch: int = option(
        0, help="stage 3: gather the next layers, this many, while one computes", unit="elements", low=0, group=MEMORY
    )
    persistence: int = option(0, help="stage 3: smaller layers stay whole", unit="elements", low=0, group=MEMORY)
    offload_optimizer: bool = option(
        False, help="masters and moments live, and step, on the CPU", open_to="auto", group=MEMORY
    )
    offload_param: bool = option(
        False, help="stage 3: shards of parameters live on the CPU", open_to="auto", group=MEMORY
    )
    recompute: str = option(
        "none",
        help="none, all, attention, or every so many layers: computed again in the backward",
        open_to="auto",
        group=MEMORY,
    )
    compile: bool = option(False, help="let torch.compile fuse each layer; stages 0 to 2", group=RUNNING)
    loss_scale: float = option(0.0, help="of fp16; 0 finds it while training", low=0, group=RUNNING)
    threads: int = option(0, help="threads of each rank; 0 shares the cores out", low=0, group=RUNNING)
    seed: int = option(0, help="the same seed gives the same weights, bit for bit", low=0, group=RUNNING)
    eval_every: int | None = option(None, by_case=True, help="steps between evaluations", low=1, group=WRITING)
    save_every: int | None = option(
        None,
        by_case=True,
        help="steps between checkpoints; there is one before each evaluation too",
        low=1,
        group=WRITING,
    )
    keep_last: int = option(1, help="how many of the newest checkpoints stay, beside the best", low=1, group=WRITING)
    keep_every: int = option(
        0, help="checkpoints of steps that this divides stay too", unit="steps", low=0, group=WRITING
    )
    save_async: bool = option(
        False, help="write checkpoints while the training goes on; takes memory for a copy", group=WRITING
    )
    prompts: Path | None = option(
        None,
        help="a prompt a line, or JSON conversations: answered before, at each evaluation and after; RUN/samples.md",
        metavar="FILE",
        group=WRITING,
    )
    samples: int = option(0, help="held-out prompts per task answered while it learns", low=0, group=WRITING)
    max_new: int = option(256, help="longest answer when it is scored", unit="tokens", low=1, group=WRITING)
    score: int = option(50, help="held-out prompts per task answered at the end", low=0, group=WRITING)
    trace: Path | None = option(
        None,
        help="what each rank does in a few steps: see minispeed timeline",
        metavar="FILE",
        group=WRITING,
    )
    trace_steps: int = option(1, help="how many steps, from the second on", low=1, group=WRITING)
    max_skipped: int = option(
        5,
        help="skipped steps in a row that stop the run: gradients that are not finite",
        unit="steps",
        low=1,
        group=RUNNING,
    )
    preflight: bool = option(
        True, help="before step 1, do once all that the run will do: step, evaluate, answer, save", group=RUNNING
    )
    resume: bool = option(False, help="go on from the last checkpoint in --out that is whole", group=RUNNING)
    dry_run: bool = option(False, help="prepare, check and print everything, then stop before step 1", group=RUNNING)
