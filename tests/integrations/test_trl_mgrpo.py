"""M-GRPO on TRL's GRPOTrainer: the same rollouts give what our own trainer makes of them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_trl
import torch
from absent import need
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from mgrpo_kernels import MomentumModel, group_advantages, policy_loss
from mgrpo_kernels.integrations import trl as integration
from mgrpo_kernels.integrations.trl import MGRPOConfig, MGRPOTrainer
from mgrpo_kernels.integrations.trl.columns import reworded
from mgrpo_kernels.integrations.trl.scoring import completion_stats
from mgrpo_kernels.integrations.trl.trainer import MOMENTUM_FILE, _text
from mgrpo_kernels.method import METHODS
from mgrpo_kernels.train import step as steps
from mgrpo_kernels.train.config import build
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.ending import leave
from mgrpo_kernels.train.model.policy import load_policy
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts
from mgrpo_kernels.train.run.learner import make_learner
from mgrpo_kernels.vote.extraction import read_answers

P, G, N = 3, 8, 2
HERE = Path(__file__).parent


def process(*arguments, **variables):
    """Run Python on a script of this folder, which finds what the tests share."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def two_processes(script, *arguments):
    """Run a script of this folder on two ranks; each is to end with :func:`train_alike`."""
    forked = HERE.parent / "forked_ranks.py"
    done = process(forked, "trl.trainer.grpo_trainer", HERE / script, *arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same") == 2


def train_alike(trainer):
    """Train on this rank of two, and check that both have the same momentum model then."""
    trainer.train()
    average = trainer.momentum.ema["lm_head/weight"]
    other = [torch.empty_like(average) for _ in range(2)]
    torch.distributed.all_gather(other, average)
    assert torch.equal(other[0], other[1])
    assert any(line.get("grad_norm", 0) > 0 for line in trainer.state.log_history)
    print("the same")
    torch.distributed.destroy_process_group()
    leave(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_trl.make_base(tmp_path_factory.mktemp("base"))


def settings(place, **changes):
    options = {
        "num_generations": G,
        "momentum_rollouts": N,
        "per_device_train_batch_size": G,
        "gradient_accumulation_steps": P,
        "equivalence": "exact",
        "beta": 0.0,
        "decay": 0.9,
        **changes,
    }
    return tiny_trl.settings(place, **options)


def trainer_of(base, place, reward_funcs=None, **changes):
    changes.setdefault("iqr_k", 0.25)
    extract = changes.pop("extract", demo.after_hash)
    eval_dataset = changes.pop("eval_dataset", None)
    return MGRPOTrainer(
        base,
        reward_funcs,
        MGRPOConfig(**settings(place, **changes)),
        train_dataset=tiny_trl.prompts(),
        eval_dataset=eval_dataset,
        extract=extract,
    )


def responses(seed=0):
    """Return the scripted rollouts: prompt -> sampler -> token rows, most of which answer; some are cut short of their end."""
    draw = random.Random(seed)
    symbols = {character: number + 2 for number, character in enumerate(demo.CHARACTERS)}

    def one(favourite):
        digit = favourite if draw.random() < 0.6 else str(draw.randrange(10))
        text = "".join(draw.choice("0123456789+=") for _ in range(draw.randrange(6))) + "#" + digit
        return [symbols[character] for character in text] + ([1] if draw.random() < 0.8 else [])

    return [{True: [one(str(p)) for _ in range(N)], False: [one(str(p)) for _ in range(G - N)]} for p in range(P)]


def shake(momentum):
    torch.manual_seed(5)
    for name in sorted(momentum.ema, key=lambda name: name.replace("/", ".")):
        momentum.ema[name].mul_(1 + 0.3 * torch.randn_like(momentum.ema[name]))


def own_trainers(base, script, monkeypatch, **options):
    """Return what our trainer's step makes of the script: rewards, who trains, advantages."""
    config = build(
        {
            **demo.OPTIONS,
            "prompts_per_step": P,
            "rollouts": G,
            "momentum_rollouts": N,
            "kl_reference": "none",
            "iqr_k": 0.25,
            "iqr_min_spread": 0.0,
            "kl_coef": 0.0,
            **options,
        }
    )
    learner = make_learner(config, demo.make_task(0), load_policy(base, torch.device("cpu"), torch.float32))
    shake(learner.momentum)

    class Scripted(RolloutEngine):
        def sample(self, prompts, copies, *, momentum=None, **_):
            rows = [row for each in script for row in each[momentum is not None][:copies]]
            width = max(map(len, rows))
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
            return Rollouts(tokens, mask, torch.zeros(mask.shape), torch.tensor([row[-1] == 1 for row in rows]))

    seen = {}

    class Enough(Exception):
        pass

    def training_batch(learner, rollouts, stats, own, selection):
        seen.update(selection._asdict())
        raise Enough

    learner.engine = Scripted()
    monkeypatch.setattr(steps, "training_batch", training_batch)
    with pytest.raises(Enough):
        steps.train_step(learner, learner.task.train[:P], 1)
    return seen


def script_generation(trainer, script, monkeypatch):
    """Have TRL's generation say the script, and record the head that it would have sampled with."""
    heads = []

    def _generate_single_turn(self, prompt_ids, images, fields, copies, has_tool_images=False):
        momentum = self.momentum._swapped
        heads.append((momentum, copies, self.model.lm_head.weight.clone()))
        if self.use_vllm and self._last_loaded_step != self.state.global_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        rows = [row for each in script for row in each[momentum]]
        assert len(rows) == len(prompt_ids)
        return rows, [[-1.0] * len(row) for row in rows] if self.use_vllm else None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", _generate_single_turn)
    return heads


def examples(trainer):
    return [{"prompt": each.prompt} for each in demo.make_task(0).train[:P] for _ in range(G)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"filter_scope": "vote", "entropy_reduction": "sum"},
        {"filter_scope": "penalise", "momentum_scored_by": "policy"},
        {"iqr_filter": False, "min_share": 0.5},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_given_rollouts_have_our_trainers_rewards_and_advantages(base, tmp_path, monkeypatch, options):
    script = responses()
    want = own_trainers(base, script, monkeypatch, **options)
    trainer = trainer_of(base, tmp_path, **options)
    shake(trainer.momentum)
    script_generation(trainer, script, monkeypatch)
    rewards = []
    kept = trainer.__class__._calculate_rewards

    def _calculate_rewards(self, *arguments):
        found = kept(self, *arguments)
        rewards.append(self._selection.rewards)
        return found

    monkeypatch.setattr(MGRPOTrainer, "_calculate_rewards", _calculate_rewards)
    trainer.model.train()
    output = trainer._generate_and_score_completions(examples(trainer))
    trains = output["completion_mask"].bool().any(1)
    assert torch.equal(trains, want["trains"])
    assert torch.equal(rewards[0][trains], want["rewards"][trains])
    torch.testing.assert_close(output["advantages"], want["advantages"], rtol=1e-5, atol=1e-6)
    assert output["advantages"].abs().sum() > 1
    policies = (torch.arange(P * G) % G) < G - N
    assert not trains[~policies].any()
    pruned = trainer._metrics["train"].get("mgrpo/pruned_fraction", [0])[-1]
    assert (pruned > 0) == options.get("iqr_filter", True)
    assert (trains.sum() < policies.sum()) == (options == {})
    assert output["num_items_in_batch"] == sum(
        len(row) for p, each in enumerate(script) for i, row in enumerate(each[False]) if trains[p * G + i]
    )
    assert output["sequences_in_batch"] == trains.sum()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "luspo", "gmpo"])
