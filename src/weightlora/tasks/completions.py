"""Fine-tuning of causal language models on prompts and completions: GSM8K, and the user's own JSONL, chats included."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, Features, Sequence, Value
from transformers import DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerBase

from weightlora.errors import ConfigError
from weightlora.tasks.evaluation import IGNORED, OwnLossTrainer, mean_loss, token_scores
from weightlora.tasks.files import Table, half_a_pair, read_texts
from weightlora.tasks.generate import PromptTrainer
from weightlora.tasks.models import LoadedModel
from weightlora.tasks.summaries import decode
from weightlora.tasks.task import Head, Prepared, Task
from weightlora.tasks.told import tell_once

log = logging.getLogger("weightlora")

MAX_NEW_TOKENS = 256
# The official pattern, and blanks between its characters: some tokenizers put them there when they decode.
FINAL_NUMBER = re.compile(r"#\s*#\s*#\s*#\s*(-?\s*[0-9.,](?:\s*[0-9.,])*)")
ROLES = ("system", "user", "assistant", "tool", "developer")
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Completion(Task):
    """Go on from a prompt; the loss is on the completion alone.

    Rows are ``prompt`` and ``completion``, each a text or the JSON of a list of chat messages (``chat``), which the
    tokenizer's chat template turns into text. A plain completion is closed by the end-of-sequence token.

    Args:
        chat: whether the rows hold messages.
        exact_match: judge by generating and comparing the number after ``####`` (GSM8K), instead of by the tokens of
            the given completions.
        max_new_tokens: the most tokens to generate.
    """

    head: ClassVar[Head] = "causal-lm"

    chat: bool = False
    exact_match: bool = False
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_target_length={self.max_new_tokens} is not allowed; use 1 or more")

    @property
    def columns(self) -> tuple[str, ...]:
        return "prompt", "completion"

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.columns  # many completions may go on from one prompt, or from none

    def prepare(self, loaded: LoadedModel, max_length: int) -> Prepared:
        length = min(max_length, loaded.tokenizer.model_max_length)
        train, left_out = self._tokens(self.train, loaded, length)
        if left_out == len(self.train):
            raise ConfigError(f"max_length={max_length} leaves no prompt room for a completion; give more")
        if left_out:
            log.warning(
                "%d of %d training rows are left out: their prompts fill max_length=%d, or they are empty",
                left_out,
                len(self.train),
                length,
            )
        validation, too_long = self._tokens(self.validation, loaded, length)
        if too_long:
            raise ConfigError(
                f"{too_long} of {len(self.validation)} validation prompts leave no room for a completion within"
                f" max_length={length}; give more, or drop those rows"
            )
        return Prepared(
            train=train,
            validation=validation,
            collator=DataCollatorForSeq2Seq(loaded.tokenizer),
            **(self._by_generating(loaded.tokenizer) if self.exact_match else _BY_TOKENS),
        )

    def _by_generating(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
        truths = [final_number(text) for text in self.validation["completion"]]

        def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
            tokens, scores = prediction.predictions  # type: ignore[misc]  # as its trainer gives them
            guesses = [final_number(text) for text in decode(tokenizer, tokens)]
            right = [guess is not None and guess == truth for guess, truth in zip(guesses, truths, strict=False)]
            return {"exact_match": float(np.mean(right)), "loss": mean_loss(scores)}

        return {
            "compute_metrics": compute_metrics,
            "ordered": True,
            "trainer": PromptTrainer,
            "training": {
                "predict_with_generate": True,
                "generation_max_length": self.max_new_tokens,
                "per_device_eval_batch_size": 16,
            },
        }

    def _tokens(self, rows: Dataset, loaded: LoadedModel, length: int) -> tuple[Dataset, int]:
        """Prompt and completion as one row of at most ``length`` tokens; rows without room for a completion go."""
        prompts, completions = self._texts(rows, loaded)
        tokenizer = loaded.tokenizer
        before, after = ([], []) if self.chat else (opening(tokenizer), _closing(loaded))
        rows_ids, labels = [], []
        # Apart, because generation sees the prompt alone.
        for prompt, completion in zip(
            tokenizer(prompts, add_special_tokens=False)["input_ids"],
            tokenizer(completions, add_special_tokens=False)["input_ids"],
            strict=True,
        ):
            start = [*before, *prompt]
            ids = [*start, *completion, *after][:length]
            if len(ids) > max(len(start), 1):  # nothing foretells the first token of all
                rows_ids.append(ids)
                labels.append([IGNORED] * len(start) + ids[len(start) :])
        return token_dataset(rows_ids, labels), len(rows) - len(rows_ids)

    def _texts(self, rows: Dataset, loaded: LoadedModel) -> tuple[list[str], list[str]]:
        if not self.chat:
            return list(rows["prompt"]), list(rows["completion"])
        tokenizer = loaded.tokenizer
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of model {loaded.name!r} has no chat template, and the rows are chats; pass a chat"
                " model, or rows with prompt and completion as text"
            )
        prompts, completions = [], []
        for before, answer in zip(rows["prompt"], rows["completion"], strict=True):
            messages = json.loads(before)
            prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            whole = str(tokenizer.apply_chat_template([*messages, *json.loads(answer)], tokenize=False))
            if not whole.startswith(prompt):
                raise ConfigError(
                    f"the chat template of model {loaded.name!r} rewrites the prompt once there is an answer, so the"
                    " loss cannot be put on the answer alone; pass another model, or prompt and completion as text"
                )
            prompts.append(prompt)
            completions.append(whole[len(prompt) :])
        return prompts, completions


def final_number(text: str) -> str | None:
    """The number after ``####``, without commas, as GSM8K's own script reads it; None without one.

    >>> final_number("9 * 2 = 18\\n#### 1,800"), final_number("eighteen")
    ('1800', None)
    """
    found = FINAL_NUMBER.search(text)
    return None if found is None else re.sub(r"[\s,]", "", found.group(1))


def token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy of the next token, perplexity and loss, over all tokens of all completions: from `token_scores`.

    ``mean_token_accuracy`` is TRL's name; ``perplexity`` is exp of ``loss``, the mean negative log-likelihood of a
    token.
    """
    _, right, count = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    loss = mean_loss(prediction.predictions)
    with np.errstate(over="ignore"):
        return {"mean_token_accuracy": float(right / count), "perplexity": float(np.exp(loss)), "loss": loss}


