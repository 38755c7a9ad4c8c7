"""The product at the size of Stable Diffusion 2.1, with random weights: `python -m benchmarks.real_size`.

stages      what is run, in which order, within which limits, and what must come of it
run         one stage after the other; a killed rehearsal goes on
measuring   a process: how long it took, what it held
folder      Stable Diffusion 2.1 at real size, or tiny
checks      what must be true of what a stage leaves
pipeline    a student in diffusers
speed       forward passes of pruned UNets, ours and diffusers'
memory      the memory model against the training stage
table       the rows as a page
"""
