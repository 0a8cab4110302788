"""Reports: an evaluation and the runs behind it as one HTML page, markdown and JSON."""

import json
from collections.abc import Mapping, Sequence

from absl import logging
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config
from mgsd_jax.report import boards, compare, compare_page, page
from mgsd_jax.report.inputs import STAGES, PathLike, read_evaluation, read_stage


def run(config: Config, workdir: str) -> None:
    """Writes `{workdir}/report/index.html` from the evaluation and the stages in `workdir`.

    With `report.runs` it writes `{workdir}/report/comparison.html` of these runs instead.
    """
    root = epath.Path(workdir)
    resolved = config_lib.resolve(config, workdir)
    if config.report.runs:
        path = build_comparison(
            resolved.report.runs, root / "report" / "comparison.html", model=config.report.model
        )
        logging.info("%s: written", path)
        return
    models = ", ".join(f"{name} = {source}" for name, source in config.evaluate.models)
    stages = ("generate", *STAGES, "evaluate", "report")
    path = build_report(
        resolved.evaluate.folder,
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
) -> epath.Path:
    """Write the page `out_path` with its .md and .json twins beside it, and return its path.

    `evaluation_folder` holds `rows.jsonl` and `summary.json`; `runs` maps a stage ('grounding',
    'distillation', in this order, or another) to its run directory, and a stage without curves is
    stated on the page. `commands` are the command lines that made the results. Raises ValueError
    naming the file, got and want where results are absent, empty or contradict each other.
    """
    out = epath.Path(out_path)
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


def build_comparison(folders: Sequence[str], out_path: PathLike, *, model: str = "") -> epath.Path:
    """Write the page that compares runs with its .md and .json twins, and return its path.

    `folders` are workdirs or evaluation folders; `model` stands for each run, by default its last
    one. Raises ValueError naming the folder where a run has no results.
    """
    out = epath.Path(out_path)
    comparison = compare.compare(folders, model)
    title = f"Comparison of {' and '.join(comparison.results)}"
    commands = (
        f"python -m mgsd_jax.main --stage=report --config=... --workdir=... "
        f"--set report.runs={','.join(folders)}",
    )
    html = compare_page.page(title, comparison, commands)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    out.with_suffix(".md").write_text(
        compare_page.markdown(title, comparison, commands), encoding="utf-8"
    )
    record = compare_page.as_json(title, comparison, commands)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return out
