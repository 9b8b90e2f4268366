"""The machine chooses: the order of choices, what is kept of them, and where they are used."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess

import mlx.core as mx
import pytest

from metal_kernels import choices, launch, machine
from metal_kernels.choices import MLX
from ring_mlx import demo_model_path, load_model
from ring_mlx.bench.random_weights import random_model
from ring_mlx.cli import build_parser, main
from ring_mlx.doctor import tuning
from ring_mlx.doctor.tuning import tune as tune_of_doctor
from ring_mlx.model.model import LanguageModel
from ring_mlx.tuning import autotune, buffers, table, workloads
from ring_mlx.tuning.autotune import Tuning, settle, shape_class, stored, tune
from ring_mlx.tuning.race import NO_TIME, Budget, Verdict
from tests.run_clock import SECRET, Clock
from tests.test_docs import leaves
from tests.tiny import PACKABLE, make_model


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Whatever this machine has, so that what holds here and what is timed is the same everywhere.

    Nothing is compiled: on a CPU that takes a C++ compiler, which a machine with a GPU need not have.
    """
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    yield
    mx.enable_compile()
    mx.set_default_device(before)


def asking(work):
    """The same work, which asks for all choices of its kind in its runs."""

    def asked(model, name, chosen):
        run = work(model, name, chosen)

        def ask(times):
            for other in choices.TABLE:
                if autotune.kind_of(other) == autotune.kind_of(name):
                    choices.chosen(other)
            run(times)

        return ask

    return asked


def made(chosen, name="prefill_step", default=128):
    verdict = Verdict(name, default, chosen[name], {default: 0.2, chosen[name]: 0.1}, {256: NO_TIME})
    return Tuning("a model", choices.where(), dict(chosen), [verdict], 3.5)


