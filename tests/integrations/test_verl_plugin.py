"""verl loading the plugin by itself, in processes of their own: what it does, and how it fails."""

import tomllib
from concurrent.futures import ThreadPoolExecutor

import pytest
from installed_peers import ROOT, environment, need, python

need("verl")

MODULE = "mgrpo_kernels.integrations.verl_plugin"
LOOK = """
import verl
from verl.trainer.ppo import core_algos
from verl.utils.kernel import linear_cross_entropy as kernel
import sys
print("head", getattr(getattr(kernel, "linear_cross_entropy", None), "__module__", None))
print("loss", "mgrpo_kernels" in core_algos.POLICY_LOSS_REGISTRY)
print("vanilla", core_algos.compute_policy_loss_vanilla.__module__)
print("plugin", "mgrpo_kernels.integrations.verl_plugin" in sys.modules)
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return processes that import verl, by name: one plain, two whose kernel has moved before the plugin looks for it."""
    folder = tmp_path_factory.mktemp("site")
    declared = folder / "a_plugin-1.dist-info"  # as of an installed package, whatever the environment has
    declared.mkdir()
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1\n")
    (declared / "entry_points.txt").write_text(f"[verl.plugins]\nmgrpo_kernels = {MODULE}\n")
    (folder / "moved.py").write_text(
        "from verl.utils.kernel import linear_cross_entropy as module\ndel module.linear_cross_entropy\n"
    )
    calls = {
        "plain": environment(folder),
        "moved": environment(folder, VERL_USE_EXTERNAL_MODULES="moved"),
        "named": environment(folder, VERL_USE_EXTERNAL_MODULES=f"moved,{MODULE}"),
    }
    with ThreadPoolExecutor() as pool:
        return dict(zip(calls, pool.map(lambda env: python("-c", LOOK, env=env), calls.values()), strict=True))


def test_the_package_declares_it():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    assert declared == {"mgrpo_kernels": MODULE}


def test_verl_loads_it(done):
    assert done["plain"].returncode == 0, done["plain"].stderr
    want = "head mgrpo_kernels.integrations.verl\nloss True\nvanilla verl.trainer.ppo.core_algos\nplugin True"
    assert want in done["plain"].stdout


def test_a_failure_is_loud_and_verl_goes_on(done):
    assert done["moved"].returncode == 0, done["moved"].stderr
    assert "mgrpo_kernels' plugin for verl did not load" in done["moved"].stderr
    assert "linear_cross_entropy.linear_cross_entropy: this version of verl has no such name" in done["moved"].stderr
    assert "loss False" in done["moved"].stdout


def test_a_failure_is_fatal_where_the_user_names_the_plugin(done):
    assert done["named"].returncode == 1
    assert "IntegrationError: verl.utils.kernel.linear_cross_entropy.linear_cross_entropy" in done["named"].stderr
    assert "loss" not in done["named"].stdout
