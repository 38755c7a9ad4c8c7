"""Whole runs, from settings to a report: `config` and `session` of training, `router` and `prune_aptp` of APTP,
`prepare_concepts` of concept banks, `paper` of the paper's tables and figures."""
