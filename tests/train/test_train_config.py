"""Options: defaults, layers, and what is refused."""

from __future__ import annotations

import argparse
import re
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import tiny
import yaml

from mgrpo_kernels.method import METHODS, MethodName
from mgrpo_kernels.method.options import EquivalenceName, Reduction
from mgrpo_kernels.ops.iqr_filter import REDUCTIONS
from mgrpo_kernels.ops.policy_loss.loss_types import LOSS_TYPES
from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train import evaluate
from mgrpo_kernels.train.config import (
    PAIR,
    PRESETS,
    SECTIONS,
    build,
    fields_of,
    find_config,
    preset_descriptions,
    read_yaml,
)
from mgrpo_kernels.train.config.sections import LossName
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.rollout.engines import ENGINES, EngineName
from mgrpo_kernels.vote import EQUIVALENCES

BAD = {
    "iqr_k": (-0.1, "iqr_k: expected at least 0.0, got -0.1"),
    "iqr_min_spread": (-0.1, "iqr_min_spread: expected at least 0.0, got -0.1"),
    "momentum_scored_by": ("teacher", "momentum_scored_by: expected one of sampler, policy, got 'teacher'"),
    "guard": ("on", "guard: expected one of off, warn, stop, rollback, got 'on'"),
    "guard_rollbacks": (-1, "guard_rollbacks: expected at least 0, got -1"),
    "decay": (1.0, "decay: expected at least 0.0 and less than 1.0, got 1.0"),
    "decay_end": (1.5, "decay_end: expected at least 0.0 and less than 1.0, got 1.5"),
    "rollouts": (1, "rollouts: expected at least 2, got 1"),
    "momentum_rollouts": (32, "momentum_rollouts: expected at most 30 of 32 rollouts"),
    "warmup": (1.0, "warmup: expected at least 0.0 and less than 1.0, got 1.0"),
    "steps": (0, "steps: expected at least 1, got 0"),
    "temperature": (0.0, "temperature: expected at least 0.0001, got 0.0"),
    "learning_rate": (float("nan"), "learning_rate: expected a finite number, more than 0.0, got nan"),
    "method": ("grpo", "method: expected one of mgrpo, srt, "),
    "filter_scope": ("all", "filter_scope: expected one of both, vote, penalise, got 'all'"),
    "truncated": ("drop", "truncated: expected one of keep, mask"),
    "behaviour_floor": (-0.1, "behaviour_floor: expected at least 0.0, got -0.1"),
    "geometric_cap": (0.0, "geometric_cap: expected more than 0.0"),
    "geometric_floor": (-1.0, "geometric_floor: expected at least 0.0, got -1.0"),
    "off_policy_delta": (-0.1, "off_policy_delta: expected at least 0.0, got -0.1"),
    "dppo_tv_bounds": ((0.1, -0.1), "dppo_tv_bounds: expected at least 0.0, got -0.1"),
    "dppo_kl_bounds": (0.1, "dppo_kl_bounds: expected two numbers, got 0.1"),
    "dppo_cap": (0.0, "dppo_cap: expected more than 0.0"),
    "advantage_scale": ("iqr", "advantage_scale: expected one of std, batch, none, mean, got 'iqr'"),
    "top_entropy_share": (0.0, "top_entropy_share: expected more than 0.0"),
    "loss_type": ("ppo", "loss_type: expected one of grpo"),
    "engine": ("sglang", "engine: expected one of transformers, vllm, got 'sglang'"),
    "top_p": (0.0, "top_p: expected more than 0.0 and at most 1.0, got 0.0"),
    "top_k": (513, "top_k: expected at least 0 and at most 512, got 513"),
    "min_p": (1.5, "min_p: expected at least 0.0 and at most 1.0, got 1.5"),
    "vllm_memory": (1.5, "vllm_memory: expected more than 0.0 and at most 1.0, got 1.5"),
    "vllm_cache_gib": (0.0, "vllm_cache_gib: expected more than 0.0, got 0.0"),
    "vllm_timeout": (0.0, "vllm_timeout: expected more than 0.0, got 0.0"),
    "prompts_per_step": (0, "prompts_per_step: expected at least 1, got 0"),
    "tokens_per_microbatch": (0, "tokens_per_microbatch: expected at least 1, got 0"),
    "clip_low": (-1.0, "clip_low: expected at least 0.0 and at most 1.0, got -1.0"),
    "kl_coef": (-1.0, "kl_coef: expected at least 0.0, got -1.0"),
    "max_grad_norm": (0.0, "max_grad_norm: expected more than 0.0, got 0.0"),
    "gradient_tolerance": (1.0, "gradient_tolerance: expected at least 0.0 and less than 1.0, got 1.0"),
    "eval_pass_k": (9, "eval_pass_k: expected at least 1 and at most 8, got 9"),
    "seed": (-1, "seed: expected at least 0 and less than 9223372036854775808, got -1"),
    "log_every": (0, "log_every: expected at least 1, got 0"),
    "data": ("x.jsonl", "model: expected a value with --data, got none"),
    "model": ("x", "data: expected a value with --model, got none"),
    "eval_data": ("x.jsonl", "eval_data: expected it together with --data"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_name_the_option(name: str) -> None:
    value, message = BAD[name]
    with pytest.raises(UsageError) as caught:
        build({name: value})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, "steps: expected int, got 'many'"),
        ({"steps": 1.5}, "steps: expected int, got 1.5"),
        ({"seed": True}, "seed: expected int, got True"),
        ({"decay": "high"}, "decay: expected float, got 'high'"),
        ({"iqr_filter": "yes"}, "iqr_filter: expected bool or none, got 'yes'"),
        ({"steps": None}, "steps: expected int, got None"),
        ({"warmup": 50}, "warmup: expected at least 0.0 and less than 1.0, got 50"),
        (
            {"method": "srt", "train_momentum_rollouts": True},
            "train_momentum_rollouts: expected momentum rollouts with it, without which it has no effect, got True",
        ),
        (
            {"momentum_rollouts": 0, "momentum_scored_by": "policy"},
            "momentum_scored_by: expected momentum rollouts with it",
        ),
        ({"method": "srt", "decay_end": 0.999}, "decay_end: expected a momentum model with it"),
        (
            {"vllm_timeout": 60.0},
            "vllm_timeout: expected --engine vllm with it, without which it has no effect, got 60.0",
        ),
        (
            {"engine": "vllm", "eval_temperature": 0.005},
            "eval_temperature: expected >= 0.01, below which vllm samples at another temperature, got 0.005",
        ),
        ({"method": "srt", "filter_scope": "vote"}, "filter_scope: expected the IQR filter (iqr_filter) with it"),
        ({"iqr_filter": False, "iqr_min_spread": 0.1}, "iqr_min_spread: expected the IQR filter (iqr_filter) with it"),
        (
            {"method": "gold", "iqr_filter": True, "filter_scope": "vote"},
            "filter_scope: expected a method that votes with it",
        ),
        (
            {"method": "rent", "iqr_filter": True, "filter_scope": "penalise"},
            "filter_scope: expected both or vote with method rent, whose rewards may be below the 0 that a pruned rollout would get",
        ),
        ({"method": "rent", "vote_by": "excess"}, "vote_by: expected a method that votes with it"),
        ({"method": "empo", "min_share": 0.5}, "min_share: expected a method that takes a label with it"),
        (
            {"method": "restrain", "iqr_filter": True, "filter_scope": "penalise"},
            "filter_scope: expected both or vote with method restrain, whose advantages are not those of its rewards",
        ),
        (
            {"method": "evol_rl", "iqr_filter": True, "filter_scope": "penalise"},
            "filter_scope: expected both or vote with method evol_rl, whose rewards may be below the 0",
        ),
        (
            {"method": "srt", "entropy_reduction": "sum"},
            "entropy_reduction: expected the IQR filter (iqr_filter) with it",
        ),
        ({"chat_template": "on"}, "chat_template: expected --model with it"),
        ({"chat_template": "yes"}, "chat_template: expected one of auto, on, off, got 'yes'"),
        ({"model": "m", "data": "x.jsonl", "eval_every": 5}, "eval_every: expected --eval-data with it, got 5 alone"),
        ({"kl_coef": 0.0, "kl_reference": "momentum"}, "kl_reference: expected --kl-coef above 0 with it"),
        (
            {"behaviour_correction": True, "behaviour_floor": 3.0},
            "behaviour_floor: expected at most behaviour_cap 2.0, got 3.0",
        ),
        ({"geometric_cap": 1.1}, "geometric_cap: expected --behaviour-correction or --train-momentum-rollouts with it"),
        (
            {"off_policy_delta": 0.1},
            "off_policy_delta: expected --behaviour-correction, --train-momentum-rollouts or --updates",
        ),
        ({"dppo_cap": 3.0}, "dppo_cap: expected --loss-type dppo_tv or dppo_kl with it"),
        ({"stepz": 1}, "stepz: expected one of the options "),
        ({"rollouts": 4, "momentum_rollouts": 3}, "momentum_rollouts: expected at most 2 of 4 rollouts"),
        (
            {"method": "co_rewarding", "momentum_rollouts": 0},
            "momentum_rollouts: expected >= 1 with method co_rewarding",
        ),
    ],
)
def test_wrong_types_unknown_options_and_combinations(values: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(values)
    assert str(caught.value).startswith(message)


def test_evaluating_every_so_often_needs_data_only_where_it_is_asked_for() -> None:
    data = {"model": "m", "data": "x.jsonl"}
    assert build(data).eval.eval_every == 20  # the default asks for nothing
    build({**data, "eval_every": 0})
    build({**data, "eval_every": 5}, {"eval_data": "y.jsonl"})
    build(build(data).values())  # as a run's config.yaml has it, which names no held-out data


def test_defaults_are_the_papers_but_for_the_momentum_models_share() -> None:
    config = build()
    assert (config.rollout.prompts_per_step, config.rollout.rollouts, config.momentum_rollouts) == (8, 32, 16)
    assert (config.method.decay, config.method.iqr_k, config.filters) == (0.99, 0.75, True)
    assert (config.optim.learning_rate, config.optim.warmup, config.optim.warmup_steps) == (1e-6, 0.1, 50)
    assert (config.loss.loss_type, config.loss.kl_coef, config.loss.clip_low, config.loss.clip_high) == (
        "dapo",
        0.005,
        0.2,
        0.2,
    )
    assert (config.rollout.max_response_tokens, config.rollout.temperature, config.eval.eval_temperature) == (
        3072,
        1.1,
        0.8,
    )


def test_methods_bring_their_own_rollouts_and_filter() -> None:
    srt = build({"method": "srt"})
    assert (srt.momentum_rollouts, srt.filters, srt.needs_momentum) == (0, False, False)
    crossed = build({"method": "srt", "momentum_rollouts": 8, "iqr_filter": True})
    assert (crossed.momentum_rollouts, crossed.filters, crossed.needs_momentum) == (8, True, True)
    assert build({"method": "srt", "kl_reference": "momentum"}).needs_momentum
    assert build({"method": "co_rewarding"}).method.last_decay == 0.9999


def test_behaviour_correction_comes_with_vllm() -> None:
    assert [build({"engine": engine}).corrects_behaviour for engine in ("transformers", "vllm")] == [False, True]
    assert not build({"engine": "vllm", "behaviour_correction": False}).corrects_behaviour
    assert build({"behaviour_correction": True}).derived()["behaviour correction"].startswith("token weights")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "token weights (trainer / rollout engine), truncated at 2"),
        (
            {"behaviour_floor": 0.5, "behaviour_cap": 5.0},
            "token weights (trainer / rollout engine), truncated to [0.5, 5]",
        ),
        (
            {"behaviour_mode": "geometric_mask", "behaviour_floor": 0.5},
            "geometric weights (trainer / rollout engine), set to 0 outside [0.5, 2]",
        ),
        ({"behaviour_mode": "sequence_mask"}, "sequence weights (trainer / rollout engine), set to 0 above 2"),
        (
            {"behaviour_mode": "none", "geometric_floor": 0.9},
            "no weights; sequences masked where their geometric mean is outside [0.9, inf]",
        ),
    ],
)
def test_the_plan_says_how_behaviour_weights_are_bounded(values: dict, text: str) -> None:
    assert build({"behaviour_correction": True, **values}).derived()["behaviour correction"] == text


