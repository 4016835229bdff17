"""Closed forms of what a run holds, sends and computes. No torch: a plan is made of them."""

from minispeed.ledger.states import ADAM_MOMENTS, Held, Widths, held, paper_bytes, sent, shard_size

__all__ = ["ADAM_MOMENTS", "Held", "Widths", "held", "paper_bytes", "sent", "shard_size"]
