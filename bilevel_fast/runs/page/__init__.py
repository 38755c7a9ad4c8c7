"""Pages of HTML, each one file: document (their parts), charts (curves and bars), training (the report of a run),
experiment (that of one over seeds)."""
