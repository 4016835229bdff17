"""Laws of what an engine holds: looked at, changed, saved, loaded, it is one state, whatever the layout."""

import copy
import csv
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_deepspeed_engine import Net, close, config_of, fill, made, on_ranks, rows, whole
from torch import nn

import minispeed
from minispeed.deepspeed import fragments, saving
from minispeed.errors import UserError

LAYOUTS = st.tuples(st.integers(1, 3), st.integers(0, 3))


class Normed(Net):
    """With buffers, one of which no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, x):
        return super().forward(self.norm(x))


def start(stage, accumulation=1, model=None, **more):
    adam = {"type": "AdamW", "params": {"lr": 0.01}}
    return made(stage, accumulation, model or Net().double(), **{"optimizer": adam, **more})


def step(engine, rank, ranks, index):
    for x in rows(ranks, engine.gradient_accumulation_steps(), index)[:, rank]:
        engine.backward(engine(x))
        engine.step()


# ---- fragments


@given(st.integers(1, 3), st.integers(0, 3), st.sampled_from([torch.float64, torch.bfloat16]))
@settings(max_examples=12)
def test_what_is_cut_can_be_looked_at_whole(ranks, stage, dtype):
    """Master, mean gradient and moments, against a plain loop; before the first update there are no moments."""
    half = {"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}

    def look(rank):
        model = Net().to(torch.float64 if not half else torch.float32)
        engine = start(stage, 2, model, **half)
        xs = rows(ranks, 2, 0)[:, rank].to(dtype)
        for x in xs[:1]:
            engine.backward(engine(x))
            engine.step()
        engine.backward(engine(xs[1]))
        grads = {name: fragments.safe_get_full_grad(p) for name, p in model.named_parameters()}
        with pytest.raises(UserError, match="keeps no 'exp_avg'"):
            fragments.safe_get_full_optimizer_state(model.scale, "exp_avg")
        engine.step()
        masters = {name: fragments.safe_get_full_fp32_param(p) for name, p in model.named_parameters()}
        moments = {n: fragments.safe_get_full_optimizer_state(p, "exp_avg") for n, p in model.named_parameters()}
        assert all(fragments.safe_get_full_grad(p) is None for p in model.parameters())
        assert all(torch.equal(x, masters[name].to(x.dtype)) for name, x in whole(engine).items())
        return grads, moments

    plain = Net().to(dtype)
    everything = rows(ranks, 2, 0).flatten(0, 1).to(dtype)
    (sum(plain(x) for x in everything) / len(everything)).backward()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in plain.named_parameters()}
    most = 1e-10 if dtype == torch.float64 else 0.03
    for grads, moments in on_ranks(ranks, look):
        assert close(grads, expected, most)
        assert close(moments, {name: 0.1 * grad for name, grad in grads.items()}, 1e-6)


@given(st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=12)
def test_what_is_put_is_found_and_used(ranks, stage):
    def change(rank):
        engine = start(stage)
        p = engine.module.layers[0].weight
        engine.backward(engine(rows(ranks, 1, 0)[0, rank]))
        grad, value = (torch.arange(32.0, dtype=torch.float64).view(8, 4) + k for k in (0.5, -3))
        fragments.safe_set_full_grad(p, grad)
        assert torch.allclose(fragments.safe_get_full_grad(p), grad, rtol=1e-12)
        engine.step()
        assert torch.allclose(fragments.safe_get_full_optimizer_state(p, "exp_avg"), 0.1 * grad, rtol=1e-9)
        fragments.safe_set_full_optimizer_state(p, value, "exp_avg")
        fragments.safe_set_full_fp32_param(p, value)
        assert torch.equal(fragments.safe_get_full_optimizer_state(p, "exp_avg"), value)
        assert torch.equal(whole(engine)["layers.0.weight"], value)
        mine = fragments.safe_get_local_fp32_param(p)
        fragments.safe_set_local_fp32_param(p, mine + 1)
        fragments.safe_set_local_grad(p, torch.zeros_like(mine))
        fragments.safe_set_local_optimizer_state(p, mine * 2, "exp_avg_sq")
        assert torch.equal(fragments.safe_get_local_optimizer_state(p, "exp_avg_sq"), mine * 2)
        assert not fragments.safe_get_local_grad(p).any() and not fragments.safe_get_full_grad(p).any()
        assert torch.equal(fragments.safe_get_full_fp32_param(p), value + 1)
        with pytest.raises(UserError, match=r"layers.0.weight has the shape \(8, 4\), the value \(2, 2\)"):
            fragments.safe_set_full_fp32_param(p, torch.ones(2, 2))
        return mine.numel()

    sizes = on_ranks(ranks, change)
    assert sum(sizes) == 32 if stage else sizes == [32] * ranks


def test_a_parameter_of_nobody_has_no_master():
    with pytest.raises(UserError, match="no engine's"):
        fragments.safe_get_full_fp32_param(nn.Linear(2, 2).weight)


# ---- the loss scale


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_loss_scale_is_where_its_users_look(stage):
    fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1}

    def train(rank):
        engine = start(stage, model=Net(), fp16=fp16)
        optimizer, seen = engine.optimizer, []
        for index in range(5):
            x = rows(2, 1, index)[0, rank].half() * (1e6 if index == 3 else 1)
            engine.backward(engine(x))
            engine.step()
            scaler = optimizer.loss_scaler
            assert optimizer.cur_scale == optimizer.loss_scale == scaler.cur_scale == scaler.loss_scale
            assert optimizer.overflow == (index == 3) != engine.was_step_applied()
            assert (scaler.cur_iter, scaler.scale_window, scaler.dynamic) == (index + 1, 2, True)
            seen.append(scaler.cur_scale)
        assert engine.skipped_steps == 1 and engine.global_steps == 5 and optimizer.dynamic_loss_scale
        return seen

    assert on_ranks(2, train) == [[16.0, 32.0, 32.0, 16.0, 16.0]] * 2


def test_a_loss_that_was_not_scaled_is_noticed():
    engine = start(0, model=Net(), fp16={"enabled": True})
    engine(torch.ones(2, 4).half()).backward()
    with pytest.raises(UserError, match="not multiplied by the loss scale, 65536.*engine.scale"):
        engine.step()
    engine.zero_grad()
    engine.scale(engine(torch.ones(2, 4).half())).backward()
    engine.step()


def test_inputs_are_cast_where_asked():
    engine = start(0, model=Net(), fp16={"enabled": True, "auto_cast": True})
    engine.backward(engine(torch.ones(2, 4)))
    engine.step()


# ---- on disk


@given(LAYOUTS, LAYOUTS)
@settings(max_examples=12)
def test_any_layout_goes_on_from_any_other(before, after):
    more = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 0.01}}}

    def feed(engine, rank, ranks, index):
        mine = rows(6, 1, index)[0].view(6 // ranks, ranks, 2, 4)[:, rank]
        for x in mine:
            engine.backward(engine(x))
            engine.step()

    with tempfile.TemporaryDirectory() as folder:

        def write(rank):
            engine = start(before[1], 6 // before[0], Normed().double(), **more)
            engine.eval()
            engine.module.norm.running_mean += 0.5
            for index in range(2):
                feed(engine, rank, before[0], index)
            engine.save_checkpoint(folder, client_state={"epoch": 3, "seen": (1, 2.5), 7: torch.arange(3)})
            feed(engine, rank, before[0], 2)
            return whole(engine), engine.get_lr()

        def read(rank):
            engine = start(after[1], 6 // after[0], Normed().double(), **more)
            engine.eval()
            path, client = engine.load_checkpoint(folder)
            assert path.endswith("global_step2") and client["epoch"] == 3 and client["seen"] == (1, 2.5)
            assert torch.equal(client[7], torch.arange(3)) and engine.global_steps == 2
            feed(engine, rank, after[0], 2)
            return whole(engine), engine.get_lr()

        expected, lr = on_ranks(before[0], write)[0]
        for got, got_lr in on_ranks(after[0], read):
            assert close(got, expected) and got_lr == lr


def test_latest_tags_and_what_is_not_there(tmp_path, capsys):
    engine = start(1)
    assert engine.load_checkpoint(tmp_path) == (None, None) and "no checkpoint is loaded" in capsys.readouterr().out
    step(engine, 0, 1, 0)
    engine.save_checkpoint(tmp_path)
    step(engine, 0, 1, 1)
    engine.save_checkpoint(tmp_path, "mine", save_latest=False)
    assert (tmp_path / "latest").read_text().strip() == "global_step1"
    after = whole(engine)
    assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "global_step1") and engine.global_steps == 1
    assert engine.load_checkpoint(tmp_path, "mine")[0] == str(tmp_path / "mine") and engine.global_steps == 2
    assert close(whole(engine), after, most=0)
    with pytest.raises(UserError, match="no checkpoint other in .*global_step1, mine"):
        engine.load_checkpoint(tmp_path, "other")
    (tmp_path / "latest").write_text("gone")
    with pytest.raises(UserError, match=rf"{tmp_path}/gone/index.json is missing.*tag=\"global_step1\", the newest"):
        engine.load_checkpoint(tmp_path)


@given(st.integers(0, 3), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=12)
def test_what_is_not_asked_for_stays_as_it_is(stage, states, rates, only):
    """Parameters are loaded always; moments, rates, the schedule and the counts as DeepSpeed's arguments say."""
    more = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 0.01}}}

    def begun(seed, steps):
        engine = start(stage, model=Net(seed).double(), **more)
        for index in range(steps):
            step(engine, 0, 1, index + seed)
        return engine

    def held(engine):
        core = engine.core
        moments = {name: fragments.safe_get_full_optimizer_state(p, "exp_avg") for name, p in named(engine)}
        numbers = sorted({float(state["step"]) for state in core.optimizer.state.values()})
        return {
            "states": (moments, numbers, engine.get_lr()),
            "rates": engine.lr_scheduler.state_dict(),
            "counts": (engine.global_steps, engine.micro_steps, engine.global_samples, core.step, core.num_updates),
        }

    def named(engine):
        return [(name, p) for name, p in engine.module.named_parameters()]

    with tempfile.TemporaryDirectory() as folder:
        engine, other = begun(0, 3), begun(5, 1)
        engine.save_checkpoint(folder, client_state={"epoch": 3})
        theirs, mine = held(engine), held(other)
        how = {"load_optimizer_states": states, "load_lr_scheduler_states": rates, "load_module_only": only}
        assert other.load_checkpoint(folder, **how) == (f"{folder}/global_step3", {"epoch": 3})
    assert close(whole(other), whole(engine), most=0)
    expected = {kind: theirs if wanted and not only else mine for kind, wanted in
                (("states", states), ("rates", rates), ("counts", True))}  # fmt: skip
    found = held(other)
    assert all(found[kind] == of[kind] for kind, of in expected.items() if kind != "states")
    moments, numbers, lr = expected["states"]["states"]
    assert close(found["states"][0], moments, most=0) and found["states"][1:] == (numbers, lr)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("half", [False, True])
