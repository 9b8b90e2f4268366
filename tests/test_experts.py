"""Experts on disk: the same logits as in memory, bounded memory, counts that add up, and no wrong output from bad files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as mlx_lm_load_model

from metal_kernels import launch
from ring_mlx import Session, demo_model_path, load_model
from ring_mlx.bench.random_weights import random_model_of
from ring_mlx.cli import build_parser, main
from ring_mlx.cli.exit_codes import CUT_OFF
from ring_mlx.cli.serve_command import make_server
from ring_mlx.convert import convert, verify
from ring_mlx.convert.writer import PartialFolder, partial_folder
from ring_mlx.engine.events import AnswerText, Sampling, ThinkingText
from ring_mlx.errors import OptionError, WeightsError
from ring_mlx.experts import POLICIES, recommend_cache_bytes
from ring_mlx.experts.layout import ALIGN_BYTES, find_experts
from ring_mlx.experts.policies import LFU
from ring_mlx.experts.pool import Pool
from ring_mlx.experts.slots import is_on_cuda
from ring_mlx.model.config import RingConfig
from ring_mlx.model.decode_step import DecodeStep
from ring_mlx.model.memory import budget_bytes, parameter_count, routed_count
from tests.compare import assert_close
from tests.kernel_backends import backends
from tests.kill_and_resume import folder_hashes
from tests.tiny import GOLDENS, config, save_hf, tokens

GOLDEN = GOLDENS / "mini_like"
ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(is_on_cuda(), reason="experts on disk are refused there")


def least_bytes(folder):
    """What the experts of one token take, from the message that refuses less."""
    with pytest.raises(OptionError, match=r"too little for the \d+ experts of a token; give at least") as e:
        load_model(folder, expert_cache_bytes=1)
    return int(str(e.value).split()[-1].rstrip("."))


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same model in float, single, stacked and streamed, and quantized, stacked and streamed."""
    folder = tmp_path_factory.mktemp("forms")
    save_hf(folder / "single", config(), shards=2)
    out = {"single": folder / "single"}
    packed = {"quantize": True, "group_size": 32, "fit": "rtn", "overrides": ["layers.2.=8"]}
    for layout in ("stacked", "streamed"):
        out[layout] = convert(out["single"], folder / layout, expert_layout=layout)
        out[f"{layout}-q"] = convert(GOLDEN, folder / f"{layout}-q", expert_layout=layout, **packed)
    return out


@pytest.mark.parametrize(
    ("policy", "form"),
    [
        *(("lfu", form) for form in ("single", "stacked", "streamed", "stacked-q", "streamed-q")),
        *((policy, "streamed-q") for policy in POLICIES if policy != "lfu"),  # no policy sees the form
    ],
)
def test_logits_are_those_of_the_resident_model_bit_for_bit(forms, form, policy):
    resident = load_model(forms[form])
    least = least_bytes(forms[form])
    for cache_bytes in (least, 3 * least, 1 << 30):
        streamed = load_model(forms[form], expert_cache_bytes=cache_bytes, expert_policy=policy)
        pools = {id(layer.mlp._pool): layer.mlp._pool for layer in streamed.layers if hasattr(layer.mlp, "_pool")}
        assert 0 < sum(a.nbytes for pool in pools.values() for a in pool.slots.arrays.values()) <= cache_bytes
        for B, T in ((1, 90), (2, 1), (1, 7)):
            x = tokens(T, B=B)
            caches = [m.make_cache([0] * B if B > 1 else None) for m in (resident, streamed)]
            for part in (x, x[:, :1], x[:, -1:]):
                a, b = (m(part, c) for m, c in zip((resident, streamed), caches, strict=True))
                assert mx.array_equal(a, b), (cache_bytes, B, T)


@pytest.mark.parametrize("backend", backends("fast"))
def test_the_kernels_take_slots_too(tmp_path, backend):
    """A decode step through the fused kernels, and a prefill that does not fit into the slots at once."""
    folder = convert(GOLDEN, tmp_path / "out", expert_layout="streamed", quantize=True, group_size=32, fit="rtn")
    with launch.use(backend):
        resident = load_model(folder, lazy=True)
        streamed = load_model(folder, lazy=True, expert_cache_bytes=2 * least_bytes(folder))
        caches = [m.make_cache() for m in (resident, streamed)]
        for part in (tokens(12), tokens(1), tokens(1, seed=3)):
            a, b = (m(part, c) for m, c in zip((resident, streamed), caches, strict=True))
            assert_close(b, a, 1e-5)


