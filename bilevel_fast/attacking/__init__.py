"""Attacks on a model whose concept was erased: what brings it back, and after how many steps.

    states        a shift of the text encoder's states, along the concept's direction or learnt against the model
    unlearn_diff  tokens before a prompt, found by descent on the model's own loss (UnlearnDiffAtk)
    ring_a_bell   tokens near a state, found by a genetic search that never asks the model (Ring-A-Bell)
    mma           tokens that mean a prompt without its words, found by descent in the text encoder (MMA-Diffusion)

The last three find prompts that anybody can type. Each is a generator: after every so many steps it says what it has.
"""
