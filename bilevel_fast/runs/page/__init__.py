"""Pages of HTML, each one file.

document and parts are what pages are made of, charts draws curves and bars; training, experiment and mixture are the
reports of a training run, of an experiment over seeds, and of a router.
"""