def test_later_layers_win() -> None:
    assert build({"steps": 3, "seed": 1}, {"steps": 5}).values() == {**build().values(), "steps": 5, "seed": 1}


def test_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = tiny.config(method="gold", prompt_template="Q: {question}\n", iqr_filter=False)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert build(read_yaml(tmp_path / "c.yaml")) == config


def test_yaml_may_write_numbers_without_a_point(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-6\nmax-grad-norm: 2\n")
    config = build(read_yaml(tmp_path / "c.yaml"))
    assert (config.optim.learning_rate, config.optim.max_grad_norm) == (1e-6, 2.0)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just text"])
def test_files_that_are_no_options(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"config: expected .*c\.yaml"):
        read_yaml(tmp_path / "c.yaml")


def test_command_line_over_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"steps": 7, "seed": 3, "method": "srt"}))
    config, output, resume, dry_run, *_ = command.read_command_line(["--config", str(file), "--seed", "4", "--dry-run"])
    assert (config.optim.steps, config.run.seed, config.method.method) == (7, 4, "srt")
    assert output.parent == Path("runs")
    assert output.name.startswith("srt-")
    assert (resume, dry_run) == (False, True)


def preset(name: str) -> dict[str, object]:
    return build(read_yaml(find_config(name)), {"data": "x.jsonl"}).values()