def test_rollouts_that_do_not_train_have_no_part_in_the_loss(base, tmp_path, monkeypatch, loss_type):
    trainer = trainer_of(
        base,
        tmp_path,
        loss_type=loss_type,
        per_device_train_batch_size=P * G,
        gradient_accumulation_steps=1,
        epsilon=0.1,
    )
    script_generation(trainer, responses(), monkeypatch)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions(examples(trainer))
    torch.manual_seed(0)
    old = inputs["old_per_token_logps"] = -2 + torch.randn(inputs["completion_mask"].shape)
    loss = trainer._compute_loss(trainer.model, inputs)
    ids, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
    rows = mask.any(1)
    assert 0 < rows.sum() < P * (G - N)
    with torch.no_grad():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], ids], 1)[rows],
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[rows],
            ids.shape[1],
        )
    want = policy_loss(
        logprobs,
        old[rows],
        inputs["advantages"][rows],
        mask=mask[rows],
        loss_type=loss_type,
        clip_low=0.1,
        clip_high=0.1,
        max_response_tokens=10,
    ).loss
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert abs(want) > 1e-3


class FakeEngine:
    """Stands for TRL's vLLM engine: it only notes which weights it was given last."""

    def __init__(self, model):
        self.model, self.heads = model, []

    def sync_weights(self):
        self.heads.append(self.model.lm_head.weight.clone())


