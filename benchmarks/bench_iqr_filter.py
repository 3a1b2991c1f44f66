"""The IQR filter: kilobytes, so the cost is launches. The eager form is what one writes with torch.quantile."""

import pytest
import torch
from harness import DEVICE, measure

from mgrpo_kernels import iqr_filter

PROMPTS, GROUP = 512, 32


def ours(entropy):
    return iqr_filter(entropy, GROUP).keep


def eager(entropy):
    groups = entropy.view(-1, GROUP)
    q1, q3 = torch.quantile(groups, torch.tensor([0.25, 0.75], device=entropy.device), dim=1)
    return (groups >= (q1 - 0.75 * (q3 - q1)).unsqueeze(1)).view(-1)


PROVIDERS = {"ours": ours, "eager": eager}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_iqr_filter(benchmark, provider):
    torch.manual_seed(0)
    entropy = torch.rand(PROMPTS * GROUP, device=DEVICE)
    function = PROVIDERS[provider]
    assert torch.equal(function(entropy), eager(entropy))
    measure(benchmark, lambda: function(entropy), ceiling=lambda: eager(entropy), ceiling_name="eager", rounds=20)
