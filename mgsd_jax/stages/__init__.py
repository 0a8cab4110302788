"""The stages of the program, each a run(config, workdir), and how they load models."""
