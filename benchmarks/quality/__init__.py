"""How good students of the mini world are after pruning, distillation and erasing."""
