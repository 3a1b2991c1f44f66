"""Methods that ask a question in two wordings, on TRL's GRPOTrainer: groups that are split over two processes, and vLLM's server mode."""

import random

import pytest
import tiny_trl
import torch
from datasets import Dataset
from test_trl_mgrpo import first_digit, two_processes
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer
from trl.generation import vllm_generation

from mgrpo_kernels.integrations.trl import MGRPOConfig, MGRPOTrainer
from mgrpo_kernels.train.data import demo

P, G = 3, 8
TWICE = ("co_rewarding_1", "self_harmony", "co_rewarding_3")  # the last asks the momentum model the second wording


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_trl.make_base(tmp_path_factory.mktemp("base"))


def questions():
    return [{"prompt": each.prompt, "paraphrase": "=" + each.prompt} for each in demo.make_task(0).train[:P]]


def trainer_of(base, place, method, **changes):
    options = {
        "method": method,
        "num_generations": G,
        "per_device_train_batch_size": G,
        "gradient_accumulation_steps": P,
        "equivalence": "exact",
        "beta": 0.0,
        "min_votes": 1,
        **changes,
    }
    return MGRPOTrainer(
        base,
        None,
        MGRPOConfig(**tiny_trl.settings(place, **options)),
        train_dataset=Dataset.from_list(questions()),
        extract=first_digit,
    )


def examples():
    return [each for each in questions() for _ in range(G)]


def script(trainer, first, number, monkeypatch):
    """Have TRL's generation say what it said for the rows `first` and the next of all of them, and check what each of them is asked."""
    draw = random.Random(0)
    symbols = {character: index + 2 for index, character in enumerate(demo.CHARACTERS)}
    whole = [[symbols[draw.choice("0123")], 1] for _ in range(P * G)]
    asked = examples()

    def _generate_single_turn(self, prompt_ids, images, fields, copies, has_tool_images=False):
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in prompt_ids]
        second = texts[0].startswith("=")
        rows = [row for row in range(first, first + number) if (row % G >= G // 2) == second]
        assert texts == [asked[row]["paraphrase" if second else "prompt"] for row in rows]
        assert copies == G // 2
        assert self.momentum._swapped == (second and self.momentum_rollouts > 0)
        return [whole[row] for row in rows], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", _generate_single_turn)
    trainer.model.train()


def test_groups_split_over_two_processes(base, tmp_path, monkeypatch):
    wanted = {}
    for method in TWICE:
        trainer = trainer_of(base, tmp_path / method, method)
        script(trainer, 0, P * G, monkeypatch)
        output = trainer._generate_and_score_completions(examples())
        assert output["advantages"].any()
        wanted[method] = {name: output[name] for name in ("advantages", "completion_mask", "num_items_in_batch")}
    torch.save(wanted, tmp_path / "wanted.pt")
    two_processes("wordings_on_two.py", base, tmp_path / "wanted.pt", tmp_path / "two")


class Server:
    """Stands for TRL's client of a vLLM server: it samples with the weights that it was sent last, and notes what it was asked."""

    def __init__(self, base_url, group_port, connection_timeout):
        self.calls, self.model = [], None

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, parameters):
        found = dict(parameters)
        assert {name for name, _, _ in metadata} == set(found)
        self.model.load_state_dict(found)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, features, n, temperature, max_tokens, **_):
        self.calls.append((prompts, n, self.model.lm_head.weight.detach().clone()))
        completions, logprobs = [], []
        for prompt in prompts:
            for _ in range(n):
                ids, said = list(prompt), []
                while len(said) < max_tokens and ids[-1] != 1:
                    logits = self.model(torch.tensor([ids])).logits[0, -1].detach() / temperature
                    ids.append(int(torch.multinomial(logits.softmax(-1), 1)))
                    said.append([float(logits.log_softmax(-1)[ids[-1]])])
                completions.append(ids[len(prompt) :])
                logprobs.append(said)
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": logprobs}


@pytest.mark.parametrize("method", TWICE)
def test_a_vllm_server_answers_both_wordings(base, tmp_path, monkeypatch, method):
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", Server)
    trainer = trainer_of(
        base, tmp_path, method, use_vllm=True, vllm_mode="server", max_steps=2, max_completion_length=4
    )
    server = trainer.vllm_generation.vllm_client
    server.model = AutoModelForCausalLM.from_pretrained(base)
    heads = [trainer.model.lm_head.weight.detach().clone()]
    with torch.no_grad():
        trainer.momentum.ema["lm_head/weight"].mul_(0.5)
    averages = [trainer.momentum.ema["lm_head/weight"].clone()]
    step = trainer.momentum.advance

    def advance(*arguments, **options):
        found = step(*arguments, **options)
        heads.append(trainer.model.lm_head.weight.detach().clone())
        averages.append(trainer.momentum.ema["lm_head/weight"].clone())
        return found

    monkeypatch.setattr(trainer.momentum, "advance", advance)
    trainer.train()
    assert len(server.calls) == 4  # two wordings in each of two steps
    for number, (prompts, copies, head) in enumerate(server.calls):
        texts = [trainer._tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
        assert copies == G // 2
        assert len(texts) == P
        assert all(text.startswith("=") == (number % 2 == 1) for text in texts)
        by_momentum = method == "co_rewarding_3" and number % 2 == 1
        torch.testing.assert_close(head, (averages if by_momentum else heads)[number // 2])
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    assert all(line["grad_norm"] > 0 for line in lines)
    assert {key for key in lines[0] if "sampling_logp_difference/max" in key}
    if method != "co_rewarding_3":  # the policy's own log-probs, from the server and from the trainer
        assert max(line["sampling/sampling_logp_difference/max"] for line in lines) < 1e-4
