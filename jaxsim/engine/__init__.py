"""The only place that batches: vmap, jit, tiles and devices live here."""
