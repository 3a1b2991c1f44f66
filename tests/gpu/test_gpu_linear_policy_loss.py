"""From hidden states to the loss on the device: where it fuses, where it composes, over one block of rows and over many."""

import pytest
import torch
from on_device import CPU, DEVICE, NAN, hold, pick, run
from torch.nn.functional import linear

from mgrpo_kernels import linear_policy_loss, linear_token_stats, policy_loss, token_stats_from_logits
from mgrpo_kernels.ops.policy_loss.specs import LOSS_TYPES

SEQUENCES, LENGTH = pick((8, 160), (4, 7))
WIDTH, VOCAB = pick((64, 10007), (16, 501))
SMALL = pick(2**20, 2**16)  # bytes of workspace: about 50 (small: 60) rows in a block
HEAD = {"temperature": 0.9, "softcap": 8.0}


def batch(dtype, *, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(SEQUENCES, LENGTH, WIDTH).to(dtype)
    weight = (torch.randn(VOCAB, WIDTH) * 2.5 * WIDTH**-0.5).to(dtype)
    labels = torch.randint(0, VOCAB, (SEQUENCES, LENGTH))
    added = torch.randn(VOCAB).to(dtype) if bias else None
    mask = torch.rand(SEQUENCES, LENGTH) > 0.3
    mask[2] = False
    # Ratios stand well off every limit: rounding must not push a token over one, where the gradient jumps.
    wide = [None if each is None else each.double() for each in (hidden, weight, added)]
    logprob = linear_token_stats(*wide[:2], labels, bias=wide[2], **HEAD, backend="reference").logprob
    old = (logprob + torch.tensor([-0.5, 0.0, 0.5])[torch.randint(0, 3, labels.shape)]).float()
    behaviour = old + torch.tensor([-1.0, 0.3])[torch.randint(0, 2, labels.shape)]
    inputs = {
        "hidden": hidden,
        "weight": weight,
        "bias": added,
        "labels": labels,
        "mask": mask,
        "old": old,
        "ref_logprobs": old + 0.1 * torch.randn(labels.shape),
        "behaviour_logprobs": behaviour,
        "advantages": torch.randn(SEQUENCES),
    }
    for values in (hidden, old, behaviour, inputs["ref_logprobs"]):
        values[~mask] = NAN
    labels[~mask] = -100
    for name in ("hidden", "weight", "bias"):
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    return inputs


def loss(inputs, backend, *, form="fused", workspace_bytes=None, **options):
    hidden, weight, labels, mask, bias = (inputs[name] for name in ("hidden", "weight", "labels", "mask", "bias"))
    options = {
        "mask": mask,
        "ref_logprobs": inputs["ref_logprobs"],
        "kl_coef": 0.1,
        "max_response_tokens": LENGTH,
        "behaviour_logprobs": inputs["behaviour_logprobs"],
        **options,
    }
    rest = inputs["old"], inputs["advantages"]
    if form == "fused" and backend != "plain":
        result = linear_policy_loss(
            hidden,
            weight,
            labels,
            *rest,
            bias=bias,
            **HEAD,
            workspace_bytes=workspace_bytes,
            backend=backend,
            **options,
        )
        return result.loss, *result.metrics.values()
    if backend == "plain":
        y = linear(torch.where(mask.unsqueeze(-1), hidden, 0.0), weight, bias).float()
        y = HEAD["softcap"] * torch.tanh(y / HEAD["softcap"])
        stats = token_stats_from_logits(y, labels, temperature=HEAD["temperature"], mask=mask, backend="reference")
        backend = "reference"
    else:
        stats = linear_token_stats(
            hidden, weight, labels, bias=bias, **HEAD, mask=mask, workspace_bytes=workspace_bytes, backend=backend
        )
    entropy = stats.entropy if options.get("entropy_coef") else stats.entropy.detach()
    result = policy_loss(stats.logprob, *rest, entropy=entropy, backend=backend, **options)
    return result.loss, *result.metrics.values()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("blocks", ["one block", "many blocks"])
def test_loss_types(loss_type, blocks):
    options = {
        "loss_type": loss_type,
        "entropy_coef": 0.02 * (LOSS_TYPES.index(loss_type) % 2),
        "workspace_bytes": SMALL if blocks == "many blocks" else None,
    }
    inputs = batch(torch.float32)
    got = hold(
        lambda inputs, backend: loss(inputs, backend, **options), inputs, plain="plain", floor=2e-5
    )  # scalars: one draw each
    composed = run(lambda inputs, backend: loss(inputs, backend, form="composed", **options), inputs, DEVICE, "triton")
    for name, value in composed.items():
        torch.testing.assert_close(
            got[name],
            value,
            rtol=1e-3,
            atol=1e-4 * value.abs().max().item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert (got["gradient of hidden"][~inputs["mask"]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace", [None, SMALL])
def test_16_bits(dtype, workspace):
    """Gradients against the truth; a scalar's error is one draw, so the loss is held to a bound instead."""
    inputs = batch(dtype, bias=False)
    options = {"loss_type": "dapo", "workspace_bytes": workspace}
    truth, plain, got = (
        run(
            lambda inputs, backend: loss(inputs, backend, **options),
            inputs,
            device,
            backend,
            wide=backend == "reference",
        )
        for device, backend in ((CPU, "reference"), (DEVICE, "plain"), (DEVICE, "triton"))
    )
    for name in ("gradient of hidden", "gradient of weight"):
        error, usual = ((each[name].double() - truth[name]).square().mean().sqrt() for each in (got, plain))
        # Fused, the gradient is rounded once with the loss's own scale in it, and again with the upstream factor.
        assert error <= 1.5 * usual + 1e-5 * truth[name].square().mean().sqrt(), (
            f"{name}: error {error:.3e}, plain PyTorch's {usual:.3e}"
        )
    assert abs(got["output 0"].double() - truth["output 0"]) < 2e-2


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen(frozen):
    inputs = batch(torch.bfloat16, bias=False)
    whole = run(loss, inputs, DEVICE, "triton")
    part = run(loss, inputs | {frozen: inputs[frozen].detach()}, DEVICE, "triton")
    (left,) = {"hidden", "weight"} - {frozen}
    assert f"gradient of {frozen}" not in part
    torch.testing.assert_close(part[f"gradient of {left}"], whole[f"gradient of {left}"], rtol=1e-2, atol=1e-5)
