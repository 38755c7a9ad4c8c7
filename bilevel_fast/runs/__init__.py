"""Whole runs, from settings to a report: `config` and `session` of training, `router` and `prune_aptp` of APTP, `paper`
of the paper's tables and figures; and what `prune`, `erase`, `profile` and `prepare concepts` do (`prune_method`,
`erase_model`, `profiled`, `prepare_concepts`)."""
