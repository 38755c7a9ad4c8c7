"""Several processes that train one student, a rank each, as torchrun starts them.

    settings   what a command line sets of it
    team       who they are; what they give each other, agree on and wait for
    watch      who of them is gone
    overdue    whether a GPU does what it was given
    rows       which rows of the flat buffers are whose, and the sums over them in one order for any number of ranks

Nothing here knows a model. One process alone makes no process group, and waits for nobody.
"""
