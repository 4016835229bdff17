"""Laws of the configuration: the table decides alone; any dict is a Config, or one sentence that names the key."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from minispeed import optim
from minispeed.__main__ import main
from minispeed.chat.explain import read_count
from minispeed.config import DeepSpeedConfigError, read_config, values_of
from minispeed.config.check import BLOCK, read_value
from minispeed.config.flat import FLAT
from minispeed.config.key import HONOURED, NO_EFFECT, REFUSED, example
from minispeed.config.optimizers import ADAM, NOT_MADE, OPTIMIZERS, SGD
from minispeed.config.page import page
from minispeed.config.read import BATCH
from minispeed.config.table import BLOCKS, OPEN, TABLE
from minispeed.errors import UserError
from minispeed.ledger import paper_bytes
from minispeed.scaler import LossScaler
from minispeed.schedules import SCHEDULES, schedule_by_name

ARTICLE = {
    "train_batch_size": 32,
    "train_micro_batch_size": 8,
    "train_gradient_accumulation_steps": 4,
    "train_use_amp": True,
    "train_fp16": True,
    "train_init_scale": 2**24,
    "train_loss_scale": 2**24,
    "train_lr": 0.001,
    "train_optimizer": "adamw",
    "train_lr_schedule_type": "linear",
    "train_warmup_steps": 1000,
    "train_weight_decay": 0.01,
    "train_fp16_compression": "none",
}
NESTED = {
    "fp16": {"enabled": True},
    "optimizer": {"type": "Adam", "params": {"lr": 0.0001, "betas": [0.9, 0.98], "eps": 1e-6}},
}
ONE = {"train_batch_size": 1}
SETTINGS = {f"optimizer.params.{name}" for name in {**ADAM, **SGD}}
CONSTANT = [name for name, key in TABLE.items() if key.kind == HONOURED and not key.alias and key.type is not BLOCK]

parts = {part for name in {*TABLE, *SETTINGS} for part in name.split(".")}
words = st.sampled_from(sorted(parts)) | st.text("ab_. ", max_size=3)
plain = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.sampled_from(["auto", "cpu", "fp16", "AdamW"])
junk = st.recursive(plain, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=3))
blocks = st.fixed_dictionaries({}, optional={name: junk for name in ("fp16", "zero_optimization", "optimizer", "bf16")})


def refused(source, **more) -> DeepSpeedConfigError:
    with pytest.raises(DeepSpeedConfigError) as caught:
        read_config(source, **more)
    assert caught.value.what
    return caught.value


def nested(name: str, value: object, base: dict = ONE) -> dict:
    """Return a copy of a dict with one value more, by its dotted name."""
    first, _, rest = name.partition(".")
    return {**base, first: nested(rest, value, base.get(first, {})) if rest else value}


def merged(a: dict, b: dict) -> dict:
    both = {
        name: merged(a[name], b[name])
        for name in a.keys() & b.keys()
        if isinstance(a[name], dict) and isinstance(b[name], dict)
    }
    return {**a, **b, **both}


def base_for(name: str) -> dict:
    """Return a configuration in which a key can have any value of its type."""
    base = {**ONE, "zero_optimization": {"stage": 3}}
    return nested("scheduler.type", "WarmupLR", nested("optimizer.type", "SGD", base)) if name in CONSTANT else base


def others_of(name: str) -> list:
    """Return values of a key's type that are not its default."""
    key, found = TABLE[name], []
    candidates = {"optimizer.type": ["AdamW"], "scheduler.type": ["LRRangeTest"]}
    for value in candidates.get(
        name,
        [True, False, 2, 3, 0.5, "cpu", "fp64", "Fail", "mock", "liger", "socket", "gpipe", "onebit", ["a"], {"a": 1}],
    ):
        try:
            read = read_value(name, value, key.type, example(key))
        except DeepSpeedConfigError:
            continue
        if read != key.default:
            found.append(value)
    return found


