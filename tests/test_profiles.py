"""Laws of machine profiles: what is written is read, what is wrong is named, an old profile is never lost."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from minispeed import profiles
from minispeed.errors import UserError
from minispeed.profiles import Link, Profile, check_machine, load, this_machine
from minispeed.published import PUBLISHED
from minispeed.sizes import parse_count, parse_size, spell_size

H100 = PUBLISHED["h100"]
names = st.sampled_from(sorted(PUBLISHED))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_profile_survives_json(name, tmp_path):
    profile = PUBLISHED[name]
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    profile.save(tmp_path / "deeper" / "profile.json")
    assert load(tmp_path / "deeper" / "profile.json") == profile == load(name)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_figures_are_dense_and_in_order(name):
    profile = PUBLISHED[name]
    (rates,) = profile.rates
    for dtype, rate in rates.flops.items():
        assert rate == pytest.approx(profile.efficiency * profile.peak[dtype])
        assert rates.attention[dtype] < rate < profile.peak[dtype]
    assert profile.between.bandwidth < rates.link.bandwidth < rates.bandwidth
    assert profile.memory < profile.host_memory and "datasheet" in profile.source


def test_the_figures_that_everybody_knows():
    peaks = {name: profile.peak["fp16"] / 1e12 for name, profile in PUBLISHED.items()}
    assert (peaks["v100"], peaks["a100-40gb"], round(peaks["h100"]), peaks["b200"]) == (125, 312, 990, 2250)
    assert PUBLISHED["h200"].memory == 141 * 10**9 and PUBLISHED["h200"].peak == H100.peak
    assert "bf16" not in PUBLISHED["v100"].peak


@given(st.lists(st.integers(1, 64), min_size=1, unique=True), st.integers(1, 100))
def test_rates_are_those_of_the_fewest_busy_ranks_that_are_enough(counts, asked):
    profile = replace(H100, rates=tuple(replace(H100.rates[0], ranks=count) for count in sorted(counts)))
    enough = [count for count in counts if count >= asked]
    assert profile.at(asked).ranks == (min(enough) if enough else max(counts))


@given(st.floats(0, 1), st.floats(1, 1e12), st.integers(0, 10**12), st.integers(1, 100))
def test_a_message_takes_its_latency_and_its_bytes(latency, bandwidth, size, messages):
    link = Link(latency=latency, bandwidth=bandwidth)
    assert link.seconds(size, messages) == pytest.approx(messages * latency + size / bandwidth)
    assert H100.link(8) == H100.rates[0].link and H100.link(8, machines=2) == H100.between


@pytest.mark.parametrize(
    ("path", "key", "said"),
    [((), "memori", "memory"), (("between",), "latancy", "latency"), (("rates", 0), "flop", "flops")],
)
def test_an_unknown_key_is_answered_with_the_nearest(path, key, said):
    values = H100.to_dict()
    place = values
    for step in path:
        place = place[step]
    place[key] = 1
    with pytest.raises(UserError, match=f"no '{key}'; try: {said}"):
        Profile.from_dict(values)


@given(names, st.sampled_from(["name", "rates", "memory", "between", "host_memory"]))
def test_a_missing_key_is_named(name, key):
    values = PUBLISHED[name].to_dict()
    del values[key]
    with pytest.raises(UserError, match=f"incomplete.*{key}"):
        Profile.from_dict(values)


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), float("nan"), "fast", None])
@pytest.mark.parametrize("table", ["flops", "attention", "between", "bandwidth"])
def test_a_rate_that_nothing_can_be_divided_by_is_refused(table, wrong):
    rates = H100.to_dict()["rates"][0]
    rates[table] = wrong if table == "bandwidth" else {"bf16": wrong}
    with pytest.raises(UserError, match="number above 0"):
        Profile.from_dict({**H100.to_dict(), "rates": [rates]})
    with pytest.raises(UserError, match="no rates"):
        Profile.from_dict({**H100.to_dict(), "rates": []})


def test_what_cannot_be_loaded_is_answered_with_what_is_published(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no profile is called 'h10'") as caught:
        load("h10")
    assert all(name in str(caught.value) for name in PUBLISHED)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name in ("broken.json", "list.json"):
        with pytest.raises(UserError, match="is not JSON.*h100"):
            load(tmp_path / name)
    monkeypatch.setattr(profiles, "MEASURED", tmp_path / "mine.json")
    with pytest.raises(UserError, match="minispeed calibrate"):
        load("measured")
    H100.save(tmp_path / "mine.json")
    assert load("measured") == H100


def test_an_old_profile_stays_whole_when_writing_fails(tmp_path, monkeypatch):
    H100.save(tmp_path / "profile.json")

    def half(values, file, **how):
        file.write('{"name": ')
        raise OSError("no space left")

    monkeypatch.setattr(profiles.json, "dump", half)
    with pytest.raises(OSError):
        PUBLISHED["a100-40gb"].save(tmp_path / "profile.json")
    assert load(tmp_path / "profile.json") == H100


def test_a_new_profile_takes_the_old_ones_place_in_one_move(tmp_path, monkeypatch):
    H100.save(tmp_path / "profile.json")

    def crash(source, target):
        raise OSError("killed before the move")

    monkeypatch.setattr(profiles.os, "replace", crash)
    with pytest.raises(OSError, match="killed"):
        PUBLISHED["a100-40gb"].save(tmp_path / "profile.json")
    assert load(tmp_path / "profile.json") == H100


def test_a_profile_of_another_machine_is_said_not_refused():
    assert check_machine(H100) == ""
    assert check_machine(replace(H100, machine=this_machine())) == ""
    assert check_machine(replace(H100, machine=f"{this_machine()}, 8 x a GPU")) == ""
    said = check_machine(replace(H100, machine="Abacus, 3 cores"))
    assert "Abacus, 3 cores" in said and this_machine() in said


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("24 gb", 24 * 10**9), ("24e9", 24 * 10**9), ("24G", 24 * 10**9)]
    + [("1.5 TiB", 3 * 2**39), ("512MB", 512 * 10**6), ("100", 100), ("1_000", 1000), ("2,000 kB", 2_000_000)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@given(st.integers(1, 999), st.sampled_from(["B", "kB", "MB", "GB", "TB"]))
def test_a_size_that_is_written_is_read_again(number, unit):
    size = number * 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    assert spell_size(size) == f"{number} {unit}" and parse_size(spell_size(size)) == size


@pytest.mark.parametrize("text", ["", "GB", "24QB", "24B B", "-1GB", "0", "0GB", "1e999", "nan", "many"])
def test_what_is_no_size_or_count_is_named(text):
    for read, example in ((parse_size, "24GB"), (parse_count, "124M")):
        with pytest.raises(UserError) as caught:
            read(text)
        assert repr(text) in str(caught.value) and caught.value.fix == example


def test_counts_are_read_as_people_write_them():
    texts = {"124M": 124 * 10**6, "1.3B": 13 * 10**8, "1.3G": 13 * 10**8, "7e9": 7 * 10**9, "5": 5, "2 t": 2 * 10**12}
    assert {text: parse_count(text) for text in texts} == texts


def test_nothing_of_it_imports_torch():
    script = (
        "import sys, minispeed.published, minispeed.sizes, minispeed.plan.step as s; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
