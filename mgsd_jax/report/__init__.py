"""Reports: an evaluation and the runs behind it, or several runs, as HTML, markdown and JSON."""