def names_in(block: object, inside: str = "") -> set[str]:
    """Return every dotted name in a dict, of values and of blocks."""
    if not isinstance(block, dict):
        return set()
    here = {f"{inside}.{name}" if inside else name: value for name, value in block.items()}
    return {one for name, value in here.items() for one in {name, *names_in(value, name)}}


@given(st.dictionaries(words, junk, max_size=4), blocks, st.booleans())
def test_any_dict_is_a_config_or_a_sentence_that_names_a_key_of_it(some, known, has_batch):
    source = {**some, **known, **(ONE if has_batch else {})}
    try:
        config = read_config(source)
    except DeepSpeedConfigError as error:
        named = re.search(r'"([^"]*)"', error.what)
        required = {f"{block}.{name}" for block in OPEN for name in ("total_num_steps", "cycle_min_lr", "cycle_max_lr")}
        assert named and named[1] in {*names_in(source), *BATCH, *required}
        assert error.fix
    else:
        assert values_of(config).keys() == config.origins.keys()
        assert not {None} & set(config.origins.values())


@given(st.dictionaries(st.sampled_from([*FLAT]) | words, plain, max_size=6))
def test_any_flat_names_are_a_config_or_a_sentence_that_names_one(flat):
    try:
        assert read_config(ONE, flat=flat).batch.train == 1
    except DeepSpeedConfigError as error:
        assert any(name in error.what for name in flat)


@given(st.sampled_from([name for name, key in TABLE.items() if key.kind != REFUSED and name not in OPEN]), junk)
def test_a_value_of_another_type_is_named_and_the_fix_mends_it(name, value):
    """What the error says to write is taken, in place of what was written."""
    source = nested(name, value, base_for(name))
    try:
        read_config(source)
    except DeepSpeedConfigError as error:
        assert f'"{name}"' in error.what
        if " must be " in error.what:
            fixed = merged(source, json.loads(f"{{{error.fix}}}"))
            try:
                read_config(fixed)
            except DeepSpeedConfigError as second:
                assert f'"{name}" must be' not in second.what


@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name].kind != REFUSED and name not in OPEN])
def test_auto_is_refused_everywhere(name):
    error = refused(nested(name, "auto", base_for(name)))
    assert error.what == f'"{name}" is "auto", and nothing here fills it in'
    if name not in BATCH:
        read_config(merged(base_for(name), json.loads(f"{{{error.fix}}}")))


@pytest.mark.parametrize("name", CONSTANT)
def test_each_honoured_key_changes_the_config_and_says_where_from(name):
    base = base_for(name)
    if name == "gradient_accumulation_steps":
        base = {"train_micro_batch_size_per_gpu": 1}
    before = read_config(base)
    values = [value for value in others_of(name) if value != values_of(before)[name]]
    assert values
    for value in values:
        after = read_config({name: value} if name in BATCH[:2] else nested(name, value, base))
        assert after != before and values_of(after)[name] == value
        assert after.origins[name] == "config"
        if before.origins[name] == "default" and TABLE[name].default is not None:
            assert values_of(before)[name] == TABLE[name].default


@pytest.mark.parametrize("name", [name for name, key in TABLE.items() if key.kind == NO_EFFECT])
def test_a_key_without_effect_changes_nothing_and_has_its_line(name):
    key = TABLE[TABLE[name].alias or name]
    switch = f"{name.rpartition('.')[0]}.enabled"
    base = nested("optimizer.type", "AdamW", nested(switch, True) if switch in TABLE else ONE)
    for value in others_of(name) or [key.default]:
        config = read_config(nested(name, value, base))
        said = [note for note in config.notes if name in note.partition(":")[0].split(", ")]
        assert len(said) == (value is not False or (bool(key.default) and name != switch))
        assert all(key.what in note for note in said)
        assert values_of(config) == values_of(read_config(base))