def test_logits_that_are_read_late_are_still_right(forms):
    streamed = load_model(forms["streamed"], expert_cache_bytes=least_bytes(forms["streamed"]))
    resident = load_model(forms["streamed"])
    late = [streamed(tokens(5, seed=s)) for s in range(6)]
    assert all(mx.array_equal(y, resident(tokens(5, seed=s))) for s, y in enumerate(late))


def test_a_streamed_folder_is_the_stacked_one_in_another_order(forms, tmp_path):
    for suffix in ("", "-q"):
        stacked, streamed = forms[f"stacked{suffix}"], forms[f"streamed{suffix}"]
        assert mx.array_equal(load_model(stacked)(tokens(9)), load_model(streamed)(tokens(9)))
        assert verify(streamed) > verify(stacked)
        back = convert(streamed, tmp_path / f"back{suffix}")
        assert (back / "model.safetensors").read_bytes() == (stacked / "model.safetensors").read_bytes()
        index = json.loads((streamed / "model.safetensors.index.json").read_text())["weight_map"]
        layers = len(find_experts(streamed, cfg(streamed)))
        assert len([n for n in index if ".experts.3.up_proj." in n]) == layers * (3 if suffix else 1)


def cfg(folder):
    return RingConfig.from_dict(json.loads((folder / "config.json").read_text()))


def test_one_expert_is_one_aligned_read(forms):
    reads = {}
    for form, folder in forms.items():
        places = [e for layer in find_experts(folder, cfg(folder)).values() for e in layer.experts]
        reads[form] = {len(e.pieces) for e in places}
        is_streamed = form.startswith("streamed")
        assert {e.digest is not None for e in places} == {is_streamed}
        assert not is_streamed or all(e.pieces[0].offset % ALIGN_BYTES == 0 for e in places)
    assert reads["streamed"] == reads["streamed-q"] == {1}
    assert reads["stacked"] == {3}
    assert reads["stacked-q"] == {9}


@pytest.mark.parametrize("shape", [(2048, 512), (4096, 1024)])
def test_experts_of_the_real_models_need_no_padding(shape):
    weights = 3 * shape[0] * shape[1]
    for eighths in (3 + 0.5, 4 + 0.5, 5 + 0.5, 6 + 0.5, 8 + 0.5, 16):
        assert weights * eighths / 8 % ALIGN_BYTES == 0


def test_an_interrupted_streamed_conversion_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    class Stopped(BaseException):
        pass

    options = {"quantize": True, "group_size": 32, "fit": "rtn", "expert_layout": "streamed", "shard_bytes": 100_000}
    whole = folder_hashes(convert(GOLDEN, tmp_path / "whole", **options))
    finish = PartialFolder.finish_shard

    def stop(self, shard, unfinished):
        finish(self, shard, unfinished)
        if "experts" in shard:
            raise Stopped

    monkeypatch.setattr(PartialFolder, "finish_shard", stop)
    for n in range(1, len([f for f in whole if "experts" in f])):
        with pytest.raises(Stopped):
            convert(GOLDEN, tmp_path / "out", resume=True, **options)
        assert len(list(partial_folder(tmp_path / "out").glob("model-experts-*"))) == n
    monkeypatch.undo()
    assert folder_hashes(convert(GOLDEN, tmp_path / "out", resume=True, **options)) == whole


def test_counts_add_up(forms):
    model = load_model(forms["streamed"], expert_cache_bytes=1 << 30)
    found, cache = model.expert_statistics, model.make_cache()
    mx.eval(model(tokens(20), cache))
    layers, k, each = 4, 3, 3 * 48 * 32 * 4
    assert found.prefill.tokens == 20
    assert found.prefill.hits == 0
    assert found.prefill.bytes_read == found.prefill.lookups * each
    assert found.decode.tokens == 0
    for token in (1, 1, 2):
        mx.eval(model(mx.array([[token]]), cache))
    c = found.decode
    assert (c.tokens, c.lookups) == (3, 3 * layers * k)
    assert c.bytes_read == (c.lookups - c.hits) * each
    assert c.bytes_per_token == c.bytes_read / 3
    assert 0 < c.hit_rate <= 1
    assert found.as_dict()["decode"]["hit_rate"] == c.hit_rate
    assert f"{100 * c.hit_rate:.1f} % in memory" in found.line()
    found.reset()
    assert found.decode.tokens == 0


