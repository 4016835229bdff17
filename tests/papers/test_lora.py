"""What LoRA trains and holds is the closed form, whatever the rank and the targets; every row is measured."""

import pytest
from hypothesis import given, settings, strategies as st
from learning import small
from lora import NEW, RATES, adapters, documents, entry, hold, of_gpt3

from minispeed.chat.skills import SKILLS
from minispeed.model.gpt import GPT
from minispeed.model.lora import LoRA, adapted, add_lora


@pytest.fixture(scope="module")
def made():
    return entry(quick=True)


def test_what_is_counted_is_the_closed_form_to_the_byte(made):
    counted = [row for row in made.rows if row.closed_form is not None and row.measured is not None]
    assert [row.difference for row in counted] == [0] * 4


def test_the_papers_figures_are_those_of_the_closed_form():
    times, checkpoint, less, whole = of_gpt3()
    assert 9_000 < times.closed_form < 10_000 and abs(checkpoint.closed_form / checkpoint.paper - 1) < 0.1
    assert abs(less.closed_form / less.paper - 1) < 0.01
    assert whole.closed_form == 16 * 175  # the paper's 1.2 TB counts less than ZeRO's 16 bytes a parameter


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 16), st.sampled_from([("attention.*",), ("mlp.*",), ("attention.*", "mlp.*")]))
def test_trainable_parameters_are_those_of_the_adapters(rank, targets):
    model = GPT(small())
    names = add_lora(model, LoRA(rank=rank, targets=targets), seed=0)
    trained = sum(p.numel() for name, p in model.named_parameters() if name in names)
    assert trained == adapters([leaf.weight.shape for leaf in adapted(model).values()], rank)


@settings(deadline=None, max_examples=3)
@given(st.integers(1, 9))
def test_a_rank_holds_what_the_ledger_says(rank):
    found, trained, form = hold(LoRA(rank=rank))
    assert (found.parameters, found.gradients, found.optimizer) == (form.parameters, form.gradients, form.optimizer)
    assert found.optimizer == 12 * trained


def test_the_skills_that_are_taught_later_are_in_nothing_before():
    base, old, new, unseen = documents()
    found = [{of.tasks[task] for task in of.task[:].tolist()} for of in (base, old, new, unseen)]
    assert found == [set(SKILLS) - set(NEW), set(SKILLS) - set(NEW), set(NEW), set(NEW)]


def test_both_ways_are_tried_at_as_many_rates(made):
    assert {len(rates) for rates in RATES.values()} == {2} and set(made.series["curves"]) == set(RATES)
