"""Say how many bytes a rank of a job holds when it holds most, without running it.

    parameters, gradients, optimizer   what is always there: `states.py`, of the rank's units
    activations                        what autograd keeps of the micro-batches in flight: `stretch.py`, `flight.py`
    buffers                            all else that is there when most is: gathered units, gradients on their way,
                                       logits, what a block's backward needs meanwhile

The most is there in some backward, of the loss or of a block, or after the last one. Each such moment is added up, and
the largest counts. Buffers are what is left of it: less than nothing, where gradients that the table counts are not
there yet. The kernels are a CPU's, and the units those that no bucket size redraws.

Against real runs: parameters, gradients and optimizer to the byte, the total within 5 % (tests/test_memory.py).
"""

from dataclasses import dataclass

from minispeed.ledger.flight import Moment, moments
from minispeed.ledger.job import Job
from minispeed.ledger.layers import Setting
from minispeed.ledger.sharded import OVER, Sharded
from minispeed.ledger.stretch import Stretch, stretch
from minispeed.ledger.units import bounds

FIELDS, INTEGER = 6, 8  # of a micro-batch, and bytes of each of its numbers


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank; host is what offload keeps in the machine's own memory."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        """All that lies on the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


def peak(job: Job) -> Memory:
    """Return what the rank with most holds."""
    return max((memory(job, rank) for rank in range(job.layout.pp)), key=lambda one: one.total)


def memory(job: Job, pp_rank: int = 0) -> Memory:
    """Return what each rank at this place in the pipeline holds at most, from its second step on."""
    rank = _Rank(job, pp_rank)
    states, host = rank.sharded.states
    flight = moments(job.layout.schedule, job.layout.pp, job.micros, job.layout.virtual, pp_rank)
    most = max(rank.sharded.after, *map(rank.at, flight))
    total = states.parameters + states.optimizer + rank.sharded.rooms + rank.shared + most
    activations = max(map(rank.activations, flight))
    return Memory(
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=activations,
        buffers=total - states.total - activations,
        host=host,
    )


class _Rank:
    """The stages of a rank, and what they hold together."""

    def __init__(self, job: Job, pp_rank: int) -> None:
        layout, L = job.layout, job.model.num_layers
        self.job, self.sharded, self.of = job, Sharded.of(job, pp_rank), _setting(job)
        cuts = bounds(job.model, layout.stages, job.lora_rank, job.lora_targets) if layout.pp > 1 else (0, L + 2)
        spans = [(cuts[stage], cuts[stage + 1]) for stage in range(pp_rank, layout.stages, layout.pp)]
        supervised = round(job.supervised * self.of.b * self.of.s)
        head_stays = job.zero < 3 or self.of.put_off or (job.model.tied and layout.pp == 1)
        self.stages: list[Stretch] = [
            stretch(self.of, job.recompute, first, last, supervised, head_stays) for first, last in spans
        ]
        self.has_embedding, self.has_head = spans[0][0] == 0, spans[-1][1] == L + 2

    @property
    def shared(self) -> int:
        """This rank's tokens of the step's rows, where ranks share them."""
        return FIELDS * INTEGER * self.of.b * self.of.s * self.job.micros * (self.job.layout.sp > 1)

    def activations(self, moment: Moment) -> int:
        """Return what autograd keeps at a moment."""
        return sum(n * stage.saved for n, stage in zip(moment.whole, self.stages))

    def at(self, moment: Moment) -> int:
        """Return the most that is there while an action runs, without what is always there."""
        stage, sharded = self.stages[moment.chunk], self.sharded
        flying = self.activations(moment) + sum(n * one.held for n, one in zip(moment.whole, self.stages))
        flying += sum(n * one.put_off for n, one in zip(moment.halves, self.stages))
        if moment.kind == "F":
            return flying + stage.forward + sharded.sums(OVER, moment)
        head, table = self._waiting()
        if moment.kind == "BW":
            there = sharded.sums(self.job.model.num_layers + 2, moment) + self._linear() + head + table
            return flying + max(there, sharded.sums(OVER, moment) - stage.put_off)
        flying += table * any(moment.halves)
        before = head * any(moment.halves)  # at the loss; afterwards the two are one
        loss = self.job.model.num_layers + 2
        return flying + max(
            extra + sharded.sums(layer, moment) + sharded.gathered(layer, moment) + before * (layer == loss)
            for layer, extra in stage.steps
        )

    def _waiting(self) -> tuple[int, int]:
        """Return the bytes of the gradients of head and embedding, where they are here and wait for a second half."""
        of = self.of
        trained = of.config.model_dim * of.e * (not of.lora_rank)
        head = -(-of.config.vocab_size // of.t) * trained
        positions = of.config.max_positions * (of.config.positions == "learned") * trained
        return head * self.has_head, (head + positions) * self.has_embedding

    def _linear(self) -> int:
        """Return the bytes of the largest gradient that a split backward puts off."""
        of, config = self.of, self.of.config
        widest = max(config.hidden_dim, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
        return widest * config.model_dim * of.e // of.t


def _setting(job: Job) -> Setting:
    """Return how the layers of a job run on a rank."""
    layout = job.layout
    return Setting(
        config=job.model,
        b=min(job.micro_batch, job.replica_rows),
        s=-(-job.tokens // layout.sp),
        dtype=job.dtype,
        t=layout.tp,
        is_cut=layout.tokens,
        p=layout.sp,
        sequence=layout.sequence,
        recomputed="attention" if job.recompute == "attention" else "none",
        lora_rank=job.lora_rank,
        lora_targets=job.lora_targets,
        put_off=layout.pp > 1 and layout.schedule == "zb_h1",
    )
