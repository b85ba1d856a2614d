"""Data in, batches and metric out, and models to fine-tune; importing it makes Transformers know mean-pooled BERT."""

from weightlora.tasks.base import TASKS, Task, load_task, tokenize
from weightlora.tasks.models import MODELS, LoadedModel, load_model
from weightlora.tasks.pooling import MeanPooledBertConfig, MeanPooledBertForSequenceClassification

__all__ = [
    "MODELS",
    "TASKS",
    "LoadedModel",
    "MeanPooledBertConfig",
    "MeanPooledBertForSequenceClassification",
    "Task",
    "load_model",
    "load_task",
    "tokenize",
]
