"""How long a conversion is said to take, and what its progress says is left."""

from __future__ import annotations

import re
import time

import pytest

from ring_mlx.convert import Options, conversion, convert, convert_plan, timing
from ring_mlx.convert.conversion import size_table
from tests.tiny import config, save_hf

# Seconds a weight on a machine that is slow at fitting and at what stays in float.
SPEEDS = {"rtn": 1e-6, "fast": 4e-6, "best": 20e-6}
FLOAT_S, FINISHING_S = 50e-6, 3e-6


@pytest.fixture
def source(tmp_path):
    sizes = {"moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "num_hidden_layers": 4}
    save_hf(tmp_path / "hf", config(hidden_size=64, intermediate_size=512, **sizes))
    return tmp_path / "hf"


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by what is encoded and what is finished."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "LEAST_WEIGHTS", 0)
    encode, finish = conversion.encode, conversion.writer.PartialFolder.finish_shard

    def slow(output, files, start, stop, fit):
        weights = (stop - start) * output.shape[-1]
        now[0] += weights * (FLOAT_S if output.setting is None else SPEEDS[fit] / 8 * output.setting.bits)
        return encode(output, files, start, stop, fit)

    def slow_finish(self, shard, unfinished):
        now[0] += unfinished.stat().st_size * FINISHING_S
        finish(self, shard, unfinished)

    read = timing._read
    monkeypatch.setattr(timing, "_read", lambda *args: (read(*args)[0], 1e-9))
    monkeypatch.setattr(conversion, "encode", slow)
    monkeypatch.setattr(timing, "encode", slow)
    monkeypatch.setattr(conversion.writer.PartialFolder, "finish_shard", slow_finish)
    return now


@pytest.mark.parametrize("is_sampled", [True, False])
def test_what_is_left_is_right_from_a_tenth_on(source, tmp_path, clock, monkeypatch, is_sampled):
    """Kinds of matrix whose weights take from half a microsecond to fifty, and large float matrices at the end alone."""
    if not is_sampled:
        monkeypatch.setattr(timing, "LEAST_WEIGHTS", 1 << 40)
    told = []

    def progress(done, total, name, left_s):
        told.append((clock[0], left_s))

    started = []
    monkeypatch.setattr(conversion, "_check_space", lambda *args: started.append(clock[0]))
    options = {"quantize": True, "group_size": 32, "recipe": "ring-q3", "overrides": ["layers.3=none", "lm_head=none"]}
    convert(source, tmp_path / "out", progress=progress, shard_bytes=60_000, **options)
    whole_s = clock[0] - started[0]
    later = [(clock[0] - at, left_s) for at, left_s in told if at - started[0] >= 0.1 * whole_s and clock[0] > at]
    assert len(later) > 20
    wrong = [abs(left_s - true_s) > 0.2 * whole_s for true_s, left_s in later]
    assert any(wrong) != is_sampled, "without the sample nothing tells how slow the last matrices are"


def test_the_first_line_and_the_dry_run_say_how_long_and_what_each_fit_would_change(source, tmp_path, clock):
    options = Options(quantize=True, bits=8, group_size=32)
    opened, plan = convert_plan(source, options)
    fitted = sum(o.count for o in plan.outputs if o.setting is not None)
    others = sum(o.count for o in plan.outputs) - fitted
    for_fits = {fit: round(fitted * s + others * FLOAT_S) for fit, s in SPEEDS.items()}
    text, quality = size_table(opened, plan, options).splitlines()[-2:]
    said = []
    convert(source, tmp_path / "out", say=said.append, **vars(options))
    assert said[:2] == [text, quality]
    assert re.fullmatch(
        r"quality: weights are off by 0\.[4-8]% .*, which is hardly to be told from the source", quality
    )
    assert text.startswith(f"time: about {for_fits['fast']} s on this machine, which reads ")
    assert f"--q-fit rtn: about {for_fits['rtn']} s, error 1." in text
    assert f"--q-fit best: about {for_fits['best']} s, error " in text
    copied = size_table(*convert_plan(tmp_path / "out", Options())).splitlines()[-1]
    assert copied.startswith("time: about ")
    assert "--q-fit" not in copied, "nothing is fitted"


def test_small_conversions_and_those_that_are_not_here_are_not_sampled(source):
    opened, plan = convert_plan(source, Options(quantize=True, group_size=32))
    assert "time: about" not in size_table(opened, plan)
