"""A HuggingFace model trains through the engine unchanged, recomputation included: the run is a plain loop's."""

import pytest
import torch
from test_deepspeed_engine import close, config_of, fill, on_ranks, whole

import minispeed

transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=19, pad_token_id=0, bos_token_id=1, eos_token_id=2)
KINDS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=8, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0,
                                **SIZES)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=1, max_position_embeddings=8, **SIZES)
    ),
}  # fmt: skip


def model_of(kind: str) -> torch.nn.Module:
    model = KINDS[kind]().double().train()
    fill(model, 0)
    return model


def tokens(ranks: int, step: int) -> torch.Tensor:
    return torch.randint(3, 19, (ranks, 2, 6), generator=torch.Generator().manual_seed(step))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # the name that scripts use
@pytest.mark.parametrize("recomputed", ["", "reentrant", "not reentrant"])
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_it_trains_as_in_a_plain_loop(kind, stage, recomputed):
    ranks = 2
    plain = model_of(kind)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        (sum(plain(input_ids=rows, labels=rows).loss for rows in tokens(ranks, step)) / ranks).backward()
        optimizer.step()

    def train(rank):
        model = model_of(kind)
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": recomputed == "reentrant"})
        config = config_of(stage, 1, 0.0, optimizer={"type": "AdamW", "params": {"lr": 0.01}})
        engine, *_ = minispeed.initialize(model=model, config=config)
        for step in range(3):
            rows = tokens(ranks, step)[rank]
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            engine.step()
        return whole(engine)

    expected = {name: p.detach() for name, p in plain.named_parameters()}
    for got in on_ranks(ranks, train):
        assert close(got, expected)
