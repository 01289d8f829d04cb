"""BLIP: one model that finds, matches, captions and answers: `python -m examples.blip`."""