def test_a_function_of_the_callers_loads_what_it_likes(tmp_path, stage, half):
    """Other names, other shapes, on a whole module; masters keep what half precision would round away."""
    more = {"bf16": {"enabled": True}} if half else {}
    dtype = torch.float32 if half else torch.float64

    def load(rank):
        engine, other = (start(stage, model=Net(seed).to(dtype), **more) for seed in (0, 1))
        engine.backward(engine(rows(2, 1, 0)[0, rank].to(torch.bfloat16 if half else dtype)))
        engine.step()
        engine.save_checkpoint(tmp_path, client_state={"epoch": 3})
        seen = {}

        def custom(src, dst):
            seen.update(src)
            dst.load_state_dict({**src, "never.weight": dst.never.weight.detach() * 0 + rank})

        path, client = other.load_checkpoint(tmp_path, custom_load_fn=custom)
        assert (path, client) == (str(tmp_path / "global_step1"), {"epoch": 3})
        found, masters = ({n: fragments.safe_get_full_fp32_param(p) for n, p in e.module.named_parameters()}
                          for e in (other, engine))  # fmt: skip
        assert close(seen, masters, most=0) and not found.pop("never.weight").any()
        assert all(torch.equal(x, masters[name]) for name, x in found.items()) and other.global_steps == 1
        grown = Net(seed=2)
        grown.never = nn.Linear(2, 5)
        bigger = start(stage, model=grown.to(dtype), **more)
        with pytest.raises(UserError, match="never.* has the shape"):
            bigger.load_checkpoint(tmp_path, custom_load_fn=custom)

        def grow(src, dst):
            with torch.no_grad():
                dst.never.weight[:3] = src["never.weight"]

        bigger.load_checkpoint(tmp_path, load_module_only=True, custom_load_fn=grow)
        p = bigger.module.never.weight
        first = fragments.safe_get_full_fp32_param(p)[:3]
        return torch.equal(first, masters["never.weight"].to(torch.bfloat16 if half else dtype).to(first.dtype))

    assert on_ranks(2, load) == [True] * 2


