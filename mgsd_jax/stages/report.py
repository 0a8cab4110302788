"""The `report` stage: one page about a workdir, or one that compares several."""

from absl import logging
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config
from mgsd_jax.data import prompts
from mgsd_jax.report.compare_page import build_comparison
from mgsd_jax.report.evaluation_page import build_report
from mgsd_jax.report.inputs import STAGES


def run(config: Config, workdir: str) -> None:
    """Write `{workdir}/report/index.html` about the evaluation and the stages of `workdir`.

    With `report.runs` set, write `{workdir}/report/comparison.html` about those runs instead.
    """
    root = epath.Path(workdir)
    resolved = config_lib.resolve(config, workdir)
    if config.report.runs:
        path = root / "report" / "comparison.html"
        build_comparison(resolved.report.runs, path, model=config.report.model)
    else:
        path = root / "report" / "index.html"
        build_report(
            resolved.evaluate.folder,
            {name: root / name for name in STAGES},
            path,
            title=f"Planning from pictures: {root.name}",
            boards_folder=resolved.data.folder,
            prompts=prompts.load(resolved.data.prompts, resolved.data.state_text),
        )
    logging.info("%s: written", path)
