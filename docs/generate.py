"""Write what the pages repeat: of the code (options.md, presets.md, metrics.md), and of results (every figure in README.md and docs/).

    python docs/generate.py             write them
    python docs/generate.py --plots     and draw roofline.png and scaling.png of the run that the pages show

A test compares them with what this file would write. How a page asks for a figure: see spans.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import families_table  # noqa: F401 - likewise
import figures_of_rollouts  # noqa: F401 - its tables are figures too
import figures_of_study  # noqa: F401 - likewise
import figures_of_tolerance  # noqa: F401 - likewise
import method_tables  # noqa: F401 - likewise
import peer_suites_table  # noqa: F401 - likewise
import spans
import torture_table  # noqa: F401 - likewise
from figures import FIGURES, PUBLISHED, RESULTS, report

from mgrpo_kernels.ops.policy_loss.loss_types import LOSSES, LossType
from mgrpo_kernels.ops.policy_loss.options import DECLARED
from mgrpo_kernels.train.__main__ import make_parser
from mgrpo_kernels.train.config import PRESETS
from mgrpo_kernels.train.data.demo import OPTIONS
from mgrpo_kernels.train.watch.metrics import EVALUATION, KEYS

DOCS = Path(__file__).resolve().parent
WRITTEN = "<!-- Written by docs/generate.py: change the code, then run that. -->"


def pages() -> dict[str, str]:
    """Return each generated page's text by its name in docs/."""
    return {
        "options.md": options(),
        "presets.md": presets(),
        "metrics.md": metrics(),
        "ops/policy_loss.md": policy_loss(),
    }


def pages_with_figures() -> list[Path]:
    """Return the pages whose figures come from results: README.md and all of docs/ that is written by hand."""
    return [DOCS.parent / "README.md", *sorted(path for path in DOCS.rglob("*.md") if path.name not in pages())]


def options() -> str:
    """Return the trainer's options as its own command line has them."""
    text = f"""# Options of the trainer

{WRITTEN}

On this page you can look up every option of `python -m mgrpo_kernels.train`, with its meaning, unit and default. `--help` prints the
same texts, and `-h` only the most used options.

```bash
python -m mgrpo_kernels.train --steps 100 --learning-rate 1e-4 --dry-run
```

An option is written `--like-this` on the command line and `like_this:` in the YAML file that `--config` names. The command line overrides
the file, and the file overrides the defaults. "none" means that the option is not set.

A value that is invalid, by itself or together with other options, ends the command with status 2 before anything is written. The error
names the option, the expected value and the received value. `--dry-run` checks all options, prints [the plan](planning.md) (every value,
the values that follow from them, parameters, memory, time) and stops.
"""
    for group in make_parser()._action_groups:
        rows = [(name_of(action), help_of(action)) for action in group._group_actions if action.dest != "help"]
        if rows:
            text += f"\n## {(group.title or '')[:1].upper()}{(group.title or '')[1:]}\n\n{table('option', rows)}"
    changed = [(f"`--{name.replace('_', '-')}`", f"`{value}`") for name, value in OPTIONS.items()]
    return f"{text}\n## The built-in task\n\nWithout `--model` and `--data` these defaults apply instead:\n\n{table('option', changed)}"


def name_of(action: argparse.Action) -> str:
    """Return an option with the place of its value."""
    if action.choices:
        return f"`{action.option_strings[0]}` {', '.join(f'`{each}`' for each in action.choices)}"
    value = f" {action.metavar}" if action.metavar else ""
    return ", ".join(f"`{each}{value}`" for each in action.option_strings)


def help_of(action: argparse.Action) -> str:
    """Return what ``--help`` says of an option."""
    text = (action.help or "").replace("%%", "%")
    return text.replace("\n", "\\n").replace("<", "&lt;")


def presets() -> str:
    """Return the presets as they are, with the sources in their comments."""
    text = f"""# Presets

{WRITTEN}

With this page you can choose a preset to start from. `--config NAME` selects one of these presets, unless a file of that name exists,
and options on the command line override it. No preset names data: give `--data`, and `--eval-data` for evaluations.

<!-- not run: the model would be downloaded -->
```bash
python -m mgrpo_kernels.train --config paper --data questions.jsonl --eval-data held_out.jsonl --dry-run
```
"""
    files = [
        f"\n## {path.stem}\n\n```yaml\n{path.read_text('utf-8').rstrip()}\n```\n"
        for path in sorted(PRESETS.glob("*.yaml"))
    ]
    return text + "".join(files)


def metrics() -> str:
    """Return the keys of metrics.jsonl and what they mean."""
    every = [(f"`{key}`", text) for key, text in KEYS.items() if key not in EVALUATION]
    evaluation = [(f"`{key}`", KEYS[key]) for key in EVALUATION]
    return f"""# Metrics

{WRITTEN}

With this page you can interpret every key of `metrics.jsonl`, the file that a run writes one line to after each step.

<!-- not run: reads a run of yours; the page on your own model and data reads one that it makes -->
```python
import json

for line in map(json.loads, open("runs/mine/metrics.jsonl")):
    print(line["step"], line["reward_mean"], line.get("eval_accuracy"))
```

Every line has every key of the first table, in this order. A value that does not exist or is not finite is `null`, never NaN. A
resumed run first cuts the file back to its checkpoint, so no step occurs twice. [The page on the guard](guard.md) lists the keys that
are signs of collapse.

{table("key", every)}
Lines of steps with an evaluation, including step 0, which is before the first step, also have these keys:

{table("key", evaluation)}"""


def policy_loss() -> str:
    """Return the page on the policy loss with the tables of loss types and options as the code has them."""
    text = (DOCS / "ops" / "policy_loss.md").read_text(encoding="utf-8")
    losses = "".join(
        f"| `{name}` | {row.surrogate.formula} | {row.share} | {row.counts} | {source(row)} |\n"
        for name, row in LOSSES.items()
    )
    settings = [(f"`{each.name}` = {each.default!r}", each.text) for each in DECLARED]
    text = between(
        text, "loss types", f"| | surrogate | share | normalizer counts | source |\n|---|---|---|---|---|\n{losses}"
    )
    typed = "<!-- typed: all; defaults of the code -->\n"
    return between(text, "options", typed + table("option and default", settings))


def source(row: LossType) -> str:
    """Return a link to where a loss comes from."""
    return "TRL" if row.source is None else f"[{row.source}](https://arxiv.org/abs/{row.source})"


def between(text: str, name: str, new: str) -> str:
    """Return a page with the text between two marks replaced."""
    first, last = f"<!-- {name}: written by docs/generate.py -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(first)
    _, _, after = rest.partition(last)
    assert rest, f"expected {first!r} in the page"
    assert last in rest, f"expected {last!r} in the page"
    return f"{before}{first}\n{new}\n{last}{after}"


def table(first: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of two columns, the second without a heading."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows]
    return f"| {first} | |\n|---|---|\n{''.join(lines)}"


def main() -> None:
    """Write every page, and draw the plots where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", action="store_true")
    arguments = parser.parse_args()
    for page, text in pages().items():
        (DOCS / page).write_text(text, encoding="utf-8")
    for path in pages_with_figures():
        path.write_text(spans.filled(path.read_text(encoding="utf-8"), FIGURES), encoding="utf-8")
    if arguments.plots:
        report.main([str(RESULTS / f"{PUBLISHED}.json"), "--plots", str(DOCS)])


if __name__ == "__main__":
    main()