def test_presets_hold_their_papers_numbers() -> None:
    assert {each.stem for each in PRESETS.glob("*.yaml")} == {
        *("paper", "srt", "ttrl", "single_24gb", "gsm8k", "half", "excess", "steady")
    }
    paper = {
        **build().values(),
        "model": "Qwen/Qwen3-4B-Base",
        "dtype": "bfloat16",
        "data": "x.jsonl",
        "momentum_rollouts": 8,
    }
    assert preset("paper") == paper  # the defaults are the paper's
    srt, ttrl = preset("srt"), preset("ttrl")
    differing = {"method": "srt", "momentum_rollouts": None}
    assert srt == {**paper, **differing}  # the method alone differs
    assert ttrl == {**paper, **differing, "method": "ttrl", "rollouts": 64}
    small = build(read_yaml(find_config("single_24gb")), {"data": "x.jsonl"})
    assert (small.rollout.rollouts, small.momentum_rollouts, small.needs_reference) == (16, 4, "momentum")
    questions = build(read_yaml(find_config("gsm8k")), {})
    assert (questions.rollout.rollouts, questions.momentum_rollouts, questions.needs_reference) == (16, 8, "momentum")


def test_every_line_of_a_preset_says_where_it_is_from() -> None:
    for file in PRESETS.glob("*.yaml"):
        for line in file.read_text().splitlines():
            assert line.startswith("#") or "# [" in line, (file.name, line)


