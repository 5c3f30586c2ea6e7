"""Built-in shapes, and shapes read from workload files of DLIO and mlpstorage."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlstor.checkpoint import models
from mlstor.checkpoint.layout import Layout
from mlstor.checkpoint.workload_file import from_workload_yaml
from mlstor.errors import UsageError

LLAMA3_8B = """
model:
  name: llama_8b
  type: transformer
  num_layers: 32
  model_datatype: fp16
  optimizer_datatype: fp32
  parallelism:
    pipeline: 1
    tensor: 1
    zero_stage: 3
  transformer:
    vocab_size: 128256
    hidden_size: 4096
    ffn_hidden_size: 14336
    num_attention_heads: 32
    num_kv_heads: 8

framework: pytorch

workflow:
  generate_data: False
  train: False
  checkpoint: True

checkpoint:
  checkpoint_folder: checkpoints/llama_8b
  time_between_checkpoints: 5
  num_checkpoints_write: 10
  num_checkpoints_read: 10
  fsync: True
"""

LISTED_TENSORS = """
model:
  name: megatron_deepspeed
  type: megatron_deepspeed
  optimization_groups: [1009254400, 865075200, 793600]
  num_layers: 40
  parallelism: {pipeline: 8, tensor: 4, zero_stage: 1}
  layer_parameters: [52583936, 209715200]