def test_a_function_of_the_callers_needs_a_whole_module(tmp_path):
    def load(rank):
        model = minispeed.PipelineModule([nn.Linear(4, 4).double() for _ in range(2)], num_stages=2, loss_fn=torch.sum)
        engine = start(1, model=model)
        engine.save_checkpoint(tmp_path)
        with pytest.raises(UserError, match="custom_load_fn: each of the 2 ranks of a copy holds a part"):
            engine.load_checkpoint(tmp_path, custom_load_fn=lambda src, dst: None)

    on_ranks(2, load)


def test_an_engine_without_an_optimizer_loads(tmp_path):
    engine = start(2, model=Normed().double())
    step(engine, 0, 1, 0)
    engine.module.norm.running_mean += 0.5
    engine.save_checkpoint(tmp_path, client_state={"epoch": 3})
    plain, *_ = minispeed.initialize(model=Normed().double(), config={"train_batch_size": 2})
    assert plain.load_checkpoint(tmp_path) == (str(tmp_path / "global_step1"), {"epoch": 3})
    assert close(whole(plain), whole(engine), most=0) and plain.global_steps == 1
    assert torch.equal(plain.module.norm.running_mean, engine.module.norm.running_mean)
    other, *_ = minispeed.initialize(model=Net().double(), config={"train_batch_size": 2})
    with pytest.raises(UserError, match="holds buffers/norm.num_batches_tracked, which the module has not"):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_module_strict=False)
    assert all(torch.equal(x, whole(engine)[name]) for name, x in whole(other).items())
    other.load_checkpoint(tmp_path, custom_load_fn=lambda src, dst: dst.scale.copy_(src["scale"] * 0))
    assert other.module.scale == 0


