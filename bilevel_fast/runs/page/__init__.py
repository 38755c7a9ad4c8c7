"""Pages of HTML, each one file: document and parts (what they are made of), charts (curves and bars), and the reports of
a training run (training), of an experiment over seeds (experiment) and of a router (mixture)."""