def test_a_file_wins_over_a_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("paper") == PRESETS / "paper.yaml"
    (tmp_path / "paper").write_text("steps: 3\n")
    assert read_yaml(find_config("paper")) == {"steps": 3}
    with pytest.raises(
        UsageError,
        match="config: expected a YAML file that exists, or a preset .excess, gsm8k, half, paper, single_24gb, srt, steady, ttrl., got 'papr'",
    ):
        find_config("papr")


def test_unknown_yaml_key_ends_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("lerning_rate: 1\n")
    assert command.main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert (
        "error: lerning_rate: expected one of the options that --help lists, got an unknown one; did you mean --learning-rate?"
        in capsys.readouterr().err
    )


def test_resume_wants_an_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--resume"]) == 2
    assert "resume: expected --output DIR" in capsys.readouterr().err


OPTIONS = {name: option for section in SECTIONS.values() for name, option in fields_of(section).items()}
NUMBERS = [name for name, option in OPTIONS.items() if {int, float, PAIR} & set(option.kinds)]
DIMENSIONLESS = (
    "share",
    "ratio",
    "factor",
    "coefficient",
    "weight",
    "decay",
    "rank",
    "temperature",
    "learning rate",
    "norm",
    "exponents",
    "rates",
    "random seed",
    "threshold",
    "number",
)
"""Words that say what a number without a unit is."""