def test_a_checkpoint_of_before_loads_and_one_of_sft_is_named(tmp_path, monkeypatch):
    """Before, a checkpoint did not say its tied and its frozen parameters."""

    def before(directory, pieces, state, *more):
        kept = [piece for piece in pieces if piece.name != "parameters/empty"]
        save(directory, kept, {key: x for key, x in state.items() if key not in ("tied", "frozen")}, *more)

    save = saving.save
    engine, other = (start(1, model=Tied(seed).double()) for seed in (0, 1))
    monkeypatch.setattr(saving, "save", before)
    engine.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path)
    assert all(torch.equal(x, whole(engine)[name]) for name, x in whole(other).items())
    monkeypatch.setattr(saving, "save", lambda directory, pieces, state, *more: save(directory, pieces, {}, *more))
    engine.save_checkpoint(tmp_path, "step-00000007")
    with pytest.raises(UserError, match="step-00000007 was written by no save_checkpoint"):
        other.load_checkpoint(tmp_path)


class Tied(Net):
    """With a weight of two names, and a parameter of nothing."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.never.weight, self.other = nn.Parameter(torch.ones(4, 8)), nn.Linear(8, 4, bias=False)
        self.other.weight = self.layers[2].weight
        self.empty = nn.Parameter(torch.empty(0, 3))


def test_what_is_damaged_is_named_with_what_is_whole(tmp_path):
    engine = start(1)
    for tag in ("a1", "a2", "a3"):
        engine.save_checkpoint(tmp_path, tag)
    (tmp_path / "a3" / "rank-00000.json").write_text("[]")
    with pytest.raises(UserError, match=rf"{tmp_path}/a3/rank-00000.json.*try: {tmp_path}/a2"):
        engine.load_checkpoint(tmp_path)


def test_frozen_parameters_may_be_left_out(tmp_path):
    def frozen(seed):
        model = Net(seed).double()
        model.layers[0].requires_grad_(False)
        return start(2, model=model)

    engine, other = frozen(0), frozen(1)
    step(engine, 0, 1, 0)
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    kept = whole(other)["layers.0.weight"]
    with pytest.raises(UserError, match="holds no parameters/layers.0.*load_module_strict=False"):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_module_strict=False)
    assert torch.equal(whole(other)["layers.0.weight"], kept)
    assert torch.equal(whole(other)["layers.2.weight"], whole(engine)["layers.2.weight"])


def test_gradients_that_are_not_used_yet_are_not_saved_silently(tmp_path, capsys):
    engine = start(0, accumulation=2)
    engine.save_checkpoint(tmp_path)
    assert not capsys.readouterr().out
    engine.backward(engine(rows(1, 1, 0)[0, 0]))
    engine.save_checkpoint(tmp_path)
    assert "warning: gradients that no update has used" in capsys.readouterr().out


def test_a_client_state_that_cannot_be_stored_is_named(tmp_path):
    engine = start(0)
    with pytest.raises(UserError, match=r"client_state.deep.1 is a Net, which is no number"):
        engine.save_checkpoint(tmp_path, client_state={"deep": [1, engine.module]})
    assert not list(tmp_path.iterdir())
    engine.save_checkpoint(tmp_path, client_state={"a": np.arange(3), "b": np.float32(2.5)})
    client = engine.load_checkpoint(tmp_path)[1]
    assert (client["a"] == np.arange(3)).all() and client["b"] == 2.5


@pytest.mark.parametrize("how", ["Ignore", "Warn", "Fail"])
def test_ranks_with_different_tags(tmp_path, capsys, how):
    """A checkpoint is one: the first rank's tag counts, unless that is to fail."""

    def save(rank):
        engine = start(1, checkpoint={"tag_validation": how})
        if how == "Fail":
            with pytest.raises(UserError, match="checkpoint's tag is a0 on rank 0, a1 on rank 1"):
                engine.save_checkpoint(tmp_path, f"a{rank}")
        else:
            engine.save_checkpoint(tmp_path, f"a{rank}")
            step(engine, rank, 2, 0)
            assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "a0") and engine.global_steps == 0
        engine.save_checkpoint(tmp_path, "same")

    on_ranks(2, save)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(["a0"] if how != "Fail" else []), "latest", "same"]
    assert ("warning: the checkpoint's tag is a0 on rank 0, a1 on rank 1" in capsys.readouterr().out) == (how == "Warn")


