"""Autoencoders with latents of several kinds on handwritten digits, beside a GAN."""