@pytest.mark.parametrize("name", [name for name, key in TABLE.items() if key.kind == REFUSED])
def test_a_refused_key_says_why_unless_it_is_off(name):
    key = TABLE[name]
    off = [key.default] if key.default is True else [key.default, None, False, {}, {"enabled": False, "other": 3}]
    for value in off:
        assert read_config(nested(name, value)).notes == ()
    for value in [
        2,
        "on",
        {"enabled": True},
        {"setting": 3},
        *([not key.default] if isinstance(key.default, bool) else []),
    ]:
        error = refused(nested(name, value))
        assert error.what.startswith(f'"{name}" is ') and error.fix
        assert error.what.endswith(TABLE[key.alias or name].what)


@pytest.mark.parametrize("name", [name for name, key in TABLE.items() if key.alias])
def test_another_name_of_a_key_means_the_same(name):
    key = TABLE[name]
    target = TABLE[key.alias]
    if target.kind == REFUSED:
        return
    for value in [True, False] if key.stands_for else others_of(key.alias):
        base = {**ONE, "zero_optimization": {"stage": 3}}
        real = key.stands_for.get(value, value) if key.stands_for else value
        by_alias, by_name = read_config(nested(name, value, base)), read_config(nested(key.alias, real, base))
        assert values_of(by_alias) == values_of(by_name)
        if target.kind == HONOURED:
            assert by_alias.origins[key.alias] == f"alias of {name}"
        agreed = nested(name, value, nested(key.alias, real, base))
        assert values_of(read_config(agreed)) == values_of(by_name)
        other = next(one for one in [*others_of(key.alias), target.default] if one != real)
        error = refused(nested(name, value, nested(key.alias, other, base)))
        assert f'"{name}"' in error.what and f'"{key.alias}"' in error.what


def test_no_key_is_another_name_and_a_block_at_once():
    assert not set(TABLE) & (BLOCKS - set(OPEN))
    assert all(TABLE[key.alias].alias == "" for key in TABLE.values() if key.alias)
    assert all(key.what for key in TABLE.values())


# ---- batch


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sets(st.sampled_from(BATCH), min_size=1))
def test_two_of_the_batch_give_the_third_and_one_means_no_accumulation(micro, accumulation, ranks, chosen):
    sizes = dict(zip(BATCH, (micro * accumulation * ranks, micro, accumulation)))
    source = {name: sizes[name] for name in chosen}
    if chosen == {"gradient_accumulation_steps"}:
        assert "neither" in refused(source, data_parallel=ranks).what
        return
    config = read_config(source, data_parallel=ranks)
    assert config.batch.train == config.batch.micro * config.batch.accumulation * ranks
    if len(chosen) > 1:
        assert (config.batch.train, config.batch.micro, config.batch.accumulation) == tuple(sizes.values())
    else:
        assert config.batch.accumulation == 1
    for name in BATCH:
        assert (config.origins[name] == "config") == (name in chosen)


@given(*[st.integers(1, 60)] * 3, st.integers(1, 5))
def test_three_that_disagree_show_the_product(train, micro, accumulation, ranks):
    source, product = dict(zip(BATCH, (train, micro, accumulation))), micro * accumulation * ranks
    if train == product:
        assert read_config(source, data_parallel=ranks).batch.train == train
        return
    error = refused(source, data_parallel=ranks)
    assert f'"train_batch_size" is {train}, but ' in error.what and f"= {product}" in error.what
    assert f"{ranks} data-parallel rank" in error.what
    assert read_config(merged(source, json.loads(f"{{{error.fix}}}")), data_parallel=ranks).batch.train == product


@given(*[st.integers(1, 60)] * 2, st.integers(1, 5), st.booleans())
def test_a_batch_that_cannot_be_cut_evenly_is_refused(train, part, ranks, is_micro):
    source = {"train_batch_size": train, BATCH[1 if is_micro else 2]: part}
    if train % (part * ranks):
        error = refused(source, data_parallel=ranks)
        read_config(merged(source, json.loads(f"{{{error.fix}}}")), data_parallel=ranks)
    else:
        assert read_config(source, data_parallel=ranks).batch.train == train


