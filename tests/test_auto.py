"""What `--auto` leaves to the planner, what it keeps, and that what it chooses can be run."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from minispeed.chat import auto
from minispeed.chat.auto import open_ones, plan_run
from minispeed.chat.build import build_layout, check_pipeline
from minispeed.chat.commands import SftOptions
from minispeed.chat.defaults import count_ranks
from minispeed.chat.sft_options import PLANNED
from minispeed.errors import UserError
from minispeed.model.presets import preset
from minispeed.options import parse

WORDS = ["--model", "nano", "--data", "chats.jsonl", "--out", "run"]
CPU = torch.device("cpu")


def options_of(*words, config=None, folder=None):
    if config is not None:
        (folder / "c.json").write_text(json.dumps({"sft": config}))
        words = ("--config", str(folder / "c.json"), *words)
    return parse([*WORDS, *words], SftOptions)


def test_each_way_to_say_auto_opens_what_it_names(tmp_path):
    assert open_ones(options_of("--seq", "64")) == []
    assert open_ones(options_of("--auto")) == list(PLANNED)
    assert open_ones(options_of("--auto", "--tp", "2")) == [name for name in PLANNED if name != "tp"]
    assert open_ones(options_of("--auto", "zero", "micro_batch")) == ["zero", "micro_batch"]
    assert set(open_ones(options_of("--zero", "auto", "--tp=auto", "--micro-batch", "2"))) == {"zero", "tp"}
    opened = options_of(config={"zero": "auto", "recompute": "auto", "pp": 2}, folder=tmp_path)
    assert set(open_ones(opened)) == {"zero", "recompute", "micro_batch"} and opened.pp == 2
    assert open_ones(options_of(config={"auto": True}, folder=tmp_path)) == list(PLANNED)
    with pytest.raises(UserError, match="--zero is left to the planner, and is 2"):
        open_ones(options_of("--zero", "2", config={"zero": "auto"}, folder=tmp_path))
    with pytest.raises(UserError, match="--seq"):
        options_of("--seq", "auto")


@settings(max_examples=settings.default.max_examples // 4)
@given(
    st.sampled_from([1, 2, 3, 4, 8]),
    st.lists(
        st.sampled_from([("--zero", "3"), ("--tp", "2"), ("--micro-batch", "1"), ("--offload-optimizer",)]), unique=True
    ),
)
def test_what_is_planned_can_be_run_and_what_is_said_is_kept(ranks, said):
    options = replace(options_of("--auto", *(word for words in said for word in words)), seq=32, batch=24, dtype="fp32")
    options = replace(options, profile="l4")
    planned = open_ones(options)
    fixed = {name: getattr(options, name) for name in PLANNED if name not in planned}
    try:
        chosen, lines = plan_run(options, preset("nano"), planned=planned, devices=ranks, device=CPU)
    except UserError as error:
        assert "tp 2: does not divide" in str(error) and ranks % 2
        return
    assert {name: getattr(chosen, name) for name in fixed} == fixed and not chosen.auto
    layout = build_layout(count_ranks(chosen))
    assert layout.mesh(ranks).dp == chosen.dp and chosen.batch % chosen.dp == 0
    check_pipeline(layout, chosen.batch // chosen.dp, chosen.micro_batch)
    assert sum(line.startswith("planned: ") for line in lines) == 1


def test_without_a_profile_a_measurement_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(auto, "MEASURED", tmp_path / "none.json")
    options = replace(options_of("--auto"), seq=32, batch=8, dtype="fp32")
    with pytest.raises(UserError, match="nobody has measured"):
        plan_run(options, preset("nano"), planned=open_ones(options), devices=2, device=CPU)


def test_what_never_fits_is_told_with_what_it_needs(monkeypatch):
    monkeypatch.setattr(auto, "memory_of", lambda device, ranks: 10**6)
    options = replace(options_of("--auto", "--profile", "l4"), seq=32, batch=8, dtype="fp32")
    with pytest.raises(UserError, match="the least that a layout needs is .* a rank .*, and there is 900 kB"):
        plan_run(options, preset("nano"), planned=open_ones(options), devices=2, device=CPU)