@pytest.mark.parametrize("tag", ["", ".", "..", "../there", "/there", "latest", "a/../../b"])
def test_no_tag_leads_out_of_the_folder(tmp_path, tag):
    (tmp_path / "there").mkdir()
    engine = start(1)
    engine.save_checkpoint(tmp_path / "here", "mine")
    with pytest.raises(UserError, match="is no name for a checkpoint inside"):
        engine.save_checkpoint(tmp_path / "here", tag)
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"latest", "mine"}
    with pytest.raises(UserError, match="save_dir is empty"):
        engine.save_checkpoint("", "mine")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_in_half_precision_for_anybody(tmp_path, stage, name):
    def save(rank):
        engine = start(stage, model=Net(), bf16={"enabled": True})
        assert engine.save_16bit_model(tmp_path, name) == (stage == 0)
        engine = made(stage, model=Net(), bf16={"enabled": True}, zero_optimization={
            "stage": stage, "stage3_gather_16bit_weights_on_model_save": True})  # fmt: skip
        assert engine.save_16bit_model(tmp_path, name)

    on_ranks(2, save)
    if name.endswith("bin"):
        found = torch.load(tmp_path / name, weights_only=True)
    else:
        from safetensors.torch import load_file

        found = load_file(tmp_path / name)
    model = Net(seed=1).bfloat16()
    model.load_state_dict(found)
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(model.parameters(), Net().parameters()))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_dicts_are_whole_and_masters_follow(stage):
    def swap(rank):
        engine, other = start(stage), start(stage, model=Net(seed=1).double())
        other.load_state_dict(engine.state_dict())
        for each in (engine, other):
            step(each, rank, 2, 0)
        assert {key.removeprefix("module.") for key in engine.state_dict()} == set(Net().state_dict())
        return close(whole(other), whole(engine), most=0)

    assert on_ranks(2, swap) == [True] * 2


# ---- what is printed and written


def test_progress_times_and_curves(tmp_path, capsys):
    def train(rank):
        csv_monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
        engine = start(1, 2, steps_per_print=2, wall_clock_breakdown=True, csv_monitor=csv_monitor)
        for index in range(4):
            step(engine, rank, 2, index)
        return engine.global_samples

    assert on_ranks(2, train) == [32] * 2
    printed = capsys.readouterr().out
    assert printed.count("step=2, skipped=0, lr=[0.01]") == printed.count("step=4, skipped=0") == 1
    assert printed.count("communication:") == 4 and "forward:" in printed and "backward:" in printed
    found = list(csv.reader((tmp_path / "run" / "Train_Samples_train_loss.csv").read_text().splitlines()))
    assert [row[0] for row in found] == ["step", "8", "16", "24", "32"]
    mean = np.mean([Net().double()(x).item() for x in rows(2, 2, 0).flatten(0, 1)])
    assert float(found[1][1]) == pytest.approx(mean, rel=1e-6)


