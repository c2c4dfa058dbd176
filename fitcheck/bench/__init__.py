"""The dry run and the measurement: the only code that imports torch and transformers."""
