"""Open what a run begins with: a model, new or somebody's, and its data, tokenised.

A checkpoint's weights are not read here: the model is built hollow, and each rank reads its own slices of them into
what it keeps, once the ranks have shared it out (`ChatModel.source`).
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minispeed.chat.chat_model import ChatModel, check_vocabulary
from minispeed.chat.defaults import DEFAULT_SEQ
from minispeed.chat.prepare import prepare
from minispeed.chat.prepared import Prepared
from minispeed.chat.sft_options import SftOptions
from minispeed.chat.sources import check_files, check_prepared
from minispeed.chat.templates import choose_template
from minispeed.errors import UserError
from minispeed.model import hf
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.model.lora import LoRA, add_lora
from minispeed.model.presets import preset

CPU = torch.device("cpu")


def open_model_and_data(options: SftOptions, device: torch.device = CPU) -> tuple[ChatModel, Prepared, bool]:
    """Tokenise the data (or find it tokenised) and build or load the model; the last says whether it is new.

    Raises  UserError if the data cannot be read, or tokenizer, model and row length do not go together
    """
    directory = model_folder(options)
    check_size(options, directory)
    if options.resume:
        check_files(options.out, options)
    check_length(options, preset(options.model) if directory is None else ChatModel.read_config(directory))
    prepared = prepare(
        options.data,
        options.eval_data,
        cache_folder(options),
        tokenizer=options.tokenizer if directory is None else directory / "tokenizer.json",
        vocab_size=options.vocab_size,
        train_on=options.train_on,
        seq=options.seq or DEFAULT_SEQ,
        skip_bad=options.skip_bad,
        workers=2,
        template=choose_template(options.template, directory),
    )
    if options.resume:
        check_prepared(options.out, prepared)
    chat = new_model(options, prepared) if directory is None else old_model(options, prepared, directory, device)
    lora = lora_of(options)
    chat = chat if lora is None else with_adapters(chat, lora, options.seed)
    chat.model.to(device)
    return chat, prepared, directory is None


def model_folder(options: SftOptions) -> Path | None:
    """Return the folder of the model to go on with, downloaded if it is a hub's; None for a preset, a new model."""
    if Path(options.model).is_dir() or "/" in options.model:
        return hf.resolve(options.model)
    return None


def new_model(options: SftOptions, prepared: Prepared) -> ChatModel:
    """Build a preset, for the vocabulary of its data."""
    deep = {"deep": options.deep, "deep_dilation": options.deep_dilation, "deep_period": options.deep_period}
    how: dict[str, Any] = {"attention": options.attention, "dropout": options.dropout or 0.0, **deep}
    config = preset(options.model, vocab_size=prepared.tokenizer.size, **how)
    if config.positions == "rotary":  # it reads as far as it was trained, and says so
        config = replace(config, max_positions=options.seq or min(DEFAULT_SEQ, config.max_positions))
    return ChatModel(GPT(config, seed=options.seed), prepared.tokenizer, prepared.template)


def old_model(options: SftOptions, prepared: Prepared, directory: Path, device: torch.device) -> ChatModel:
    """Open a run of ours or a HuggingFace checkpoint, to be trained further."""
    chat = ChatModel.load(directory, attention=options.attention, template=prepared.template, hollow_on=device)
    check_vocabulary(chat.model.config, prepared.tokenizer, directory)
    p = chat.model.config.dropout if options.dropout is None else options.dropout
    chat.model.set_dropout(p, seed=options.seed)
    return chat


def with_adapters(chat: ChatModel, lora: LoRA, seed: int) -> ChatModel:
    """Give a model adapters; they alone are trained, or, where its tokenizer has new tokens, embedding and head too."""
    trained = add_lora(chat.model, lora, seed=seed)
    numbers = sum(chat.model.get_parameter(name).numel() for name in trained)
    notes = [f"LoRA of rank {lora.rank}: {numbers:,} parameters in {len(trained) // 2} adapters"]
    if chat.tokenizer.lacked:
        for layer in (chat.model.embed.tokens, chat.model.head):
            layer.weight.requires_grad_(True)
        notes.append("embedding and head are trained too, whole: the template's tokens are new to the model")
    return replace(chat, notes=(*chat.notes, *notes))


def lora_of(options: Any) -> LoRA | None:
    """Return the adapters that the options ask for; None where they ask for none."""
    if not options.lora_rank:
        return None
    alpha = 2.0 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    how: dict[str, Any] = {"targets": tuple(options.lora_targets)} if options.lora_targets else {}
    return LoRA(rank=options.lora_rank, alpha=alpha, dropout=options.lora_dropout, lr=options.lora_lr, **how)


def check_size(options: SftOptions, directory: Path | None) -> None:
    """Raise UserError if a size is asked for of the tokenizer that came with a model."""
    if directory is not None and options.vocab_size != SftOptions.vocab_size:
        what = f"--vocab-size {options.vocab_size} is for a tokenizer that is learnt, and {directory} has one"
        raise UserError(what, fix="no --vocab-size")


def check_length(options: SftOptions, config: GPTConfig) -> None:
    """Raise UserError if the rows asked for are longer than the model reads; before any data is touched."""
    if options.seq is not None and options.seq > config.max_positions:
        raise UserError(
            f"--seq {options.seq} is longer than the {config.max_positions} positions of {options.model}",
            fix=f"--seq {config.max_positions}",
        )


def cache_folder(options: SftOptions) -> Path:
    """Return the folder that holds this data tokenised this way; `prepare` checks its content."""
    asked: list[Any] = [
        options.data,
        options.eval_data,
        options.tokenizer,
        options.model if options.tokenizer is None else "",
        options.template,
    ]
    asked += [options.vocab_size, options.train_on, options.seq or DEFAULT_SEQ, options.skip_bad]
    name = hashlib.blake2b(repr(asked).encode() + str(Path.cwd()).encode(), digest_size=10).hexdigest()
    return (options.cache or Path.home() / ".cache" / "minispeed") / name