# ---- initialize


def test_both_dictionaries_of_the_articles():
    flat = {
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
    engine, *_ = minispeed.initialize(Net(), **flat)
    nested = {
        "fp16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 0.0001, "betas": [0.9, 0.98], "eps": 1e-6}},
    }
    with pytest.raises(UserError, match="train_batch_size"):
        minispeed.initialize(model=Net(), config=nested)
    other, *_ = minispeed.initialize(model=Net(), config={**nested, "train_batch_size": 8})
    for each, num_micro in ((engine, 4), (other, 1)):
        before, losses = whole(each), []
        for index in range(40 * num_micro):
            x = torch.ones(8, 4).half()
            losses.append(each(x))
            each.backward(losses[-1])
            each.step()
        assert each.global_steps == 40 and each.skipped_steps < 20 and each.optimizer.dynamic_loss_scale
        assert losses[-1] < losses[0] and not close(whole(each), before, most=1e-4)


def test_the_loader_gives_each_rank_its_share():
    def train(rank):
        torch_data = torch.utils.data.TensorDataset(torch.arange(32.0).view(8, 4))
        engine, _, loader, _ = minispeed.initialize(
            model=Net(),
            training_data=torch_data,
            config={"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {}}},
        )
        seen = []
        for (x,) in loader:
            engine.backward(engine(x))
            engine.step()
            seen += x[:, 0].tolist()
        return seen

    found = on_ranks(2, train)
    assert sorted(found[0] + found[1]) == [4.0 * k for k in range(8)] and len(found[0]) == 4


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(model=None), "NoneType for a model"),
        (dict(config={"train_batch_size": 1, "optimizer": {"type": "Adam"}}, optimizer=lambda ps: torch.optim.SGD(ps)),
         "an optimizer twice.*Adam.*one of them"),
        (dict(config_params={"train_batch_size": 1}), "two configurations: config and config_params"),
        (dict(args=type("Args", (), {"deepspeed_config": "ds.json"})()), "config and --deepspeed_config"),
        (dict(model_parameters=[nn.Parameter(torch.ones(3))], optimizer=None), r"shape \(3,\) that is not the model's"),
        (dict(model=Net().half()), 'fp16 parameters.*asks for fp32.*"fp16": '),
        (dict(mesh_param=(1, 2)), "mesh_param=.*only the batch"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_a_sentence(given, message):
    config = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {}}}
    with pytest.raises(UserError, match=message):
        minispeed.initialize(**{"model": Net(), "config": config, **given})


def test_a_trainable_parameter_in_no_group_is_named():
    model = Net()
    with pytest.raises(UserError, match="never.weight is trainable, and in none of the optimizer's 1 groups"):
        minispeed.initialize(
            model=model,
            optimizer=torch.optim.SGD([p for n, p in model.named_parameters() if "never" not in n], lr=0.1),
            config={"train_batch_size": 1},
        )


def test_an_optimizer_that_has_stepped_is_refused():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).backward()
    optimizer.step()
    with pytest.raises(UserError, match="AdamW given has made updates already"):
        minispeed.initialize(model=model, optimizer=optimizer, config={"train_batch_size": 1})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_groups_keep_their_settings_and_schedulers_their_optimizer(stage):
    def train(rank):
        model = Net().double()
        groups = [
            {"params": model.layers.parameters(), "lr": 0.5},
            {"params": [model.scale, *model.never.parameters()]},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        config = config_of(stage, 1, 0.0)
        engine, shown, _, same = minispeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config
        )
        assert same is scheduler and shown.param_groups is optimizer.param_groups
        rates = []
        for index in range(3):
            step(engine, rank, 2, index)
            rates.append(engine.get_lr())
        return rates

    assert on_ranks(2, train) == [[[0.25, 0.05], [0.5 / 3, 0.1 / 3], [0.125, 0.025]]] * 2


def test_a_torch_scheduler_takes_the_optimizer_that_is_returned():
    engine = start(1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lambda index: 1 / (index + 1))
    for index in range(2):
        step(engine, 0, 1, index)
        scheduler.step()
    assert engine.get_lr() == [0.01 * (1 / 3)]
    saved = engine.optimizer.state_dict()
    other = start(1)
    step(other, 0, 1, 0)
    other.optimizer.load_state_dict(saved)
    assert other.get_lr() == [0.01 * (1 / 3)] and "AdamW" in repr(other.optimizer)


