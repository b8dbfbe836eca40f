"""Cuts a model over ranks: rendezvous, mesh, tensor parallelism, loss, recomputation. Knows no architecture."""
