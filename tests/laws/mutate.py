"""Break the library on purpose, one line at a time, and see that the tests notice.

    python tests/laws/mutate.py [WORD...]        only the mutations whose description holds one of the words

Each mutation is played on a copy of the project: a line is replaced, the test that should notice is run, and it must
fail. The table is written to MUTATIONS.md beside this file. A mutation whose line is no longer in the code is an error:
the list follows the code.

Mutation testing: DeMillo, Lipton & Sayward 1978, Hints on test data selection.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LATTICE = "tests/laws/test_lattice.py"
ENGINE, CLIP, NUMBERS = "minispeed/engine.py", "minispeed/clip.py", "minispeed/collective/numbers.py"
UNIT, GRADIENTS = "minispeed/zero/unit.py", "minispeed/zero/gradients.py"
SHARDED, REDUCTION = "minispeed/zero/sharded.py", "minispeed/zero/reduction.py"
TABLE, LEDGER = "minispeed/zero/table.py", "tests/test_ledger.py"
PARTS, LAYOUTS = "minispeed/parts.py", "tests/laws/test_layouts.py"
RING, BLOCK, CUT_ROWS = (f"minispeed/sequence/{name}.py" for name in ("ring", "block", "cut"))
PIPELINE = ("execute", "clock", "deferred", "messages", "partition")
EXECUTE, CLOCK, DEFERRED, MESSAGES, PARTITION = (f"minispeed/pipeline/{name}.py" for name in PIPELINE)
CUT, TIES, RUNNER = (f"minispeed/{name}.py" for name in ("cut", "ties", "runner"))
LAYERS, DEEP, CHUNK = "minispeed/tensor/layers.py", "minispeed/model/connections.py", "minispeed/model/chunk.py"
PIPE, INITIALIZE, PARALLEL = (
    "minispeed/deepspeed/pipe.py",
    "minispeed/deepspeed/initialize.py",
    "minispeed/tensor/parallel.py",
)
PIPES, AUTOTP = "tests/test_deepspeed_pipe.py", "tests/test_autotp.py"
SEQUENCE, EXECUTES = "tests/test_sequence.py", "tests/test_execute.py"
SNAPSHOT, CALLS, CALLING = "minispeed/snapshot.py", "minispeed/deepspeed/engine.py", "tests/test_deepspeed_engine.py"


class Mutation(NamedTuple):
    """What is broken, where, how, and the test that must fail."""

    what: str
    file: str
    before: str
    after: str
    test: str


MUTATIONS = [
    Mutation(
        "drop the division by the step's tokens",
        ENGINE,
        "self.scaler.scale / max(1, num_supervised)",
        "self.scaler.scale",
        LATTICE,
    ),
    Mutation(
        "count supervised tokens of this rank alone",
        ENGINE,
        "num_supervised, num_tokens = sums_of(self.lines.dp, counts).tolist()",
        "num_supervised, num_tokens = counts",
        LATTICE,
    ),
    Mutation(
        "norm of my shard in place of all",
        CLIP,
        "return math.sqrt(sums_of(holders, [squares]).item()), is_finite",
        "return math.sqrt(squares), is_finite",
        LATTICE,
    ),
    Mutation(
        "count the norm N times at stage 0",
        CLIP,
        "holders = lines.model if parts[0].sharded.stage == 0 else lines.world",
        "holders = lines.world",
        LATTICE,
    ),
    Mutation("count what all ranks of tp hold in each one's norm", PARTS, "if all(counts):", "if True:", LAYOUTS),
    Mutation(
        "write a slice as if it were the whole",
        SNAPSHOT,
        "tensor, _is_copy(part, unit, name), of.part)",
        "tensor, _is_copy(part, unit, name))",
        LAYOUTS,
    ),
    Mutation("clip when the norm is small", CLIP, "norm > most", "norm < most", LATTICE),
    Mutation(
        "overflow flag: max -> min",
        NUMBERS,
        'all_reduce(largest, "max")',
        'all_reduce(largest, "min")',
        "tests/test_scaler.py",
    ),
    Mutation(
        "overflow is each rank's own affair",
        CLIP,
        "is_finite = not any_of(lines.world, bad)",
        "is_finite = not bad",
        "tests/test_scaler.py",
    ),
    Mutation(
        "forget to divide the loss scale out",
        ENGINE,
        "(norm, self.clip) / self.gradient_divisor)\n            if unit.masters",
        "(norm, self.clip))\n            if unit.masters",
        "tests/test_scaler.py",
    ),
    Mutation(
        "unscale in the gradient's dtype",
        UNIT,
        "wide.mul_(factor)  #",
        "wide = self.gradient.mul_(factor).to(wide)  #",
        "tests/test_scaler.py",
    ),
    Mutation(
        "sum gradients twice",
        GRADIENTS,
        "wide = mine.to(self.dtypes.gradient)",
        "wide = (mine * 2).to(self.dtypes.gradient)",
        LATTICE,
    ),
    Mutation(
        "keep the gradients that were reduced, and reduce them again",
        GRADIENTS,
        "room, self.full = self.full, None",
        "room = self.full",
        LATTICE,
    ),
    Mutation(
        "replace a unit's gradient where it should add",
        GRADIENTS,
        "(torch._foreach_copy_ if fresh else torch._foreach_add_)",
        "torch._foreach_copy_",
        LATTICE,
    ),
    Mutation(
        "an absent gradient leaves what the memory held", GRADIENTS, "view.zero_() if fresh else None", "None", LATTICE
    ),
    Mutation(
        "all-reduce the largest in place of the sum",
        "minispeed/zero/summing.py",
        "wire.group.all_reduce(sent), sent",
        'wire.group.all_reduce(sent, "max"), sent',
        LATTICE,
    ),
    Mutation(
        "never wait for the last sums",
        REDUCTION,
        "        for unit in self._order:\n            unit.settle()\n",
        "",
        LATTICE,
    ),
    Mutation(
        "forget the padding",
        "minispeed/layout.py",
        "_round_up(-(-self.total // self.ranks), self.alignment)",
        "_round_up(self.total // self.ranks, self.alignment)",
        LATTICE,
    ),
    Mutation(
        "skip the gradient of a parameter used again after its unit was complete",
        REDUCTION,
        "if unit.has_gradients:",
        "if False:",
        LATTICE,
    ),
    Mutation("skip parameters that got no gradient", REDUCTION, "while self._waiting:  #", "while False:  #", LATTICE),
    Mutation(
        "reduce units in order of readiness",
        REDUCTION,
        "while self._waiting and not self._missing[id(self._waiting[0])]:\n"
        "            self._complete(self._waiting.pop(0))",
        "if unit in self._waiting and not self._missing[id(unit)]:\n            self._waiting.remove(unit)\n"
        "            self._complete(unit)",
        LATTICE,
    ),
    Mutation(
        "release a unit in the middle of its recomputation",
        SHARDED,
        "if not self._depth[id(unit)] and not self._in_backward:",
        "if not self._depth[id(unit)]:",
        LEDGER,
    ),
    Mutation(
        "stage 3 keeps every unit whole after its forward",
        TABLE,
        '"after forward": ("", "", "", "reshard")',
        '"after forward": ("", "", "", "")',
        LEDGER,
    ),
    Mutation(
        "stage 2 reduces on the last micro-batch only",
        TABLE,
        '"gradients complete": ("", "", "reduce", "reduce")',
        '"gradients complete": ("", "", "", "reduce")',
        LEDGER,
    ),
    Mutation(
        "stage 1 does not gather what the others updated",
        TABLE,
        '"after step": ("", "unshard", "unshard", "")',
        '"after step": ("", "", "unshard", "")',
        LATTICE,
    ),
    Mutation("prefetch without a limit", SHARDED, "            if left < 0:\n                return\n", "", LEDGER),
    Mutation("no unit is too small to be released", SHARDED, "size < persistence", "size < 0", LEDGER),
    Mutation(
        "masters start from rounded weights",
        UNIT,
        "self.master = self.layout.shard(exact, self.part)",
        "self.master = self.layout.shard(self.flat, self.part).to(dtypes.master)",
        "tests/test_engine.py",
    ),
    Mutation(
        "the optimizer's result is not copied to the parameters",
        UNIT,
        "self._move(self.master, self.shard, self.has_states_away)",
        "pass",
        "tests/test_engine.py",
    ),
    Mutation(
        "a change of one parameter rounds its neighbours' masters",
        UNIT,
        "torch.where(is_new, found.to(self.master.dtype), self.master)",
        "found.to(self.master.dtype)",
        "tests/test_zero_init.py",
    ),
    Mutation(
        "each rank keeps its own random values",
        "minispeed/zero/init.py",
        "piece.take(0)  #",
        "pass",
        "tests/test_zero_init.py",
    ),
    Mutation(
        "a view may outlive its turn",
        "minispeed/zero/init.py",
        "> 2  # the",
        "> 99  # the",
        "tests/test_zero_init.py",
    ),
    Mutation(
        "the scale doubles one step late",
        "minispeed/scaler.py",
        "(self.iteration - self.last_overflow) % self.window == 0",
        "(self.iteration - self.last_overflow) % (self.window + 1) == 0",
        "tests/test_scaler.py",
    ),
    Mutation(
        "an overflow does not restart the window",
        "minispeed/scaler.py",
        "last_overflow=self.iteration,",
        "",
        "tests/test_scaler.py",
    ),
    Mutation(
        "the ring stops one step early",
        "minispeed/collective/rings.py",
        "for step in range(1, size):",
        "for step in range(1, size - 1):",
        "tests/test_rings.py",
    ),
    Mutation(
        "the ring adds the neighbour's part",
        "minispeed/collective/rings.py",
        "mine = parts[(rank - 1 - step) % size]",
        "mine = parts[(rank - step) % size]",
        "tests/test_rings.py",
    ),
    Mutation(
        "a frozen parameter that was loaded is not gathered",
        SNAPSHOT,
        "sharded.publish(frozen=True)",
        "sharded.publish()",
        "tests/test_snapshot.py",
    ),
    Mutation(
        "an optimizer's count of updates is not saved",
        SNAPSHOT,
        "for key, value in _numbers(optimizer, group).items():",
        "for key, value in ():",
        "tests/test_snapshot.py",
    ),
    Mutation(
        "forget to divide by the accumulation",
        "minispeed/deepspeed/initialize.py",
        "divisor=sharing.replicas * settings.batch.accumulation",
        "divisor=sharing.replicas",
        CALLING,
    ),
    Mutation(
        "what was divided out early is divided out again",
        ENGINE,
        "self.divisor / self.predivide * self.scaler.scale",
        "self.divisor * self.scaler.scale",
        CALLING,
    ),
    Mutation(
        "a backward that the caller calls ends without reducing",
        SHARDED,
        "torch.autograd.Variable._execution_engine.queue_callback(whole.close)",
        "torch.autograd.Variable._execution_engine.queue_callback(self._stop)",
        CALLING,
    ),
    Mutation(
        "gradients set by hand are divided like summed ones",
        CALLS,
        "p.grad * (core.scaler.scale * self.config.batch.accumulation)",
        "p.grad * core.scaler.scale",
        CALLING,
    ),
    Mutation(
        "inside no_sync the last micro-batch is summed",
        CALLS,
        "is_last = self.is_gradient_accumulation_boundary() and self._is_synchronised",
        "is_last = self.is_gradient_accumulation_boundary()",
        CALLING,
    ),
    Mutation(
        "zero_grad leaves what was added up",
        GRADIENTS,
        "self.gradient = self.full = None",
        "pass",
        CALLING,
    ),
    Mutation(
        "hand out rows as runs where zigzag is meant",
        RING,
        "return rank, 2 * size - 1 - rank",
        "return 2 * rank, 2 * rank + 1",
        SEQUENCE,
    ),
    Mutation("forget the keys' gradients of earlier stops", RING, "x += came", "x = came", SEQUENCE),
    Mutation(
        "let padded tokens stand before the row",
        CUT_ROWS,
        "(0, missing), value=fill",
        "(missing, 0), value=fill",
        SEQUENCE,
    ),
    Mutation(
        "merge softmaxes by an infinite maximum",
        BLOCK,
        "base = top.masked_fill(top == -math.inf, 0)",
        "base = top",
        SEQUENCE,
    ),
    Mutation(
        "free an activation before its backward",
        EXECUTE,
        "if self.last_use.get(value, action) == action:",
        "if self.last_use.get(value, action) is None:",
        EXECUTES,
    ),
    Mutation(
        "tell the receiver's clock alone",
        CLOCK,
        "end = max(start, unpacked(stamp[0].tolist())) + self.cost(sent)",
        "end = start + self.cost(sent)",
        EXECUTES,
    ),
    Mutation(
        "put off no weight gradient in a recomputation",
        DEFERRED,
        "if func is torch.autograd.backward:",
        "if func is None:",
        EXECUTES,
    ),
    Mutation(
        "send messages of a slot in each rank's own order",
        MESSAGES,
        "(slot, False, send, message)",
        "(slot, False, message, message)",
        EXECUTES,
    ),
    Mutation(
        "let a tied copy keep its own gradient",
        TIES,
        "unit.gradient = total.clone()",
        "unit.gradient = summed[name]",
        LAYOUTS,
    ),
    Mutation("count a tied copy in the norm too", CUT, "not is_copy and counts(", "counts(", LAYOUTS),
    Mutation(
        "reduce after the first micro-batch and not the last",
        RUNNER,
        "self.sharded.backward_from(tensors, gradients, last=micro == self.last)",
        "self.sharded.backward_from(tensors, gradients, last=micro == 0)",
        LAYOUTS,
    ),
    Mutation(
        "forget the weight halves that were put off", RUNNER, "self.sharded.add_gradient(p, gradient)", "pass", LAYOUTS
    ),
    Mutation(
        "run another micro-batch than the one asked for",
        RUNNER,
        "tokens, labels, positions, documents, tasks, cells = micro_batches[micro]",
        "tokens, labels, positions, documents, tasks, cells = micro_batches[0]",
        LAYOUTS,
    ),
    Mutation(
        "add a row layer's bias on every rank before the sum",
        LAYERS,
        "y = F.linear(x, self.weight.t() if self.transposed else self.weight)\n        y = y if self.lora is None",
        "y = F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)\n"
        "        y = y if self.lora is None",
        "tests/test_tensor.py",
    ),
    Mutation(
        "count the losses of every rank of tp",
        PARTS,
        "self.pp.rank == self.pp.size - 1 and self.tp.rank == 0",
        "self.pp.rank == self.pp.size - 1",
        LAYOUTS,
    ),
    Mutation(
        "send more than the smallest bundle",
        "minispeed/model/deep.py",
        "others = {j: x for j, x in self.raw.items() if j not in columns}",
        "others = self.raw",
        "tests/test_deep.py",
    ),
    Mutation(
        "stop a cover's search at its first path",
        DEEP,
        "reached_columns += [partner[row] for row in new]",
        "pass",
        "tests/test_deep.py",
    ),
    Mutation(
        "leave out the hooks of a copied parameter", CHUNK, "twin.register_hook(hook)", "pass", "tests/test_chunk.py"
    ),
    Mutation(
        "cut the stages anywhere",
        PARTITION,
        "return min(around, key=lambda begin: max(slowest[begin], before[n] - before[begin]))",
        "return around[0]",
        "tests/test_partition.py",
    ),
    Mutation(
        "count every link's copy of a tied parameter", CUT, "is_copy=local in link.copies)", "is_copy=False)", PIPES
    ),
    Mutation("tie no parameter of a later layer", PIPE, "if users[p] < first]", "if users[p] < 0]", PIPES),
    Mutation(
        "divide by all ranks under tensor parallelism",
        INITIALIZE,
        "divisor=sharing.replicas *",
        "divisor=sharing.group.size *",
        AUTOTP,
    ),
    Mutation(
        "leave an attention's count of heads",
        PARALLEL,
        "getattr(module, size) // stream.group.size",
        "getattr(module, size)",
        AUTOTP,
    ),
    Mutation(
        "sum no gradient of what LoRA shares over tp",
        LAYERS,
        "copy(self.weight, self.stream.group)",
        "self.weight",
        "tests/test_lora.py",
    ),
    Mutation(
        "merge adapters without their scale",
        "minispeed/model/merge.py",
        "scale * (b.to(wide) @ a.to(wide))",
        "b.to(wide) @ a.to(wide)",
        "tests/test_lora.py",
    ),
    Mutation(
        "leave frozen parameters out of what a rank holds",
        "minispeed/ledger/states.py",
        "whole + whole_frozen",
        "whole",
        "tests/test_lora.py",
    ),
    Mutation(
        "read a checkpoint's piece without looking at its checksums",
        "minispeed/checkpoint/tensors.py",
        "if promise and found != promise.checksum:",
        "if False:",
        "tests/test_checkpoint.py",
    ),
    Mutation(
        "read a piece from its begin, however little is wanted",
        "minispeed/checkpoint/tensors.py",
        "range(wanted.start // self.block, -(-wanted",
        "range(0, -(-wanted",
        "tests/test_checkpoint.py",
    ),
    Mutation(
        "let a background save write what the tensors are by then",
        "minispeed/checkpoint/saver.py",
        "self._copies[which] = copy.copy_(x, non_blocking=True)",
        "copy = self._copies[which] = x",
        "tests/test_checkpoint.py",
    ),
    Mutation(
        "forget other names of tied parameters in a checkpoint",
        "minispeed/deepspeed/saving.py",
        '"tied": tied_names(self.module),',
        '"tied": {},',
        "tests/test_fp32.py",
    ),
    Mutation(
        "read every row of a HuggingFace tensor",
        "minispeed/model/hf/read.py",
        "first, last = elements.start // width",
        "first, last = 0",
        "tests/test_hf.py",
    ),
    Mutation(
        "scale all of llama3's rotary pairs alike",
        "minispeed/model/rotary.py",
        "kept = ((turns - config.rope_low)",
        "kept = ((turns - 0 * config.rope_low)",
        "tests/test_gpt.py",
    ),
    Mutation(
        "evaluate before the checkpoint is written",
        "minispeed/chat/trainer.py",
        "if is_examined or self.clock.is_due(step, options.save_every):",
        "if self.clock.is_due(step, options.save_every):",
        "tests/test_survive.py",
    ),
    Mutation(
        "keep the gradients of the pre-flight",
        "minispeed/chat/preflight.py",
        "            part.sharded.forget()",
        "            pass",
        "tests/test_survive.py",
    ),
    Mutation(
        "let each rank think for itself whether a save went well",
        "minispeed/chat/saving.py",
        "return not any_of(self.engine.group, not is_done)",
        "return is_done",
        "tests/test_survive.py",
    ),
    Mutation(
        "take any run that lies in --out for one to go on with after a restart",
        "minispeed/chat/sft.py",
        "return began == [Path(sys.argv[0]).name, *sys.argv[1:]]",
        "return True",
        "tests/test_survive.py",
    ),
    Mutation(
        "let two texts make a special token where they meet",
        "minispeed/chat/marks.py",
        "if text[end - n : end] in beginnings",
        "if False",
        "tests/test_jinja.py",
    ),
    Mutation(
        "start new tokens from the mean of all rows, the unused too",
        "minispeed/chat/chat_model.py",
        "table[:known].mean(0",
        "table.mean(0",
        "tests/test_jinja.py",
    ),
    Mutation(
        "export the padding as the stop",
        "minispeed/chat/export.py",
        '"eos_token_id": stop if',
        '"eos_token_id": pad if',
        "tests/test_export.py",
    ),
    Mutation(
        "let adapters learn at the run's rate",
        "minispeed/schedules.py",
        'rate * group.get("lr_factor", 1.0)',
        "rate",
        "tests/test_foreign.py",
    ),
    Mutation(
        "put a group on several machines on the fast link",
        "minispeed/plan/network.py",
        "self.profile.per_machine % reach != 0",
        "self.profile.per_machine < reach",
        "tests/test_simulate.py",
    ),
    Mutation(
        "gather nothing after a step of stage 2",
        "minispeed/plan/step.py",
        "job.zero in (1, 2) else 0.0",
        "job.zero == 1 else 0.0",
        "tests/test_simulate.py",
    ),
    Mutation(
        "take the rates of fewer busy ranks",
        "minispeed/profiles.py",
        "if entry.ranks >= ranks), self.rates[-1]",
        "if entry.ranks > ranks), self.rates[-1]",
        "tests/test_profiles.py",
    ),
    Mutation(
        "fit a line of messages with the wrong sign",
        "minispeed/chat/calibrate.py",
        "inverse = (b * aa - a * ab)",
        "inverse = (b * aa + a * ab)",
        "tests/test_calibrate.py",
    ),
    Mutation(
        "forget that a tied head reads its unit again",
        "minispeed/ledger/messages.py",
        "job.micros * (1 + _is_read_again(job, unit))",
        "job.micros",
        "tests/test_messages.py",
    ),
    Mutation(
        "count a dropped output's messages once",
        "minispeed/ledger/layer_messages.py",
        "leaves = runs + (runs if job.model.dropout else 1)",
        "leaves = runs + 1",
        "tests/test_messages.py",
    ),
    Mutation(
        "forget the gradients of an adapted output",
        "minispeed/ledger/gradients.py",
        'attention = queries or "out" in adapted',
        "attention = queries",
        "tests/test_messages.py",
    ),
    Mutation(
        "prefetch again what has been read",
        "minispeed/zero/sharded.py",
        "unit.stage == 3 and unit not in self._used",
        "unit.stage == 3",
        "tests/test_messages.py",
    ),
    Mutation(
        "owe half of what was left out",
        "minispeed/zero/onebit.py",
        "given.add_(owed)",
        "given.add_(owed, alpha=0.5)",
        "tests/test_compress.py",
    ),
    Mutation(
        "keep what a skipped step owes",
        "minispeed/zero/gradients.py",
        "self.summing.undo()",
        "self.summing.keep()",
        "tests/test_compress.py",
    ),
    Mutation(
        "let the frozen second moment be scaled on",
        "minispeed/zero/frozen.py",
        "beta2**self.freeze_step",
        "beta2**t",
        "tests/test_compress.py",
    ),
    Mutation(
        "sum a checkpoint's block over its last part alone",
        "minispeed/checkpoint/tensors.py",
        "crc = zlib.crc32(out[:count], crc)",
        "crc = zlib.crc32(out[:count])",
        "tests/test_checkpoint.py",
    ),
    Mutation(
        "let a plan forget the bubble",
        "minispeed/plan/estimate.py",
        '"bubble": together - wait}',
        '"bubble": 0 * wait}',
        "tests/test_plan.py",
    ),
    Mutation(
        "look at no candidate once a group is known",
        "minispeed/plan/search.py",
        "if (is_known and not unknown) or not",
        "if is_known or not",
        "tests/test_plan.py",
    ),
    Mutation(
        "let a plan cut heads that tp does not divide",
        "minispeed/plan/space.py",
        "for what, number in divisible(request.model).items() if number % tp]",
        "for what, number in divisible(request.model).items() if number < tp]",
        "tests/test_plan.py",
    ),
]


def play(mutation: Mutation, place: Path) -> str:
    """Break the copy at `place`, run the test, mend the copy. Returns the name of the test that failed, "" if none."""
    path = place / mutation.file
    whole = path.read_text()
    if whole.count(mutation.before) != 1:
        raise SystemExit(f"{mutation.what}: {mutation.file} has {whole.count(mutation.before)} of {mutation.before!r}")
    path.write_text(whole.replace(mutation.before, mutation.after))
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "CI": "true"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "--first-failure",
        mutation.test,
    ]
    try:
        run = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "(it never ends)"
    finally:
        path.write_text(whole)
    failed = [line.split()[1].split("[")[0] for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else ("(the process dies)" if run.returncode not in (0, 1) else "")


def main() -> None:
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(word in m.what for word in sys.argv[1:])]
    lines, survivors = [], []
    with tempfile.TemporaryDirectory(prefix="minispeed-mutations-") as folder:
        place = Path(folder)
        for part in ("minispeed", "tests", "docs"):
            shutil.copytree(ROOT / part, place / part, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, place / name)
        for mutation in chosen:
            killer = play(mutation, place)
            print(f"{'killed' if killer else 'SURVIVED':9} {mutation.what}: {killer or mutation.test}", flush=True)
            lines.append(f"| {mutation.what} | `{mutation.file}` | {killer.replace('::', ' ') or 'nothing'} |")
            survivors += [] if killer else [mutation.what]
    if len(chosen) == len(MUTATIONS):
        head = ["# What was broken, and which test noticed", "", "Played by `python tests/laws/mutate.py`.", ""]
        head += ["| broken | in | noticed by |", "|---|---|---|"]
        (ROOT / "tests/laws/MUTATIONS.md").write_text("\n".join(head + lines) + "\n")
    raise SystemExit(f"survived: {survivors}" if survivors else 0)


if __name__ == "__main__":
    main()