def test_ranks_with_different_configurations_are_named():
    def begin(rank):
        with pytest.raises(UserError, match="gradient_clipping is 0.0 on rank 0, 1.0 on rank 1"):
            minispeed.initialize(model=Net(), config={"train_batch_size": 2, "gradient_clipping": float(rank)})

    on_ranks(2, begin)


# ---- what goes wrong without a word elsewhere


class Plain(nn.Module):
    def __init__(self, inner=4, outer=6):
        super().__init__()
        self.one, self.two = nn.Linear(inner, outer, bias=False), nn.Linear(outer, 4, bias=False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x))).square().mean()


def test_a_checkpoint_of_another_shape_model_or_optimizer_is_refused(tmp_path):
    engine = start(1, model=Plain().double())
    engine.backward(engine(torch.ones(2, 4).double()))
    engine.step()
    engine.save_checkpoint(tmp_path, tag=5)
    turned = Plain()
    turned.one.weight = nn.Parameter(turned.one.weight.detach().reshape(4, 6))
    with pytest.raises(UserError, match=r"one.weight has the shape \(6, 4\) in the checkpoint, \(4, 6\) here"):
        start(1, model=turned.double()).load_checkpoint(tmp_path, tag=5)
    fewer = Plain()
    del fewer.two
    with pytest.raises(UserError, match="holds parameters/two.weight, which the module has not.*strict=False"):
        start(1, model=fewer.double()).load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="of AdamW with 1 parameter groups, here is SGD with 1"):
        made(1, model=Plain().double()).load_checkpoint(tmp_path)
    made(1, model=Plain().double()).load_checkpoint(tmp_path, load_optimizer_states=False)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("who", ["module", "inner optimizer"])
def test_whoever_zeroes_gradients_zeroes_all(stage, who):
    def train(rank):
        engine, fresh = start(stage), start(stage)
        engine.backward(engine(rows(2, 1, 0)[0, rank]))
        (engine.module if who == "module" else engine.optimizer.optimizer).zero_grad()
        for each in (engine, fresh):
            each.backward(each(rows(2, 1, 1)[0, rank]))
            each.step()
        return close(whole(engine), whole(fresh), most=0)

    assert on_ranks(2, train) == [True] * 2


def test_a_copy_of_the_module_zeroes_its_own_gradients():
    engine = start(0)
    twin = copy.deepcopy(engine.module)
    twin(rows(1, 1, 0)[0, 0]).backward()
    engine.backward(engine(rows(1, 1, 0)[0, 0]))
    twin.zero_grad()
    assert all(p.grad is None for p in twin.parameters())
    engine.step()
    assert fragments.safe_get_full_fp32_param(engine.module.scale) != 1.0