# ---- optimizers and schedules


@pytest.mark.parametrize("mode", [None, True, False])
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "adam", "ADAMW"])
@pytest.mark.parametrize("torch_adam", [False, True])
def test_deepspeeds_adam_is_adamw_unless_it_is_told_otherwise(kind, mode, torch_adam):
    params = {"lr": 1e-4, "torch_adam": torch_adam} | ({} if mode is None else {"adam_w_mode": mode})
    source = {**ONE, "optimizer": {"type": kind, "params": params}}
    made = read_config(source).optimizer
    decoupled = kind.lower() == "adamw" or mode is not False
    assert made.type == ("AdamW" if decoupled else "Adam")
    assert made.params["weight_decay"] == (0.01 if torch_adam and decoupled else 0.0)
    decayed = read_config(nested("optimizer.params.weight_decay", 0.1, source))
    assert ('"Adam" is AdamW' in " ".join(decayed.notes)) == (kind.lower() == "adam" and mode is None)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_our_optimizers_take_what_is_left_of_the_settings(kind):
    settings = {"lr": 0.5} if kind not in ("Adam", "AdamW", "SGD") else {}
    source = {**ONE, "optimizer": {"type": kind.lower(), "params": settings}}
    made = read_config(source).optimizer
    cls = getattr(optim, made.type, None) or getattr(torch.optim, made.type)
    assert set(made.params) <= set(inspect.signature(cls).parameters)
    cls([torch.zeros(2, requires_grad=True)], **made.params)
    if OPTIMIZERS[kind] is None:
        in_zero = nested("zero_optimization.stage", 1, source)
        error = refused(in_zero)
        assert f"'{kind.lower()}'" in error.what
        assert read_config(merged(in_zero, json.loads(f"{{{error.fix}}}"))).optimizer == made


def test_optimizers_that_are_not_made_are_named_with_the_reason():
    for name, why in NOT_MADE.items():
        error = refused({**ONE, "optimizer": {"type": name}})
        assert name in error.what and why in error.what
    assert optim.NOT_ELEMENTWISE.keys() <= NOT_MADE.keys()
    error = refused({**ONE, "optimizer": {"type": "AdamX"}})
    assert all(name in error.what for name in OPTIMIZERS)


@pytest.mark.parametrize(
    ("params", "what"),
    [
        ({"lrr": 1}, '"optimizer.params.lrr" is no setting of AdamW'),
        ({"max_grad_norm": 1.0}, '"optimizer.params.max_grad_norm" is 1.0, but gradients are clipped by the engine'),
        ({"bias_correction": False}, '"optimizer.params.bias_correction" is False, but '),
        ({"amsgrad": True}, '"optimizer.params.amsgrad" is True, but '),
        ({"betas": [0.9]}, '"optimizer.params.betas" must be two numbers'),
        ({"betas": [0.9, 1.0]}, '"optimizer.params.betas" must be two numbers'),
        ({"lr": "auto"}, '"optimizer.params.lr" is "auto"'),
        ({"lr": -1}, '"optimizer.params.lr" must be a number, at least 0; got -1'),
    ],
)
def test_a_wrong_setting_of_the_optimizer_is_named(params, what):
    assert refused({**ONE, "optimizer": {"type": "AdamW", "params": params}}).what.startswith(what)
    assert "optimizer.type" in refused({**ONE, "optimizer": {"params": params}}).what


rates = st.floats(0, 1) | st.sampled_from([True, "auto", "log", None, -1])
sizes = st.integers(-1, 5) | st.sampled_from([2.5, 3.0, None])


