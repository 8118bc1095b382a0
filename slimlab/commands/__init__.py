"""The commands of `slimlab`, which slimlab.cli puts together."""
