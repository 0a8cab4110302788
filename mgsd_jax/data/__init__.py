"""Host-side data: processor, positions, batches, sources. Imports no jax."""
