"""A model with all that it takes to talk to it, in a directory: weights, shape, tokenizer, template.

The directory is a run of ours, or a checkpoint in HuggingFace's form. Such a one keeps the chat template that it came
with; without one it is given ours, whose six tokens take rows of the embedding that start as the mean of all others.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minispeed import checkpoint
from minispeed.chat.template import ChatTemplate
from minispeed.chat.templates import SAVED as TEMPLATE, choose_template
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.errors import UserError
from minispeed.model import hf
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT
from minispeed.snapshot import Source

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


@dataclass(frozen=True)
class ChatModel:
    """A model with all that it takes to talk to it.

    notes   lines on what was changed to make it one
    source  what its weights are still to be read from, where the model is hollow
    """

    model: GPT
    tokenizer: ChatTokenizer
    template: ChatTemplate
    notes: tuple[str, ...] = ()
    source: Source | None = None

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write model, configuration, tokenizer and template; each file is replaced in one move.

        weights  of the model, whole, by name; its own when absent
        """
        weights = {
            name: p.detach().contiguous() for name, p in (weights or dict(self.model.named_parameters())).items()
        }
        config = json.dumps(self.model.config.to_dict(), indent=1) + "\n"
        checkpoint.write_whole(directory / TOKENIZER, self.tokenizer.save)
        checkpoint.write_whole(directory / TEMPLATE, self.template.save)
        checkpoint.write_whole(directory / CONFIG, lambda path: path.write_text(config))
        checkpoint.write_whole(directory / WEIGHTS, lambda path: save_file(weights, path))

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        attention: str = "fused",
        device: torch.device = torch.device("cpu"),
        template: ChatTemplate | None = None,
        hollow_on: torch.device | None = None,
    ) -> "ChatModel":
        """Read what `save` wrote, or a HuggingFace checkpoint, to run on a device with the attention of that name.

        template   to use in place of the directory's; the tokens that it needs are added to those of the tokenizer
        hollow_on  to be trained on this device: the weights of a HuggingFace checkpoint stay where they are, for each
                   rank to read its own slices of, unless rows must be added to them
        Raises     UserError naming the file that is missing, damaged or disagrees with the configuration
        """
        if not directory.is_dir():
            raise UserError(f"there is no directory {directory}", fix="the --out of a finished `minispeed sft`")
        is_hf = hf.is_hf(directory)
        if not is_hf:
            _check_files(directory)
        template = (template or choose_template("auto", directory)).dated()
        tokenizer = ChatTokenizer.load(directory / TOKENIZER, template.tokens)
        check_vocabulary(cls.read_config(directory), tokenizer, directory)
        if is_hf and hollow_on is not None and not tokenizer.lacked:
            source = hf.HFSource(directory, hf.read_config(directory, attention=attention))
            return cls(GPT(source.config, hollow_on=hollow_on), tokenizer, template, source=source)
        model = hf.load(directory, attention=attention) if is_hf else _load_run(directory, attention)
        notes = grow(model, tokenizer.size - tokenizer.lacked, tokenizer.size) if tokenizer.lacked else ()
        return cls(model.to(device).eval(), tokenizer, template, notes)

    @staticmethod
    def read_config(directory: Path) -> GPTConfig:
        """Read the model's shape.  Raises UserError where the directory holds no model"""
        if hf.is_hf(directory):
            return hf.read_config(directory)
        try:
            return GPTConfig.from_dict(json.loads((directory / CONFIG).read_text()))
        except FileNotFoundError:
            raise UserError(f"{directory} holds no {CONFIG}", fix="the --out of a finished `minispeed sft`") from None
        except (OSError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{directory / CONFIG} is not a model's configuration: {error}") from error


def check_vocabulary(config: GPTConfig, tokenizer: ChatTokenizer, directory: Path) -> None:
    """Raise UserError if the tokenizer came with ids that the model has no row for."""
    size = tokenizer.size - tokenizer.lacked
    if size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {size} tokens, the model in {directory} has {config.vocab_size} rows",
            fix="the tokenizer that the model was trained with",
        )


@torch.no_grad()
def grow(model: GPT, known: int, size: int) -> tuple[str, ...]:
    """Give a model rows for `size` tokens, of which it has learnt the first `known`; return lines that say so.

    Writes  embedding and head, (V, D): rows known ... size are the mean of the rows before, so that none of the new
            tokens stands out before anything is learnt.  https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """
    rows = max(size, model.config.vocab_size)
    grown = {layer: _grown(layer.weight, known, size, rows) for layer in (model.embed.tokens, model.head)}
    model.embed.tokens.weight, model.embed.tokens.num_embeddings = grown[model.embed.tokens], rows
    model.head.weight, model.head.out_features = grown[model.head], rows
    if model.config.tied:
        model.head.weight = model.embed.tokens.weight
    more = f", for which embedding and head have {rows - model.config.vocab_size} rows more"
    more = more if rows > model.config.vocab_size else ", in rows that the model had to spare"
    model.config = replace(model.config, vocab_size=rows)
    return (f"the tokenizer was given {size - known} tokens of our template{more}: each is the mean of the others",)


def _grown(table: Tensor, known: int, size: int, rows: int) -> nn.Parameter:
    """Return a table of that many rows.  (V, D) -> (rows, D)"""
    new = table.new_zeros(rows, table.shape[1])
    new[: len(table)] = table
    new[known:size] = table[:known].mean(0, dtype=torch.promote_types(table.dtype, torch.float32)).to(table.dtype)
    return nn.Parameter(new)


def _check_files(directory: Path) -> None:
    for name in (TOKENIZER, TEMPLATE, WEIGHTS):
        if not (directory / name).exists():
            raise UserError(f"{directory} holds no {name}", fix="the --out of a finished `minispeed sft`")


def _load_run(directory: Path, attention: str) -> GPT:
    """Read the model of a run of ours."""
    config = ChatModel.read_config(directory)
    kept = 0.0 if attention == "fused" else config.attention_dropout  # that kernel does not show its weights
    config = replace(config, attention=attention, attention_dropout=kept)
    try:
        weights = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory / WEIGHTS} cannot be read: {error}", fix="another run") from error
    model = GPT(config)
    model.to(next(iter(weights.values())).dtype)
    for name, p in model.named_parameters():
        found = tuple(weights[name].shape) if name in weights else "nothing"
        if found != tuple(p.shape):
            raise UserError(f"{directory / WEIGHTS}: {name} should be {tuple(p.shape)}, found {found}")
        p.data.copy_(weights[name])
    return model