_BY_TOKENS: dict[str, Any] = {
    "compute_metrics": token_metrics,
    "preprocess_logits": token_scores,
    "trainer": OwnLossTrainer,
    "training": {"per_device_eval_batch_size": 8},
}


def token_dataset(ids: list[list[int]], labels: list[list[int]]) -> Dataset:
    """Rows of token ids and labels, without padding, as a causal model takes them."""
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
    kinds = {"input_ids": "int32", "attention_mask": "int8", "labels": "int64"}
    features = Features({name: Sequence(Value(kind)) for name, kind in kinds.items()})
    return Dataset.from_dict(columns, features=features)


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return list(whole[: whole.index(plain[0])])


def _closing(loaded: LoadedModel) -> list[int]:
    """The token at which generation stops: the tokenizer's, else the model's."""
    eos = loaded.tokenizer.eos_token_id
    if eos is None:
        eos = loaded.model.config.get_text_config().eos_token_id
    if isinstance(eos, list):
        eos = eos[0]
    if eos is None:
        raise ConfigError(
            f"model {loaded.name!r} has no end-of-sequence token, so no completion would end; pass another"
        )
    return [eos]


def read_gsm8k(table: Table) -> Dataset:
    """GSM8K's rows as prompts (``Question: ... Answer:``) and completions.

    Raises:
        DataError: a missing column, or an answer without ``#### number``.
    """
    remedy = "task 'gsm8k' needs the columns question, answer"
    questions, answers = (read_texts(table, column, remedy) for column in ("question", "answer"))
    for row, answer in enumerate(answers):
        if final_number(answer) is None:
            raise table.error(row, "the answer does not end in #### and a number; repair or drop the row")
    prompts = [f"Question: {question}\nAnswer:" for question in questions]
    return _dataset(prompts, [f" {answer}" for answer in answers])


def read_completions(table: Table) -> tuple[Dataset, bool]:
    """The user's rows, and whether they are chats.

    A row is ``{"prompt": text, "completion": text}``, the same with lists of messages, or ``{"messages": [...]}``,
    whose last message, the assistant's, is the completion.

    Raises:
        DataError: a row of another form, or of another kind than the first.
    """
    chats: list[list[Message]]
    if "messages" in table.rows[0]:
        chats = [_messages(table, row, value, "messages") for row, value in enumerate(table.column("messages", _FORM))]
        lengths = [len(chat) - 1 for chat in chats]
    else:
        prompts, completions = (table.column(name, _FORM) for name in ("prompt", "completion"))
        if not isinstance(prompts[0], list):
            return _read_plain(table), False
        before = [_messages(table, row, value, "prompt") for row, value in enumerate(prompts)]
        answers = [_messages(table, row, value, "completion") for row, value in enumerate(completions)]
        chats = [first + last for first, last in zip(before, answers, strict=True)]
        lengths = [len(chat) for chat in before]
    for row, (chat, length) in enumerate(zip(chats, lengths, strict=True)):
        _check_chat(table, row, chat, length)
    _tell_empty(table, [chat[-1]["content"] for chat in chats])
    return _dataset([json.dumps(chat[:-1]) for chat in chats], [json.dumps(chat[-1:]) for chat in chats]), True


def _read_plain(table: Table) -> Dataset:
    prompts, completions = (read_texts(table, name, _FORM) for name in ("prompt", "completion"))
    _tell_empty(table, completions)
    return _dataset(prompts, completions)


def _tell_empty(table: Table, completions: list[str]) -> None:
    if empty := sum(not text.strip() for text in completions):
        what = f"{empty} of {len(completions)} completions are empty: there the model learns to end at once"
        tell_once(logging.WARNING, f"{table.path}: {what}")


_FORM = (
    'a row is {"prompt": ..., "completion": ...} or {"messages": [...]}, and all rows are of one kind;'
    " texts with labels go with --task files --train-file FILE --label-column COLUMN"
)


def _messages(table: Table, row: int, value: object, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise table.error(row, f"column {column!r} holds no list of messages; {_FORM}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise table.error(row, f'column {column!r}: a message is {{"role": text, "content": text}}')
        if message["role"] not in ROLES:
            raise table.error(row, f"column {column!r}: the role {message['role']!r} is not one of {', '.join(ROLES)}")
        if half_a_pair(message["content"]):
            raise table.error(row, f"column {column!r} holds half of a surrogate pair; repair or drop the row")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _check_chat(table: Table, row: int, chat: list[Message], prompt: int) -> None:
    """Raise DataError unless one message of the assistant follows a prompt of so many messages."""
    if not prompt:
        raise table.error(row, "a chat needs a message before the assistant's answer; add one or drop the row")
    if len(chat) != prompt + 1 or chat[-1]["role"] != "assistant":
        raise table.error(
            row, "a chat must end in one message of the assistant, which is learned; add it or drop the row"
        )


def _dataset(prompts: list[str], completions: list[str]) -> Dataset:
    features = Features({"prompt": Value("string"), "completion": Value("string")})
    return Dataset.from_dict({"prompt": prompts, "completion": completions}, features=features)
