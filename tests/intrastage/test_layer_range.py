"""Layers are shared out among stages without gap or overlap, and keep their numbers."""

from __future__ import annotations

import pytest

from fuse.intrastage.layer_range import checked_layer_range, even_layer_range, global_name


def test_even_layer_ranges_tile_the_layers() -> None:
    assert [even_layer_range(5, stage, 3) for stage in range(3)] == [(0, 1), (1, 3), (3, 5)]


def test_a_range_may_be_empty_only_where_stages_allow_it() -> None:
    assert checked_layer_range("Llama", 5, (3, 3), stage=1, num_stages=3) == (3, 3)
    assert checked_layer_range("Llama", 5, None, stage=2, num_stages=3, min_layers=2) == (3, 5)
    with pytest.raises(ValueError, match=r"layer range \(0, 1\) of Llama: .* at least 2 .* or fewer stages"):
        checked_layer_range("Llama", 5, None, stage=0, num_stages=3, min_layers=2)
    with pytest.raises(ValueError, match=r"layer range \(-1, 2\) of Llama"):
        checked_layer_range("Llama", 5, (-1, 2), stage=0, num_stages=2)


def test_names_number_layers_in_the_whole_model() -> None:
    assert global_name("model.layers.2.mlp.up_proj.weight", "model.layers.", 7) == "model.layers.9.mlp.up_proj.weight"
    assert global_name("model.norm.weight", "model.layers.", 7) == "model.norm.weight"
