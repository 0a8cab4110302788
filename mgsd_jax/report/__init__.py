"""Reports: an evaluation and the runs behind it as one HTML page, markdown and JSON."""

import json
import pathlib
from collections.abc import Mapping, Sequence

from absl import logging

from mgsd_jax.config import Config
from mgsd_jax.report import boards, page
from mgsd_jax.report.inputs import STAGES, PathLike, read_evaluation, read_stage


def run(config: Config, workdir: str) -> None:
    """Writes `{workdir}/report/index.html` from the evaluation and the stages in `workdir`."""
    root = pathlib.Path(workdir)
    models = ", ".join(f"{name} = {source}" for name, source in config.evaluate.models)
    stages = ("generate", *STAGES, "evaluate", "report")
    path = build_report(
        root / "evaluate",
        {name: root / name for name in STAGES},
        root / "report" / "index.html",
        title=f"Planning from pictures: {root.name}",
        commands=(
            *(
                f"python -m mgsd_jax.main --stage={name} --config=... --workdir=..."
                for name in stages
            ),
            f"models: {models}; teacher context: {config.distillation.teacher_context}",
        ),
    )
    logging.info("%s: written", path)


def build_report(
    evaluation_folder: PathLike,
    runs: Mapping[str, PathLike],
    out_path: PathLike,
    *,
    title: str,
    commands: Sequence[str] = (),
) -> pathlib.Path:
    """Write the page `out_path` with its .md and .json twins beside it, and return its path.

    `evaluation_folder` holds `rows.jsonl` and `summary.json`; `runs` maps a stage ('grounding',
    'distillation', in this order, or another) to its run directory, and a stage without curves is
    stated on the page. `commands` are the command lines that made the results. Raises ValueError
    naming the file, got and want where results are absent, empty or contradict each other.
    """
    out = pathlib.Path(out_path)
    if out.suffix != ".html":
        raise ValueError(f"report: got path {str(out)!r}, want one that ends in .html")
    evaluation = read_evaluation(evaluation_folder)
    names = [*STAGES, *(name for name in runs if name not in STAGES)]
    stages = [read_stage(name, runs.get(name)) for name in names]
    picks = boards.choose(evaluation.rows)
    html = page.page(title, evaluation, stages, picks, commands)
    summary = evaluation.summary
    record = page.as_json(title, summary, stages, picks, commands)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    out.with_suffix(".md").write_text(
        page.markdown(title, summary, stages, commands), encoding="utf-8"
    )
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return out
