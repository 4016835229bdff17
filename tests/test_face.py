"""DeepSpeed's names resolve: as imports, as attributes, from the table alone, and without torch until one is used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import minispeed

ROOT = Path(__file__).parents[1]
FACE = ROOT / "minispeed" / "face"

FRAGMENTS = " ".join(
    f"safe_{verb}_{part}_{what}"
    for verb in ("get", "set")
    for part in ("full", "local")
    for what in ("fp32_param", "grad", "optimizer_state")
)
LAYERS = "LayerSpec PipelineModule TiedLayerSpec"
CHECKPOINTING = "checkpoint configure is_configured non_reentrant_checkpoint reset"
ZERO = "GatheredParameters Init register_external_parameter unregister_external_parameter"
NAMES = {  # what scripts import, by the part of DeepSpeed that they import it from
    "": "DeepSpeedConfig DeepSpeedConfigError DeepSpeedEngine OnDevice PipelineEngine PipelineModule "
    "RepeatingLoader __version__ accelerator "
    "add_config_arguments add_tuning_arguments checkpointing comm get_accelerator init_distributed initialize launch "
    "log_dist logger ops pipe runtime utils zero",
    "accelerator": "get_accelerator",
    "checkpointing": CHECKPOINTING,
    "comm": "P2POp ReduceOp all_gather all_gather_into_tensor all_gather_object all_reduce all_to_all "
    "all_to_all_single barrier batch_isend_irecv broadcast broadcast_object_list destroy_process_group gather "
    "get_all_ranks_from_group get_global_rank get_local_rank get_rank get_world_group get_world_size "
    "init_distributed irecv is_available is_initialized isend log_summary new_group recv reduce reduce_scatter "
    "reduce_scatter_tensor scatter send",
    "ops": "adam",
    "ops.adam": "DeepSpeedCPUAdam FusedAdam",
    "pipe": LAYERS,
    "runtime": "activation_checkpointing config dataloader engine lr_schedules pipe utils zero",
    "runtime.activation_checkpointing": "checkpointing",
    "runtime.activation_checkpointing.checkpointing": CHECKPOINTING,
    "runtime.config": "DeepSpeedConfig DeepSpeedConfigError",
    "runtime.dataloader": "RepeatingLoader",
    "runtime.engine": "DeepSpeedEngine",
    "runtime.lr_schedules": "LRRangeTest OneCycle VALID_LR_SCHEDULES WarmupCosineLR WarmupDecayLR WarmupLR "
    "add_tuning_arguments",
    "runtime.pipe": f"{LAYERS} ProcessTopology engine module topology",
    "runtime.pipe.engine": "PipelineEngine",
    "runtime.pipe.module": f"{LAYERS} PipelineError",
    "runtime.pipe.topology": "PipeDataParallelTopology PipeModelDataParallelTopology ProcessTopology",
    "runtime.utils": "see_memory_usage set_random_seed",
    "runtime.zero": ZERO,
    "runtime.zero.partition_parameters": ZERO,
    "utils": f"OnDevice RepeatingLoader log_dist logger logging timer zero_to_fp32 {FRAGMENTS}",
    "utils.logging": "log_dist logger print_dist",
    "utils.timer": "SynchronizedWallClockTimer ThroughputTimer",
    "utils.zero_to_fp32": "convert_zero_checkpoint_to_fp32_state_dict convert_zero_checkpoint_to_state_dict "
    "get_fp32_state_dict_from_zero_checkpoint load_state_dict_from_zero_checkpoint",
    "zero": ZERO,
}
FACES = sorted(FACE.rglob("*.py"))


def full(part):
    return f"minispeed.{part}" if part else "minispeed"


@pytest.mark.parametrize(("part", "name"), [(part, name) for part in NAMES for name in NAMES[part].split()])
def test_every_name_is_found_by_import_and_as_an_attribute(part, name):
    module = importlib.import_module(full(part))
    by_import = getattr(module, name)
    by_attributes = minispeed
    for word in [*part.split("."), name] if part else [name]:
        by_attributes = getattr(by_attributes, word)
    assert by_import is by_attributes
    assert name in dir(module) or part == "zero"


def test_a_name_is_one_thing_wherever_it_stands():
    homes = {}
    for part, names in NAMES.items():
        for name in names.split():
            found = getattr(importlib.import_module(full(part)), name)
            if not isinstance(found, type(importlib)):  # `zero` and `checkpointing` are modules in two places
                assert homes.setdefault(name, found) is found


def test_the_face_offers_what_the_table_says():
    parts = {".".join(path.relative_to(FACE).with_suffix("").parts).removesuffix(".__init__") for path in FACES}
    assert parts == {*NAMES, "__init__"} - {"", "zero"}
    for part in NAMES:
        module = importlib.import_module(full(part))
        if "__getattr__" not in vars(module):
            assert set(module.__all__) == set(NAMES[part].split())


@pytest.mark.parametrize("path", FACES, ids=lambda path: str(path.relative_to(FACE)))
def test_the_face_is_names_only(path):
    """A docstring, imports, tables, and what a script begins with: nothing that does anything."""
    allowed = (ast.Import, ast.ImportFrom, ast.Assign)
    begins = "if __name__ == '__main__':\n    sys.exit(main())"
    docstring, *rest = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    assert all(isinstance(node, allowed) or ast.unparse(node) == begins for node in rest)


def test_no_name_of_the_face_is_hidden_by_a_room():
    faces = {path.stem for path in FACE.iterdir() if path.stem not in ("__init__", "__pycache__")}
    rooms = {path.stem for path in FACE.parent.iterdir()} - {"__init__", "__pycache__"}
    assert len(faces) >= 6 and not faces & rooms


def test_asking_for_a_name_is_what_imports_torch():
    program = (
        "import sys, minispeed; names = dir(minispeed); print('torch' in sys.modules, 'comm' in names);"
        "import minispeed.ops; minispeed.runtime; print('torch' in sys.modules);"
        "minispeed.comm; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "False", "True"], done.stderr


@pytest.mark.parametrize("module", ["", "utils", "runtime.engine", "zero"])
def test_what_is_nowhere_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        importlib.import_module(full(module)).nothing  # noqa: B018
