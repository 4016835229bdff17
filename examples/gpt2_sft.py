"""Fine-tune HuggingFace's GPT-2 on questions and answers: a model of somebody else's, under any ZeRO stage.

    python examples/gpt2_sft.py --stage 2
    torchrun --nproc-per-node 2 examples/gpt2_sft.py --stage 3

The model is small and its weights are random, so nothing is fetched; the letters' codes are the tokens. Only the answer
is supervised. All answers are equally long: so the mean over one rank's answers, which the model returns, is of as many
tokens as any other rank's, and the mean over ranks is the mean over all.
"""

import minispeed as deepspeed  # the only line to change

# isort: split
import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel

END = 0
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Korea": "Seoul",
    "India": "Delhi", "Bulgaria": "Sofia", "Belarus": "Minsk", "Vietnam": "Hanoi",
    "Ecuador": "Quito", "Morocco": "Rabat", "Tunisia": "Tunis", "Ghana": "Accra",
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--stage", type=int, default=2, choices=[0, 1, 2, 3], help="of ZeRO")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def make_config(stage: int, bf16: bool) -> dict[str, object]:
    return {
        "train_batch_size": len(CAPITALS),
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def tokenize() -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels, (number of questions, tokens of the longest) each; unsupervised labels are -100."""
    rows = [(f"What is the capital of {land}? ", city + chr(END)) for land, city in CAPITALS.items()]
    width = max(len(question + answer) for question, answer in rows)
    tokens, labels = torch.full((len(rows), width), END), torch.full((len(rows), width), -100)
    for row, (question, answer) in enumerate(rows):
        whole = torch.tensor([ord(letter) for letter in question + answer])
        tokens[row, : len(whole)] = whole
        labels[row, len(question) : len(whole)] = whole[len(question) :]
    return tokens, labels


def make_model() -> GPT2LMHeadModel:
    shape = dict(vocab_size=128, n_positions=64, n_embd=48, n_layer=2, n_head=4)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(GPT2Config(**shape, **dropout, use_cache=False, bos_token_id=END, eos_token_id=END))
    model.gradient_checkpointing_enable()
    return model


def mean_over_ranks(value: torch.Tensor) -> float:
    value = value.detach().clone()
    deepspeed.comm.all_reduce(value)
    return value.item() / deepspeed.comm.get_world_size()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)  # every rank begins with the same weights
    model = make_model()
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=make_config(args.stage, args.bf16)
    )
    mine = slice(deepspeed.comm.get_rank(), None, deepspeed.comm.get_world_size())
    tokens, labels = (x[mine].to(engine.device) for x in tokenize())
    micro = engine.train_micro_batch_size_per_gpu()
    for step in range(args.steps):
        total = torch.zeros((), device=engine.device)
        for some_tokens, some_labels in zip(tokens.split(micro), labels.split(micro)):
            loss = engine(input_ids=some_tokens, labels=some_labels).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach() / engine.gradient_accumulation_steps()
        loss = mean_over_ranks(total)
        if (step + 1) % 4 == 0 and deepspeed.comm.get_rank() == 0:
            print(f"step {step + 1}: loss {loss:.6f}", flush=True)


if __name__ == "__main__":
    main()
