"""What a run keeps on disk: config, lock, metrics, checkpoints."""
