"""Training of a student in two levels, one step after the other, with statistics, checkpoints and resume.

A step, in its order:

    levels       a step of either level: its batch, its gradient, its optimizer
    lower        the lower gradient: noise, teacher, student, losses
    teacher      what the dense UNet answers
    losses       the objectives of both levels
    upper        the upper gradient: an eraser's loss, and the lower loss as penalty
    parameters   master weights, gradients and averages, flat
    sharded      the same, of several ranks
    fully_sharded  the same, of ranks none of which has a whole network
    units        layers that are whole while they compute
    optim        AdamW with warm-up; steps that are not finite are skipped
    graphs       a step as one CUDA graph
    phases       names of the parts of a step, for profiles

Around the steps:

    loop         status lines, checkpoints, resume, stops
    student      a student as the loop takes it
    stats        means on the device, records on disk
    checkpoint   files that outlive a kill
    run_folder   one run, one process
    settings     what a command line sets of the losses
"""