@pytest.mark.filterwarnings("ignore:a warm-up of")
@given(st.data(), st.sampled_from([*SCHEDULES]))
def test_a_schedule_that_is_read_can_be_made(data, kind):
    settings = [*inspect.signature(SCHEDULES[kind]).parameters]
    params = data.draw(st.dictionaries(st.sampled_from(settings), rates | sizes, max_size=len(settings)))
    for name in ("total_num_steps", "cycle_min_lr", "cycle_max_lr"):
        if name in settings and data.draw(st.booleans()):
            params[name] = 10
    source = {**ONE, "scheduler": {"type": kind.lower(), "params": params}}
    try:
        read = read_config(source).scheduler
    except DeepSpeedConfigError as error:
        assert '"scheduler.params.' in error.what
    else:
        assert read.type == kind
        schedule_by_name(read.type, **read.params)(3)


def test_a_schedule_rises_to_the_optimizers_rate():
    source = {**ONE, "scheduler": {"type": "WarmupLR"}}
    assert "warmup_max_lr" not in read_config(source).scheduler.params
    config = read_config({**source, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}})
    assert config.scheduler.params["warmup_max_lr"] == 0.5
    of_torch = {**source, "optimizer": {"type": "RMSprop", "params": {"lr": [0.5]}}}
    assert refused(of_torch).what.startswith('"optimizer.params.lr" must be a number')
    assert config.origins["scheduler.params.warmup_max_lr"] == "derived from optimizer.params.lr"


# ---- what follows from other values, and what contradicts


def test_the_defaults_that_follow_from_other_values():
    for stage in range(4):
        assert read_config(nested("zero_optimization.stage", stage)).zero.overlap_comm == (stage == 3)
    bf16 = nested("bf16.enabled", True, {"train_micro_batch_size_per_gpu": 1})
    assert read_config(bf16).dtype == read_config(bf16).communication_data_type == "bf16"
    assert read_config(bf16).data_types.grad_accum_dtype == "bf16"
    assert read_config({**bf16, "gradient_accumulation_steps": 2}).data_types.grad_accum_dtype == "fp32"
    assert read_config(nested("communication_data_type", "torch.float16", bf16)).communication_data_type == "fp16"
    assert read_config(ONE).gradient_clipping == 1.0


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, '"fp16.enabled" and "bf16.enabled" are both true'),
        ({"fp16": {"enabled": True}, "bfloat16": {"enabled": True}}, '"fp16.enabled" and "bfloat16.enabled" are both'),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            '"zero_optimization.offload_optimizer.device"',
        ),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, '"zero_optimization.offload_param.device"'),
        ({"train_batch_size": True}, '"train_batch_size" must be a whole number, at least 1; got True'),
        ({"fp16": {"enabled": 1}}, '"fp16.enabled" must be true or false; got 1'),
        ({"fp16": {"min_loss_scale": 0}}, '"fp16.min_loss_scale" must be a number, above 0; got 0'),
        (
            {"zero_optimization": {"zero_hpz_partition_size": True}},
            '"zero_optimization.zero_hpz_partition_size" is True',
        ),
        ({"zero_optimization": True}, '"zero_optimization" must be an object; got True'),
        ({"zero_optimization.stage": 3}, '"zero_optimization.stage" is no key'),
        ({1: 2}, '"1" is no key'),
    ],
)
def test_a_contradiction_or_a_wrong_shape_is_named(source, what):
    assert refused({**ONE, **source}).what.startswith(what)


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ({"zero_optimisation": {}}, '"zero_optimization": {"stage": 0}'),
        ({"stage": 3}, '"zero_optimization": {"stage": 0}'),
        ({"zero_optimization": {"reduce_bucket_sizes": 3}}, '"zero_optimization": {"reduce_bucket_size": 500000000}'),
        ({"gradient_acumulation_steps": 3}, '"gradient_accumulation_steps": 8'),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(source, fix):
    error = refused({**ONE, **source})
    assert error.what.endswith("is no key of DeepSpeed's configuration") and error.fix == fix


# ---- the two articles