framework: pytorch
"""


@pytest.fixture
def workload(tmp_path: Path):
    def write(text: str, name: str = "custom.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "nparameters"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 69_882_617_856),
        ("llama3-405b", 405_853_388_800),
        ("llama3-1t", 1_183_035_102_480),
    ],
)
def test_llama3_has_the_parameters_that_mlperf_counts(name: str, nparameters: int):
    assert models.get(name).nparameters == nparameters


def _elements(rule: models.FileRule) -> list[int]:
    return [tensor.nelements for tensor in rule.tensors]


@pytest.mark.parametrize(
    ("name", "block", "embedding", "norm", "optimizer"),
    [
        (
            "llama3-405b",
            [16384, 37748736, 33554432, 16384, 218103808, 109051904],
            262668288,
            16384,
            792682400,
        ),
        (
            "llama3-1t",
            [25872, 111404832, 83670048, 25872, 635830272, 317915136],
            414779904,
            25872,
            1155307717,
        ),
    ],
)
def test_layer_files_hold_the_tensors_of_the_worked_example(name, block, embedding, norm, optimizer):
    shape = models.get(name)
    first = shape.role_files(shape.dp, 0, True)
    last = shape.role_files(shape.dp, shape.pp - 1, True)
    assert _elements(first[0]) == [embedding]
    assert _elements(first[1]) == block
    assert _elements(last[-3]) == [embedding]
    assert _elements(last[-2]) == [norm]
    assert _elements(last[-1])[::2] == [optimizer] * 3


@pytest.mark.parametrize(
    ("name", "block", "embedding", "norm", "ntensors", "optimizer"),
    [
        ("llama3-8b", [512, 3145728, 2097152, 512, 14680064, 7340032], 65667072, 512, 195, 1003782656),
        ("llama3-70b", [1024, 1179648, 1048576, 1024, 7340032, 3670016], 16416768, 1024, 483, 1091915904),
    ],
)
def test_zero3_files_hold_the_tensors_of_the_worked_example(name, block, embedding, norm, ntensors, optimizer):
    shape = models.get(name)
    model_file, optimizer_file = shape.role_files(shape.dp, 0, True)
    elements = _elements(model_file)
    assert len(elements) == ntensors
    assert elements[0] == elements[-2] == embedding
    assert elements[1:7] == elements[-8:-2] == block
    assert elements[-1] == norm
    assert _elements(optimizer_file)[::2] == [optimizer] * 3


@pytest.mark.parametrize(
    ("size", "parameters_1e9", "fp16_gb", "lean_gb", "full_gb", "full_gb_per_rank_at_8", "at_64"),
    [
        ("125m", 0.126, 0.25, 1.3, 1.8, 0.22, 0.03),
        ("350m", 0.357, 0.71, 3.6, 5.0, 0.62, 0.08),
        ("760m", 0.762, 1.52, 7.6, 10.7, 1.33, 0.17),
        ("1.3b", 1.318, 2.64, 13.2, 18.4, 2.31, 0.29),
        ("2.7b", 2.654, 5.31, 26.5, 37.2, 4.64, 0.58),
        ("6.7b", 6.662, 13.32, 66.6, 93.3, 11.66, 1.46),
        ("13b", 12.858, 25.72, 128.6, 180.0, 22.50, 2.81),
        ("30b", 29.981, 59.96, 299.8, 419.7, 52.47, 6.56),
        ("66b", 65.728, 131.46, 657.3, 920.2, 115.02, 14.38),
        ("175b", 174.616, 349.23, 1746.2, 2444.6, 305.58, 38.20),
    ],
)
def test_opt_table(size, parameters_1e9, fp16_gb, lean_gb, full_gb, full_gb_per_rank_at_8, at_64):
    def gigabytes(state: str) -> float:
        return Layout(models.get(f"opt-{size}-{state}")).total_nbytes / 1e9

    assert models.get(f"opt-{size}-full").nparameters / 1e9 == pytest.approx(parameters_1e9, abs=0.0006)
    assert gigabytes("fp16") == pytest.approx(fp16_gb, abs=0.0051)
    assert gigabytes("lean") == pytest.approx(lean_gb, abs=0.051)
    assert gigabytes("full") == pytest.approx(full_gb, abs=0.051)
    full = models.get(f"opt-{size}-full")
    assert Layout(full).rank_nbytes(0) / 1e9 == pytest.approx(full_gb_per_rank_at_8, abs=0.0051)
    assert Layout(full, ranks=64).rank_nbytes(63) / 1e9 == pytest.approx(at_64, abs=0.0051)


def test_unknown_model_is_answered_with_the_closest_names_and_all_of_them():
    with pytest.raises(UsageError) as caught:
        models.get("llama3-71b")
    message = str(caught.value)
    assert "did you mean llama3-70b" in message
    for name in ("llama3-8b", "llama3-405b", "llama3-1t", "175b", "--workload"):
        assert name in message


def test_model_without_its_state_is_answered_with_the_three_states():
    with pytest.raises(UsageError, match="opt-13b-fp16 or opt-13b-lean or opt-13b-full"):
        models.get("opt-13b")


def test_workload_file_gives_the_built_in_shape(workload):
    read = from_workload_yaml(workload(LLAMA3_8B))
    assert read.name == "llama_8b"
    assert read.nranks == 1
    ours, theirs = Layout(models.get("llama3-8b")), Layout(read, ranks=8)
    assert [list(ours.files(r)) for r in range(8)] == [list(theirs.files(r)) for r in range(8)]


def test_workload_file_may_name_data_parallelism_and_older_places_of_data_types(workload):
    text = LLAMA3_8B.replace("    tensor: 1\n", "    tensor: 1\n    data: 8\n")
    text = text.replace("  model_datatype: fp16\n  optimizer_datatype: fp32\n", "")
    text += "  model_datatype: fp32\n  optimizer_datatype: bf16\n"
    layout = Layout(from_workload_yaml(workload(text)))
    assert layout.nranks == 8
    assert [file.nbytes for file in layout.files(0)] == [2 * 2_007_565_312, 12_045_637_632 // 2]


def test_listed_tensors_are_bytes_and_replace_the_architecture(workload):
    layout = Layout(from_workload_yaml(workload(LISTED_TENSORS)))
    assert layout.nranks == 32
    groups = 1009254400 + 865075200 + 793600
    layer = 52583936 // 4 + 209715200 // 4
    assert [(file.name, file.nbytes) for file in layout.files(5)] == [
        ("model_states-5.pt", 10240),
        *((f"layer_{i}-model_5_model_states.pt", layer) for i in range(6, 11)),
        ("zero_pp_rank_0_mp_rank_5_optim_states.pt", 3 * groups),
    ]


@pytest.mark.parametrize(
    ("zero_stage", "names_of_rank_0", "names_of_rank_1"),
    [
        (0, ["zero_pp_rank_0_mp_rank_0_model_states.pt", "zero_pp_rank_0_mp_rank_0_optim_states.pt"], []),
        (
            1,
            ["model_0_model_states.pt", "zero_pp_rank_0_mp_rank_0_optim_states.pt"],
            ["zero_pp_rank_1_mp_rank_0_optim_states.pt"],
        ),
        (
            2,
            ["model_0_model_states.pt", "zero_pp_rank_0_mp_rank_0_optim_states.pt"],
            ["zero_pp_rank_1_mp_rank_0_optim_states.pt"],
        ),
    ],
)
def test_each_zero_stage_names_its_files(workload, zero_stage, names_of_rank_0, names_of_rank_1):
    text = LLAMA3_8B.replace("zero_stage: 3", f"zero_stage: {zero_stage}")
    layout = Layout(from_workload_yaml(workload(text)), ranks=2)
    assert [file.name for file in layout.files(0)] == names_of_rank_0
    assert [file.name for file in layout.files(1)] == names_of_rank_1
    optimizer_shard = 8_030_261_248 // (1 if zero_stage == 0 else 2)
    assert layout.files(0)[-1].nbytes == 3 * 4 * (optimizer_shard + 5 * 4096)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("  num_layers: 32\n", "", "model.num_layers is missing"),
        ("    hidden_size: 4096\n", "", "model.transformer.hidden_size is missing"),
        ("num_layers: 32", "num_layers: many", "'many'; it must be a whole number"),
        ("num_layers: 32", "num_layers: -1", "at least 1"),
        ("num_layers: 32", "num_layers: true", "it must be a whole number"),
        ("tensor: 1", "tensor: 0", "model.parallelism.tensor is 0"),
        ("zero_stage: 3", "zero_stage: 4", "it must be 0, 1, 2 or 3"),
        ("pipeline: 1", "pipeline: 2", "does not go with pipeline parallelism"),
        ("model_datatype: fp16", "model_datatype: fp12", "it must be one of int8"),
        ("framework: pytorch", "framework: tensorflow", "only the files of pytorch"),
        ("name: llama_8b", "name: ../up", "may not hold a /"),
        ("  type: transformer\n", "  layer_parameters: 3\n", "must be a list"),
        ("model:", "modell:", "model is missing"),
        ("  transformer:\n", "  transformer: 3\n  other:\n", "model.transformer is not a YAML mapping"),
    ],
)
def test_broken_workload_file_is_refused_with_its_key(workload, old, new, complaint):
    assert old in LLAMA3_8B
    path = workload(LLAMA3_8B.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        from_workload_yaml(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_too_few_layers_for_the_pipeline_are_refused(workload):
    with pytest.raises(UsageError, match="40 layers can't fill 41 pipeline stages"):
        from_workload_yaml(workload(LISTED_TENSORS.replace("pipeline: 8", "pipeline: 41")))


@pytest.mark.parametrize("text", ["a: [1\n", "\tkey: 1", "{{{", "\x00"])
def test_file_that_is_not_yaml_is_refused(workload, text):
    with pytest.raises(UsageError, match="is not YAML"):
        from_workload_yaml(workload(text))


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(UsageError, match="is not YAML"):
        from_workload_yaml(path)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n"])
def test_yaml_that_is_no_mapping_is_refused(workload, text):
    with pytest.raises(UsageError, match="is not a YAML mapping"):
        from_workload_yaml(workload(text))


def test_missing_file_and_directory_are_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        from_workload_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match="Is a directory"):
        from_workload_yaml(tmp_path)
