"""Erasers: what makes a model forget a concept, by name."""

from bilevel_fast.erasing.concept_prune import ConceptPrune
from bilevel_fast.erasing.uce import Uce

EDITS = {"uce": Uce, "concept-prune": ConceptPrune}
"""Edits of weights: settings whose `edit(unet, job)` changes a UNet in place."""