def groups(parser: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
    return {str(group.title): group._group_actions for group in parser._action_groups if group._group_actions}


def test_help_describes_every_option_with_its_default() -> None:
    text = " ".join(command.make_parser().format_help().split())
    for name, option in OPTIONS.items():
        assert f"--{name.replace('_', '-')}" in text
        assert " ".join(option.field.metadata["help"].split())[:30] in text
    for shown in (
        "(default: 1e-06)",
        "(default: 3072 tokens)",
        "(default: 1 step)",
        "(default: the small built-in model)",
        "(default: 2.0 3.0)",
        "(default: on)",
    ):
        assert shown in text


@pytest.mark.parametrize("name", OPTIONS)
def test_a_help_text_can_be_read_alone(name: str) -> None:
    option = OPTIONS[name]
    text, unit = option.field.metadata["help"], option.field.metadata["unit"]
    assert len(text.split()) >= 4
    assert not text.endswith(".")
    assert text.split()[0] not in {"of", "its", "it", "only", "after", "with", "one"}, "continues another sentence"
    assert option.if_none or option.field.default is not None or "none: " in text, "what happens without a value?"
    if name in NUMBERS:
        assert unit or any(word in text for word in DIMENSIONLESS), "which unit, or what kind of number?"


@pytest.mark.parametrize("make_parser", [command.make_parser, evaluate.make_parser])
def test_the_most_used_options_come_first(make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    (title, first), *others = groups(make_parser()).items()
    assert title == "most used options"
    assert all(action.help and "(" in action.help for action in first)  # with a default, or "(required)"
    assert {action.dest for action in first} >= {"config", "model", "output", "engine"}
    assert len({action.dest for _, group in others for action in group} & {action.dest for action in first}) == 0
    assert max(len(group) for _, group in others) <= 20


def test_ten_options_of_training_come_first() -> None:
    first = next(iter(groups(command.make_parser()).values()))
    assert [action.dest for action in first] == [
        "config",
        "model",
        "data",
        "method",
        "output",
        "steps",
        "prompts_per_step",
        "rollouts",
        "learning_rate",
        "engine",
    ]


def test_short_help_is_the_first_group_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["-h"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert len(text.splitlines()) <= 50
    for action in next(iter(groups(command.make_parser()).values())):
        assert action.option_strings[0] in text
    assert "--temperature" not in text
    assert "--help describes every option" in text


def test_help_of_the_evaluation_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = evaluate.make_parser().format_help().splitlines()
    assert max(map(len, lines[2:])) <= 80, [line for line in lines[2:] if len(line) > 80]
    assert "examples:" in lines


def test_help_fits_80_columns_and_names_every_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = command.make_parser().format_help().splitlines()
    assert max(map(len, lines)) <= 80, [line for line in lines if len(line) > 80]
    text = " ".join(" ".join(lines).split())
    for section in SECTIONS.values():
        assert f"{(section.__doc__ or '').rstrip('.')}:" in lines
        for name, option in fields_of(section).items():
            for choice in option.choices or ():
                assert choice in text, (name, choice)
    start = next(number for number, line in enumerate(lines) if line.startswith("methods, for --method"))
    named = [line.split()[0] for line in lines[start + 1 :] if re.match(r"  \S", line)]  # a text goes on further right
    assert named[: len(METHODS)] == list(METHODS)


def test_every_preset_has_a_description() -> None:
    for name, text in preset_descriptions().items():
        assert 20 <= len(text) <= 65, name
        assert not text.endswith("."), name


@pytest.mark.parametrize(
    ("literal", "table"),
    [
        (MethodName, METHODS),
        (EngineName, ENGINES),
        (LossName, LOSS_TYPES),
        (Reduction, REDUCTIONS),
        (EquivalenceName, EQUIVALENCES),
    ],
)
def test_a_literal_type_names_the_entries_of_its_table(literal: object, table: Iterable[str]) -> None:
    assert typing.get_args(literal) == tuple(table)


@pytest.mark.parametrize(("warmup", "steps", "wanted"), [(0.1, 15, 2), (0.1, 500, 50), (0.01, 20, 1), (0.0, 20, 0)])
def test_a_part_of_a_step_of_warm_up_is_a_whole_one(warmup, steps, wanted):
    assert build({"warmup": warmup, "steps": steps}).optim.warmup_steps == wanted
