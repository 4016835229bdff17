"""A model with all that it takes to talk to it, in a directory: weights, shape, tokenizer, template."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minispeed import checkpoint
from minispeed.chat.template import Template
from minispeed.chat.tokenizer import ChatTokenizer
from minispeed.errors import UserError
from minispeed.model.config import GPTConfig
from minispeed.model.gpt import GPT

WEIGHTS, CONFIG, TOKENIZER, TEMPLATE = "model.safetensors", "config.json", "tokenizer.json", "template.json"


@dataclass(frozen=True)
class ChatModel:
    """A model with all that it takes to talk to it."""

    model: GPT
    tokenizer: ChatTokenizer
    template: Template

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
        cls, directory: Path, *, attention: str = "fused", device: torch.device = torch.device("cpu")
    ) -> "ChatModel":
        """Read what `save` wrote, to run on a device with the attention of that name.

        Raises  UserError naming the file that is missing, damaged or disagrees with the configuration
        """
        if not directory.is_dir():
            raise UserError(f"there is no directory {directory}", fix="the --out of a finished `minispeed sft`")
        for name in (TOKENIZER, TEMPLATE, WEIGHTS):
            if not (directory / name).exists():
                raise UserError(f"{directory} holds no {name}", fix="the --out of a finished `minispeed sft`")
        config = cls.read_config(directory)
        kept = 0.0 if attention == "fused" else config.attention_dropout  # that kernel does not show its weights
        config = replace(config, attention=attention, attention_dropout=kept)
        try:
            weights = load_file(directory / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{directory / WEIGHTS} cannot be read: {error}", fix="another run") from error
        tokenizer = ChatTokenizer.load(directory / TOKENIZER)
        check_vocabulary(config, tokenizer, directory)
        model = GPT(config)
        model.to(next(iter(weights.values())).dtype)
        for name, p in model.named_parameters():
            found = tuple(weights[name].shape) if name in weights else "nothing"
            if found != tuple(p.shape):
                raise UserError(f"{directory / WEIGHTS}: {name} should be {tuple(p.shape)}, found {found}")
            p.data.copy_(weights[name])
        return cls(model.to(device).eval(), tokenizer, Template.load(directory / TEMPLATE))

    @staticmethod
    def read_config(directory: Path) -> GPTConfig:
        """Read the model's shape.  Raises UserError where the directory holds no model of ours"""
        try:
            return GPTConfig.from_dict(json.loads((directory / CONFIG).read_text()))
        except FileNotFoundError:
            raise UserError(f"{directory} holds no {CONFIG}", fix="the --out of a finished `minispeed sft`") from None
        except (OSError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{directory / CONFIG} is not a model's configuration: {error}") from error


def check_vocabulary(config: GPTConfig, tokenizer: ChatTokenizer, directory: Path) -> None:
    """Raise UserError if the tokenizer has ids that the model has no row for."""
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.size} tokens, the model in {directory} has {config.vocab_size} rows",
            fix="the tokenizer that the model was trained with",
        )
