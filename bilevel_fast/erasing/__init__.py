"""Erasing of concepts, as an upper step of a training or as an edit of a model folder.

An upper step, in its order:

    settings       what `train --upper` sets, with ranges
    registry       all erasers by name, and what a run must know of each
    references     whose answers a target is made of
    targets, esd, saliency, attention    erasers with a loss on concept images
    loop_edits     edits of weights, made again at every upper step
    subsets        parameters that upper steps move
    solvers        how two gradients become one direction
    controller     chooses lambda and when upper steps come

By itself (`python -m bilevel_fast.erase`):

    pairs, phrases    what is erased, and what stands in its place
    edit              what an edit takes and returns; the record of edits
    uce, concept_prune
"""
