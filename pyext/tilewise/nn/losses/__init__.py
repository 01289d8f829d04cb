"""Contrastive losses as modules, with what they keep between steps."""
