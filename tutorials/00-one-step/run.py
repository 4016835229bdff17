"""Where do the time and the bytes of a training step go?

A GPT of about a million parameters makes a few steps on one device; one of them is traced, operation by operation.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiment import GREY, Experiment, Values, finish
from tracing import CATEGORIES, Kept, Trace, marking_layers

from minispeed.model.config import GPTConfig
from minispeed.model.flops import step_flops
from minispeed.model.gpt import GPT
from minispeed.model.presets import preset
from minispeed.optim import AdamW

PHASES = ("forward", "backward", "optimizer")
COLOURS = dict(zip(CATEGORIES, ("#4c78a8", "#e45756", "#54a24b", "#eeb43b", "#b07aa1")))


def measure(code: ModuleType, is_quick: bool) -> dict[str, Any]:
    """Trace a step, compare it with what `code` predicts, time steps, and break one."""
    config, rows, tokens = preset("nano"), *((2, 32) if is_quick else (8, 256))
    traced = trace_step(config, rows, tokens)
    course = predict_course(code, config, rows, tokens)
    peak = max(traced.samples, key=sum)
    states, kept = code.bytes_of_states(config), code.bytes_kept_by_block(config, rows * tokens)
    return {
        "model": config.to_dict(),
        "rows": rows,
        "tokens": tokens,
        "batch": rows * tokens,
        "parameters": code.count_parameters(config),
        "states": {**states, "total": sum(states.values())},
        "block": {"bytes": kept, "per_token": kept // (rows * tokens)},
        "course": compare(course, traced),
        "peak": {**dict(zip(CATEGORIES, peak)), **about(peak, states["parameters"], traced.samples.index(peak))},
        "sweep": [sweep(code, config, n, tokens) for n in ((1, 2) if is_quick else (1, 2, 4, 8))],
        "times": measure_times(config, rows, tokens, 1 if is_quick else 15),
        "leak": {name: leak(config, rows, tokens, name) for name in ("tensor", "number", "no graph")},
        "series": {name: [sample[place] for sample in traced.samples] for place, name in enumerate(CATEGORIES)},
        "phases": {mark: at for mark, at, _ in traced.marks if mark.endswith("is over")},
        "operations": len(traced.samples),
    }


def train_step(model: GPT, optimizer: AdamW, tokens: Tensor, labels: Tensor, trace: Trace | None = None) -> list[float]:
    """Make one step, and return the processor seconds that its three phases took."""
    times = [time.process_time()]
    with trace.kept.watching() if trace else nullcontext():
        loss = model(tokens, labels).sum() / labels.numel()
    note(trace, times, "the forward is over")
    loss.backward()
    note(trace, times, "the backward is over")
    optimizer.step()
    note(trace, times, "the update is over")
    optimizer.zero_grad()
    return [end - start for start, end in zip(times, times[1:])]


def note(trace: Trace | None, times: list[float], name: str) -> None:
    """Write down that a phase is over."""
    times.append(time.process_time())
    if trace:
        trace.mark(name)


def trace_step(config: GPTConfig, rows: int, tokens: int) -> Trace:
    """Trace a second step: the first one makes Adam's moments."""
    model = GPT(config)
    optimizer = AdamW(model.parameters())
    train_step(model, optimizer, *draw_rows(config, rows, tokens, seed=0))
    batch = draw_rows(config, rows, tokens, seed=1)
    trace = Trace(model, optimizer)
    with trace, marking_layers(trace):
        train_step(model, optimizer, *batch, trace)
    return trace


