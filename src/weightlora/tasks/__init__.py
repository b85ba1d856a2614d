"""Data in, batches and metric out, and models to fine-tune; its models make Transformers know mean-pooled BERT."""

import lazy_loader

# Loaded on first use: what a task may be told is looked up, for help, without any of the libraries that read data.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
