"""The public names of this room, each listed here and nowhere else; `__init__` loads them on first use."""

from .answer_tokens import AnswerTokens as AnswerTokens
from .answer_tokens import by_answer_tokens as by_answer_tokens
from .answers import QuestionAnswering as QuestionAnswering
from .classification import Classification as Classification
from .classification import tokenize as tokenize
from .completions import Completion as Completion
from .load import TASKS as TASKS
from .load import check_name as check_name
from .load import load_task as load_task
from .load import read_task as read_task
from .models import LANGUAGE as LANGUAGE
from .models import MODELS as MODELS
from .models import LoadedModel as LoadedModel
from .models import completes_text as completes_text
from .models import load_model as load_model
from .pooling import MeanPooledBertConfig as MeanPooledBertConfig
from .pooling import MeanPooledBertForSequenceClassification as MeanPooledBertForSequenceClassification
from .spec import TaskSpec as TaskSpec
from .summaries import Summarization as Summarization
from .task import Head as Head
from .task import Prepared as Prepared
from .task import Task as Task
from .told import tell_once as tell_once
