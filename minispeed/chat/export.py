"""Write a run as a directory that `transformers` loads: its model, tokenizer, chat template, and where to stop.

    OUT/config.json, *.safetensors                    the model, in the first architecture that can hold it
    OUT/tokenizer.json, tokenizer_config.json, ...    the tokenizer, with the chat template in it
    OUT/generation_config.json                        the id that ends an answer: `generate` stops there unasked

Our template goes out as jinja that renders to the same ids; another checkpoint's goes out as it came. One thing differs
over there: `transformers` reads a special token that someone's text spells as that token, unless it is told otherwise
(`sanitize_control_tokens=True`), and here it is always text.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from torch import Tensor

from minispeed import checkpoint
from minispeed.chat.chat_model import TOKENIZER, ChatModel
from minispeed.chat.conversation import ASSISTANT, SYSTEM, USER
from minispeed.chat.jinja import CONFIG, GENERATION, SPECIALS, JinjaTemplate
from minispeed.chat.opening import lora_of
from minispeed.chat.run import RunDirectory
from minispeed.chat.template import ChatTemplate, Template
from minispeed.errors import UserError
from minispeed.model import hf
from minispeed.model.merge import merged
from minispeed.precision import DTYPES
from minispeed.snapshot import MASTERS


class Asked(Protocol):
    """What the command was told: the run, the new directory, and what to write: None is the finished model, as it is.

    checkpoint  "last" or "best": the masters of that checkpoint, in full precision unless `dtype` says otherwise
    """

    @property
    def run(self) -> Path: ...

    @property
    def out(self) -> Path: ...

    @property
    def dtype(self) -> str | None: ...

    @property
    def checkpoint(self) -> str | None: ...


def export(options: Asked) -> int:
    """Do `minispeed export`. Returns the exit code."""
    chat = ChatModel.load(options.run)
    weights = None if options.checkpoint is None else masters_in(options.run, options.checkpoint, chat)
    write_export(chat, options.out, weights, dtype=options.dtype)
    print(f"{options.out} holds the model for transformers: AutoModelForCausalLM.from_pretrained({str(options.out)!r})")
    return 0


def write_export(
    chat: ChatModel, out: Path, weights: Mapping[str, Tensor] | None = None, *, dtype: str | None = None
) -> None:
    """Write the directory, whole or not at all.

    weights  of the model, whole, by name, adapters already merged into them; the model's own when absent
    dtype    "bf16", "fp32", ...; as the weights are, when absent
    Raises   UserError where `out` holds something, or `transformers` has no such model
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is left as it is", fix="another --out")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}", fix=" or ".join(DTYPES))
    weights = weights or {name: p.detach() for name, p in chat.model.named_parameters()}
    stop, pad = chat.template.stop_id(chat.tokenizer), chat.template.pad_id(chat.tokenizer)
    files = files_of(chat)
    bos = chat.tokenizer.added.get(bos_of(chat.template))
    came = json.loads(files.get(GENERATION, "{}"))
    stops = came.get("eos_token_id") or []
    stops = [stop, *(other for other in (stops if isinstance(stops, list) else [stops]) if other != stop)]
    ids = {"bos_token_id": bos, "eos_token_id": stop if len(stops) == 1 else stops, "pad_token_id": pad}
    files[GENERATION] = _json(came | ids)

    def write(aside: Path) -> None:
        hf.save(aside, chat.model.config, weights, dtype=DTYPES[dtype] if dtype else None, extra=ids)
        chat.tokenizer.save(aside / TOKENIZER)
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")

    checkpoint.write_whole(out, write)


def masters_in(run: Path, pointer: str, chat: ChatModel) -> dict[str, Tensor]:
    """Read the masters of the checkpoint that `last` or `best` names.  Raises UserError where a run has none"""
    if not (run / "checkpoints" / pointer).exists():
        raise UserError(f"{run} has no {pointer} checkpoint", fix="no --checkpoint: the finished model")
    stored = RunDirectory(run).load_checkpoint(pointer)
    names = [name.partition("/")[2] for name in stored.shapes if name.startswith(f"{MASTERS}/")]
    found = {name: stored.tensor(f"{MASTERS}/{name}") for name in names}
    weights = {name: tensor for name, tensor in found.items() if tensor is not None}
    if any(".lora." in name for name in weights):
        lora = lora_of(SimpleNamespace(**RunDirectory(run).effective_options("sft")))
        if lora is None:
            what = f"{stored.directory} holds adapters, and {run / 'run.json'} says nothing of them"
            raise UserError(what, fix="no --checkpoint: the finished model")
        weights = merged(weights, lora)
    if lacking := [name for name, _ in chat.model.named_parameters() if name not in weights]:
        raise UserError(f"{stored.directory} holds no {lacking[0]}", fix="the run that wrote it")
    return weights


def files_of(chat: ChatModel) -> dict[str, str]:
    """Return the text files that belong to a template, by name: as they came, or written for ours."""
    template = chat.template
    if isinstance(template, JinjaTemplate):
        return dict(template.files)
    assert isinstance(template, Template)
    roles = [template.system, template.user, template.assistant]
    named = {"bos_token": template.bos, "eos_token": template.end, "pad_token": template.pad}
    specials = {**named, "additional_special_tokens": roles}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": chat.model.config.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": jinja_of(template),
    }
    return {CONFIG: _json(about | specials), SPECIALS: _json(specials)}


def jinja_of(template: Template) -> str:
    """Return our template in jinja's language: what it renders has the ids that `encode_rows` and `prompt` make."""
    opening = {role: getattr(template, role) for role in (SYSTEM, USER, ASSISTANT)}
    return (
        f"{{%- set opening = {json.dumps(opening)} -%}}"
        f"{{{{- {json.dumps(template.bos)} -}}}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] not in opening -%}"
        "{{- raise_exception('there is no role ' + message['role']) -}}"
        "{%- endif -%}"
        f"{{{{- opening[message['role']] + message['content'] + {json.dumps(template.end)} -}}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {json.dumps(template.assistant)} -}}}}{{%- endif -%}}"
    )


def bos_of(template: ChatTemplate) -> str:
    """Return the token that begins a sequence; empty where there is none."""
    if isinstance(template, JinjaTemplate):
        return template.variables.get("bos_token", "")
    assert isinstance(template, Template)
    return template.bos


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