def test_a_model_has_one_engine():
    engine = start(2)
    for model in (engine.module, nn.Sequential(engine.module.layers, nn.Linear(4, 4).double())):
        with pytest.raises(UserError, match="belongs to an engine already.*destroy"):
            start(2, model=model)
    with pytest.raises(UserError, match="DeepSpeedEngine for a model"):
        start(2, model=engine)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_put_in_a_parameters_place_is_trained_on(stage, dtype):
    def train(rank):
        half = {"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}
        engine, other = (start(stage, model=Net().to(dtype if not half else torch.float32), **half) for _ in range(2))
        for p in engine.module.parameters():
            p.data = p.data.clamp(-0.1, 0.1)
        with minispeed.zero.GatheredParameters(other.module, modifier_rank=0), torch.no_grad():
            for p in other.module.parameters():
                p.clamp_(-0.1, 0.1)
        for each in (engine, other):
            for index in range(2):
                each.backward(each(rows(2, 1, index)[0, rank].to(dtype)))
                each.step()
        return close(whole(engine), whole(other), most=0)

    assert on_ranks(2, train) == [True] * 2


def test_a_cast_after_initialize_is_named():
    engine = start(0, model=Net())
    engine.module.double()
    with pytest.raises(UserError, match="is .* of torch.float64 now, and was .* of torch.float32"):
        engine.backward(engine(torch.ones(2, 4).double()))


class Lamb(torch.optim.Optimizer):
    """Looks at whole parameters."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * p.norm())


def test_an_optimizer_that_may_look_at_whole_parameters_is_refused_on_pieces():
    with pytest.raises(UserError, match="Lamb at ZeRO stage 2.*zero_allow_untested_optimizer"):
        minispeed.initialize(model=(net := Net()), optimizer=Lamb(net.parameters()), config=config_of(2, 1, 0.0))
    for config in (config_of(0, 1, 0.0), config_of(2, 1, 0.0, zero_allow_untested_optimizer=True)):
        net = Net()
        minispeed.initialize(model=net, optimizer=Lamb(net.parameters()), config=config)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_boundary_that_is_told_after_the_backward_counts(stage):
    def train(rank):
        engine, other = start(stage, 2), start(stage, 2)
        for micro, x in enumerate(rows(2, 2, 0)[:, rank]):
            engine.set_gradient_accumulation_boundary(False)
            engine.backward(engine(x))
            engine.set_gradient_accumulation_boundary(micro == 1)
            engine.step()
            other.backward(other(x))
            other.step()
        return close(whole(engine), whole(other))

    assert on_ranks(2, train) == [True] * 2


@pytest.mark.parametrize("stage", [0, 3])
def test_a_whole_step_inside_gathered_parameters(stage):
    """DeepSpeed-Chat generates inside it; afterwards stage 3 releases again."""

    def train(rank):
        engine, other = start(stage), start(stage)
        with minispeed.zero.GatheredParameters(engine.module.parameters()):
            first = engine(rows(2, 1, 0)[0, rank])
            engine.backward(first)
            engine.step()
            second = engine(rows(2, 1, 1)[0, rank]).item()
        step(other, rank, 2, 0)
        assert second == other(rows(2, 1, 1)[0, rank]).item()
        assert all(unit.is_released == (stage == 3) for unit in engine.core.sharded.units if unit.num_elements)
        return close(whole(engine), whole(other), most=0)

    assert on_ranks(2, train) == [True] * 2


def test_dtypes_that_one_buffer_cannot_hold_are_named():
    for odd in (torch.tensor([1 + 2j]), torch.tensor([7])):
        model = Net()
        model.odd = nn.Parameter(odd, requires_grad=odd.is_complex())
        with pytest.raises(UserError, match="odd is of torch.(complex64|int64)"):
            start(0, model=model)
    model = Net()
    model.layers[0].double()
    with pytest.raises(UserError, match="fp64 and of fp32"):
        start(0, model=model)


def test_client_states_of_alike_names_do_not_meet(tmp_path):
    engine = start(0)
    given = {"ema.weight": torch.tensor(1.0), "ema": {"weight": torch.tensor(2.0)}, 1: torch.tensor(3), "1": "x"}
    engine.save_checkpoint(tmp_path, client_state={**given, "p": engine.module.scale, "again": engine.module.scale})
    client = engine.load_checkpoint(tmp_path)[1]
    assert (client["ema.weight"], client["ema"]["weight"], client[1], client["1"]) == (1.0, 2.0, 3, "x")
    assert client["p"] == client["again"] == engine.module.scale


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_sparse_gradients_are_made_dense(stage):
    class Sparse(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.embed = nn.Embedding(5, 4, sparse=sparse)
            fill(self, 0)

        def forward(self, x):
            return self.embed(x).square().mean()

    def train(rank):
        engines = [start(stage, model=Sparse(sparse).double()) for sparse in (True, False)]
        for engine in engines:
            engine.backward(engine(torch.tensor([rank, 1])))
            engine.step()
        return close(*map(whole, engines), most=0)

    assert on_ranks(2, train) == [True] * 2


@pytest.mark.parametrize("wrong", [None, 1.0, (torch.ones(()), torch.ones(()))])
def test_a_backward_of_no_loss_is_a_sentence(wrong):
    with pytest.raises(UserError, match=f"got {type(wrong).__name__}, not a loss"):
        start(0).backward(wrong)


def test_groups_are_given_at_the_start():
    with pytest.raises(UserError, match="parameter group after initialize"):
        start(1).optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(UserError, match="str for an optimizer"):
        minispeed.initialize(model=Net(), optimizer="adam", config={"train_batch_size": 1})


def test_released_parameters_answer_harmless_questions():
    engine = start(3)
    p = engine.module.layers[0].weight
    assert p.grad_fn is None and not p.is_cuda and p.is_contiguous() and torch.numel(p) == 32 and p.itemsize == 8
    assert torch.is_floating_point(p) and p.get_device() == -1 and p.requires_grad_(True) is p
