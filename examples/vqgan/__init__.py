"""VQGAN in two stages: pictures become codes, then new codes become pictures."""
