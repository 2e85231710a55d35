"""Prompts in, pictures out, from a bundle alone: tokens, text encoders, the denoise loop, decoder, files. No torch."""