def test_the_least_used_expert_makes_room():
    lfu = LFU(half_life_passes=2)
    for key in "aaabbc":
        lfu.touch(key)
    assert lfu.victim(()) == "c"
    assert lfu.victim("c") == "b"
    for _ in range(12):
        lfu.advance()
    lfu.touch("c")
    assert lfu.victim(()) == "b", "old uses must fade"
    lfu.forget("b")
    assert lfu.victim(()) == "a"


def test_scores_survive_many_passes():
    lfu = LFU(half_life_passes=1)
    for n in range(3000):
        lfu.advance()
        lfu.touch(n % 5)
    assert lfu.victim(()) == 0
    assert len(lfu._heap) < 200


def test_mlx_lm_loads_a_streamed_folder_without_padding(tmp_path):
    save_hf(tmp_path / "hf", config(hidden_size=64, moe_intermediate_size=64, num_attention_heads=4, group_norm_size=2))
    folder = convert(tmp_path / "hf", tmp_path / "out", expert_layout="streamed")
    model = mlx_lm_load_model(folder)[0]
    theirs, ours = model.layers[1].mlp.switch_mlp, load_model(folder).layers[1].mlp.switch_mlp
    assert mx.array_equal(theirs.down_proj.weight, ours.down_proj.weight)


def test_an_interrupted_read_loses_no_slot(forms, monkeypatch):
    model = load_model(forms["streamed"], expert_cache_bytes=least_bytes(forms["streamed"]))
    expected = load_model(forms["streamed"])(tokens(30))
    finish = Pool._finish

    def interrupted(self, reading, counts):
        raise KeyboardInterrupt

    for _ in range(5):
        monkeypatch.setattr(Pool, "_finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(tokens(30))
        monkeypatch.setattr(Pool, "_finish", finish)
        assert mx.array_equal(model(tokens(30)), expected)


def test_systems_without_vectored_reads(forms, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    model = load_model(forms["streamed-q"], expert_cache_bytes=1 << 30)
    assert mx.array_equal(model(tokens(30)), load_model(forms["streamed-q"])(tokens(30)))


def damaged(folder, tmp_path, at=None, cut=None):
    """A copy with one byte of its third layer's experts changed, or that file cut short."""
    out = shutil.copytree(folder, tmp_path / "damaged")
    file = out / "model-experts-00003.safetensors"
    data = bytearray(file.read_bytes())
    if at is not None:
        data[at] ^= 1
    file.write_bytes(data[:cut])
    return out, file


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_damaged_expert_is_an_error_and_not_an_answer(forms, tmp_path):
    places = find_experts(forms["streamed"], cfg(forms["streamed"]))[3].experts
    out, file = damaged(forms["streamed"], tmp_path, at=places[5].pieces[0].offset + 100)
    model = load_model(out, expert_cache_bytes=1 << 30)
    for _ in range(2):  # what failed is not taken for read
        with pytest.raises(WeightsError, match=f"{file.name} is damaged at expert 5 of layer 3") as e:
            mx.eval(model(tokens(60)))
        assert one_line(e).endswith("download or convert it again.")
    good = damaged(forms["streamed"], tmp_path / "again")[1]
    shutil.copyfile(good, file)
    assert mx.array_equal(model(tokens(60)), load_model(forms["streamed"])(tokens(60)))


def test_a_truncated_file_is_refused_when_it_is_opened(forms, tmp_path):
    out, file = damaged(forms["streamed"], tmp_path, cut=-50)
    with pytest.raises(WeightsError, match=f"{file.name} is truncated or damaged"):
        load_model(out, expert_cache_bytes=1 << 30)


def test_a_file_cut_or_changed_under_way_is_an_error(forms, tmp_path):
    for form, cut, match in (
        ("streamed", 40_000, r"ends within expert \d+ of layer 3, \d+ bytes short"),
        ("streamed", None, "is damaged at expert"),
        ("stacked", 40_000, "was changed while expert"),
    ):
        out = shutil.copytree(forms[form], tmp_path / f"{form}{cut}")
        file = out / ("model-experts-00003.safetensors" if form == "streamed" else "model.safetensors")
        model = load_model(out, expert_cache_bytes=least_bytes(out))
        mx.eval(model(tokens(60)))
        with file.open("r+b") as f:
            if cut:
                f.truncate(cut)
            else:
                f.seek(ALIGN_BYTES)
                f.write(os.urandom(file.stat().st_size - ALIGN_BYTES))
        with pytest.raises(WeightsError, match=match) as e:
            mx.eval(model(tokens(60)))
        one_line(e)


def test_a_file_that_was_only_touched_is_read_on(forms, tmp_path):
    out = shutil.copytree(forms["streamed"], tmp_path / "out")
    model = load_model(out, expert_cache_bytes=least_bytes(out))
    before = model(tokens(30))
    mx.eval(before)
    for file in out.glob("*.safetensors"):
        os.utime(file, (1, 1))
    assert mx.array_equal(model(tokens(30)), before)


def test_too_few_checksums_are_refused(forms, tmp_path):
    out, file = damaged(forms["streamed"], tmp_path)
    data = file.read_bytes()
    at = data.index(b"expert_sha256") + len('expert_sha256":"')
    file.write_bytes(data[: at + 16] + b"x" + data[at + 17 :])
    with pytest.raises(WeightsError, match="checksums for 12 experts"):
        load_model(out, expert_cache_bytes=1 << 30)


def test_options_that_cannot_work(forms):
    with pytest.raises(OptionError, match="'arc' is not one of lfu, none"):
        load_model(forms["streamed"], expert_cache_bytes=1 << 30, expert_policy="arc")
    with pytest.raises(WeightsError, match="experts on disk are F32 and cannot be read as bfloat16"):
        load_model(forms["single"], expert_cache_bytes=1 << 30, dtype=mx.bfloat16)
    with pytest.raises(OptionError, match="'side' is not one of stacked, streamed"):
        convert(GOLDEN, Path("nowhere"), expert_layout="side")


def test_no_step_is_compiled_around_reads(forms):
    x = mx.zeros((1, 1, 48))
    for model, accepted in (
        (load_model(forms["streamed"], expert_cache_bytes=1 << 30), False),
        (load_model(forms["streamed"]), True),
    ):
        cache = model.make_cache()
        mx.eval(model(tokens(3), cache))
        assert DecodeStep(model.layers).accepts(x, cache) == accepted


@pytest.mark.parametrize(
    ("text", "value"), [("8GB", 8 * 10**9), ("1.5GiB", 3 << 29), ("512mb", 512 * 10**6), ("2k", 2000), ("77", 77)]
)
def test_sizes_have_suffixes(text, value):
    args = build_parser().parse_args(["generate", "--expert-cache-bytes", text])
    assert args.expert_cache_bytes == value


def generate(capsys, *flags):
    code = main(["generate", "--prompt", "Add 2 and 3.", "--max-tokens", "12", "--temp", "0", *flags])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_generate_says_the_same_and_prints_counts(capsys, tmp_path):
    folder = convert(demo_model_path(), tmp_path / "toy", expert_layout="streamed")
    model = ("--model", str(folder))
    plain = generate(capsys, *model, "--verbose", "False")
    found = generate(capsys, *model, "--verbose", "False", "--expert-cache-bytes", "2MB", "--expert-policy", "lfu")
    assert found == plain
    assert plain[0] == CUT_OFF
    assert "Experts (lfu, " in generate(capsys, *model, "--expert-cache-bytes", "2MB", "--expert-policy", "lfu")[1]
    as_json = json.loads(generate(capsys, *model, "--json", "--expert-cache-bytes", "2MB")[1])
    assert as_json["experts"]["decode"]["tokens"] == 11
    code, _, error = generate(capsys, *model, "--expert-policy", "lfu")
    assert code == 2
    assert error.splitlines()[-1].startswith("ring-mlx: [option] --expert-policy lfu needs --expert-cache-bytes")
    code, _, error = generate(capsys, *model, "--expert-cache-bytes", "1KB")
    assert code == 2
    assert "--expert-cache-bytes 1000 is too little" in error


def test_what_is_recommended_fits():
    from ring_mlx.bench.shapes import FLASH, MINI

    flash, mini = RingConfig.from_dict(FLASH), RingConfig.from_dict(MINI)
    sizes = [recommend_cache_bytes(flash, n * 10**9) for n in (2, 16, 24, 32, 48, 64, 128)]
    assert sizes[0] == 0
    assert sizes[-1] is None
    middle = sizes[1:-2]
    assert all(a < b for a, b in pairwise(middle))
    rest = (parameter_count(flash) - routed_count(flash)) * 4.5 / 8
    assert all(0 < s + rest < n * 10**9 for s, n in zip(middle, (16, 24, 32, 48), strict=True))
    assert recommend_cache_bytes(mini, 128 * 10**9) is None
    assert recommend_cache_bytes(mini, budget_bytes(), 16) != 0


PEAK = """
import json, resource, sys
import mlx.core as mx
from ring_mlx import load_model
warm = mx.quantize(mx.random.normal((64, 64)))
mx.eval(warm, mx.quantized_matmul(mx.ones((1, 64)), *warm))
def rss(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))
before = rss("VmRSS")
mx.reset_peak_memory()
model = load_model(sys.argv[1], expert_cache_bytes=int(sys.argv[2]), expert_policy=sys.argv[3])
cache = model.make_cache()
for step in range(3):
    mx.eval(model(mx.random.randint(0, 256, (1, 24)), cache, last_only=True))
for step in range(24):
    mx.eval(model(mx.array([[step]]), cache))
print(json.dumps([mx.get_peak_memory(), rss("VmHWM") - before, model.expert_statistics.as_dict()["decode"]["hit_rate"]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_stays_within_the_bound_on_a_checkpoint_several_times_larger(tmp_path):
    from ring_mlx.bench.shapes import MINI

    raw = MINI | {
        "num_hidden_layers": 5, "num_experts": 64, "hidden_size": 384, "vocab_size": 256, "intermediate_size": 512,
        "moe_intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1,
        "torch_dtype": "float32", "max_position_embeddings": 256,
    }  # fmt: skip
    model = random_model_of(raw, "made-up", None, 64, False, mx.float32, 0)
    arrays = dict(tree_flatten(model.parameters()))
    rest = sum(a.nbytes for n, a in arrays.items() if ".switch_mlp." not in n)
    plain = tmp_path / "plain"
    plain.mkdir()
    mx.save_safetensors(str(plain / "model.safetensors"), arrays)
    (plain / "config.json").write_text(json.dumps(raw))
    folder = convert(plain, tmp_path / "streamed", expert_layout="streamed")
    shutil.rmtree(plain)
    cache_bytes = 150_000_000
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert size > 4 * cache_bytes
    bound = (rest + cache_bytes) * 1.1
    for policy in ("lfu", "none"):
        command = [sys.executable, "-c", PEAK, str(folder), str(cache_bytes), policy]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert run.returncode == 0, run.stderr
        peak, grown, rate = json.loads(run.stdout)
        print(
            f"{policy}: checkpoint {size / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB, MLX {peak / 1e6:.0f}, RSS +{grown / 1e6:.0f}"
        )
        assert peak <= bound
        assert grown <= bound
        assert (rate > 0.05) == (policy == "lfu")


def test_slots_hold_what_the_file_says(forms):
    folder = forms["streamed-q"]
    model = load_model(folder, expert_cache_bytes=1 << 30)
    resident = load_model(folder)
    mx.eval(model(tokens(60)))
    moe = model.layers[2].mlp
    held = {e: s for (layer, e), s in moe._pool._held.items() if layer == 2}
    assert len(held) > 3
    for name in ("weight", "scales", "biases"):
        ours, theirs = moe.switch_mlp.up_proj[name], resident.layers[2].mlp.switch_mlp.up_proj[name]
        assert all(np.array_equal(np.array(ours[s]), np.array(theirs[e])) for e, s in held.items())


def test_a_session_and_a_server_read_experts_on_demand():
    messages = [{"role": "user", "content": "What is 27 + 35?"}]
    said = []
    for room in (None, 2_000_000):
        with Session(expert_cache_bytes=room, store=False, read_ahead=False) as session:
            reply = session.send(messages, sampling=Sampling(temp=0.0), max_tokens=60)
            said.append([e.text for e in reply if isinstance(e, AnswerText | ThinkingText)])
    assert said[0] == said[1]
    parser = build_parser()
    args = parser.parse_args(["serve", "--expert-cache-bytes", "2MB", "--expert-policy", "none", "--port", "0"])
    server = make_server(args, None)
    server.start()
    try:
        assert server.engine.wait_until_loaded(60)
        assert server.engine.loaded.model.expert_statistics is not None
    finally:
        server.close()
    with pytest.raises(OptionError, match="needs --expert-cache-bytes"):
        make_server(parser.parse_args(["serve", "--expert-policy", "none"]), None)