@pytest.mark.parametrize("vllm", [False, True])
def test_momentum_rollouts_come_from_the_momentum_models_weights(base, tmp_path, monkeypatch, vllm):
    trainer = trainer_of(base, tmp_path)
    shake(trainer.momentum)
    if vllm:
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, FakeEngine(trainer.model), -1
        trainer.vllm_importance_sampling_correction = False
    heads = script_generation(trainer, responses(), monkeypatch)
    before = tiny_trl.weights(trainer.model)
    trainer.model.train()
    for _ in range(2):
        trainer._generate_and_score_completions(examples(trainer))
    assert [(momentum, copies) for momentum, copies, _ in heads] == [(False, G - N), (True, N)] * 2
    average = trainer.momentum.ema["lm_head/weight"]
    for momentum, _, head in heads:
        assert torch.equal(head, average if momentum else before["lm_head.weight"])
    assert not torch.equal(average, before["lm_head.weight"])
    if vllm:  # the engine was given the weights that each part is sampled with
        assert [torch.equal(a, b) for a, (_, _, b) in zip(trainer.vllm_generation.heads, heads, strict=True)] == [
            True
        ] * 4
        assert trainer._last_loaded_step == -1  # the policy's weights come back before it is sampled again
    assert all(torch.equal(value, before[name]) for name, value in tiny_trl.weights(trainer.model).items())


