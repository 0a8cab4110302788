"""Weights in and out of Hugging Face folders: names, layouts, files, adapters."""