@pytest.fixture(scope="module")
def model():
    return make_model(num_hidden_layers=3)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A store of its own, timing allowed, nothing applied."""
    monkeypatch.setenv(machine.SWITCH, str(tmp_path / "machine"))
    monkeypatch.delenv(choices.SWITCH)
    monkeypatch.setattr(choices, "applied", {})
    return tmp_path / "machine"


@pytest.fixture
def gpu(monkeypatch):
    """A backend on which a load times what is fast; its kernels are not launched here."""
    monkeypatch.setattr(autotune, "tune", lambda *_: pytest.fail("timed at a load"))
    with launch.use(launch.Backend("metal", lambda **_: pytest.fail("launched"))):
        yield


def test_every_choice_of_a_model_on_a_cpu_is_timed(model, monkeypatch):
    clock, told = Clock(), []
    monkeypatch.setattr(workloads, "work", lambda m, name, chosen: clock.way(name, 0.2 * 0.5 ** len(chosen)))
    monkeypatch.setattr(workloads, "fitting_steps", lambda m: [64, 128])
    monkeypatch.setattr(workloads, "work", asking(workloads.work))
    found = autotune.tune(model, Budget(100, clock), lambda done, total, *_: told.append((done, total)))
    assert found.chosen == {"chunk_tokens/9+": 16, "prefill_step": 64}
    assert [v.name for v in found.verdicts][-2:] == ["reading a prompt", "reading in steps"]
    assert told[0] == (0, 2)
    assert told[-1] == (2, 2)


@pytest.mark.parametrize(("prompt", "first"), [(0.05, 0.0), (0.05, 2.0), (0.9, 0.0), (4.0, 0.0), (7.5, 0.5)])
def test_all_choices_together_keep_to_the_seconds(model, monkeypatch, prompt, first):
    clock = Clock()
    seconds = dict.fromkeys(autotune.KINDS, 0.05) | {choices.MANY: prompt, autotune.STEP: prompt}
    work = asking(lambda m, name, chosen: clock.way(name, seconds[autotune.kind_of(name)], first=first))
    monkeypatch.setattr(workloads, "work", work)
    monkeypatch.setattr(workloads, "fitting_steps", lambda m: [512, 2048])
    with launch.use(launch.Backend("metal", None)):
        found = autotune.tune(model, Budget(10, clock))
    assert clock.now <= 10 + prompt + first
    assert found.chosen == {}
    assert {v.name for v in found.verdicts} == set(choices.TABLE)
    assert found.verdicts[0].seconds or first > 1  # what matters most is timed
    assert found.seconds == clock.now


def test_what_is_not_confirmed_together_is_given_up(model, monkeypatch):
    clock = Clock()
    seconds = {(): 0.2, ("prefill_step",): 0.1, ("chunk_tokens/9+",): 0.1}
    monkeypatch.setattr(workloads, "work", lambda m, name, chosen: clock.way(name, seconds.get(tuple(chosen), 0.3)))
    monkeypatch.setattr(workloads, "fitting_steps", lambda m: [64, 128])
    monkeypatch.setattr(workloads, "work", asking(workloads.work))
    found = autotune.tune(model, Budget(100, clock))
    assert found.chosen == {"chunk_tokens/9+": 16}  # a step of 64 on top of it is slower than 128
    order = iter([0.2])  # of the tables while single choices are timed
    work = asking(lambda m, name, chosen: clock.way(name, 0.1 if chosen else next(order, 0.05)))
    monkeypatch.setattr(workloads, "work", work)
    assert autotune.tune(model, Budget(100, clock)).chosen == {}


def test_a_step_is_compiled_for_the_choices_that_hold(model):
    with launch.use(launch.Backend("metal", None)):
        first = model.model._decode_step()
        with choices.use({"route/1": MLX}):
            second = model.model._decode_step()
            assert model.model._decode_step() is second
        assert second is not first
        assert model.model._decode_step() is not second


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_the_work_runs_the_model_with_the_choices(model, rows):
    with choices.use({}) as asked:
        workloads.step(model, {}, rows)(2)
        workloads.prompt(model, {})(1)
        workloads.reading(model, {"prefill_step": 64})(1)
    assert asked == {"chunk_tokens/9+", "prefill_step"}


@pytest.mark.parametrize(("size", "count"), [("2-4", 4), ("5-8", 8)])
def test_a_few_tokens_are_timed_as_rows_and_as_a_speculative_step(size, count, monkeypatch):
    seen, call = [], LanguageModel.before_norm
    monkeypatch.setattr(
        LanguageModel, "before_norm", lambda self, x, *a, **k: seen.append(x.shape) or call(self, x, *a, **k)
    )
    with launch.use(launch.Backend("metal", zeros)), choices.use({}) as asked:
        monkeypatch.setattr("ring_mlx.model.decode_step.COMPILED_ON", ())
        workloads.work(make_model(**PACKABLE, num_hidden_layers=3), f"experts/{size}", {})(2)
    assert seen.count((count, 1)) == 3
    assert seen.count((1, count)) == 2
    assert {f"few_queries/{size}", f"experts/{size}", f"norm_qmv/{size}", f"head/{size}"} <= asked


def zeros(**_):
    """A kernel that computes nothing."""
    return lambda output_shapes, output_dtypes, **_: [
        mx.zeros(*o) for o in zip(output_shapes, output_dtypes, strict=True)
    ]


SIBLING = {"model_type": "bailing_moe_v2", "layer_group_size": ..., "group_norm_size": ...}


@pytest.mark.parametrize(
    "changes", [SIBLING, {"num_hidden_layers": 1}, {"num_experts": 0}, {"max_position_embeddings": 40}]
)
def test_every_kind_of_model_can_be_timed(changes):
    other = make_model(**changes)
    other.exact = True
    found = autotune.tune(other, Budget(0.4))
    assert found.seconds < 30
    assert {v.name for v in found.verdicts} <= set(choices.TABLE) | set(autotune.KINDS.values())


def test_steps_that_would_not_fit_are_not_tried(model, monkeypatch):
    assert workloads.fitting_steps(model) == [64, 128, 256]
    monkeypatch.setattr(workloads.memory, "budget_bytes", mx.get_active_memory)
    assert workloads.fitting_steps(model) == [64, 128]


def test_a_choice_is_kept_and_used_by_the_next_load(model, kept):
    autotune.keep(model, made({"prefill_step": 64}))
    settle(model)
    assert choices.chosen("prefill_step") == 64
    settle(make_model(num_hidden_layers=5))
    assert choices.chosen("prefill_step") == 128


def test_the_first_load_on_a_gpu_times_and_later_ones_do_not(model, kept, gpu, monkeypatch):
    timed = []

    def tune(_, budget, progress):
        timed.append(budget.seconds)
        return made({"norm_qmv/1": "half"}, "norm_qmv/1", "kernel")

    monkeypatch.setattr(autotune, "tune", tune)
    with pytest.warns(UserWarning, match="up to 10 s .* --no-tune"):
        settle(model)
    for _ in range(2):
        assert choices.chosen("norm_qmv/1") == "half"
        settle(model)
    assert timed == [autotune.SECONDS]


def test_who_interrupts_timing_is_asked_again(model, kept, gpu, monkeypatch):
    def interrupted(*_):
        assert stored(model, "metal")["problem"] == "timing did not end"  # what stays where the process is killed
        raise KeyboardInterrupt

    monkeypatch.setattr(autotune, "tune", interrupted)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="the first model"):
        settle(model)
    assert stored(model, "metal") is None


def test_where_timing_did_not_end_or_failed_later_loads_use_the_tables(model, kept, gpu, monkeypatch):
    autotune.keep(model, Tuning("a model", "metal"), "timing did not end")
    settle(model)  # fails where it times
    assert choices.active("metal") == {}
    (seen,) = tuning.check()
    assert (seen.status, seen.seen) == ("note", "the tables: timing did not end")
    machine.store("metal").clear(machine.CHOICES)
    monkeypatch.setattr(autotune, "tune", tune)
    monkeypatch.setattr(workloads, "work", lambda *_: Clock().failing("work"))
    with pytest.warns(UserWarning, match="the first model"), pytest.warns(UserWarning, match="nothing could be timed"):
        settle(model)
    settle(model)
    assert SECRET in stored(model, "metal")["problem"]


@pytest.mark.parametrize("why", ["off", "a file", "a long name", "a full disk"])
def test_nothing_is_timed_where_it_cannot_be_kept(model, kept, gpu, monkeypatch, why):
    where = {"off": "off", "a file": str(kept), "a long name": str(kept.with_name(300 * "a")), "a full disk": str(kept)}
    monkeypatch.setenv(machine.SWITCH, where[why])
    if why == "a file":
        kept.touch()
    with monkeypatch.context() as m:
        if why == "a full disk":
            m.setattr(machine, "_write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        settle(model)
    assert choices.active("metal") == {}
    machine.store("metal").put(machine.CHOICES, {"other": {}})
    assert stored(model, "metal") is None


@pytest.mark.parametrize("error", [RuntimeError, KeyError, TypeError, OverflowError])
def test_whatever_timing_raises_a_load_goes_on(model, kept, gpu, monkeypatch, error):
    def fail(*_):
        raise error("no")

    monkeypatch.setattr(autotune, "tune", tune)
    monkeypatch.setattr(workloads, "work", fail)
    with pytest.warns(UserWarning, match="the first model"), pytest.warns(UserWarning, match="nothing could be timed"):
        settle(model)
    assert choices.active("metal") == {}


@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_the_environment_keeps_the_tables(model, kept, gpu, monkeypatch, value):
    autotune.keep(model, made({"norm_qmv/1": "half"}, "norm_qmv/1", "kernel"))
    monkeypatch.setenv(choices.SWITCH, value)
    settle(model)
    assert choices.chosen("norm_qmv/1") == "kernel"


def test_nothing_is_timed_on_a_cpu_or_for_experts_on_disk_or_where_it_waits(model, kept, monkeypatch):
    monkeypatch.setattr(autotune, "tune", lambda *_: pytest.fail("timed at a load"))
    settle(model)
    with launch.use(launch.Backend("metal", None)):
        with autotune.later():
            settle(model)
        monkeypatch.setattr(autotune, "_is_streamed", lambda _: True)
        settle(model)


def store_file(kept):
    (path,) = kept.glob("*.json")
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"prefill_step": 64', '"prefill_step": 65'),
        lambda text: text.replace('"prefill_step": 64', '"unheard/of": 64'),
        lambda text: text.replace('"chosen": {', '"chosen": 7, "x": {'),
        lambda text: text.replace(autotune._sources(), "of other kernels"),
        lambda text: text.replace(mx.__version__, "0.0.1"),
    ],
    ids=["cut", "value", "name", "kind", "kernels", "machine"],
)
def test_a_broken_or_foreign_store_leaves_the_tables(model, kept, monkeypatch, change):
    autotune.keep(model, made({"prefill_step": 64}))
    path = store_file(kept)
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    machine._store.cache_clear()
    settle(model)
    assert choices.chosen("prefill_step") == 128


def test_models_of_other_shapes_or_formats_are_other_kinds(model):
    others = [make_model(num_hidden_layers=4), make_model(num_hidden_layers=3, exact=True), make_model(**PACKABLE)]
    keys = {shape_class(m)[1] for m in [model, *others]}
    assert len(keys) == 4
    assert shape_class(make_model(seed=3, num_hidden_layers=3)) == shape_class(model)


def child_of(seconds, prompts=None):
    """Steps and prompts of processes that take so long."""
    times = {v: iter(s if isinstance(s, list) else [s, s]) for v, s in seconds.items()}

    def child(value):
        return {"step": [next(times[value], 1.0)] * 9, "prompt": [(prompts or {}).get(value, 0.5)]}

    return child


FLAT = dict.fromkeys(buffers.VALUES, 0.02)


@pytest.mark.parametrize(
    ("seconds", "prompts", "expected"),
    [
        (FLAT, None, buffers.AS_MLX),
        (FLAT | {200: 0.018}, None, 200),
        (FLAT | {200: 0.0195}, None, buffers.AS_MLX),
        (FLAT | {200: 0.018, 500: 0.016}, None, 500),
        (FLAT | {500: [0.016, 0.0199]}, None, buffers.AS_MLX),
        (FLAT | {500: 0.016}, {500: 0.52}, buffers.AS_MLX),
    ],
)
def test_command_buffers_must_win_in_each_process(seconds, prompts, expected):
    verdict = buffers.choose(child_of(seconds, prompts), Budget(60, Clock()))
    assert verdict.chosen == expected


@pytest.mark.parametrize(
    ("seconds", "chosen"), [(80, 25), (50, 25), (40, 25), (30, buffers.AS_MLX), (5, buffers.AS_MLX)]
)
def test_processes_keep_to_the_seconds_and_one_that_fails_is_out(seconds, chosen):
    clock = Clock()

    def child(value):
        clock.now += 9
        if value == 50:
            raise ValueError(SECRET)
        return {"step": [0.01 if value == 25 else 0.02] * 9, "prompt": [0.5]}

    verdict = buffers.choose(child, Budget(seconds, clock))
    assert clock.now <= max(9, seconds)
    assert verdict.chosen == chosen
    assert verdict.out.get(50) == (SECRET if seconds > 40 else NO_TIME)
    assert (NO_TIME in verdict.out.values()) == (seconds < 80)


@pytest.mark.parametrize("fails", [buffers.AS_MLX, 25])
def test_a_process_that_fails_the_second_time_decides_nothing(fails):
    seen = []

    def child(value):
        seen.append(value)
        if seen.count(fails) == 2 and value == fails:
            raise OSError(SECRET)
        return {"step": [0.01 if value == 25 else 0.02] * 9, "prompt": [0.5]}

    verdict = buffers.choose(child, Budget(80, Clock()))
    assert verdict.chosen == buffers.AS_MLX
    assert verdict.out == {fails: SECRET}


def test_command_buffers_are_set_before_the_device_is_made(kept, monkeypatch):
    for name in (buffers.OPS, buffers.MB):
        monkeypatch.delenv(name, raising=False)
    buffers.use_stored()
    assert buffers.OPS not in os.environ
    buffers.keep(Verdict(buffers.NAME, buffers.AS_MLX, 200, {200: 0.01}), "metal")
    monkeypatch.setenv(choices.SWITCH, "off")
    buffers.use_stored()
    assert buffers.OPS not in os.environ
    monkeypatch.delenv(choices.SWITCH)
    monkeypatch.setenv(buffers.MB, "70")
    buffers.use_stored()
    assert buffers.OPS not in os.environ
    monkeypatch.delenv(buffers.MB)
    monkeypatch.setenv(buffers.OPS, "7")  # so that it is taken away at the end
    monkeypatch.delenv(buffers.OPS)
    buffers.use_stored()
    assert os.environ.pop(buffers.OPS) == "200"
    assert os.environ.pop(buffers.MB) == buffers.UNLIMITED_MB
    path = store_file(kept)
    text = path.read_text()
    for old, new in (('"chosen": 200', '"chosen": 201'), (mx.__version__, "0.0.1"), (platform.version(), "another")):
        path.write_text(text.replace(old, new))
        buffers.use_stored()
        assert buffers.OPS not in os.environ
    path.write_text(text)
    buffers.keep(
        Verdict(buffers.NAME, buffers.AS_MLX, 50, {50: 0.01}), "cuda"
    )  # of which of two it is, nobody knows yet
    buffers.use_stored()
    assert buffers.OPS not in os.environ


def test_doctor_tunes_and_shows_what_it_chose(kept, monkeypatch, capsys):
    monkeypatch.setattr(autotune, "tune", lambda m, budget, progress: made({"prefill_step": 64}))
    assert main(["doctor", "--tune", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "64, not 128: 50.0 % less time" in said
    assert "not timed: 256 (no time left)" in said
    assert main(["doctor", "--json", "--quiet"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)["findings"]
    (shown,) = [f for f in found if f["section"] == "tuning"]
    assert shown["seen"] == "prefill_step 64; timed in 3.5 s"


def test_a_process_gets_the_number_in_its_environment(monkeypatch):
    seen = []

    def run(command, env, **_):
        seen.append((json.loads(command[-1]), env.get(buffers.OPS), env.get(buffers.MB)))
        return subprocess.CompletedProcess(command, 0, 'a line\n{"step": [1.0], "prompt": [2.0]}\n', "")

    monkeypatch.setattr(subprocess, "run", run)
    child = tuning.in_a_process({"random": "golden"})
    assert child(200) == child(buffers.AS_MLX) == {"step": [1.0], "prompt": [2.0]}
    assert seen == [({"random": "golden"}, "200", buffers.UNLIMITED_MB), ({"random": "golden"}, None, None)]
    monkeypatch.setattr(subprocess, "run", lambda *a, **_: subprocess.CompletedProcess(a, 1, "", f"more\n{SECRET}\n"))
    with pytest.raises(ValueError, match=SECRET):
        child(200)


def test_a_process_times_steps_and_prompts(monkeypatch):
    monkeypatch.setattr(tuning, "STEPS", 3)
    found = tuning.times({"random": "golden", "layers": 2})
    assert {name: len(times) for name, times in found.items()} == {"step": tuning.STEPS, "prompt": tuning.PROMPTS}
    assert min(map(min, found.values())) > 0


def test_command_buffers_are_tuned_after_the_choices_and_kept(kept, monkeypatch):
    monkeypatch.setattr(
        autotune, "tune", lambda m, budget, progress: made({"norm_qmv/1": "half"}, "norm_qmv/1", "kernel")
    )
    monkeypatch.setattr("ring_mlx.doctor.tuning.in_a_process", lambda what: child_of(FLAT | {200: 0.01}))
    with launch.use(launch.Backend("metal", None)):
        found = tune_of_doctor(demo_model_path(), None, 4)
        assert (found.chosen, found.buffers.chosen) == ({"norm_qmv/1": "half"}, 200)
        seen = {f.name: f.seen for f in tuning.check()}
    assert seen[buffers.NAME] == "200"
    assert "200, not MLX's own: 50.0 % less time" in table.text(found)
    assert table.markdown(found).count("| 200 |") == 1
    assert json.loads(json.dumps(found.as_dict()))["buffers"]["chosen"] == 200


def test_doctor_does_not_tune_where_the_tables_are_to_hold(kept, monkeypatch, capsys):
    monkeypatch.setenv(choices.SWITCH, "off")
    assert main(["doctor", "--tune", "--quiet"]) == 2
    assert capsys.readouterr().err == "ring-mlx: [option] RING_MLX_TUNE=off keeps the tables; unset RING_MLX_TUNE.\n"
    monkeypatch.delenv(choices.SWITCH)
    for wrong in (["--random", "golden"], ["--tune", "x", "--random", "golden"], ["--tune", "--check-decay", "x"]):
        assert main(["doctor", "--quiet", *wrong]) == 2
        assert capsys.readouterr().err.startswith("ring-mlx: [option] --")


def test_no_tune_keeps_the_tables(kept, monkeypatch, capsys):
    autotune.keep(load_model(demo_model_path()), made({"prefill_step": 64}))
    used = []
    for flags in ([], ["--no-tune"], ["--prefill-step-size", "7"]):
        monkeypatch.setenv(choices.SWITCH, "on")
        path = kept.with_suffix(".json")
        assert main(["bench", "-p", "4", "-g", "1", "-n", "1", "--quiet", "--json", str(path), *flags]) == 0
        used.append(json.loads(path.read_text())["cells"][0]["prefill_step"])
    assert used == [64, 128, 7]
    capsys.readouterr()


def test_commands_set_command_buffers_first(kept, monkeypatch, capsys):
    buffers.keep(Verdict(buffers.NAME, buffers.AS_MLX, 50, {50: 0.01}), "metal")
    for name in (buffers.OPS, buffers.MB):
        monkeypatch.setenv(name, "")  # so that it is taken away at the end
        monkeypatch.delenv(name)
    made_of = {}
    monkeypatch.setattr("ring_mlx.bench.run.bench", lambda *_, **__: made_of.update(os.environ))
    assert main(["bench", "--quiet"]) == 0
    assert made_of[buffers.OPS] == "50"


def test_random_weights_use_what_was_chosen_for_their_shapes(kept, capsys):
    model = random_model("golden", None)
    autotune.keep(model, made({"prefill_step": 64}))
    assert main(["bench", "--random", "golden", "-p", "4", "-g", "1", "-n", "1", "--quiet"]) == 0
    assert choices.chosen("prefill_step") == 64


def test_every_command_that_loads_a_model_has_no_tune():
    having = {path[0] for path, command in leaves(build_parser()) if "--no-tune" in command._option_string_actions}
    assert having == {"agent", "bench", "cache-prompt", "chat", "convert", "eval", "generate", "serve"}
