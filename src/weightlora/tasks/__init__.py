"""Data in, batches and metric out, and models to fine-tune; importing it makes Transformers know mean-pooled BERT."""

from weightlora.tasks.answer_tokens import AnswerTokens, by_answer_tokens
from weightlora.tasks.answers import QuestionAnswering
from weightlora.tasks.classification import Classification, tokenize
from weightlora.tasks.completions import Completion
from weightlora.tasks.load import TASKS, check_name, default_max_length, load_task
from weightlora.tasks.models import LANGUAGE, MODELS, LoadedModel, completes_text, load_model
from weightlora.tasks.pooling import MeanPooledBertConfig, MeanPooledBertForSequenceClassification
from weightlora.tasks.sources import lacks_validation
from weightlora.tasks.summaries import Summarization
from weightlora.tasks.task import Head, Prepared, Task
from weightlora.tasks.told import tell_once

__all__ = [
    "LANGUAGE",
    "MODELS",
    "TASKS",
    "AnswerTokens",
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
    "by_answer_tokens",
    "check_name",
    "completes_text",
    "default_max_length",
    "lacks_validation",
    "load_model",
    "load_task",
    "tell_once",
    "tokenize",
]