def test_momentum_rollouts_come_from_vllm(tmp_path):
    need("vllm", "make vllm")
    # 32 is the least width of a head that vLLM has for a CPU.
    base = tiny_trl.make_base(tmp_path / "base", num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    done = process(HERE / "mgrpo_on_vllm.py", base, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == 2 * P * G  # before and after the steps
    assert found["own"] < 1e-5
    assert found["other"] > 0.01
    assert found["moved"] > 1e-4
    assert found["gradients"][0] > 0
    assert len(found["gradients"]) == 3


def first_digit(text):
    return next((character for character in text if character.isdigit()), None)


class Watch(TrainerCallback):
    def __init__(self):
        self.heads = []

    def on_optimizer_step(self, args, state, control, model=None, **_):
        self.heads.append(model.lm_head.weight.detach().clone())


def test_a_run_moves_policy_and_momentum_and_resumes_to_the_same(base, tmp_path):
    def start(place, **changes):
        trainer = trainer_of(
            base, place, max_steps=4, save_strategy="steps", save_steps=2, beta=0.02, extract=first_digit, **changes
        )
        trainer.add_callback(watch := Watch())
        return trainer, watch

    whole, watch = start(tmp_path / "whole")
    average = whole.model.lm_head.weight.detach().clone()
    with integration.patched(strict=True):
        whole.train()
    for head in watch.heads:
        average = 0.9 * average + 0.1 * head
    torch.testing.assert_close(whole.momentum.ema["lm_head/weight"], average, rtol=1e-5, atol=1e-6)
    assert whole.momentum.updates == 4
    lines = [line for line in whole.state.log_history if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        assert 0 < line["mgrpo/momentum_distance"] < 1
        assert 0 <= line["mgrpo/pruned_fraction"] < 0.5
        assert line["mgrpo/training_fraction"] <= 1 - N / G
        assert 0 < line["mgrpo/vote_share"] <= 1
        assert line["grad_norm"] > 0
        assert "rewards/majority_vote_reward/mean" in line

    saved = torch.load(tmp_path / "whole" / "checkpoint-2" / MOMENTUM_FILE, weights_only=True)
    assert saved["updates"] == 2
    resumed, _ = start(tmp_path / "resumed")
    loaded = []

    class AtStart(TrainerCallback):
        def on_train_begin(self, *_, **__):
            loaded.append({name: value.clone() for name, value in resumed.momentum.ema.items()})

    resumed.add_callback(AtStart())
    with integration.patched(strict=True):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(loaded[0][name], value) for name, value in saved["ema"].items())
    assert resumed.momentum.updates == 4
    for (
        name,
        value,
    ) in whole.momentum.ema.items():  # rollouts, filter, vote and steps after the resume are those of the whole run
        torch.testing.assert_close(resumed.momentum.ema[name], value, rtol=1e-5, atol=1e-6)

    Path(tmp_path / "whole" / "checkpoint-2" / MOMENTUM_FILE).unlink()
    foreign, _ = start(tmp_path / "foreign")
    with pytest.raises(
        ValueError, match=r"expected a checkpoint of MGRPOTrainer, with momentum.pt, got .*checkpoint-2"
    ):
        foreign.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_evaluated(base, tmp_path, method):
    momentum = {} if METHODS[method].momentum_share else {"momentum_rollouts": 0}
    data = tiny_trl.prompts().map(lambda row: {"answer": row["gold"], "paraphrase": "0+" + row["prompt"]})
    args = settings(tmp_path, **{"momentum_rollouts": None, "max_steps": 2, "beta": 0.0, "method": method, **momentum})
    trainer = MGRPOTrainer(
        base,
        None,
        MGRPOConfig(**args, per_device_eval_batch_size=G),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        extract=first_digit,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    # A step without a label has no accuracy of one.
    assert all(("mgrpo/label_accuracy" in line) == (line["mgrpo/labelled_fraction"] > 0) for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)
    found = trainer.evaluate()["eval_reward"]
    if method == "intuitor":  # of random logits it is above the log of the vocabulary's size
        assert found > 2.5
    elif method == "rent":
        assert found < 0
    else:
        assert METHODS[method].lowest <= found <= 1


def test_a_second_wording_that_is_missing_is_named(base, tmp_path):
    with pytest.raises(ValueError, match="paraphrase_field: expected one of the columns prompt, gold, got None"):
        trainer_of(base, tmp_path, method="self_harmony", momentum_rollouts=0)
    with pytest.raises(ValueError, match="paraphrase_field: expected None with method mgrpo, .* got 'gold'"):
        MGRPOConfig(**settings(tmp_path, paraphrase_field="gold"))
    with pytest.raises(ValueError, match="rollouts: expected at least 4 with method co_rewarding_1"):
        MGRPOConfig(
            **tiny_trl.settings(tmp_path, method="co_rewarding_1", num_generations=3, per_device_train_batch_size=3)
        )
    trainer = trainer_of(
        base, tmp_path, method="self_harmony", momentum_rollouts=0, paraphrase_field="gold", iqr_k=0.75
    )
    trainer.model.train()
    rows = [{"prompt": "1+1=", "gold": "  " if i == G - 1 else "+11="} for i in range(G)]
    with pytest.raises(
        ValueError, match="paraphrase_field: expected a text in the column 'gold' of every row, got '  '"
    ):
        trainer._generate_and_score_completions(rows)


def test_a_second_wording_of_messages_is_messages_or_the_text_of_the_last_one():
    system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2?"}
    rows = [
        {"prompt": [system, asked], "other": other} for other in ("2+1?", [{"role": "user", "content": "2+1?"}], "")
    ]
    first, second = reworded(rows[:2], torch.tensor([True, True]), "other")
    assert first["prompt"] == [system, {"role": "user", "content": "2+1?"}]
    assert second["prompt"] == [{"role": "user", "content": "2+1?"}]
    assert reworded(rows, torch.tensor([False] * 3), "other") == rows
    with pytest.raises(ValueError, match="paraphrase_field: expected messages or a text in the column 'other'"):
        reworded(rows, torch.tensor([True] * 3), "other")


def test_self_certainty_is_that_of_the_logits(base, tmp_path):
    trainer = trainer_of(base, tmp_path, method="intuitor", momentum_rollouts=0, iqr_k=0.75, temperature=0.7)
    rows = [([3, 4], [5, 6, 7]), ([3, 4, 8], [9])]
    got = completion_stats(trainer, rows, 4, ("entropy", "self_certainty"))
    for row, (prompt, ids) in enumerate(rows):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.7
        want = logits.logsumexp(-1) - logits.mean(-1)
        torch.testing.assert_close(got["self_certainty"][row, : len(ids)], want, rtol=1e-4, atol=1e-4)
        probability = logits.softmax(-1)
        torch.testing.assert_close(
            got["entropy"][row, : len(ids)], -(probability * probability.log()).sum(-1), rtol=1e-4, atol=1e-4
        )


def test_the_decay_rises_to_the_methods_own(base, tmp_path, monkeypatch):
    decays = []
    update = MomentumModel.update
    monkeypatch.setattr(
        MomentumModel, "update", lambda self, decay=None, **_: decays.append(decay) or update(self, decay)
    )
    trainer_of(base, tmp_path, method="co_rewarding", iqr_k=0.75, max_steps=3, extract=first_digit).train()
    assert decays == pytest.approx([0.9, (0.9 + 0.9999) / 2, 0.9999])


def test_a_column_of_true_answers_that_is_missing_is_named(base, tmp_path):
    with pytest.raises(ValueError, match="answer_field: expected one of the columns prompt, gold, got None"):
        trainer_of(base, tmp_path, method="gold", momentum_rollouts=0, iqr_k=0.75)
    with pytest.raises(ValueError, match="answer_field: expected .* got 'truth'"):
        trainer_of(base, tmp_path, answer_field="truth")
    assert trainer_of(base, tmp_path, answer_field="gold").answer_field == "gold"


def test_several_true_answers_and_missing_ones(base, tmp_path, monkeypatch):
    trainer = trainer_of(
        base, tmp_path, method="gold", momentum_rollouts=0, iqr_filter=False, answer_field="gold", iqr_k=0.75
    )
    script = responses()
    rows = [row for each in script for row in (*each[False], *each[True])]
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda self, prompts, *_, **__: (rows, None))
    trainer.model.train()
    cells = [["0", "1"], 1, ("2", None, "7")]
    given = [{"prompt": "1+1=", "gold": cells[i // G]} for i in range(P * G)]
    found = trainer._generate_and_score_completions(given)
    right = [{"0", "1"}, {"1"}, {"2", "7"}]
    finished = [trainer._is_finished(row) for row in rows]
    answers = read_answers(demo.after_hash, [trainer._decode(row) for row in rows], finished)
    rewards = torch.tensor([float(answer in right[i // G]) for i, answer in enumerate(answers)])
    torch.testing.assert_close(found["advantages"], group_advantages(rewards, G))
    with pytest.raises(
        TypeError, match="answer_field: expected a text, a number or a list of them as the true answer, got {'x': 1}"
    ):
        trainer._generate_and_score_completions([{"prompt": "1+1=", "gold": {"x": 1}}] * G)


def test_own_rewards_and_an_evaluation(base, tmp_path):
    seen = []

    def length(completions, **_):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    trainer = trainer_of(
        base, tmp_path, length, max_steps=1, eval_dataset=tiny_trl.prompts(2), per_device_eval_batch_size=G
    )
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert "rewards/length/mean" in line
    assert "mgrpo/vote_share" not in line
    assert "mgrpo/pruned_fraction" in line
    number = len(seen)
    found = trainer.evaluate()  # of the policy alone: nothing is pruned or swapped
    assert len(seen) == number + 2 * G
    assert found["eval_reward"] == pytest.approx(sum(map(len, seen[number:])) / (2 * G), rel=1e-4)


@pytest.mark.parametrize("name", ["mgrpo/vote_share", "reward", "entropy"])
def test_the_best_checkpoint_is_by_any_figure_of_an_evaluation(base, tmp_path, name):
    each_step = dict.fromkeys(("eval_strategy", "save_strategy"), "steps") | dict.fromkeys(
        ("eval_steps", "save_steps"), 1
    )
    trainer = trainer_of(
        base,
        tmp_path,
        eval_dataset=tiny_trl.prompts(2),
        extract=first_digit,
        per_device_eval_batch_size=G,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model=name,
        greater_is_better=name != "entropy",
        save_total_limit=1,
        **each_step,
    )
    trainer.train()
    found = {line["step"]: line[f"eval_{name}"] for line in trainer.state.log_history if f"eval_{name}" in line}
    assert list(found) == [1, 2, 3]
    best = (min if name == "entropy" else max)(found, key=found.__getitem__)
    place = tmp_path / f"checkpoint-{best}"
    assert trainer.state.best_model_checkpoint == str(place)
    assert (place / MOMENTUM_FILE).exists()
    saved = type(trainer.model).from_pretrained(place)
    assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in saved.state_dict().items())


def test_what_it_cannot_do_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="momentum_rollouts: expected at most 6 of 8 rollouts.*got 7"):
        MGRPOConfig(**settings(tmp_path, momentum_rollouts=7))
    with pytest.raises(ValueError, match="filter_scope"):
        MGRPOConfig(**settings(tmp_path, filter_scope="all"))
    with pytest.raises(ValueError, match="use_adaptive_entropy: expected False with M-GRPO, got True"):
        MGRPOConfig(**settings(tmp_path, use_adaptive_entropy=True))
    assert MGRPOConfig(**settings(tmp_path, momentum_rollouts=None)).momentum_rollouts == G // 2
    with pytest.raises(TypeError, match="args: expected MGRPOConfig, got GRPOConfig"):
        MGRPOTrainer(base, None, GRPOConfig(**tiny_trl.settings(tmp_path)), train_dataset=tiny_trl.prompts())
    with pytest.raises(ValueError, match="tools: expected None with MGRPOTrainer"):
        MGRPOTrainer(base, None, MGRPOConfig(**settings(tmp_path)), train_dataset=tiny_trl.prompts(), tools=[len])
    with pytest.raises(ValueError, match="train_momentum_rollouts: expected False with MGRPOTrainer"):
        MGRPOConfig(**settings(tmp_path, train_momentum_rollouts=True))
    with pytest.raises(ValueError, match="filter_scope: expected the IQR filter"):
        MGRPOConfig(**settings(tmp_path, iqr_filter=False, filter_scope="vote"))
    with pytest.raises(ValueError, match="vote_by: expected at least 2 prompts in each step with excess, .* got 1"):
        MGRPOConfig(**settings(tmp_path, vote_by="excess", gradient_accumulation_steps=1))
    with pytest.raises(ValueError, match="min_votes: expected at most 8, .* with method mgrpo, got 9"):
        MGRPOConfig(**settings(tmp_path, min_votes=G + 1))
    with pytest.raises(ValueError, match="reward_weights: expected None without reward_funcs"):
        trainer_of(base, tmp_path, reward_weights=[2.0])
    with pytest.raises(ValueError, match=r"got epsilon 1.5 is not in \[0, 1\]"):
        trainer_of(base, tmp_path, epsilon=1.5)
    with pytest.raises(ValueError, match="got loss_type 'dppo_tv' is not one of grpo, .*, gmpo"):
        trainer_of(base, tmp_path, loss_type="dppo_tv")
    with pytest.raises(ValueError, match="got delta 1.5 has no effect on loss_type 'gmpo', which needs None"):
        trainer_of(base, tmp_path, loss_type="gmpo", delta=1.5)


def test_the_text_of_a_chat_completion():
    assert _text([{"role": "assistant", "content": "so #"}, {"role": "assistant", "content": "4"}]) == "so #4"
    assert _text("#4") == "#4"


def test_a_group_split_over_two_processes(base, tmp_path, monkeypatch):
    trainer = trainer_of(base, tmp_path / "one", per_device_train_batch_size=P * G, gradient_accumulation_steps=1)
    shake(trainer.momentum)
    script_generation(trainer, responses(), monkeypatch)
    trainer.model.train()
    output = trainer._generate_and_score_completions(examples(trainer))
    want = {
        "advantages": output["advantages"],
        "trains": output["completion_mask"].bool().any(1),
        "tokens": output["num_items_in_batch"],
    }
    torch.save(want, tmp_path / "want.pt")
    two_processes("mgrpo_on_two.py", base, tmp_path / "want.pt", tmp_path / "two")