def draw_rows(config: GPTConfig, rows: int, tokens: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens, and for each the one that follows it; costs do not depend on what they say.  Each (B, T)"""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(config.vocab_size, (rows, tokens + 1), generator=generator)
    return drawn[:, :-1].clone(), drawn[:, 1:].clone()


def predict_course(code: ModuleType, config: GPTConfig, rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Return, for every moment that is marked, the bytes of each category but the temporary ones."""
    states, n, L = code.bytes_of_states(config), rows * tokens, config.num_layers
    block, beside = code.bytes_kept_by_block(config, n), code.bytes_kept_beside(config, n)
    fewer = replace(config, num_layers=1), replace(config, num_layers=2)
    learnt = 4 * (code.count_parameters(fewer[1]) - code.count_parameters(fewer[0]))
    norm = 4 * 2 * config.model_dim

    def at(gradients: int, activations: int) -> tuple[int, ...]:
        return states["parameters"], gradients, states["optimizer"], activations

    below = [beside["tokens"] + beside["rotary"] + (i + 1) * block for i in range(L)]
    course = {"forward of embedding": at(0, beside["tokens"])}
    course |= {f"forward of block {i}": at(0, below[i]) for i in range(L)}
    course["the forward is over"] = at(0, below[-1] + beside["norm and loss"])
    for i in reversed(range(L)):
        course[f"backward down to block {i}"] = at(norm + (L - 1 - i) * learnt, below[i])
    course["backward down to embedding"] = at(norm + L * learnt, beside["tokens"])
    course |= {f"the {phase} is over": at(states["gradients"], 0) for phase in ("backward", "update")}
    return course


def compare(course: Mapping[str, tuple[int, ...]], traced: Trace) -> list[dict[str, Any]]:
    """Put prediction and measurement of every moment side by side."""
    names, rows = CATEGORIES[:-1], []
    for moment, at, found in traced.marks:
        predicted, measured = dict(zip(names, course[moment])), dict(zip(names, found))
        rows.append({"moment": moment, "operation": at, "predicted": predicted, "measured": measured})
    return rows


def about(peak: tuple[int, ...], parameters: int, at: int) -> dict[str, float]:
    """Say what is remarkable about the fullest moment."""
    total, activations = sum(peak), peak[CATEGORIES.index("activations")]
    share = activations / total
    return {"total": total, "operation": at, "times_parameters": total / parameters, "activations_share": share}


def sweep(code: ModuleType, config: GPTConfig, rows: int, tokens: int) -> dict[str, Any]:
    """Count what steps of more rows keep: the states are what they are, the activations grow."""
    model, n = GPT(config), rows * tokens
    kept = Kept(model)
    with kept.watching():
        losses = model(*draw_rows(config, rows, tokens, seed=0))
    counted, predicted = kept.bytes, config.num_layers * code.bytes_kept_by_block(config, n)
    del losses
    states = sum(code.bytes_of_states(config).values())
    predicted += sum(code.bytes_kept_beside(config, n).values())
    return {"rows": rows, "tokens": n, "states": states, "activations, predicted": predicted, "counted": counted}


def measure_times(config: GPTConfig, rows: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Time each phase on one thread, the fastest of some steps: whatever else the machine does only adds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = GPT(config)
    optimizer, batch = AdamW(model.parameters()), draw_rows(config, rows, tokens, seed=0)
    train_step(model, optimizer, *batch)
    steps = [train_step(model, optimizer, *batch) for _ in range(repeats)]
    torch.set_num_threads(threads)
    seconds = dict(zip(PHASES, (min(phase) for phase in zip(*steps))))
    flops = step_flops(config, rows=rows, tokens=tokens)
    whole = sum(seconds.values())
    return {
        "seconds": seconds,
        "share": {name: value / whole for name, value in seconds.items()},
        "step": whole,
        "repeats": repeats,
        "products": {"forward": flops.forward, "backward": flops.backward + flops.again},
        "ratio": seconds["backward"] / seconds["forward"],
    }


def leak(config: GPTConfig, rows: int, tokens: int, how: str) -> list[int]:
    """Return the bytes that autograd keeps after each of four batches of an evaluation."""
    model, total, kept_after = GPT(config), 0, []
    kept = Kept(model)
    with kept.watching(), torch.no_grad() if how == "no graph" else nullcontext():
        for seed in range(4):
            loss = model(*draw_rows(config, rows, tokens, seed=seed)).mean()
            total = total + (loss.item() if how == "number" else loss)
            del loss
            kept_after.append(kept.bytes)
    return kept_after


def show(values: Values) -> str:
    """Return what the run prints."""
    lines = [f"a step of {values['parameters']:,} parameters on {values['rows']} rows of {values['tokens']} tokens", ""]
    lines += [f"{'bytes':28}" + "".join(f"{name:>14}" for name in CATEGORIES[:-1]) + "   prediction"]
    for moment in values["course"]:
        measured, predicted = moment["measured"], moment["predicted"]
        verdict = "exact" if measured == predicted else f"off by {sum(measured.values()) - sum(predicted.values()):+,}"
        lines.append(f"{moment['moment']:28}" + "".join(f"{size:14,}" for size in measured.values()) + f"   {verdict}")
    peak, times = values["peak"], values["times"]
    fullest = f"the fullest, operation {peak['operation']}"
    lines.append(f"{fullest:28}" + "".join(f"{peak[name]:14,}" for name in CATEGORIES[:-1]))
    lines.append(f"{'':28}  and {peak['temporary']:,} temporary: {peak['total']:,} in all")
    lines += ["", f"{'seconds of a processor':28}" + "".join(f"{name:>14}" for name in PHASES)]
    lines += [f"{'':28}" + "".join(f"{times['seconds'][name]:14.4f}" for name in PHASES)]
    lines += ["", "kept after each batch of an evaluation that adds up"]
    names = {"tensor": "losses", "number": "loss.item()", "no graph": "losses, under no_grad"}
    lines += [f"  {names[how]:26}" + "".join(f"{size:14,}" for size in sizes) for how, sizes in values["leak"].items()]
    return "\n".join(lines)


def draw_memory(results: Values, path: Path) -> None:
    """Draw the bytes alive over the operations of a step, the predictions on them, and the time by phase below."""
    from matplotlib.figure import Figure

    values, figure = results["values"], Figure(figsize=(8, 4.8))
    memory, phases = figure.subplots(2, 1, height_ratios=[9, 1], gridspec_kw={"hspace": 0.4})
    order = ("parameters", "optimizer", "gradients", "activations", "temporary")  # what stays lies below
    series = [[size / 1e6 for size in values["series"][name]] for name in order]
    memory.stackplot(range(len(series[0])), *series, labels=order, colors=[COLOURS[name] for name in order], lw=0)
    points = [(mark["operation"], sum(mark["predicted"].values()) / 1e6) for mark in values["course"]]
    memory.plot(*zip(*points), "o", ms=4, mfc="white", mec="black", mew=1, label="predicted, but for temporary")
    top = max(map(sum, zip(*series)))
    memory.set(xlim=(0, len(series[0])), ylim=(0, 1.1 * top), ylabel="MB alive", xlabel="operations of the step")
    ends = list(values["phases"].values())
    memory.axvline(ends[0], color=GREY, lw=0.8, ls=":")
    for name, at in (("forward", ends[0] / 2), ("backward", (ends[0] + ends[1]) / 2)):
        memory.text(at, 1.12 * top, name, color=GREY, ha="center", fontsize=9)
    handles, labels = memory.get_legend_handles_labels()
    memory.legend(handles[::-1], labels[::-1], frameon=False, labelcolor=GREY, fontsize=8, loc="upper right")
    _draw_times(phases, values["times"]["seconds"])
    finish(figure, path)


def _draw_times(axes: Any, seconds: Mapping[str, float]) -> None:
    """Draw a bar of the phases, as long as they took."""
    start, whole = 0.0, sum(seconds.values())
    for (name, length), shade in zip(seconds.items(), ("#9ecae9", "#6baed6", COLOURS["optimizer"])):
        axes.barh(0, 1000 * length, left=1000 * start, color=shade)
        if length > whole / 10:
            axes.text(1000 * (start + length / 2), 0, name, ha="center", va="center", fontsize=8, color="black")
        start += length
    axes.set(
        yticks=[],
        xlabel="ms of one processor for the step; the last, green ones are the optimizer's",
        xlim=(0, 1000 * start),
    )
    axes.spines["left"].set_visible(False)


def claims(results: Values) -> Iterator[tuple[str, bool]]:
    """Yield the lesson's sentences, and whether they are true."""
    values = results["values"]
    peak, seconds, leak = values["peak"], values["times"]["seconds"], values["leak"]
    is_exact = all(moment["predicted"] == moment["measured"] for moment in values["course"])
    yield "At every boundary between two layers the prediction is exact, to the byte.", is_exact
    is_more = values["block"]["bytes"] > values["states"]["total"]
    yield "One block keeps more than the whole model holds in states", is_more
    states = [row["states"] for row in values["sweep"]]
    yield "The states do not change with the number of rows.", len(set(states)) == 1
    counted = [row["counted"] for row in values["sweep"]]
    is_doubling = all(later == 2 * earlier for earlier, later in zip(counted, counted[1:]))
    yield "Twice the rows keep exactly twice the activations.", is_doubling
    yield "On one row the states are still more than the activations.", states[0] > counted[0]
    yield "At the fullest moment not one byte of gradient exists.", peak["gradients"] == 0
    first, last = values["phases"]["the forward is over"], values["phases"]["the backward is over"]
    has_just_begun = first < peak["operation"] < (9 * first + last) / 10
    yield "The fullest moment comes when the backward has just begun", has_just_begun
    is_most = peak["activations"] > peak["total"] / 2
    yield "the activations are more than all the rest together", is_most
    yield "The backward takes longer than the forward", seconds["backward"] > seconds["forward"]
    yield "The optimizer takes the least", seconds["optimizer"] == min(seconds.values())
    forward = next(row["measured"] for row in values["course"] if row["moment"] == "the forward is over")
    grows = leak["tensor"] == [(batch + 1) * forward["activations"] for batch in range(4)]
    yield "Every batch adds exactly what a forward keeps.", grows
    yield "Either line ends it: nothing is kept from one batch to the next.", not any(leak["number"] + leak["no graph"])


EXPERIMENT = Experiment(
    measure=measure,
    show=show,
    claims=claims,
    figures={"memory.svg": draw_memory},
    sources=(
        "minispeed/census.py",
        "minispeed/model/attention.py",
        "minispeed/model/gpt.py",
        "minispeed/model/loss.py",
        "minispeed/model/presets.py",
        "minispeed/model/rotary.py",
        "minispeed/optim.py",
        "tutorials/00-one-step/run.py",
        "tutorials/00-one-step/solution.py",
        "tutorials/00-one-step/tracing.py",
    ),
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
