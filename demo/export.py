"""``python -m demo.export CHECKPOINT FOLDER``: a training checkpoint to a model folder in bfloat16; knows file names."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx

HERE = Path(__file__).parent


def export(checkpoint: Path, folder: Path, dtype: mx.Dtype = mx.bfloat16) -> None:
    """Write config.json and model.safetensors to ``folder``; the expert bias stays float32."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = mx.load(str(checkpoint / "model.safetensors"))
    assert isinstance(weights, dict)
    weights = {n: w if n.endswith("expert_bias") else w.astype(dtype) for n, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    raw = json.loads((HERE / "config.json").read_text()) | {"torch_dtype": str(dtype).removeprefix("mlx.core.")}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    for file in (HERE.parent / "ring_mlx" / "demo_model").glob("*"):
        if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(file, folder)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
