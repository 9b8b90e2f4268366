"""What the libraries of other engines really wrote (`tests.make_foreign_files`) is read as it is meant, in float64."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.convert import conversion, convert
from ring_mlx.convert.sources import matrices, open_source
from ring_mlx.errors import OptionError
from tests import foreign
from tests.compare import assert_close
from tests.foreign_meaning import meaning, read

FILES = sorted((Path(__file__).parent / "foreign_files").glob("*.safetensors"))
MODULE = "model.layers.1.mlp.shared_experts.up_proj"
SHAPE = foreign.shape(num_hidden_layers=2, moe_shared_expert_intermediate_size=96, num_experts=2, n_group=1)


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    """A checkpoint without one matrix."""
    folder = tmp_path_factory.mktemp("rest")
    tensors = foreign.float_weights(SHAPE)
    del tensors[f"{MODULE}.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def source_with(rest, folder, file):
    """A checkpoint whose missing matrix is in a file of its own; returns its tensors' meaning and config.json."""
    folder.mkdir()
    parts, metadata = read(file)
    raw = SHAPE | {"quantization_config": json.loads(metadata["quantization_config"])}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").hardlink_to(rest / "model.safetensors")
    shutil.copy(file, folder / "model-foreign.safetensors")
    return meaning(parts, raw["quantization_config"]), raw["quantization_config"]


def dequantized(folder, quantization):
    arrays = mx.load(str(folder / "model.safetensors"))
    weight = arrays[f"{MODULE}.weight"]
    if f"{MODULE}.scales" not in arrays:
        return weight
    form = quantization.get(MODULE) or quantization
    return mx.dequantize(
        weight, arrays[f"{MODULE}.scales"], arrays[f"{MODULE}.biases"], form["group_size"], form["bits"]
    )


def test_the_files_are_there():
    assert len(FILES) == 21
    assert sum(f.stat().st_size for f in FILES) < 400_000


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_it_is_read_and_kept_as_it_is_meant(rest, tmp_path, monkeypatch, file):
    # So that pieces begin within blocks.
    monkeypatch.setattr(conversion, "CHUNK_WEIGHTS", 3000)
    expected, method = source_with(rest, tmp_path / "in", file)
    matrix = matrices(open_source(tmp_path / "in"))[f"{MODULE}.weight"]
    with closing(TensorFiles()) as files:
        assert_close(matrix.read(files, 0, 96), expected.astype(np.float32), 1e-6)
        assert_close(matrix.read(files, 37, 38), expected[37:38].astype(np.float32), 1e-6)
    if method.get("desc_act"):
        with pytest.raises(OptionError, match="add -q to requantize or -d to dequantize"):
            convert(tmp_path / "in", tmp_path / "out")
        return
    out = convert(tmp_path / "in", tmp_path / "out")
    quantization = json.loads((out / "config.json").read_text()).get("quantization")
    assert (quantization is None) == ("fp8" in file.stem)
    assert_close(dequantized(out, quantization), expected.astype(np.float32), 1e-6)
