"""M-GRPO in verl's trainer, in a process of its own: hydra, which verl's trainer imports, needs an antlr that math-verify cannot use."""

from installed_peers import ROOT, environment, need, python

need("verl")


def test_in_its_own_process():
    checks = ROOT / "tests" / "integrations" / "verl_trainer_checks.py"
    env = environment(
        VERL_USE_EXTERNAL_MODULES="mgrpo_kernels.integrations.verl_trainer", VERL_USE_EXTERNAL_PLUGINS="none"
    )
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", checks, env=env)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
