"""The layout against the worked numbers of MLPerf Storage v3.0, and its rules for other numbers of ranks."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from mlstor.checkpoint import models
from mlstor.checkpoint.deal import deal, parse_ranks
from mlstor.checkpoint.layout import Layout, step_dir
from mlstor.errors import UsageError

# (first rank, last rank, files, bytes per rank)
ROLES = {
    "llama3-8b": [(0, 7, 2, 14_053_202_944)],
    "llama3-70b": [(0, 63, 2, 15_287_602_688)],
    "llama3-405b": [
        (0, 7, 6, 13_226_441_600),
        (8, 239, 5, 12_701_105_024),
        (240, 247, 4, 11_904_121_728),
        (248, 255, 6, 12_429_491_072),
        (256, 511, 1, 9_513_171_840),
    ],
    "llama3-1t": [
        (0, 7, 4, 19_290_292_860),
        (8, 503, 3, 18_460_733_052),
        (504, 511, 5, 19_290_344_604),
        (512, 1023, 1, 13_865_244_924),
    ],
}

# (pattern of the name, files, bytes each)
KINDS = {
    "llama3-8b": [
        (r"zero_pp_rank_[0-7]_mp_rank_0_model_states\.pt", 8, 2_007_565_312),
        (r"zero_pp_rank_[0-7]_mp_rank_0_optim_states\.pt", 8, 12_045_637_632),
    ],
    "llama3-70b": [
        (r"zero_pp_rank_[0-7]_mp_rank_[0-7]_model_states\.pt", 64, 2_184_120_320),
        (r"zero_pp_rank_[0-7]_mp_rank_[0-7]_optim_states\.pt", 64, 13_103_482_368),
    ],
    "llama3-405b": [
        (r"layer_0-model_[0-7]_model_states\.pt", 8, 525_336_576),
        (r"layer_([1-9]|[1-9]\d|1[01]\d|12[0-6])-model_\d+_model_states\.pt", 1008, 796_983_296),
        (r"layer_127-model_(24[89]|25[0-5])_model_states\.pt", 8, 525_336_576),
        (r"layer_128-model_(24[89]|25[0-5])_model_states\.pt", 8, 32_768),
        (r"zero_pp_rank_[01]_mp_rank_\d+_optim_states\.pt", 512, 9_513_171_840),
    ],
    "llama3-1t": [
        (r"layer_0-model_[0-7]_model_states\.pt", 8, 829_559_808),
        (r"layer_([1-9]|[1-9]\d|1[01]\d|12[0-8])-model_\d+_model_states\.pt", 1024, 2_297_744_064),
        (r"layer_129-model_(50[4-9]|51[01])_model_states\.pt", 8, 829_559_808),
        (r"layer_130-model_(50[4-9]|51[01])_model_states\.pt", 8, 51_744),
        (r"zero_pp_rank_[01]_mp_rank_\d+_optim_states\.pt", 1024, 13_865_244_924),
    ],
}

# files, model bytes, optimizer bytes, checkpoint_size_GB as published
TOTALS = {
    "llama3-8b": (16, 16_060_522_496, 96_365_101_056, 104.70452117919922),
    "llama3-70b": (128, 139_783_700_480, 838_622_871_552, 911.2121276855469),
    "llama3-405b": (1544, 811_764_809_728, 4_870_743_982_080, 5292.248718261719),
    "llama3-1t": (2072, 2_366_163_292_416, 14_198_010_802_176, 15426.589264154434),
}


@pytest.mark.parametrize("name", ROLES)
def test_each_rank_has_the_files_and_bytes_of_its_role(name):
    layout = Layout(models.get(name))
    assert layout.nranks == ROLES[name][-1][1] + 1
    for first, last, nfiles, nbytes in ROLES[name]:
        for rank in range(first, last + 1):
            files = layout.files(rank)
            assert len(files) == layout.rank_nfiles(rank) == nfiles
            assert sum(file.nbytes for file in files) == layout.rank_nbytes(rank) == nbytes


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_file_has_its_count_and_size(name):
    unmatched = list(Layout(models.get(name)).all_files())
    for pattern, count, nbytes in KINDS[name]:
        matched = [file for file in unmatched if re.fullmatch(pattern, file.name)]
        assert len(matched) == count
        assert {file.nbytes for file in matched} == {nbytes}
        unmatched = [file for file in unmatched if file not in set(matched)]
    assert unmatched == []


@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_the_published_ones_to_the_last_digit(name):
    layout = Layout(models.get(name))
    nfiles, model_nbytes, optimizer_nbytes, checkpoint_size_gib = TOTALS[name]
    files = list(layout.all_files())
    assert len(files) == layout.nfiles == nfiles
    assert len({file.name for file in files}) == nfiles
    assert sum(file.nbytes for file in files if "model_states" in file.name) == model_nbytes
    assert sum(file.nbytes for file in files if "optim_states" in file.name) == optimizer_nbytes
    assert layout.total_nbytes == model_nbytes + optimizer_nbytes
    assert layout.total_nbytes / 2**30 == checkpoint_size_gib


@pytest.mark.parametrize(
    ("name", "nfiles", "nbytes"),
    [
        ("llama3-8b", 16, 112_425_623_552),
        ("llama3-70b", 16, 122_300_821_504),
        ("llama3-405b", 48, 105_811_532_800),
        ("llama3-1t", 32, 154_322_342_880),
    ],
)
def test_subset_of_8_keeps_the_full_data_parallelism(name, nfiles, nbytes):
    layout, full = Layout(models.get(name), subset=8), Layout(models.get(name))
    assert (layout.nranks, layout.nfiles, layout.total_nbytes) == (8, nfiles, nbytes)
    assert [layout.files(rank) for rank in range(8)] == [full.files(rank) for rank in range(8)]


def test_write_order_is_layers_upward_then_optimizer():
    names = [file.name for file in Layout(models.get("llama3-405b")).files(248)]
    assert names == [
        "layer_124-model_248_model_states.pt",
        "layer_125-model_248_model_states.pt",
        "layer_126-model_248_model_states.pt",
        "layer_127-model_248_model_states.pt",
        "layer_128-model_248_model_states.pt",
        "zero_pp_rank_0_mp_rank_248_optim_states.pt",
    ]


def test_opt_ranks_write_one_sharded_file_each_as_metaseq_names_them():
    layout = Layout(models.get("opt-2.7b-full"))
    assert [file.name for file in layout.all_files()] == [
        f"checkpoint_last-model_part-{rank % 4}-shard{rank // 4}.pt" for rank in range(8)
    ]


def test_fewer_ranks_are_the_first_of_the_full_layout():
    full, half = Layout(models.get("llama3-70b")), Layout(models.get("llama3-70b"), ranks=32)
    assert [half.files(rank) for rank in range(32)] == [full.files(rank) for rank in range(32)]
    assert half.dp == 8
    assert "the first 32 of the 64 ranks" in half.meaning


def test_more_ranks_raise_data_parallelism():
    layout = Layout(models.get("llama3-70b"), ranks=128)
    assert layout.dp == 16
    assert "DP 16" in layout.meaning
    assert layout.files(127)[0].name == "zero_pp_rank_15_mp_rank_7_model_states.pt"
    assert layout.files(127)[0].nbytes == 2_184_120_320 // 2


def test_own_count_means_the_full_layout():
    assert Layout(models.get("llama3-8b")).meaning == "all 8 ranks of llama3-8b (TP 1 x PP 1 x DP 8)"


@pytest.mark.parametrize(
    ("name", "ranks", "tries"),
    [("llama3-70b", 100, (96, 104)), ("llama3-405b", 513, (512, 768)), ("llama3-1t", 2000, (1536, 2048))],
)
def test_count_that_fits_nothing_is_refused_with_the_nearest_that_do(name, ranks, tries):
    shape = models.get(name)
    with pytest.raises(UsageError) as caught:
        Layout(shape, ranks=ranks)
    for count in tries:
        assert f"--ranks {count}" in str(caught.value)
        assert Layout(shape, ranks=count).nranks == count


@pytest.mark.parametrize("ranks", [0, -8])
def test_no_ranks_are_refused(ranks):
    with pytest.raises(UsageError, match="give 1 or more"):
        Layout(models.get("llama3-8b"), ranks=ranks)


@pytest.mark.parametrize("subset", [0, -1, 65])
def test_subset_must_be_a_part(subset):
    with pytest.raises(UsageError, match="give 1 to 64"):
        Layout(models.get("llama3-70b"), subset=subset)


def test_subset_and_ranks_may_not_differ():
    with pytest.raises(UsageError, match="contradict"):
        Layout(models.get("llama3-70b"), ranks=16, subset=8)
    assert Layout(models.get("llama3-70b"), ranks=8, subset=8).nranks == 8


def test_default_is_the_own_count_or_a_larger_world():
    shape = models.get("llama3-70b")
    assert Layout(shape, nprocs=2).nranks == 64
    assert Layout(shape, nprocs=128).nranks == 128
    assert Layout(shape, subset=8, nprocs=128).nranks == 8
    with pytest.raises(UsageError, match="100 processes, one rank each, do not fit"):
        Layout(shape, nprocs=100)


@pytest.mark.parametrize("scale", [Fraction(0), Fraction(-1, 16)])
def test_scale_must_be_above_zero(scale):
    with pytest.raises(UsageError, match="not above zero"):
        Layout(models.get("llama3-8b"), scale=scale)


def test_scale_shrinks_each_tensor_and_nothing_else():
    full, small = Layout(models.get("llama3-8b")), Layout(models.get("llama3-8b"), scale=Fraction(1, 16))
    assert [file.name for file in full.all_files()] == [file.name for file in small.all_files()]
    optimizer = 3 * 4 * (1003782656 // 16 + 5 * 4096 // 16)
    assert small.files(3)[1].nbytes == optimizer
    # 512 elements of a norm become 32
    block = 2 * (512 // 16) + (3145728 + 2097152 + 14680064 + 7340032) // 16
    assert small.files(3)[0].nbytes == 2 * (2 * 65667072 // 16 + 32 * block + 512 // 16)


def test_scaled_tensor_keeps_at_least_one_element():
    layout = Layout(models.get("llama3-405b"), scale=Fraction(1, 10**15))
    assert [file.nbytes for file in layout.files(248)] == [12, 12, 12, 2, 2, 24]


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(models.MODELS)),
    factor=st.integers(1, 5),
    scale=st.fractions(Fraction(1, 10**9), 1),
)
def test_totals_are_sums_and_names_are_unique(name, factor, scale):
    shape = models.get(name)
    layout = Layout(shape, ranks=factor * shape.nranks, scale=scale)
    files = list(layout.all_files())
    assert layout.nfiles == len(files) == len({file.name for file in files})
    assert layout.total_nbytes == sum(file.nbytes for file in files)
    assert min(file.nbytes for file in files) > 0


def test_file_ids_are_unique_64_bit_and_lead_back_to_the_name():
    layout = Layout(models.get("llama3-405b"))
    files = list(layout.all_files())
    ids = [file.file_id for file in files]
    assert len(set(ids)) == len(ids)
    assert 0 <= min(ids) <= max(ids) < 2**64
    assert all(layout.file_name_of(file.file_id) == file.name for file in files)


def test_file_id_is_the_same_in_a_subset_and_a_scaled_layout():
    shape = models.get("llama3-1t")
    full, part = Layout(shape), Layout(shape, subset=8, scale=Fraction(1, 100))
    assert [file.file_id for file in full.files(7)] == [file.file_id for file in part.files(7)]


@pytest.mark.parametrize("file_id", [2, 8 << 32, 2**64 - 1])
def test_file_id_of_another_layout_has_no_name(file_id):
    assert Layout(models.get("llama3-8b")).file_name_of(file_id) is None


@pytest.mark.parametrize("rank", [-1, 8])
def test_rank_outside_the_layout_is_refused(rank):
    with pytest.raises(UsageError, match="ranks 0 to 7"):
        Layout(models.get("llama3-8b")).files(rank)


def test_16384_ranks_are_laid_out_by_role(monkeypatch):
    """What is proved is the number of times that tensors are looked at, not the speed of this machine."""
    shape = models.get("llama3-405b")
    calls = Counter()
    original = models.Transformer.role_files

    def counted(self, dp, stage, first_replica):
        calls[stage, first_replica] += 1
        return original(self, dp, stage, first_replica)

    monkeypatch.setattr(models.Transformer, "role_files", counted)
    layout = Layout(shape, ranks=16384)
    assert len(list(layout.all_files())) == layout.nfiles == 16384 + 1032
    assert set(calls.values()) == {1}
    assert len(calls) == 2 * shape.pp


def test_step_directory_is_dlios():
    assert step_dir(3) == "global_epoch1_step3"


def test_deal_in_blocks_and_round_robin():
    assert deal(8, 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert deal(8, 3, "round-robin") == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert deal(8, 2, only=[1, 5, 6]) == [[1, 5], [6]]
    assert deal(2, 4) == [[0], [1], [], []]


@given(
    nranks=st.integers(1, 200),
    nprocs=st.integers(1, 50),
    how=st.sampled_from(["block", "round-robin"]),
)
def test_every_rank_is_dealt_once_and_evenly(nranks, nprocs, how):
    dealt = deal(nranks, nprocs, how)
    assert len(dealt) == nprocs
    assert sorted(rank for ranks in dealt for rank in ranks) == list(range(nranks))
    sizes = [len(ranks) for ranks in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert all(ranks == sorted(ranks) for ranks in dealt)


def test_deal_refuses_no_process_and_an_unknown_way():
    with pytest.raises(UsageError, match="give 1 or more"):
        deal(8, 0)
    with pytest.raises(UsageError, match="give block or round-robin"):
        deal(8, 2, "random")


def test_list_of_ranks():
    assert parse_ranks("3", 8) == [3]
    assert parse_ranks("0-3", 8) == [0, 1, 2, 3]
    assert parse_ranks("6, 0-2,1", 8) == [0, 1, 2, 6]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not a list of ranks"),
        ("a", "is not a list of ranks"),
        ("-1", "is not a list of ranks"),
        ("1,,2", "is not a list of ranks"),
        ("5-2", "write it as 2-5"),
        ("8", "there is no rank 8; ranks are 0 to 7"),
        ("0-99", "there is no rank 99"),
    ],
)
def test_bad_list_of_ranks_is_refused(text, complaint):
    with pytest.raises(UsageError, match=re.escape(complaint)):
        parse_ranks(text, 8)