def test_the_flat_dictionary_works_as_printed():
    config = read_config(None, flat=ARTICLE)
    assert (config.batch.train, config.batch.micro, config.batch.accumulation) == (32, 8, 4)
    assert config.dtype == "fp16" and config.communication_data_type == "fp16"
    assert config.fp16.is_dynamic and config.fp16.first_scale == 2.0**24
    assert (
        LossScaler(scale=config.fp16.first_scale, dynamic=config.fp16.is_dynamic).after(True).after(True).scale == 2**23
    )
    assert config.optimizer.type == "AdamW"
    assert config.optimizer.params == {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    rise = schedule_by_name(config.scheduler.type, **config.scheduler.params)
    assert [rise(step) for step in (0, 501, 1001, 9999)] == [0.0, 0.0005, 0.001, 0.001]
    assert any("train_init_scale and train_loss_scale are both 16777216" in note for note in config.notes)
    assert "2 data-parallel ranks = 64" in refused(None, flat=ARTICLE, data_parallel=2).what


def test_the_nested_dictionary_wants_a_batch():
    error = refused(NESTED)
    assert "neither" in error.what and "train_micro_batch_size_per_gpu" in error.fix
    config = read_config({**NESTED, "train_batch_size": 8}, data_parallel=2)
    assert (config.batch.micro, config.batch.accumulation, config.dtype) == (4, 1, "fp16")
    assert config.optimizer.params == {"lr": 0.0001, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.0}
    assert config.fp16.first_scale == 2.0**16 and config.raw == {**NESTED, "train_batch_size": 8}


@pytest.mark.parametrize("name", FLAT)
def test_each_flat_name_sets_its_key(name):
    flat = {**ARTICLE, "train_fp16_compression": "bf16"}
    if name == "train_fp16":
        del flat["train_use_amp"]
    config = read_config(None, flat=flat)
    assert config.origins[FLAT[name].key] == ("config" if name == FLAT[name].key else f"alias of {name}")


def test_flat_names_that_disagree_are_refused():
    assert refused(ONE, flat={"train_batch_size": 16}).what.startswith('"train_batch_size" is given twice: 1 as ')
    assert refused(None, flat={**ARTICLE, "train_fp16": False}).what.startswith('"fp16.enabled" is given twice')
    assert "one that stays" in refused(None, flat={**ARTICLE, "train_loss_scale": 2.0}).what
    assert refused(ONE, flat={"train_init_scale": 1000}).fix == '"train_init_scale": 65536'
    assert refused(ONE, flat={"train_init_scale": 2.0**128}).what.startswith(
        '"train_init_scale" must be a power of two'
    )
    assert refused(ONE, flat={"train_lrs": 0.1}).fix == "train_lr"
    assert read_config(ONE, flat={"train_loss_scale": 128}).fp16.first_scale == 128
    falls = {**ONE, "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}}
    made = read_config(falls, flat={"train_warmup_steps": 3}).scheduler
    assert made.type == "WarmupDecayLR" and made.params["warmup_num_steps"] == 3
    both = read_config({**ONE, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}}, flat={"train_lr": 0.5})
    assert both.optimizer.params["lr"] == 0.5


# ---- files


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b'{"train_batch_size": 1,\n "a": }', "FILE is not JSON: line 2, column 7: Expecting value"),
        (b'{"fp16": {"enabled": true, "enabled": false}}', 'FILE cannot be read: the key "enabled" is there twice'),
        (b"[1]", "FILE holds no object: [1]"),
        (b"\xff\xfe", "FILE cannot be read: 'utf-8' codec"),
        (b"[" * 100_000, "FILE cannot be read: maximum recursion depth"),
        (b'{"train_batch_size": NaN}', '"train_batch_size" must be a whole number, at least 1; got nan'),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text, what):
    path = tmp_path / "ds.json"
    path.write_bytes(text)
    assert refused(path).what.startswith(what.replace("FILE", str(path)))


def test_a_file_is_read_like_its_dict(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(NESTED | ONE))
    assert read_config(str(path)) == read_config(path) == read_config(NESTED | ONE)
    assert "No such file" in refused(tmp_path / "no.json").what
    assert "cannot be read" in refused(tmp_path).what
    assert "a dict or the path" in refused(3).what


