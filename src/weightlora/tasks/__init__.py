"""Data in, batches and metric out, and models to fine-tune; importing it makes Transformers know mean-pooled BERT."""

from weightlora.tasks.answers import QuestionAnswering
from weightlora.tasks.classification import Classification, tokenize
from weightlora.tasks.completions import Completion
from weightlora.tasks.load import TASKS, check_name, default_max_length, load_task
from weightlora.tasks.models import MODELS, LoadedModel, load_model
from weightlora.tasks.pooling import MeanPooledBertConfig, MeanPooledBertForSequenceClassification
from weightlora.tasks.sources import lacks_validation
from weightlora.tasks.summaries import Summarization
from weightlora.tasks.task import Head, Prepared, Task
from weightlora.tasks.told import tell_once

__all__ = [
    "MODELS",
    "TASKS",
    "Classification",
    "Completion",
    "Head",
    "LoadedModel",
    "MeanPooledBertConfig",
    "MeanPooledBertForSequenceClassification",
    "Prepared",
    "QuestionAnswering",
    "Summarization",
    "Task",
    "check_name",
    "default_max_length",
    "lacks_validation",
    "load_model",
    "load_task",
    "tell_once",
    "tokenize",
]