# ---- the page and the command


def test_the_page_of_keys_is_fresh():
    written = Path(__file__).parent.parent / "docs" / "config.md"
    assert written.read_text(encoding="utf-8") == page(), "run `minispeed explain --keys > docs/config.md`"
    assert all(f"| `{name}` |" in page() for name in TABLE)


def test_reading_a_configuration_imports_no_torch():
    code = "import sys, minispeed.config, minispeed.config.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("stage", range(4))
def test_explain_shows_each_value_and_what_it_costs(tmp_path, capsys, stage):
    path = tmp_path / "ds.json"
    source = {**ONE, "train_batch_size": 4, "zero_optimization": {"stage": stage, "contiguous_gradients": True}}
    path.write_text(json.dumps(merged(source, {"bf16": {"enabled": True}, "optimizer": {"type": "Adam"}})))
    assert main(["explain", str(path), "--ranks", "4", "--parameters", "1G"]) == 0
    shown = capsys.readouterr().out
    config = read_config(path, data_parallel=4)
    for name, value in values_of(config).items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(json.dumps(value))} +\S", shown, re.MULTILINE)
    assert all(note in shown for note in config.notes) and config.notes
    total = paper_bytes(10**9, ranks=4, stage=stage) / 1e9
    assert re.search(rf"together +{total:g} bytes per parameter +{total:.3f} GB", shown)


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 2), (2, 5), (3, 12)])
def test_explain_says_what_a_pipeline_costs_zero(tmp_path, capsys, stage, times):
    path = tmp_path / "ds.json"
    said = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}
    path.write_text(json.dumps(said | {"zero_optimization": {"stage": stage}}))
    assert main(["explain", str(path), "--ranks", "2", "--pp", "3"]) == 0
    shown = capsys.readouterr().out
    assert f"It sends {times} x 1/2 of the parameters of its stage, 1/3 of the model's, in a step of 4" in shown
    assert ("summed by themselves: 4 instead of 1" in shown) == (stage >= 2)
    assert ("its forward and for its backward: 8 instead of 1" in shown) == (stage == 3)


def test_explain_counts_offloaded_masters_and_other_optimizers(tmp_path, capsys):
    path = tmp_path / "ds.json"
    for source, states in [
        ({"optimizer": {"type": "SGD"}}, 0),
        ({"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, 4),
        ({"zero_optimization": {"cpu_offload": True}}, 12),
        ({"bf16": {"enabled": True}, "zero_optimization": {"cpu_offload": True}}, 12),
    ]:
        path.write_text(json.dumps({**ONE, **source}))
        assert main(["explain", str(path)]) == 0
        place = ", on the CPU" * ("zero_optimization" in source)
        assert re.search(rf"optimizer states +{states} bytes per parameter{place}\n", capsys.readouterr().out)


def test_explain_without_a_file_says_what_to_type(capsys):
    assert main(["explain"]) == 2
    assert "minispeed explain ds_config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"), [("124M", 124_000_000), ("1.3B", 1_300_000_000), ("7e9", 7 * 10**9), ("5", 5)]
)
def test_numbers_of_parameters_are_read(text, count):
    assert read_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "0", "-3", "1X", "1e999"])
def test_what_is_no_number_of_parameters_is_refused(text):
    with pytest.raises(UserError, match="--parameters must be"):
        read_count(text)


@pytest.mark.parametrize(("kind", "top"), [("WarmupLR", 0.25), ("WarmupDecayLR", 0.001)])
def test_only_warmup_lr_rises_to_the_optimizers_rate(kind, top):
    total = {"total_num_steps": 9} if kind == "WarmupDecayLR" else {}
    adam = {"type": "AdamW", "params": {"lr": 0.25}}
    made = read_config({**ONE, "optimizer": adam, "scheduler": {"type": kind, "params": total}})
    assert made.scheduler.params["warmup_max_lr"] == top
